"""Tasks: the whole model at work.

Generated from notebooks/23_tasks.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np

from pali import scenes, viz
from pali.generation import generate
from pali.outlines import read_masks
from pali.paligemma import PaliGemma
from pali.patches import open_picture
from pali.tokens import Box, Processor, read_boxes
from pali.train import pair_boxes, true_boxes

__all__ = [
    "Result",
    "Score",
    "answer",
    "ask_scenes",
    "caption",
    "detect",
    "draw_answer",
    "evaluate",
    "judge",
    "ratio",
    "segment",
    "share",
    "stored_evaluation",
    "stored_results",
    "summary",
]


# cell 19c819d2
def caption(model: PaliGemma, processor: Processor, image, language="en") -> str:
    """Say what a picture shows.

    image       whatever `open_picture` reads
    language    one that the model was trained on; the shipped one knows
                those of `pali.scenes.LANGUAGES`
    """
    return generate(model, processor, open_picture(image), f"caption {language}")[0]


# cell a49870dd
def answer(
    model: PaliGemma, processor: Processor, image, question: str, language="en"
) -> str:
    """Answer a question about a picture, such as "how many cats are there?"."""
    prompt = f"answer {language} {question}"
    return generate(model, processor, open_picture(image), prompt)[0]


# cell 60eb3354
def detect(model: PaliGemma, processor: Processor, image, *things: str) -> list[Box]:
    """Find things in a picture: boxes in its own pixels; [] if there are none."""
    image = open_picture(image)
    text = generate(model, processor, image, f"detect {' ; '.join(things)}")[0]
    return read_boxes(text, image.size)


# cell 0f2223e6
def segment(
    model: PaliGemma, processor: Processor, image, *things: str, codec=None
) -> list[tuple[Box, np.ndarray]]:
    """Outline things in a picture: boxes with bool masks [H, W].

    codec    the decoder of outline codes; None: the shipped model's
    """
    image = open_picture(image)
    text = generate(model, processor, image, f"segment {' ; '.join(things)}")[0]
    return read_masks(text, image.size, codec=codec)


# cell 5d01aa7b
def draw_answer(image, prompt: str, text: str, codec=None):
    """A figure of a picture with what the model said of it drawn on it.

    text       the model's answer; boxes and outlines in it are drawn
    returns    matplotlib Figure, not shown
    """
    image = open_picture(image)
    boxes = read_boxes(text, image.size)
    found = text or "(an empty answer: nothing found)"
    title = fill(f"{prompt} → {f'{len(boxes)} found' if boxes else found}", 44)
    tall = 4.8 * min(max(image.height / image.width, 0.4), 1.6)
    with plt.ioff():
        viz.use_style()
        figure, axes = plt.subplots(figsize=(4.8, tall + 0.3 + 0.2 * title.count("\n")))
    outlines = read_masks(text, image.size, codec=codec) if "<seg" in text else []
    if outlines:
        viz.masks(image, outlines, ax=axes)
    else:
        viz.boxes(image, boxes, ax=axes)
    axes.set_title(title)
    return figure


# cell 7656a74d
def ask_scenes(
    model: PaliGemma,
    processor: Processor,
    drawn: Sequence[scenes.Scene],
    task: str,
    batch: int = 50,
    world: scenes.World = scenes.FIRST_WORLD,
) -> list[tuple[str, str, str]]:
    """Put one question of a task to each scene: (prompt, answer, truth).

    world    where the scenes come from; it says what may be asked
    """
    asked = [scenes.question(s, scenes.question_stream(s), task, world) for s in drawn]
    said = []
    for i in range(0, len(drawn), batch):
        said += generate(
            model,
            processor,
            [s.image for s in drawn[i : i + batch]],
            [prompt for prompt, _ in asked[i : i + batch]],
            max_new_tokens=64,
        )
    return [(p, a, t) for (p, t), a in zip(asked, said, strict=True)]


# cell 7fc9a44c
@dataclass(frozen=True)
class Result:
    """What a model did with one scene: a caption, a count and a search.

    seed, ground      which scene, and what lies behind the things
    things            how many it holds
    caption, count    whether the answer was right to the letter
    found             number of boxes in its answer
    sizes             sides of the things that it was asked to find, px
    overlaps          IoU of each of them with its box, 0 if it has none
    """

    seed: int
    ground: str
    things: int
    caption: bool
    count: bool
    found: int
    sizes: list[int]
    overlaps: list[float]


# cell d3f31631
def judge(scene: scenes.Scene, caption, count, detect) -> Result:
    """Compare what was said of a scene with what is true.

    caption, count, detect    (prompt, answer, truth), from `ask_scenes`
    """
    prompt, said, _ = detect
    asked = prompt.removeprefix("detect ").split(" ; ")
    found = read_boxes(said, scene.image.size)
    return Result(
        seed=scene.seed,
        ground=scene.ground.pattern,
        things=len(scene.things),
        caption=caption[1] == caption[2],
        count=count[1] == count[2],
        found=len(found),
        sizes=[t.size for t in scene.things if t.kind in asked],
        overlaps=pair_boxes(found, true_boxes(scene, asked)),
    )


# cell 6089b909
def evaluate(
    model: PaliGemma,
    processor: Processor,
    seeds: Iterable[int],
    world: scenes.World = scenes.FIRST_WORLD,
) -> list[Result]:
    """Ask three questions of every scene of these seeds, and judge the answers.

    seeds    from `scenes.TEST_SEEDS`, so that no scene was trained on
    world    where the scenes come from
    """
    drawn = [scenes.scene(seed, world=world) for seed in seeds]
    rows = [
        ask_scenes(model, processor, drawn, task, world=world)
        for task in ("caption", "count", "detect")
    ]
    return [judge(*row) for row in zip(drawn, *rows, strict=True)]


# cell 0b6112f7
@dataclass(frozen=True)
class Score:
    """A number from 0 to 1, its 95 % interval, and how many trials it rests on."""

    value: float
    low: float
    high: float
    trials: int


# cell 9ed65391
def share(right: Iterable[bool]) -> Score:
    """How large a part is right, with its interval; 0 to 1 if there is nothing.

    source    Wilson 1927
    """
    right = list(right)
    n, k, z = max(len(right), 1), sum(right), 1.96
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = min(middle - half, p), max(middle + half, p)  # = p, but for rounding
    return Score(p, low, high, len(right)) if right else Score(0.0, 0.0, 1.0, 0)


# cell 5259acb8
def ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Score:
    """One sum over scenes divided by another, with its interval.

    above, below    one number a scene
    source          Efron 1979 (bootstrap): scenes drawn anew 2,000 times
    """
    above, below = np.asarray(above, float), np.asarray(below, float)
    n = len(above)
    if not below.sum():
        return Score(0.0, 0.0, 1.0, n)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(n, np.full(n, 1 / n), size=2000)
    drawn = (times @ above) / np.maximum(times @ below, 1e-9)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Score(float(above.sum() / below.sum()), float(low), float(high), n)


# cell 0feda5ae
def summary(results: Sequence[Result]) -> dict[str, Score]:
    """Captions and counts exactly right, F1 of boxes, mean IoU of those that hit."""
    hits = [[v for v in r.overlaps if v >= 0.5] for r in results]
    return {
        "caption": share(r.caption for r in results),
        "count": share(r.count for r in results),
        "boxes, F1": ratio(
            [2 * len(h) for h in hits],
            [r.found + len(r.sizes) for r in results],
        ),
        "mean IoU": ratio([sum(h) for h in hits], [len(h) for h in hits]),
    }


# cell e4e3e657
def stored_results() -> list[Result]:
    """The shipped model's results on seeds 0 to 499, as measured and stored."""
    path = resources.files("pali").joinpath("mini", "evaluation.json")
    stored = json.loads(path.read_text("utf-8"))
    return [Result(**row) for row in stored["results"]]


# cell f3cea183
def stored_evaluation() -> dict:
    """All that was measured of the shipped model in the larger world, as stored.

    returns    "scores": a dict for "all" scenes and for parts of them; beside it
               "blind", "chance" and "ceiling", "elsewhere", "confusion", "worst";
               "definitions" says what each row is. Each score is a dict with the
               fields of `Score`
    """
    path = resources.files("pali").joinpath("mini", "evaluation_full.json")
    return json.loads(path.read_text("utf-8"))
