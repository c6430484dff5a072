"""Scenes: a little world with known answers.

Generated from notebooks/17_scenes.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

import functools
import json
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources

import numpy as np
from PIL import Image

from pali.tokens import location_tokens

__all__ = [
    "CROWDED_WORLD",
    "FIRST_WORLD",
    "Ground",
    "Kind",
    "Scene",
    "Stream",
    "TEST_SEEDS",
    "TRAINING_SEEDS",
    "Thing",
    "World",
    "all_texts",
    "arrange",
    "asked_kinds",
    "caption",
    "catalogue",
    "compose",
    "count_answer",
    "count_prompt",
    "count_word",
    "detect_answer",
    "detect_prompt",
    "draw_ground",
    "draw_things",
    "examples",
    "find_kind",
    "find_place",
    "ground_pixels",
    "kinds",
    "layout",
    "noise",
    "noun_phrase",
    "pose",
    "question",
    "question_stream",
    "ramp",
    "scene",
    "shared_area",
    "sprite",
    "sprite_sheet",
    "stamp",
    "tight_box",
]


# cell 66ca03cc
@dataclass
class Stream:
    """Random integers from a seed, the same in every language.

    state    int, 64 bits; the seed at first, moved on by each draw
    raises   TypeError if the seed is not a whole number
    source   Steele, Lea & Flood 2014 (SplitMix64)
    """

    state: int

    def __post_init__(self) -> None:
        self.state = operator.index(self.state) % 2**64

    def many(self, count: int) -> np.ndarray:
        """The next `count` numbers, uint64[count]."""
        step = 0x9E3779B97F4A7C15
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(step)
        z += np.uint64(self.state)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        self.state = (self.state + count * step) % 2**64
        return z ^ z >> np.uint64(31)

    def next(self) -> int:
        """The next number, 0 to 2**64 - 1."""
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def below(self, n: int) -> int:
        """A number from 0 to n - 1, all equally likely."""
        return (self.next() >> 32) * n >> 32

    def between(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence):
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence, count: int) -> list:
        """`count` different items, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


# cell df69efd5
@dataclass(frozen=True)
class Kind:
    """One row of the catalogue.

    name        what a thing of this kind is called, one word
    plural      what several of them are called
    codepoint   the emoji that is drawn, hexadecimal
    mirror      whether the drawing may be mirrored
    trained     whether the first world uses it
    """

    name: str
    plural: str
    codepoint: str
    mirror: bool
    trained: bool


# cell 4724c0d4
@functools.cache
def kinds() -> tuple[Kind, ...]:
    """The catalogue: 64 kinds, in the order of the sprite sheet."""
    path = resources.files("pali").joinpath("art", "kinds.json")
    return tuple(
        Kind(
            row["kind"],
            row["plural"],
            row["codepoint"],
            row["mirror"],
            row["trained"],
        )
        for row in json.loads(path.read_text("utf-8"))
    )


# cell d3978675
@functools.cache
def catalogue() -> dict[str, int]:
    """The place of every kind in the catalogue, by name, from 0."""
    return {kind.name: i for i, kind in enumerate(kinds())}


# cell d1332539
def find_kind(name: str) -> Kind:
    """The row of the catalogue with this name.

    raises   ValueError if there is none; the message lists all names
    """
    if name not in catalogue():
        raise ValueError(
            f"there is no kind {name!r}. Choose one of: "
            f"{', '.join(catalogue())}."
        )
    return kinds()[catalogue()[name]]


# cell 5eba8914
@functools.cache
def sprite_sheet() -> Image.Image:
    """All drawings, 8 to a row, RGBA, 512 x 512 px."""
    path = resources.files("pali").joinpath("art", "sheet.png")
    with path.open("rb") as file:
        return Image.open(file).convert("RGBA")


# cell 09834908
def sprite(kind: str) -> Image.Image:
    """The drawing of a kind.

    returns   PIL image, RGBA, 64 x 64 px, transparent around the art
    raises    ValueError if the catalogue has no such kind
    """
    find_kind(kind)
    row, column = divmod(catalogue()[kind], 8)
    left, top = 64 * column, 64 * row
    return sprite_sheet().crop((left, top, left + 64, top + 64))


