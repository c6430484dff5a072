"""Ask a model of the full world every kind of question, and keep what it said.

Started by `evaluate_mini.py --world full`. The answers go to a file as they come, so
a run that was stopped goes on where it was; the scores are made from them anew.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from evaluate_chance import Guess, fit
from evaluate_scores import (
    CAPTIONS,
    DEFINITIONS,
    INTERVALS,
    PARTS,
    SHORT,
    TASKS,
    Verdict,
    by_size,
    confusion,
    groups,
    judge,
    outline_scores,
    scores,
    worst,
)
from evaluate_worlds import CONDITIONS, draw
from torch import Tensor
from tqdm import tqdm

from pali import scenes, tasks
from pali.generation import only_tokens, steps
from pali.outlines import MaskCodec, outline_codes
from pali.patches import preprocess
from pali.tokens import EOS, PAD, Batch, Processor, pad_rows

PIECE = 50  # scenes that are drawn, asked and kept together
PART = 50  # rows that are computed together
FIT = 1000  # scenes behind the constant guesses and the average picture
MOST = {"detect": 100, "segment": 220, "caption": 100}  # new tokens; else 16
ELSEWHERE = ("caption en", "detect", "segment", *SHORT)  # one language is enough
TRAINED, BLIND = "as trained", "without sight"
BESIDE = ("blind", "chance", "ceiling")
MEANS = {
    "blind": "the same weights and prompts; in the place of the picture the average of "
    f"{FIT} scenes that are not measured, pixel by pixel",
    "chance": "the constant answer to each form of prompt that is right most often in "
    f"{FIT} scenes that are not measured: see benchmarks/evaluate_chance.py",
    "ceiling": "the true outlines through the mask codec and back, in the true boxes: "
    "what an answer of the right codes would score",
    "elsewhere": "never trained on: the first seeds again, with what differs; captions "
    "in English alone; what cannot be arranged is left out",
}


# -- asking ------------------------------------------------------------------


class Seen:
    """A model whose pictures are already encoded: features where pixels would go."""

    def __init__(self, model) -> None:
        self.model, self.config = model, model.config

    def __call__(self, features, ids, **rest) -> Tensor:
        return self.model(None, ids, features=features, **rest)


@torch.inference_mode()
def see_pixels(model, pixels: Tensor) -> Tensor:
    """Pictures through the vision tower, once: float[n, N, hidden]."""
    return torch.cat([model.encode(part) for part in pixels.split(PART)])


def see(model, processor: Processor, images: Sequence) -> Tensor:
    """The same from PIL images."""
    pixels = [preprocess(image, processor.image_size) for image in images]
    return see_pixels(model, torch.stack(pixels))


@torch.inference_mode()
def say(
    model, processor: Processor, features: Tensor, prompts: Sequence[str], most: int
) -> list[str]:
    """The best token each time, as `pali.generate`, for pictures already encoded."""
    texts = []
    for start in range(0, len(prompts), PART):
        rows = [processor.prompt_ids(p) for p in prompts[start : start + PART]]
        ids = pad_rows(rows, PAD, "left")
        valid = pad_rows([[True] * len(row) for row in rows], False, "left")
        batch = Batch(features[start : start + PART], ids, valid, valid & False, None)

        def best(logits: Tensor) -> Tensor:
            return only_tokens(logits.float(), processor.tokenizer.size).argmax(-1)

        new = torch.stack(list(steps(Seen(model), batch, most, best)), dim=1).tolist()
        ended = [row[: row.index(EOS)] if EOS in row else row for row in new]
        texts += [processor.decode(row) for row in ended]
    return texts


def most_of(task: str) -> int:
    """How many tokens an answer may have."""
    return MOST.get(task.split()[0], 16)


class Kept:
    """Answers in a file, one JSON line each; one cut off at the end is asked again."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text("utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, "utf-8")
        for line in whole.splitlines():
            self.note(*json.loads(line))

    def note(self, condition, seed, task, picture, prompt, said) -> None:
        self.rows[condition, seed, task] = picture, prompt, said

    def get(self, condition, seed, task, picture, prompt) -> str | None:
        """The answer; None if this question about this picture was not asked yet."""
        row = self.rows.get((condition, seed, task))
        return row[2] if row and row[:2] == (picture, prompt) else None

    def add(self, rows: Iterable[tuple]) -> None:
        """Keep (condition, seed, task, picture, prompt, answer), at once on disk."""
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                self.note(*row)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def picture_name(scene: scenes.Scene) -> str:
    """What tells this picture from others."""
    return f"{zlib.crc32(scene.image.tobytes()):08x}"


def outline_coder(codec: MaskCodec):
    """Mask and box to 16 codes; zeros if the codec holds no encoder."""
    if codec.encoder is None:
        return lambda mask, box: [0] * 16
    return partial(outline_codes, codec=codec)


def questions(
    scene: scenes.Scene, world: scenes.World, chosen: Sequence[str], encode
) -> dict[str, tuple[str, str]]:
    """One question of each task that has a sure answer: task -> (prompt, truth)."""
    unsure = {
        "where": not scenes.where_questions(scene),
        "size": not scenes.size_questions(scene),
    }
    return {
        task: scenes.question(scene, scenes.question_stream(scene), task, world, encode)
        for task in chosen
        if not unsure.get(task)
    }


