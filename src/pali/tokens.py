"""Tokens: words, places and pictures in one alphabet.

Generated from notebooks/05_tokens.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from pali.patches import preprocess

__all__ = [
    "BOS",
    "Batch",
    "Box",
    "EOS",
    "IGNORE",
    "NUM_LOCATIONS",
    "NUM_SEGMENTS",
    "OBJECT",
    "PAD",
    "Processor",
    "SPECIAL",
    "Tokenizer",
    "as_rows",
    "location_tokens",
    "log",
    "pad_rows",
    "read_boxes",
    "read_objects",
]


# cell baed8f61
PAD, EOS, BOS = 0, 1, 2  # the same in every Gemma tokenizer
NUM_LOCATIONS = 1024
NUM_SEGMENTS = 128
IGNORE = -100  # the label that cross-entropy skips
SPECIAL = re.compile(r"(<loc[0-9]{4}>|<seg[0-9]{3}>)")
OBJECT = re.compile(
    r"((?:<loc[0-9]{4}>)+)\s*((?:<seg[0-9]{3}>)*)\s*([^;<]*)"
)
log = logging.getLogger(__name__)


# cell e98f19a8
class Tokenizer:
    """Text to token ids and back, by a SentencePiece file.

    path       `tokenizer.model` of PaliGemma, of Gemma, or our own
    size       pieces, location and outline tokens included
    note       a plain Gemma file lacks `<loc…>` and `<seg…>`; they are
               then numbered on from its end, as PaliGemma does
    raises     ValueError if the file is no SentencePiece model, or has
               no piece for a line break
    source     Kudo & Richardson 2018
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        data = self.path.read_bytes()
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            if not data:
                raise RuntimeError("the file is empty")
            self.pieces.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model: {error}"
            ) from error
        names = [f"<loc{i:04d}>" for i in range(NUM_LOCATIONS)]
        names += [f"<seg{i:03d}>" for i in range(NUM_SEGMENTS)]
        end = self.pieces.GetPieceSize()
        if self.pieces.PieceToId(names[0]) == self.pieces.unk_id():
            self.special = {
                name: end + i for i, name in enumerate(names)
            }
        else:
            self.special = {
                name: self.pieces.PieceToId(name) for name in names
            }
        self.names = {i: name for name, i in self.special.items()}
        self.size = max(end, 1 + max(self.names))
        self.newline = self.pieces.PieceToId("\n")
        if self.newline == self.pieces.unk_id():
            raise ValueError(
                f"{path} has no piece for the line break that ends every "
                "prompt: use the tokenizer.model of PaliGemma or Gemma"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added before or after it."""
        # half a surrogate pair is a UnicodeEncodeError here
        text.encode()
        ids = []
        for part in SPECIAL.split(text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += self.pieces.EncodeAsIds(part)
        return ids

    def decode(self, ids) -> str:
        """Text of the ids, location tokens kept, control tokens left
        out."""
        text, run = "", []
        for i in map(int, ids):
            if i in self.names:
                text, run = (
                    text + self.pieces.DecodeIds(run) + self.names[i],
                    [],
                )
            elif 0 <= i < self.pieces.GetPieceSize():
                run.append(i)
        return text + self.pieces.DecodeIds(run)

    def piece(self, i: int) -> str:
        """How one id is written in a token strip."""
        if i in self.names:
            return self.names[i]
        return (
            self.pieces.IdToPiece(i)
            if i < self.pieces.GetPieceSize()
            else "<image>"
        )


# cell a450458d
@dataclass
class Batch:
    """What the model reads, rows padded to one length T.

    pixels    float32[M, 3, S, S], all pictures in row order; None
              without
    ids       int64[B, T], `<image>` placeholders included
    valid     bool[B, T], False on padding
    suffix    bool[B, T], True on the answer (causal part)
    labels    int64[B, T], ids on the answer and `<eos>`, -100
              elsewhere, not shifted; None without answers
    """

    pixels: Tensor | None
    ids: Tensor
    valid: Tensor
    suffix: Tensor
    labels: Tensor | None = None

    def to(self, device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            **{
                name: value.to(device)
                for name, value in vars(self).items()
                if value is not None
            },
        )


# cell 50d85f27
def pad_rows(rows: list[list], fill, padding: str) -> Tensor:
    """Lists of unequal length as one tensor, filled up on the given
    side, "left" or "right"; ValueError for any other."""
    if padding not in ("left", "right"):
        raise ValueError(
            f'padding is "left" or "right", not {padding!r}'
        )
    T = max(map(len, rows))
    if padding == "left":
        return torch.tensor(
            [[fill] * (T - len(row)) + row for row in rows]
        )
    return torch.tensor([row + [fill] * (T - len(row)) for row in rows])


# cell 50d944d3
def as_rows(images, prompts, suffixes=None) -> tuple[list, list, list]:
    """Bring one question or many to lists: pictures of each row,
    prompt, suffix.

    raises    ValueError if the numbers of pictures, prompts and
              suffixes differ
    """
    if isinstance(prompts, str):
        prompts, images = [prompts], [images]
        suffixes = suffixes if suffixes is None else [suffixes]
    elif images is None:
        images = [None] * len(prompts)
    elif not isinstance(images, (list, tuple)):
        images = [images]
    prompts, images = list(prompts), list(images)
    if suffixes is None:
        suffixes = [None] * len(prompts)
    suffixes = (
        [suffixes] if isinstance(suffixes, str) else list(suffixes)
    )
    if not len(images) == len(prompts) == len(suffixes) or not prompts:
        raise ValueError(
            "pictures, prompts and suffixes must be equally many and at "
            f"least one, got {len(images)}, {len(prompts)} and {len(suffixes)}"
        )
    texts = prompts + [text for text in suffixes if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("prompts and suffixes are strings")
    rows = [[] if row is None else row for row in images]
    rows = [
        list(row) if isinstance(row, (list, tuple)) else [row]
        for row in rows
    ]
    return rows, prompts, suffixes


# cell 1260ca06
class Processor:
    """Turn pictures and prompts into one `Batch` for the model.

    tokenizer      a `Tokenizer`
    image_size     side of the square the vision tower reads, in pixels
    num_patches    `<image>` placeholders for one picture
    image_id       id of `<image>`
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        num_patches: int,
        image_id: int,
    ) -> None:
        self.tokenizer, self.image_size = tokenizer, image_size
        self.num_patches, self.image_id = num_patches, image_id

    def prompt_ids(self, prompt: str, num_images: int = 1) -> list[int]:
        """`<image>` placeholders, `<bos>`, the prompt, one newline.

        The newline is encoded apart: joined to the prompt it could fuse
        with a newline there into another piece.
        """
        return (
            [self.image_id] * (self.num_patches * num_images)
            + [BOS]
            + self.tokenizer.encode(prompt)
            + [self.tokenizer.newline]
        )

    def __call__(
        self, images, prompts, suffixes=None, padding: str = "left"
    ) -> Batch:
        """Batch of one or many rows.

        images      picture, list of pictures, or nested list (several
                    pictures to one prompt); None for a row without
        prompts     string or list of strings
        suffixes    answers to train on, or None
        """
        pictures, prompts, suffixes = as_rows(images, prompts, suffixes)
        heads = [
            self.prompt_ids(prompt, len(row))
            for prompt, row in zip(prompts, pictures, strict=True)
        ]
        tails = [
            [] if text is None else self.tokenizer.encode(text) + [EOS]
            for text in suffixes
        ]
        rows = list(zip(heads, tails, strict=True))
        ids = pad_rows([h + t for h, t in rows], PAD, padding)
        valid = pad_rows(
            [[True] * len(h + t) for h, t in rows], False, padding
        )
        suffix = pad_rows(
            [[False] * len(h) + [True] * len(t) for h, t in rows],
            False,
            padding,
        )
        labels = (
            ids.masked_fill(~suffix, IGNORE) if any(tails) else None
        )
        pixels = [
            preprocess(p, self.image_size)
            for row in pictures
            for p in row
        ]
        pixels = torch.stack(pixels) if pixels else None
        return Batch(pixels, ids, valid, suffix, labels)

    def decode(self, ids) -> str:
        """Text of generated ids."""
        return self.tokenizer.decode(ids)


