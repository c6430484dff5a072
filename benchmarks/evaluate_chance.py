"""What can be guessed without looking: the prompt, and how often answers are true.

The best constant answer to each form of prompt is read from scenes that are not
measured, then judged on those that are, so it is no better than it can be:

- a question in words: the answer that is true most often. Forms are: a caption in a
  language; "what is left of …" and the three others; biggest; smallest; "how many";
  "is there"; "ocr" where a number shows, and where none does
- "detect": one square for every kind asked for, always the same: of all squares on a
  grid, the one that hits most things (IoU 0.5)
- "segment": one filled square, the one with the largest mean IoU
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from evaluate_scores import HIT, Outline, Verdict, judge, true_masks

from pali import scenes
from pali.tokens import Box, location_tokens

# a scene with its questions: task -> (prompt, truth)
Asked = tuple[scenes.Scene, dict[str, tuple[str, str]]]


def form(task: str, prompt: str, scene: scenes.Scene) -> str:
    """What a prompt-only guess may depend on: the prompt, without the kind in it."""
    if task == "where":
        return prompt.rsplit(" the ", 1)[0]
    if task == "size":
        return prompt
    if task == "ocr":
        return "ocr, a number shows" if scene.number else "ocr, none shows"
    return task


def squares(side: int) -> np.ndarray:
    """Squares on a grid of 8 px, 24 to 80 px wide: int[C, 4], xyxy."""
    return np.array(
        [
            (left, top, left + size, top + size)
            for size in range(24, min(side, 80) + 1, 8)
            for left in range(0, side - size + 1, 8)
            for top in range(0, side - size + 1, 8)
        ]
    )


def overlaps_with(masks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of masks with filled boxes: bool[n, H, W], int[C, 4] -> float[n, C]."""
    sums = np.pad(masks, ((0, 0), (1, 0), (1, 0))).astype(np.int64)
    sums = sums.cumsum(1).cumsum(2)  # [n, y, x]: pixels above and left of there
    x0, y0, x1, y1 = boxes.T
    shared = sums[:, y1, x1] - sums[:, y0, x1] - sums[:, y1, x0] + sums[:, y0, x0]
    areas = (x1 - x0) * (y1 - y0)
    return shared / (masks.sum((1, 2))[:, None] + areas - shared)


def filled(box: Sequence[int], side: int) -> np.ndarray:
    """A box as pixels, bool[side, side]."""
    x0, y0, x1, y1 = box
    mask = np.zeros((side, side), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def best_squares(asked: Sequence[Asked]) -> tuple[tuple, tuple]:
    """The square that hits most things, and the one with the largest mean IoU."""
    side = asked[0][0].image.width
    grid = squares(side)
    hits, areas = np.zeros(len(grid)), np.zeros(len(grid))
    for scene, questions in asked:
        for kind in questions["detect"][0].removeprefix("detect ").split(" ; "):
            boxes = [
                filled(box, side)
                for thing, box in zip(scene.things, scene.boxes, strict=True)
                if thing.kind == kind
            ]
            if boxes:
                hits += overlaps_with(np.array(boxes), grid).max(0) >= HIT
        kind = questions["segment"][0].removeprefix("segment ")
        masks = [mask for _, mask in true_masks(scene, kind)]
        if masks:
            areas += overlaps_with(np.array(masks), grid).max(0)
    return tuple(
        tuple(int(v) for v in grid[values.argmax()]) for values in (hits, areas)
    )


@dataclass(frozen=True)
class Guess:
    """The best constant answers.

    words           form of prompt: answer
    square, patch   the box for "detect", the filled box for "segment", px
    """

    words: dict[str, str]
    square: tuple[int, int, int, int]
    patch: tuple[int, int, int, int]

    def judged(self, scene: scenes.Scene, questions: dict) -> Verdict:
        """The verdict on these answers to the questions about a scene."""
        answers = {}
        for task, (prompt, truth) in questions.items():
            said = self.words.get(form(task, prompt, scene), "")
            if task == "detect":
                tokens = location_tokens(self.square, scene.image.size)
                kinds = prompt.removeprefix("detect ").split(" ; ")
                said = " ; ".join(f"{tokens} {kind}" for kind in kinds)
            answers[task] = prompt, said, truth
        return judge(scene, answers, masks=self.outline(scene, questions))

    def outline(self, scene: scenes.Scene, questions: dict) -> list[Outline]:
        """The filled square, as an outline of the kind asked for."""
        if "segment" not in questions:
            return []
        kind = questions["segment"][0].removeprefix("segment ")
        box = Box(kind, tuple(map(float, self.patch)))
        return [(box, filled(self.patch, scene.image.width))]


def fit(asked: Iterable[Asked]) -> Guess:
    """The best constant answers to these questions."""
    asked = list(asked)
    said: dict[str, Counter] = defaultdict(Counter)
    for scene, questions in asked:
        for task, (prompt, truth) in questions.items():
            if task not in ("detect", "segment"):
                said[form(task, prompt, scene)][truth] += 1
    words = {  # among equals the first in the alphabet
        name: min(counted, key=lambda answer: (-counted[answer], answer))
        for name, counted in sorted(said.items())
    }
    return Guess(words, *best_squares(asked))
