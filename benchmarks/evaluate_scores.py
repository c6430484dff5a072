"""What answers about scenes of the full world are worth. Nothing here asks a model.

An answer is judged against the scene it is about (`judge`), verdicts become scores
with 95 % intervals (`scores`): Wilson's for shares of right answers, a bootstrap over
scenes for F1 and means, both from `pali.tasks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from pali import scenes, tasks
from pali.outlines import MaskCodec, mask_iou, read_masks
from pali.tokens import Box, read_boxes
from pali.train import pair_best, pair_boxes, true_boxes

CAPTIONS = tuple(f"caption {language}" for language in scenes.LANGUAGES)
SHORT = ("count", "where", "present", "size", "ocr")  # answered in a word
TASKS = (*CAPTIONS, "detect", "segment", *SHORT)
HIT = 0.5  # IoU from which a thing counts as found

# what each row is, for readers of the file
DEFINITIONS = {
    "caption": "English caption right to the letter",
    "caption de": "German caption right to the letter",
    "caption fr": "French caption right to the letter",
    "caption es": "Spanish caption right to the letter",
    "caption zh": "Chinese caption right to the letter",
    "boxes, F1": "F1 of boxes at IoU 0.5 or more, over the boxes of all scenes; one or "
    "two kinds are asked for, in two questions of ten only an absent one; where a "
    "scene has but one kind, the second is absent",
    "mean IoU": "mean IoU of the boxes that are such hits",
    "boxes, absent": "no box at all, where none of the kinds asked for is there",
    "outlines": "mean IoU with the true visible pixels, over all true things of the "
    "kind asked for; a thing without an outline counts 0, and no outline serves twice",
    "outlines, absent": "no outline at all, where the kind is not there",
    "count": "number right; one question in four is about an absent kind",
    "count, absent": "0, where the kind is absent",
    "where": "right thing named left of, right of, above or below another, or "
    "'nothing' where there is none",
    "where, nothing": "'nothing', where there is none",
    "present": "yes or no right; half the kinds are absent",
    "size": "biggest or smallest thing right",
    "digits": "number read right, in scenes that show one",
    "no digits": "empty answer, in scenes that show no number",
}
# parts of other rows, which a constant answer gets right or wrong as a whole
PARTS = ("boxes, absent", "outlines, absent", "count, absent", "where, nothing")
PARTS += ("no digits",)
INTERVALS = (
    "95 %: Wilson for shares, else a percentile bootstrap of scenes, 2,000 draws, "
    "seed 0"
)


Outline = tuple[Box, np.ndarray]


def pair_masks(found: Sequence[Outline], truth: Sequence[Outline]) -> list[float]:
    """`pair_best` of outlines: the IoU of the masks, where the labels are the same."""

    def score(a: Outline, b: Outline) -> float:
        return float(mask_iou(a[1], b[1])) if a[0].label == b[0].label else 0.0

    return pair_best(found, truth, score)


def true_masks(scene: scenes.Scene, kind: str) -> list[Outline]:
    """The things of a kind: boxes and the pixels where they show."""
    rows = zip(scene.things, scene.boxes, scene.masks, strict=True)
    return [
        (Box(thing.kind, tuple(map(float, box))), mask)
        for thing, box, mask in rows
        if thing.kind == kind
    ]


@dataclass(frozen=True)
class Verdict:
    """What became of the questions about one scene.

    seed, ground, things    which scene, what lies behind, how many things
    answers                 task: (prompt, answer, truth)
    found, outlined         boxes and outlines in the answers
    sizes                   sides of the things that were to be found, px
    overlaps, outlines      IoU of each thing with its box, with its outline
    """

    seed: int
    ground: str
    things: int
    answers: dict[str, tuple[str, str, str]]
    found: int = 0
    outlined: int = 0
    sizes: list[int] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    outlines: list[float] = field(default_factory=list)

    def right(self, task: str) -> bool | None:
        """Whether a task's answer is right to the letter; None if it was not asked."""
        if task not in self.answers:
            return None
        _, said, truth = self.answers[task]
        return said == truth