# cell a15673c9
@dataclass(frozen=True)
class Thing:
    """Something in a picture.

    kind        a name from the catalogue
    size        side of the square that its drawing fills, px
    left, top   upper left corner of that square, px
    angle       how far it leans, degrees, anticlockwise
    mirrored    whether left and right are exchanged
    """

    kind: str
    size: int
    left: int
    top: int
    angle: int = 0
    mirrored: bool = False

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the square: x, y in px."""
        half = self.size / 2
        return self.left + half, self.top + half


# cell b1d49380
@functools.lru_cache(maxsize=1024)
def pose(kind: str, angle: int, mirrored: bool) -> Image.Image:
    """A sprite made ready for scaling: mirrored, then turned.

    returns   RGBA image, 64 x 64 px, or 96 x 96 if it leans, so that
              turning cuts no corner; shared: do not change it
    """
    art = sprite(kind)
    if mirrored:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not angle:
        return art
    canvas = Image.new("RGBA", (96, 96))
    canvas.paste(art, (16, 16))
    return canvas.rotate(angle, Image.Resampling.BICUBIC)


# cell 0e600315
def stamp(thing: Thing) -> tuple[Image.Image, int, int]:
    """A thing's drawing in its final size, and where it goes.

    returns   RGBA image, left, top in px; it is half as large again
              as the thing's square if it leans
    """
    art = pose(thing.kind, thing.angle, thing.mirrored)
    side = (thing.size * art.width + 32) // 64
    shift = (side - thing.size) // 2
    art = art.resize((side, side), Image.Resampling.BICUBIC)
    return art, thing.left - shift, thing.top - shift


# cell b0e7b1a3
@dataclass(frozen=True)
class Ground:
    """What lies behind the things.

    pattern     "plain", "shaded", "striped" or "noisy"
    colour      red, green, blue, 0 to 255
    other       second colour, where shading or stripes go
    direction   dx, dy: where they go, each -1, 0 or 1
    width       of a stripe, px
    amount      of noise, grey levels up and down
    seed        of the noise
    """

    pattern: str = "plain"
    colour: tuple[int, int, int] = (222, 230, 236)
    other: tuple[int, int, int] = (176, 196, 212)
    direction: tuple[int, int] = (1, 0)
    width: int = 12
    amount: int = 20
    seed: int = 0


# cell 99f07b62
def ramp(direction: tuple[int, int], side: int) -> np.ndarray:
    """Steps walked across a square in one direction, from 0.

    returns   int32[side, side]
    """
    dx, dy = direction
    line = np.arange(side, dtype=np.int32)
    steps = dx * line + dy * line[:, None]
    return steps - steps.min()


# cell f22edb6c
def noise(seed: int, amount: int, side: int) -> np.ndarray:
    """Grey noise, uniform from -amount to amount.

    returns   int32[side, side, 1]; eight pixels share a random number,
              lowest byte first
    """
    numbers = Stream(seed).many(-(-side * side // 8))
    grains = numbers.astype("<u8").view(np.uint8)[: side * side]
    level = (grains.astype(np.int32) * (2 * amount + 1) >> 8) - amount
    return level.reshape(side, side, 1)


# cell 3601a430
def ground_pixels(ground: Ground, side: int = 128) -> np.ndarray:
    """Paint a ground, with whole numbers only.

    returns   uint8[side, side, 3]
    raises    ValueError for a pattern that is not one of the four
    """
    colour, other = np.array([ground.colour, ground.other], np.int32)
    flat = np.zeros((side, side, 1), np.int32)
    if ground.pattern == "plain":
        pixels = flat + colour
    elif ground.pattern == "shaded":
        t = flat + ramp(ground.direction, side)[..., None]
        end = max(int(t.max()), 1)
        pixels = (colour * (end - t) + other * t) // end
    elif ground.pattern == "striped":
        t = flat + ramp(ground.direction, side)[..., None]
        pixels = np.where(t // ground.width % 2, other, colour)
    elif ground.pattern == "noisy":
        pixels = colour + noise(ground.seed, ground.amount, side)
    else:
        raise ValueError(
            f"no ground is called {ground.pattern!r}: use plain, "
            f"shaded, striped or noisy."
        )
    return pixels.clip(0, 255).astype(np.uint8)


# cell 3daf335e
@dataclass(frozen=True)
class World:
    """What may appear in a picture; every range is used evenly.

    kinds      the first so many of the catalogue
    things     fewest and most in a picture
    fewest     kinds that a picture holds at least, if it has so many
               things
    sizes      smallest and largest, px
    angles     how far a thing may lean, degrees
    overlap    most that two squares share, percent of the smaller
    grounds    patterns behind the things
    colours    darkest and lightest value of a colour channel
    side       of the picture, px
    """

    kinds: int = 32
    things: tuple[int, int] = (1, 4)
    fewest: int = 1
    sizes: tuple[int, int] = (28, 52)
    angles: tuple[int, ...] = (-15, -10, -5, 0, 5, 10, 15)
    overlap: int = 15
    grounds: tuple[str, ...] = ("plain", "shaded", "striped", "noisy")
    colours: tuple[int, int] = (104, 240)
    side: int = 128

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds of this world, in catalogue order."""
        return tuple(catalogue())[: self.kinds]


