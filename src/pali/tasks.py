"""Tasks: the whole model at work.

Generated from notebooks/23_tasks.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np

from pali import scenes, viz
from pali.generation import generate
from pali.outlines import read_masks
from pali.paligemma import PaliGemma
from pali.patches import open_picture
from pali.tokens import Box, Processor, read_boxes
from pali.train import match_boxes, true_boxes

__all__ = [
    "Evaluation",
    "Score",
    "answer",
    "ask_scenes",
    "caption",
    "detect",
    "draw_answer",
    "evaluate",
    "segment",
]


# cell 19c819d2
def caption(model: PaliGemma, processor: Processor, image, language="en") -> str:
    """Say what a picture shows.

    image       whatever `open_picture` reads
    language    as the model was trained: "en" for the shipped one
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
    with plt.ioff():
        viz.use_style()
        figure, axes = plt.subplots(figsize=(4.8, 4.8))
    outlines = read_masks(text, image.size, codec=codec) if "<seg" in text else []
    if outlines:
        viz.masks(image, outlines, ax=axes)
    else:
        viz.boxes(image, boxes, ax=axes)
    found = f"{len(boxes)} found" if prompt.startswith(("detect", "segment")) else text
    axes.set_title(f"{prompt} → {found}", wrap=True)
    return figure


# cell 9ed65391
@dataclass(frozen=True)
class Score:
    """A share of trials, with its 95 % interval after Wilson.

    right, trials    counts;  share, low, high  from 0 to 1
    source           Wilson 1927
    """

    name: str
    right: int
    trials: int

    @property
    def share(self) -> float:
        return self.right / self.trials if self.trials else 0.0

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        n, p = max(self.trials, 1), self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return middle - half, middle + half


# cell e7201657
@dataclass(frozen=True)
class Evaluation:
    """What a model got right on unseen scenes.

    caption, count, detect    `Score` of exact answers
    precision, recall         `Score` of boxes at IoU 0.5
    mean_overlap              mean IoU of the matched boxes
    """

    caption: Score
    count: Score
    detect: Score
    precision: Score
    recall: Score
    mean_overlap: float

    @property
    def f1(self) -> float:
        """F1 of boxes: 2 * hits / (found + true)."""
        return 2 * self.recall.right / (self.recall.trials + self.precision.trials)


# cell 7656a74d
def ask_scenes(
    model: PaliGemma, processor: Processor, drawn: Sequence, task: str, batch=50
) -> list[tuple[str, str, str]]:
    """Put one question of a task to each scene: (prompt, answer, truth)."""
    asked = [scenes.question(s, scenes.Stream(s.seed), task) for s in drawn]
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


# cell 6089b909
def evaluate(
    model: PaliGemma, processor: Processor, seeds: Iterable[int], world=None
) -> Evaluation:
    """Measure captions, counts and boxes on the scenes of these seeds.

    seeds    below `FIRST_TRAINING_SEED`, so that no scene was trained on
    world    where the scenes come from; None: the one trained on
    """
    world = world or scenes.FIRST_WORLD
    drawn = [scenes.scene(seed, world=world) for seed in seeds]
    exact, overlaps, found, real = {}, [], 0, 0
    for task in ("caption", "count", "detect"):
        rows = ask_scenes(model, processor, drawn, task)
        right = sum(said == truth for _, said, truth in rows)
        exact[task] = Score(task, right, len(rows))
    for scene, (prompt, said, _) in zip(drawn, rows, strict=True):
        kinds = prompt.removeprefix("detect ").split(" ; ")
        boxes, truth = read_boxes(said, scene.image.size), true_boxes(scene, kinds)
        overlaps += match_boxes(boxes, truth)
        found, real = found + len(boxes), real + len(truth)
    return Evaluation(
        **exact,
        precision=Score("precision", len(overlaps), found),
        recall=Score("recall", len(overlaps), real),
        mean_overlap=sum(overlaps) / max(len(overlaps), 1),
    )