def judge(
    scene: scenes.Scene,
    answers: dict[str, tuple[str, str, str]],
    codec: MaskCodec | None = None,
    masks: Sequence[Outline] | None = None,
) -> Verdict:
    """Compare what was said of a scene with what is true.

    answers    task: (prompt, answer, truth)
    codec      of the outlines; None: the shipped model's
    masks      outlines to judge in place of those in the answer to "segment"
    """
    size = scene.image.size
    seen: dict = {"found": 0, "outlined": 0}
    if "detect" in answers:
        prompt, said, _ = answers["detect"]
        asked = prompt.removeprefix("detect ").split(" ; ")
        found = read_boxes(said, size)
        seen["found"] = len(found)
        seen["sizes"] = [t.size for t in scene.things if t.kind in asked]
        seen["overlaps"] = pair_boxes(found, true_boxes(scene, asked))
    if "segment" in answers:
        prompt, said, _ = answers["segment"]
        if masks is None:
            masks = read_masks(said, size, codec)
        seen["outlined"] = len(masks)
        truth = true_masks(scene, prompt.removeprefix("segment "))
        seen["outlines"] = pair_masks(masks, truth)
    return Verdict(scene.seed, scene.ground.pattern, len(scene.things), answers, **seen)


def text_score(
    verdicts: Sequence[Verdict], task: str, of: Callable = lambda truth: True
) -> tasks.Score:
    """The share of a task's answers that are right, where `of` picks the truth."""
    asked = [v for v in verdicts if task in v.answers and of(v.answers[task][2])]
    return tasks.share(v.right(task) for v in asked)


def box_scores(verdicts: Sequence[Verdict]) -> dict[str, tasks.Score]:
    """F1 of boxes, mean IoU of the hits, absent kinds left alone."""
    asked = [v for v in verdicts if "detect" in v.answers]
    hits = [[x for x in v.overlaps if x >= HIT] for v in asked]
    return {
        "boxes, F1": tasks.ratio(
            [2 * len(h) for h in hits], [v.found + len(v.sizes) for v in asked]
        ),
        "mean IoU": tasks.ratio([sum(h) for h in hits], [len(h) for h in hits]),
        "boxes, absent": tasks.share(not v.found for v in asked if not v.sizes),
    }


def outline_scores(verdicts: Sequence[Verdict]) -> dict[str, tasks.Score]:
    """Mean IoU of outlines over all true things, absent kinds left alone."""
    asked = [v for v in verdicts if "segment" in v.answers]
    return {
        "outlines": tasks.ratio(
            [sum(v.outlines) for v in asked], [len(v.outlines) for v in asked]
        ),
        "outlines, absent": tasks.share(
            not v.outlined for v in asked if not v.outlines
        ),
    }


def scores(verdicts: Sequence[Verdict]) -> dict[str, tasks.Score]:
    """Every row of `DEFINITIONS` that was asked about."""
    rows = {task.removesuffix(" en"): text_score(verdicts, task) for task in CAPTIONS}
    rows |= box_scores(verdicts) | outline_scores(verdicts)
    rows["count"] = text_score(verdicts, "count")
    rows["count, absent"] = text_score(verdicts, "count", lambda t: t == "0")
    rows["where"] = text_score(verdicts, "where")
    rows["where, nothing"] = text_score(verdicts, "where", lambda t: t == "nothing")
    rows |= {task: text_score(verdicts, task) for task in ("present", "size")}
    rows["digits"] = text_score(verdicts, "ocr", bool)
    rows["no digits"] = text_score(verdicts, "ocr", lambda t: not t)
    return {name: score for name, score in rows.items() if score.trials}