FIRST_WORLD = World()
# for practice alone: what is hard in the first world, more often
CROWDED_WORLD = World(things=(3, 4), fewest=2)


# cell c384c3d6
def draw_ground(stream: Stream, world: World) -> Ground:
    """Choose what lies behind the things."""
    low, high = world.colours
    pattern = stream.choice(world.grounds)
    colour = tuple(stream.between(low, high) for _ in range(3))
    other = tuple(stream.between(low, high) for _ in range(3))
    if pattern == "striped":  # close to the first colour
        shift = stream.between(16, 44) * stream.choice((-1, 1))
        other = tuple(min(max(c + shift, 0), 255) for c in colour)
    return Ground(
        pattern,
        colour,
        other,
        direction=stream.choice(((1, 0), (0, 1), (1, 1), (1, -1))),
        width=stream.between(6, 20),
        amount=stream.between(8, 32),
        seed=stream.next(),
    )


# cell 3a043163
def draw_things(stream: Stream, world: World) -> list[Thing]:
    """Choose kinds, sizes and angles; all at 0, 0 so far.

    The number of kinds is as even as the number of things: each of
    them comes once, and the other things repeat one of them.
    """
    count = stream.between(*world.things)
    kinds = stream.between(min(world.fewest, count), count)
    pool = stream.sample(world.names, kinds)
    more = [stream.choice(pool) for _ in range(count - len(pool))]
    things = []
    for kind in stream.sample(pool + more, count):
        size = stream.between(*world.sizes)
        angle = stream.choice(world.angles)
        mirrored = stream.below(2) == 1 and find_kind(kind).mirror
        things.append(Thing(kind, size, 0, 0, angle, mirrored))
    return things


# cell 8e88fe2a
def shared_area(a: Thing, b: Thing) -> int:
    """How much the squares of two things overlap, square px."""
    right = min(a.left + a.size, b.left + b.size)
    bottom = min(a.top + a.size, b.top + b.size)
    wide = max(0, right - max(a.left, b.left))
    return wide * max(0, bottom - max(a.top, b.top))