# cell 1200ca89
@dataclass(frozen=True)
class Box:
    """A labelled rectangle: xyxy = left, top, right, bottom in
    pixels."""

    label: str
    xyxy: tuple[float, float, float, float]


# cell 8e78a52b
def location_tokens(xyxy, image_size: tuple[int, int]) -> str:
    """A box as four tokens in PaliGemma's order: top, left, bottom,
    right.

    xyxy          left, top, right, bottom in pixels
    image_size    (width, height) of the picture
    source        Chen et al. 2022 for the idea; 1023 steps as in
                  big_vision
    """
    (x0, y0, x1, y1), (width, height) = xyxy, image_size
    shares = (y0 / height, x0 / width, y1 / height, x1 / width)
    steps = [min(max(round(share * 1023), 0), 1023) for share in shares]
    return "".join(f"<loc{step:04d}>" for step in steps)


# cell b121739b
def read_objects(
    text: str, image_size: tuple[int, int]
) -> list[tuple[Box, list[int]]]:
    """Every box in an answer, with the outline codes that follow it.

    text          the model's answer
    image_size    (width, height) of the original picture
    returns       (box, codes) in the order of the text; codes is empty
                  or 16
    note          malformed parts are skipped and reported through
                  `logging`
    """
    width, height = image_size
    found = []
    for locations, segments, label in OBJECT.findall(text):
        steps = [int(n) for n in re.findall(r"\d{4}", locations)]
        codes = [int(n) for n in re.findall(r"\d{3}", segments)]
        if len(steps) != 4 or max(steps) > 1023:
            log.warning(
                "skipped %r: a box is four tokens up to 1023", locations
            )
            continue
        y0, x0, y1, x1 = (step / 1023 for step in steps)
        if y1 <= y0 or x1 <= x0:
            log.warning("skipped %r: a box without area", locations)
            continue
        if len(codes) not in (0, 16) or max(codes, default=0) > 127:
            log.warning(
                "ignored %r: an outline is 16 codes up to 127", segments
            )
            codes = []
        xyxy = (x0 * width, y0 * height, x1 * width, y1 * height)
        found.append((Box(label.strip(), xyxy), codes))
    return found


# cell eb022813
def read_boxes(text: str, image_size: tuple[int, int]) -> list[Box]:
    """The boxes in an answer, in pixels of the original picture.

    text          the model's answer, such as "<loc0100><loc0200>… cat ;
                  …"
    image_size    (width, height)
    returns       list[Box], in the order of the text; malformed parts
                  are skipped and reported through `logging`
    """
    return [box for box, _ in read_objects(text, image_size)]