@dataclass
class Examiner:
    """A model with all that is needed to ask it.

    codec    of its outlines
    kept     what it has said before
    """

    model: object
    processor: Processor
    codec: MaskCodec
    kept: Kept

    def ask(self, rows: list, features) -> None:
        """Put questions and keep the answers.

        rows        (condition, seed, task, picture, prompt, place in the features)
        features    a function without arguments; called if there is any row
        """
        seen = features() if rows else None
        for task in dict.fromkeys(row[2] for row in rows):
            of_task = [row for row in rows if row[2] == task]
            places = torch.tensor([row[-1] for row in of_task])
            prompts = [row[4] for row in of_task]
            said = say(self.model, self.processor, seen[places], prompts, most_of(task))
            self.kept.add(
                (*row[:-1], text) for row, text in zip(of_task, said, strict=True)
            )

    def piece(self, name: str, drawn: list, asked: list[dict]) -> list[Verdict]:
        """Ask about some scenes of a condition what was not asked yet, and judge."""
        pictures = [picture_name(scene) for scene in drawn]
        rows = [
            (name, scene.seed, task, picture, prompt, i)
            for i, (scene, picture) in enumerate(zip(drawn, pictures, strict=True))
            for task, (prompt, _) in asked[i].items()
        ]
        new = [row for row in rows if self.kept.get(*row[:-1]) is None]
        images = [scene.image for scene in drawn]
        self.ask(new, lambda: see(self.model, self.processor, images))
        answers: list[dict] = [{} for _ in drawn]
        for row in rows:
            prompt, truth = asked[row[-1]][row[2]]
            answers[row[-1]][row[2]] = prompt, self.kept.get(*row[:-1]), truth
        return [
            judge(scene, said, self.codec)
            for scene, said in zip(drawn, answers, strict=True)
        ]

    def blind(self, asked: list[dict], average: Tensor) -> dict[str, str]:
        """What is said to each prompt with the average picture: prompt -> answer."""
        picture = f"{zlib.crc32(average.numpy().tobytes()):08x}"
        rows = [
            (BLIND, prompt, task, picture, prompt, 0)
            for prompt, task in sorted(
                {p: task for rows in asked for task, (p, _) in rows.items()}.items()
            )
        ]
        new = [row for row in rows if self.kept.get(*row[:-1]) is None]
        self.ask(new, lambda: see_pixels(self.model, average[None]))
        return {row[4]: self.kept.get(*row[:-1]) for row in rows}


# -- the whole ---------------------------------------------------------------


def training_seeds() -> range:
    """Scenes that are not measured: the constant guesses are read from them."""
    return range(scenes.TRAINING_SEEDS.start, scenes.TRAINING_SEEDS.start + FIT)


def pieces(seeds: range, name: str) -> Iterable[range]:
    """The seeds in pieces that are drawn together, with a bar that shows the way."""
    return tqdm([seeds[i : i + PIECE] for i in range(0, len(seeds), PIECE)], name)


def look_around(processor: Processor, encode) -> tuple[Guess, Tensor]:
    """The constant guesses, and the average picture float[3, S, S]."""
    condition, asked, total = CONDITIONS[TRAINED], [], 0
    for seeds in pieces(training_seeds(), "constant guesses"):
        for scene in draw(condition, seeds):
            asked.append((scene, questions(scene, condition.world, TASKS, encode)))
            total = total + preprocess(scene.image, processor.image_size)
    return fit(asked), total / len(asked)


def measure(
    examiner: Examiner, name: str, seeds: range, guess: Guess, average: Tensor
) -> dict[str, list[Verdict]]:
    """Verdicts on a condition, one a scene for each sort of answer.

    returns    "seen": the model's; "blind": with the average picture; "chance": the
               guess's; "coded": the true outlines through the codec and back
    """
    condition, encode = CONDITIONS[name], outline_coder(examiner.codec)
    chosen = TASKS if name == TRAINED else ELSEWHERE
    verdicts: dict[str, list] = {"seen": [], "blind": [], "chance": [], "coded": []}
    for part in pieces(seeds, name):
        drawn = draw(condition, part)
        asked = [questions(s, condition.world, chosen, encode) for s in drawn]
        verdicts["seen"] += examiner.piece(name, drawn, asked)
        said = examiner.blind(asked, average)
        for scene, rows in zip(drawn, asked, strict=True):
            blind = {task: (p, said[p], t) for task, (p, t) in rows.items()}
            verdicts["blind"].append(judge(scene, blind, examiner.codec))
            verdicts["chance"].append(guess.judged(scene, rows))
            prompt, truth = rows["segment"]
            true = {"segment": (prompt, truth, truth)}
            verdicts["coded"].append(judge(scene, true, examiner.codec))
    return verdicts


def rounded(found: dict[str, tasks.Score]) -> dict[str, dict]:
    """Scores ready for JSON, four digits; no -0.0."""
    return {
        name: {k: round(v, 4) + 0 for k, v in asdict(score).items()}
        for name, score in found.items()
    }