# cell a9eddeb3
def find_place(
    thing: Thing, others: Sequence[Thing], stream: Stream, world: World
) -> Thing | None:
    """The thing at a random place beside the others, None if stuck.

    A square that leans by a degrees sticks out by at most size * a /
    114 px on each side; that much room is kept to the border.
    """
    room = -(-thing.size * abs(thing.angle) // 114)
    last = world.side - thing.size - room
    for _ in range(50 if last >= room else 0):
        left, top = (stream.between(room, last) for _ in "xy")
        placed = replace(thing, left=left, top=top)
        if all(
            100 * shared_area(placed, other)
            <= world.overlap * min(placed.size, other.size) ** 2
            for other in others
        ):
            return placed
    return None


# cell a45007d3
def arrange(
    things: Sequence[Thing], stream: Stream, world: World
) -> list[Thing]:
    """Give every thing a place, the largest first.

    When one finds no room, all start again; sizes are never redrawn,
    or crowded pictures would hold smaller things.

    raises   ValueError if 200 attempts fail
    """
    order = sorted(range(len(things)), key=lambda i: -things[i].size)
    for _ in range(200):
        placed: dict[int, Thing] = {}
        for i in order:
            others = list(placed.values())
            thing = find_place(things[i], others, stream, world)
            if thing is None:
                break
            placed[i] = thing
        else:
            return [placed[i] for i in range(len(things))]
    raise ValueError(
        f"{len(things)} things of {world.sizes} px do not fit into "
        f"{world.side} px: use fewer, smaller ones or more overlap."
    )


# cell 0258e577
def layout(
    seed: int, *, world: World = FIRST_WORLD
) -> tuple[list[Thing], Ground]:
    """What is where in the scene of a seed, before anything is drawn.

    A pure function of its arguments, with whole numbers only: any
    language that follows the same steps gets the same result.
    """
    stream = Stream(seed)
    things = draw_things(stream, world)
    ground = draw_ground(stream, world)
    return arrange(things, stream, world), ground


# cell 3849c000
@dataclass
class Scene:
    """A picture with everything that is known about it.

    seed     what it was drawn from, None if composed by hand
    ground   what lies behind
    things   in the order of drawing: later ones cover earlier ones
    image    PIL image, RGB
    boxes    left, top, right, bottom of each thing in whole px, tight
             around its visible paint (alpha over 127), right and
             bottom outside; as if nothing covered it
    masks    bool[things, height, width], the pixels where it shows
    """

    seed: int | None
    ground: Ground
    things: list[Thing]
    image: Image.Image
    boxes: list[tuple[int, int, int, int]]
    masks: np.ndarray

    def counts(self) -> dict[str, int]:
        """How many of each kind, in catalogue order."""
        found = Counter(thing.kind for thing in self.things)
        return {k: found[k] for k in sorted(found, key=catalogue().get)}


# cell 1f5d5e3b
def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around the True pixels of bool[H, W].

    returns   left, top, right, bottom; right and bottom outside
    raises    ValueError if there is none
    """
    (rows,), (columns,) = (mask.any(axis=i).nonzero() for i in (1, 0))
    if not rows.size:
        raise ValueError("no pixel is True, so there is no box.")
    top, bottom = rows[[0, -1]].tolist()
    left, right = columns[[0, -1]].tolist()
    return left, top, right + 1, bottom + 1


# cell 724de6d7
def compose(
    things: Sequence[Thing],
    ground: Ground = Ground(),
    size: int = 128,
    seed: int | None = None,
) -> Scene:
    """Draw things on a ground and note what is where.

    size     side of the picture, px
    raises   ValueError for an unknown kind, or a thing out of sight
    """
    image = Image.fromarray(ground_pixels(ground, size)).convert("RGBA")
    paint = np.zeros((len(things), size, size), bool)
    for i, thing in enumerate(things):
        art, left, top = stamp(thing)
        layer = Image.new("RGBA", (size, size))
        layer.paste(art, (left, top))
        image = Image.alpha_composite(image, layer)
        paint[i] = np.asarray(layer.getchannel("A")) > 127
        if not paint[i].any():
            raise ValueError(f"{thing} lies outside of the picture.")
    boxes = [tight_box(shown) for shown in paint]
    for i in range(len(things)):
        paint[i] &= ~paint[i + 1 :].any(axis=0)
    image = image.convert("RGB")
    return Scene(seed, ground, list(things), image, boxes, paint)


# cell 0247a4cb
def scene(seed: int, *, world: World = FIRST_WORLD) -> Scene:
    """The scene of a seed: the same one, always and everywhere.

    seed     int, 0 to 2**64 - 1; see TRAINING_SEEDS and TEST_SEEDS
    raises   ValueError if the world is too crowded to arrange
    """
    things, ground = layout(seed, world=world)
    return compose(things, ground, world.side, seed)


# cell aafd656f
def count_word(n: int) -> str:
    """A number from 0 to 12 as a word."""
    words = ["zero", "one", "two", "three", "four", "five", "six"]
    words += ["seven", "eight", "nine", "ten", "eleven", "twelve"]
    if not 0 <= n < len(words):
        raise ValueError(f"count_word knows 0 to 12, got {n}")
    return words[n]


# cell 466c47b4
def noun_phrase(kind: str, count: int) -> str:
    """So many of a kind: "an apple", "two foxes"."""
    if count == 1:
        article = "an" if kind[0] in "aeiou" else "a"
        return f"{article} {kind}"
    return f"{count_word(count)} {find_kind(kind).plural}"


# cell 00dea35c
def caption(scene: Scene, language: str = "en") -> str:
    """Say what a scene holds: kinds in catalogue order, with counts.

    returns   "a cat, two dogs and a star"
    raises    ValueError for a language other than "en"
    """
    if language != "en":
        raise ValueError(f"captions are in 'en', not in {language!r}.")
    phrases = [noun_phrase(k, n) for k, n in scene.counts().items()]
    start, last = ", ".join(phrases[:-1]), phrases[-1:]
    return " and ".join(filter(None, [start, *last]))


# cell e6dc5b0c
def detect_answer(scene: Scene, kinds: Sequence[str]) -> str:
    """Where things of the asked kinds are.

    kinds     names, in the order in which they are asked for
    returns   tokens and name of each thing, joined by " ; ": kinds as
              asked, one kind from left to right; kinds that are not
              in the picture are not named, so "" if none is
    """
    parts = []
    for kind in kinds:
        find_kind(kind)
        pairs = zip(scene.things, scene.boxes, strict=True)
        for box in sorted(b for t, b in pairs if t.kind == kind):
            tokens = location_tokens(box, scene.image.size)
            parts.append(f"{tokens} {kind}")
    return " ; ".join(parts)


# cell 679ba321
def count_answer(scene: Scene, kind: str) -> str:
    """How many things of a kind, as digits; "0" if none."""
    return str(scene.counts().get(find_kind(kind).name, 0))


# cell 32ef8bee
def detect_prompt(kinds: Sequence[str]) -> str:
    """Ask where things are: "detect cat ; dog"."""
    return f"detect {' ; '.join(kinds)}"


# cell 4d03a768
def count_prompt(kind: str) -> str:
    """Ask how many: "answer en how many cats are there?"."""
    return f"answer en how many {find_kind(kind).plural} are there?"


# cell b7c7f450
def asked_kinds(
    scene: Scene, rng: Stream, world: World = FIRST_WORLD
) -> list[str]:
    """Kinds to detect: one (4 of 10), two (4), an absent one (2).

    The second of two is present where the scene has one, else absent.
    """
    present = list(scene.counts())
    absent = [name for name in world.names if name not in present]
    draw = rng.below(10)
    if draw < 2 and absent:
        return [rng.choice(absent)]
    first = rng.choice(present)
    if draw < 6:
        rest = [k for k in present if k != first] or absent
        return rng.sample([first, rng.choice(rest)], 2)
    return [first]


# cell 9ed542d1
def question(
    scene: Scene, rng: Stream, task: str, world: World = FIRST_WORLD
) -> tuple[str, str]:
    """A prompt about a scene, and its answer.

    rng      not the stream that drew the scene: `question_stream`
    task     "caption", "detect" or "count"; one count in four is of a
             kind that is not there
    raises   ValueError for another task
    """
    if task == "caption":
        return "caption en", caption(scene)
    if task == "detect":
        asked = asked_kinds(scene, rng, world)
        return detect_prompt(asked), detect_answer(scene, asked)
    if task == "count":
        pool = list(scene.counts())
        if rng.below(4) == 0:
            pool = [k for k in world.names if k not in pool] or pool
        kind = rng.choice(pool)
        return count_prompt(kind), count_answer(scene, kind)
    raise ValueError(f"task {task!r}: use caption, detect or count.")


# cell 52425166
def question_stream(scene: Scene) -> Stream:
    """Random numbers for questions about a scene.

    They are not those that drew the scene: else the first number would
    decide both how many things there are and what is asked.
    """
    return Stream((scene.seed or 0) ^ 0x5EED)


# cell 8765f7e8
def examples(
    scene: Scene,
    rng: Stream | None = None,
    n: int = 5,
    world: World = FIRST_WORLD,
) -> list[tuple[str, str]]:
    """n prompts with answers, all different where that is possible.

    rng       where choices come from; None: `question_stream(scene)`
    returns   one caption, then detect and count in turn
    """
    rng = rng or question_stream(scene)
    pairs = [question(scene, rng, "caption")][:n]
    while len(pairs) < n:
        task = ("count", "detect")[len(pairs) % 2]
        for _ in range(20):
            pair = question(scene, rng, task, world)
            if pair not in pairs:
                break
        pairs.append(pair)
    return pairs


# cell 16667c25
def all_texts(world: World = FIRST_WORLD) -> Iterator[str]:
    """Prompts and answers that hold every word form of a world.

    Location tokens are left out: a tokenizer is told of them.
    """
    most = world.things[1]
    yield "caption en"
    yield from (str(n) for n in range(most + 1))
    for kind, other in zip(
        world.names, world.names[1:] + world.names[:1], strict=True
    ):
        yield from (noun_phrase(kind, n) for n in range(1, most + 1))
        yield f"{noun_phrase(kind, 1)}, {noun_phrase(other, 2)}"
        yield f"{noun_phrase(kind, 1)} and {noun_phrase(other, 1)}"
        yield detect_prompt([kind])
        yield detect_prompt([kind, other])
        yield count_prompt(kind)


# cell 43e434bc
TEST_SEEDS = range(1_000_000)
TRAINING_SEEDS = range(1_000_000, 2**63)
