"""Attention maps: what it looked at, honestly.

Generated from notebooks/24_attention_maps.ipynb: edit the notebook, then run `make
export`. Each block names the cell it comes from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image
from torch import Tensor

from pali import viz
from pali.generation import generate
from pali.paligemma import PaliGemma
from pali.patches import open_picture
from pali.tokens import Box, Processor

__all__ = [
    "AnswerAttention",
    "TINT",
    "answer_attention",
    "attention_figure",
    "box_cells",
    "contrast",
    "energy_in_box",
    "hide",
    "lift",
    "localising_heads",
    "log_chance",
    "occlusion",
    "pointing_hit",
    "read_maps",
    "row_maps",
    "spread",
]


# cell e6d313ce
def read_maps(trace: dict, is_image: Tensor, rows: slice) -> Tensor:
    """Rows of the decoder's attention, cut to the picture, as grids.

    trace       what one forward pass recorded
    is_image    bool[B, S], True where a key is a patch
    rows        the queries to keep
    returns     float32[B, L, H, rows, g, g]
    """
    layers = sum(
        name.startswith("decoder.") and name.endswith(".attention") for name in trace
    )
    kept = [trace[f"decoder.{i}.attention"][:, :, rows] for i in range(layers)]
    weights = torch.stack(kept, dim=1).float()  # [B, L, H, rows, S]
    maps = [w[..., m] for w, m in zip(weights, is_image, strict=True)]
    side = math.isqrt(maps[0].shape[-1])
    return torch.stack(maps).unflatten(-1, (side, side))


# cell 6b429575
@torch.no_grad()
def row_maps(
    model: PaliGemma,
    processor: Processor,
    images,
    prompts,
    texts=None,
    rows: slice = slice(-1, None),
    batch: int = 12,
) -> Tensor:
    """Where every head looks, in the same rows of many pictures.

    texts     answers put behind the prompts, or None
    rows      which rows, counted from the end: the last chooses the next token
    returns   float32[B, L, H, rows, g, g]; a map sums to its image share, the
              rest of the row lies on the text
    """
    maps, texts = [], texts or [None] * len(prompts)
    for i in range(0, len(prompts), batch):
        part = (x[i : i + batch] for x in (images, prompts, texts))
        part = processor(*part).to(model.decoder.embedding.device)
        given, trace = {"valid": part.valid, "suffix": part.suffix}, {}
        model(part.pixels, part.ids, **given, last_only=True, trace=trace)
        maps.append(read_maps(trace, part.ids == processor.image_id, rows))
    return torch.cat(maps)


# cell e2c5b380
@dataclass(frozen=True)
class AnswerAttention:
    """Where the decoder looked while it chose each token of an answer.

    text       the answer
    tokens     one string a step, `<eos>` last
    maps       float32[steps, L, H, g, g], weights on the image columns of the
               row that chose the token: the last prompt position for the
               first, then the token before
    shares     float32[steps, L, H], sum of each map: the rest lies on text
    """

    text: str
    tokens: list[str]
    maps: Tensor
    shares: Tensor


# cell 34859c99
@torch.no_grad()
def answer_attention(
    model: PaliGemma,
    processor: Processor,
    image,
    prompt: str,
    text: str | None = None,
    max_new_tokens: int = 64,
) -> AnswerAttention:
    """The attention rows that choose each token of an answer about a picture.

    text    the answer; None: what the model says, taking the best token
    """
    image = open_picture(image)
    if text is None:
        text = generate(
            model, processor, image, prompt, max_new_tokens=max_new_tokens
        )[0]
    batch = processor(image, prompt, text).to(model.decoder.embedding.device)
    steps, trace = int(batch.suffix.sum()), {}
    model(batch.pixels, batch.ids, suffix=batch.suffix, last_only=True, trace=trace)
    is_image = batch.ids == processor.image_id
    maps = read_maps(trace, is_image, slice(-steps - 1, -1))[0]
    maps = maps.permute(2, 0, 1, 3, 4).cpu()  # [steps, L, H, g, g]
    ids = batch.ids[0, -steps:].tolist()
    tokens = [processor.tokenizer.piece(i) for i in ids[:-1]] + ["<eos>"]
    return AnswerAttention(text, tokens, maps, maps.sum(dim=(-2, -1)))


# cell acac42b3
def box_cells(box: Box, image_size: tuple[int, int], side: int) -> Tensor:
    """The share of each grid cell that a box covers: float32[side, side]."""
    width, height = image_size
    left, top, right, bottom = box.xyxy
    edges = torch.arange(side + 1, dtype=torch.float32)

    def covered(low: float, high: float) -> Tensor:
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0)

    rows = covered(top / height * side, bottom / height * side)
    columns = covered(left / width * side, right / width * side)
    return rows[:, None] * columns


# cell 2f7857cc
def energy_in_box(maps: Tensor, cells: Tensor) -> Tensor:
    """The part of a map's weight that falls into a box, 0 to 1.

    maps      float[..., g, g];  cells  float[..., g, g] from `box_cells`
    source    Wang et al. 2020 (Score-CAM)
    """
    total = maps.sum(dim=(-2, -1)).clamp(min=1e-12)
    return (maps * cells).sum(dim=(-2, -1)) / total


# cell c04f2b0a
def lift(maps: Tensor, cells: Tensor) -> Tensor:
    """Energy in the box over the box's share of the picture; chance is 1."""
    return energy_in_box(maps, cells) / cells.mean(dim=(-2, -1))


