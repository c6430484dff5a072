"""Where the shipped model is asked: the world it was trained on, and five elsewhere.

Nothing here is ever trained on but the first. The scenes are those of `pali.scenes`
with the same seeds; what differs is said beside each condition.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from pali import scenes

SHEET = Path(__file__).with_name("art2") / "sheet.png"


@dataclass(frozen=True)
class Condition:
    """Where questions are asked.

    world     of `pali.scenes`, with one thing changed
    differs   what that is, for readers
    artist    1: the drawings trained on; 2: those of benchmarks/art2
    """

    world: scenes.World
    differs: str
    artist: int = 1


FULL = scenes.FULL_WORLD
CONDITIONS = {
    "as trained": Condition(FULL, "nothing: unseen scenes of the world trained on"),
    "more things": Condition(
        replace(FULL, things=(6, 7)), "6 or 7 things in a picture, not 1 to 5"
    ),
    "smaller": Condition(
        replace(FULL, sizes=(12, 18)), "things of 12 to 18 px, not 20 to 64"
    ),
    "larger": Condition(
        replace(FULL, sizes=(70, 80), things=(1, 2)),
        "things of 70 to 80 px, not 20 to 64; 1 or 2 of them, as more do not fit",
    ),
    "other grounds": Condition(
        replace(FULL, grounds=("checked", "rings")),
        "a chessboard or rings of two colours, squares and rings of 6 to 20 px; else "
        "the same scenes",
    ),
    "second artist": Condition(
        FULL, "the same scenes drawn with Twemoji instead of Noto Color Emoji", artist=2
    ),
}


@cache
def second_sheet() -> Image.Image:
    """The second artist's drawings, RGBA, in the order of the catalogue."""
    with Image.open(SHEET) as image:
        return image.convert("RGBA")


def second_sprite(kind: str) -> Image.Image:
    """The second artist's drawing of a kind, as `scenes.sprite`."""
    row, column = divmod(scenes.catalogue()[scenes.find_kind(kind).name], 8)
    left, top = 64 * column, 64 * row
    return second_sheet().crop((left, top, left + 64, top + 64))


def further_pixels(ground: scenes.Ground, side: int) -> np.ndarray | None:
    """Grounds that no world of `pali.scenes` has: uint8[side, side, 3], or None.

    "checked" is a chessboard of squares of `width` px, "rings" are rings of `width` px
    around the middle, both in the colours of the ground.
    """
    line = np.arange(side)
    if ground.pattern == "checked":
        second = (line // ground.width + (line // ground.width)[:, None]) % 2
    elif ground.pattern == "rings":
        from_middle = 2 * line + 1 - side  # in half px, so that it is whole
        squared = from_middle**2 + (from_middle**2)[:, None]
        second = np.sqrt(squared).astype(int) // (2 * ground.width) % 2
    else:
        return None
    pixels = np.where(second[..., None], ground.other, ground.colour)
    return pixels.astype(np.uint8)


@contextmanager
def drawn_as(condition: Condition) -> Iterator[None]:
    """Inside it, `pali.scenes` draws with this artist, and knows the further grounds.

    All else, places, boxes, masks and questions, stays the code of `pali.scenes`.
    """
    kept = scenes.sprite, scenes.ground_pixels

    def ground_pixels(ground: scenes.Ground, side: int = 128) -> np.ndarray:
        pixels = further_pixels(ground, side)
        return kept[1](ground, side) if pixels is None else pixels

    if condition.artist == 2:
        scenes.sprite = second_sprite
    scenes.ground_pixels = ground_pixels
    scenes.pose.cache_clear()  # it keeps drawings by the name of their kind
    try:
        yield
    finally:
        scenes.sprite, scenes.ground_pixels = kept
        scenes.pose.cache_clear()


def draw(condition: Condition, seeds: range) -> list[scenes.Scene]:
    """The scenes of these seeds; one that cannot be arranged is left out."""
    drawn = []
    with drawn_as(condition):
        for seed in seeds:
            try:
                things, ground, number = scenes.plan(seed, world=condition.world)
            except ValueError:  # too crowded to arrange
                continue
            side = condition.world.side
            drawn.append(scenes.compose(things, ground, side, seed, number))
    return drawn