def groups(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """All scenes, then those with so many things, then those on each ground."""
    chosen = {"all": list(verdicts)}
    for n in sorted({v.things for v in verdicts}):
        chosen[f"things {n}"] = [v for v in verdicts if v.things == n]
    for ground in sorted({v.ground for v in verdicts}):
        chosen[f"ground {ground}"] = [v for v in verdicts if v.ground == ground]
    return chosen


def by_size(
    verdicts: Sequence[Verdict],
    edges=((20, 30), (31, 41), (42, 52), (53, 64)),
) -> dict[str, tasks.Score]:
    """The share of things that were found, by their size in px."""
    things = [p for v in verdicts for p in zip(v.sizes, v.overlaps, strict=True)]
    rows = {
        f"{low}-{high}": tasks.share(x >= HIT for s, x in things if low <= s <= high)
        for low, high in edges
    }
    return {name: score for name, score in rows.items() if score.trials}


# -- which kind was named instead --------------------------------------------


@cache
def phrases() -> dict[str, tuple[str, int]]:
    """What each English noun phrase means: kind and number."""
    return {
        scenes.noun_phrase(kind, n): (kind, n)
        for kind in scenes.catalogue()
        for n in range(1, 13)
    }


def read_caption(text: str) -> Counter:
    """How many of each kind an English caption names; what is no phrase is skipped."""
    said: Counter = Counter()
    for part in text.replace(" and ", ", ").split(", "):
        kind, n = phrases().get(part, (None, 0))
        if kind:
            said[kind] += n
    return said


def confusion(verdicts: Iterable[Verdict]) -> dict:
    """Which kinds English captions name in place of others.

    right      kind: things named
    instead    [true kind, kind said, things], the most frequent first; only where the
               caption lacks things of one kind and has too many of one other
    missed     kind: things not named, and nothing in their place
    added      kind: things named that are not there, and in nothing's place
    unclear    things missed where more than one kind could stand for them
    """
    right, missed, added, instead = Counter(), Counter(), Counter(), Counter()
    unclear = 0
    for verdict in verdicts:
        _, said, truth = verdict.answers["caption en"]
        said, truth = read_caption(said), read_caption(truth)
        right += said & truth
        lacks, extra = truth - said, said - truth
        if len(lacks) == len(extra) == 1:
            (kind, n), (other, m) = *lacks.items(), *extra.items()
            instead[kind, other] += min(n, m)
            lacks, extra = Counter({kind: n - m}), Counter({other: m - n})
        elif lacks and extra:
            unclear += lacks.total()
            continue
        missed += lacks  # adding counters keeps what is above 0
        added += extra
    pairs = sorted(instead.items(), key=lambda p: (-p[1], p[0]))
    order = list(scenes.catalogue())

    def rows(counted: Counter) -> dict[str, int]:
        return {kind: counted[kind] for kind in order if counted[kind]}

    return {
        "right": rows(right),
        "instead": [[*pair, n] for pair, n in pairs],
        "missed": rows(missed),
        "added": rows(added),
        "unclear": unclear,
    }


# -- the worst ---------------------------------------------------------------


def mistakes(verdict: Verdict, task: str) -> int:
    """How wrong an answer is: 0 if it is right.

    caption           things missing and things too many, at least 1
    detect, segment   things without a hit, and boxes or outlines that hit nothing
    count             how far off;  the others  1
    """
    _, said, truth = verdict.answers[task]
    if task in ("detect", "segment"):
        overlaps, given = verdict.overlaps, verdict.found
        if task == "segment":
            overlaps, given = verdict.outlines, verdict.outlined
        hits = sum(x >= HIT for x in overlaps)
        return len(overlaps) - hits + given - hits
    if said == truth:
        return 0
    if task == "caption en":
        a, b = read_caption(said), read_caption(truth)
        return max(1, (a - b).total() + (b - a).total())
    if task == "count" and said.isdecimal():
        return abs(int(said) - int(truth))
    return 1


def worst(
    verdicts: Sequence[Verdict], most: int = 12, of_a_task: int = 3
) -> list[dict]:
    """The answers with the most mistakes, at most one a scene and three a task.

    Among equals, those about fewer things come first: they are harder to excuse.
    """
    asked = ("caption en", "detect", "segment", *SHORT)
    wrong = [
        (-mistakes(v, task), v.things, v.seed, i, v)
        for v in verdicts
        for i, task in enumerate(asked)
        if task in v.answers and mistakes(v, task)
    ]
    kept, seeds, times = [], set(), Counter()
    for n, _, seed, i, verdict in sorted(wrong, key=lambda row: row[:4]):
        task = asked[i]
        if seed in seeds or times[task] == of_a_task or len(kept) == most:
            continue
        seeds.add(seed)
        times[task] += 1
        prompt, said, truth = verdict.answers[task]
        kept.append(
            {"seed": seed, "task": task, "mistakes": -n, "prompt": prompt,
             "answer": said, "truth": truth}
        )  # fmt: skip
    return kept