# cell 4008d6b1
def pointing_hit(maps: Tensor, cells: Tensor) -> Tensor:
    """Whether the strongest cell lies in the box, at least half covered.

    returns   float[...]: 1 or 0, or the share of hits among cells that tie
    source    Zhang et al. 2018
    """
    best = maps == maps.amax(dim=(-2, -1), keepdim=True)
    hits = best & (cells >= 0.5)
    return hits.sum(dim=(-2, -1)) / best.sum(dim=(-2, -1))


# cell 658f4db0
def contrast(first: Tensor, second: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """How far maps move with the question: 0 if not at all, 1 at most.

    first, second    float[..., g, g], maps under two questions, each about
                     one of two things in the same picture
    own, other       float[..., g, g], cells of the first and second thing
    note             habits cancel: a liking for the middle, or for bright
                     colours, is the same under both questions
    """
    moved = energy_in_box(first, own) - energy_in_box(first, other)
    back = energy_in_box(second, other) - energy_in_box(second, own)
    return (moved + back) / 2


# cell ee997a27
def spread(maps: Tensor) -> Tensor:
    """Entropy of each map over its cells, nats; ln(cells) if it is even."""
    p = maps.flatten(-2)
    p = p / p.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return -(p * p.clamp(min=1e-12).log()).sum(dim=-1)


# cell 026a97ef
def localising_heads(seen: AnswerAttention, count: int = 3) -> list[tuple[int, int]]:
    """Heads that look at the picture, and at few places in it.

    returns   (layer, head) pairs, best first: image share times what the
              spread lacks to the most there could be, mean over the answer
    source    after Kang et al. 2025: chosen without knowing the truth
    """
    cells = seen.maps.shape[-1] * seen.maps.shape[-2]
    score = (seen.shares * (math.log(cells) - spread(seen.maps))).mean(dim=0)
    best = score.flatten().topk(count).indices.tolist()
    return [divmod(i, score.shape[1]) for i in best]


# cell 3b80e490
@torch.no_grad()
def log_chance(
    model: PaliGemma, processor: Processor, images, prompts, texts, batch: int = 16
) -> Tensor:
    """Log-probability of whole answers, `<eos>` included, in nats: float32[B]."""
    sums = []
    for i in range(0, len(prompts), batch):
        rows = (x[i : i + batch] for x in (images, prompts, texts))
        part = processor(*rows).to(model.decoder.embedding.device)
        logits = model(part.pixels, part.ids, valid=part.valid, suffix=part.suffix)
        chances = logits[:, :-1].float().log_softmax(dim=-1)
        own = chances.gather(-1, part.ids[:, 1:, None])[..., 0]
        sums.append((own * part.suffix[:, 1:]).sum(dim=-1))
    return torch.cat(sums)


# cell 6d7e0d39
def hide(image: Image.Image, xyxy, colour=None) -> Image.Image:
    """A copy with a rectangle painted over; None: in the picture's mean colour."""
    x0, y0, x1, y1 = (round(v) for v in xyxy)
    if colour is None:
        small = image.convert("RGB").resize((1, 1), Image.Resampling.BOX)
        colour = small.getpixel((0, 0))
    image = image.convert("RGB")  # a copy
    image.paste(colour, (x0, y0, x1, y1))
    return image


# cell 14e2e8d6
def occlusion(
    model: PaliGemma, processor: Processor, image, prompt: str, text: str, blocks=8
) -> Tensor:
    """How much likelihood an answer loses when a block of the picture is hidden.

    returns   float32[blocks, blocks], nats; negative where hiding helps
    source    Zeiler & Fergus 2014
    """
    image = open_picture(image)
    hidden = [image]
    for row in range(blocks):
        for column in range(blocks):
            x, y = image.width / blocks, image.height / blocks
            corner = (column * x, row * y, (column + 1) * x, (row + 1) * y)
            hidden.append(hide(image, corner))
    n = len(hidden)
    chances = log_chance(model, processor, hidden, [prompt] * n, [text] * n)
    return (chances[0] - chances[1:]).view(blocks, blocks)


# cell b598d57d
TINT = LinearSegmentedColormap.from_list(
    "pali_tint", [(0.85, 0.48, 0.0, 0.0), (0.85, 0.48, 0.0, 0.6), (0.54, 0.2, 0.0, 1.0)]
)


# cell 4bf8cce7
def attention_figure(image, prompt: str, seen: AnswerAttention, heads: Sequence):
    """The picture beside one map for each answer token, on one common scale.

    heads      (layer, head) pairs whose maps are averaged
    returns    matplotlib Figure, not shown; 1 is even looking at the picture
               with the whole row, the scale ends at 20; up to 15 tokens
    """
    image = open_picture(image)
    maps = torch.stack([seen.maps[:, i, j] for i, j in heads]).mean(dim=0)
    maps = maps * maps[0].numel()  # times uniform
    count = min(len(seen.tokens), 15)
    columns = min(count + 1, 4)
    rows = -(-(count + 1) // columns)
    with plt.ioff():
        viz.use_style()
        figure, axes = plt.subplots(
            rows, columns, figsize=(2 * columns + 0.6, 2.25 * rows + 0.4), squeeze=False
        )
    for ax in axes.flat:
        ax.set_axis_off()
    panels = list(axes.flat)
    viz.picture(image, title="the picture", ax=panels[0])
    top = min(max(float(maps[:count].max()), 2.0), 20.0)
    grey = image.convert("L").point(lambda v: 90 + v * 165 // 255)
    extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    for token, one, ax in zip(seen.tokens, maps, panels[1:], strict=False):
        viz.picture(grey.convert("RGB"), ax=ax)
        shown = ax.imshow(one, cmap=TINT, vmin=1, vmax=top, extent=extent)
        title = f"{token.replace('▁', ' ')}\n{one.mean():.0%} on the picture"
        ax.set_title(title, fontsize=9, fontweight="normal")
    names = ", ".join(f"{i}.{j}" for i, j in heads)
    figure.suptitle(f"{prompt}   (heads {names})", x=0.01, ha="left")
    figure.colorbar(
        shown, ax=list(axes.flat), label="times uniform", shrink=0.6, extend="max"
    )
    return figure