def result_row(verdict: Verdict) -> dict:
    """A scene in the file: the fields of `pali.tasks.Result`."""
    return {
        "seed": verdict.seed,
        "ground": verdict.ground,
        "things": verdict.things,
        "caption": bool(verdict.right("caption en")),
        "count": bool(verdict.right("count")),
        "found": verdict.found,
        "sizes": verdict.sizes,
        "overlaps": [round(x, 3) for x in verdict.overlaps],
    }


def further_row(verdict: Verdict) -> list:
    """The rest about a scene: right, wrong or not asked by task, outlines."""
    marks = {True: "1", False: "0", None: "-"}
    right = "".join(marks[verdict.right(task)] for task in (*CAPTIONS, *SHORT))
    return [right, verdict.outlined, [round(x, 3) for x in verdict.outlines]]


def ceiling(coded: Sequence[Verdict], codec: MaskCodec) -> dict[str, tasks.Score]:
    """Outlines of true masks through the codec and back; {} without an encoder."""
    if codec.encoder is None:
        return {}
    return {"outlines": outline_scores(coded)["outlines"]}


def compared(found: dict[str, list[Verdict]], codec: MaskCodec) -> dict[str, dict]:
    """What the scores of a condition are to be read beside."""
    chance = scores(found["chance"]).items()
    return {
        "blind": rounded(scores(found["blind"])),
        "chance": rounded({n: s for n, s in chance if n not in PARTS}),
        "ceiling": rounded(ceiling(found["coded"], codec)),
    }


def first(found: dict[str, list[Verdict]], seeds: range) -> dict[str, list[Verdict]]:
    """The verdicts on these seeds alone."""
    return {sort: [v for v in row if v.seed in seeds] for sort, row in found.items()}


def evaluate(
    examiner: Examiner, seeds: range, elsewhere: range
) -> tuple[dict, list[Verdict]]:
    """Everything that is measured: the head of the file, and the verdicts.

    seeds, elsewhere    of the scenes as trained, and of those in other conditions
    """
    codec = examiner.codec
    around = look_around(examiner.processor, outline_coder(codec))
    found = measure(examiner, TRAINED, seeds, *around)
    seen = found["seen"]
    sizes = rounded(by_size(seen)).items()
    head = {
        "definitions": DEFINITIONS | {"intervals": INTERVALS} | MEANS,
        "scores": {n: rounded(scores(v)) for n, v in groups(seen).items()}
        | {f"size {n}": {"found": score} for n, score in sizes},
        **compared(found, codec),
        "guesses": asdict(around[0]),
        "elsewhere": {},
        "confusion": {TRAINED: confusion(seen)},
        "worst": worst(seen),
    }
    for name, condition in CONDITIONS.items():
        if name == TRAINED:  # the same seeds, to compare with
            there = first(found, elsewhere)
        else:
            there = measure(examiner, name, elsewhere, *around)
        head["elsewhere"][name] = {
            "differs": condition.differs,
            "scenes": len(there["seen"]),
            "scores": rounded(scores(there["seen"])),
            **compared(there, codec),
        }
        if condition.artist == 2:
            head["confusion"][name] = confusion(there["seen"])
    return head, seen


def one_line_each(text: str) -> str:
    """JSON in which lists and objects that hold no others take one line."""

    def joined(found: re.Match) -> str:
        return re.sub(r"\n *", " ", found[0])  # no string holds a bare line break

    return re.sub(r"[\[{][^\[\]{}]*[\]}]", joined, text)


def as_json(head: dict, verdicts: Sequence[Verdict]) -> str:
    """The whole file: one line a scene, the same bytes for the same answers."""
    head = head | {"order": [*CAPTIONS, *SHORT]}
    lines = ",\n".join(json.dumps(result_row(v)) for v in verdicts)
    further = ",\n".join(json.dumps(further_row(v)) for v in verdicts)
    text = one_line_each(json.dumps(head, indent=1, ensure_ascii=False))
    return f'{text[:-2]},\n "results": [\n{lines}\n],\n "further": [\n{further}\n]}}\n'


def shown(score: dict | None) -> str:
    return f"{score['value']:.3f}" if score else "-"


def table(head: dict) -> str:
    """What was measured, for the screen."""
    lines = [f"{'':18}{'seen':>30}{'without sight':>16}{'chance':>9}{'codec':>8}"]
    for name, score in head["scores"]["all"].items():
        seen = f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
        row = [shown(head[beside].get(name)) for beside in BESIDE]
        lines.append(f"{name:18}{seen:>30}{row[0]:>16}{row[1]:>9}{row[2]:>8}")
    names = list(head["elsewhere"])
    lines += ["", f"{'':18}" + "".join(f"{name:>16}" for name in names)]
    for row in head["elsewhere"][TRAINED]["scores"]:
        cells = (head["elsewhere"][n]["scores"].get(row) for n in names)
        lines.append(f"{row:18}" + "".join(f"{shown(cell):>16}" for cell in cells))
    return "\n".join(lines)
