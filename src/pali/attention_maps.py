"""Attention maps: what it looked at, honestly.

Generated from notebooks/24_attention_maps.ipynb: edit the notebook, then run `make
export`. Each block names the cell it comes from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pali import viz
from pali.generation import generate
from pali.paligemma import PaliGemma
from pali.patches import open_picture
from pali.tokens import Box, Processor

__all__ = [
    "AnswerAttention",
    "answer_attention",
    "attention_figure",
    "box_cells",
    "contrast",
    "energy_in_box",
    "lift",
    "localising_heads",
    "pointing_hit",
    "spread",
]


# cell e2c5b380
@dataclass(frozen=True)
class AnswerAttention:
    """Where the decoder looked while it chose each token of an answer.

    text       the answer
    tokens     one string a step; the last may be `<eos>`
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
def answer_attention(
    model: PaliGemma, processor: Processor, image, prompt: str, max_new_tokens=64
) -> AnswerAttention:
    """Answer a prompt and keep the attention rows that chose each token.

    raises    ValueError if there is not exactly one picture
    """
    trace: list[dict] = []
    image = open_picture(image)
    text = generate(
        model, processor, image, prompt, max_new_tokens=max_new_tokens, trace=trace
    )[0]
    layers, N = model.config.decoder.num_layers, processor.num_patches
    rows = torch.stack(
        [
            torch.stack(
                [step[f"decoder.{i}.attention"][0, :, -1, :N] for i in range(layers)]
            )
            for step in trace
        ]
    ).float()  # [steps, L, H, N]
    ids = processor.tokenizer.encode(text)
    tokens = [processor.tokenizer.piece(i) for i in ids]
    tokens += ["<eos>"] * (len(trace) - len(tokens))
    side = int(N**0.5)
    return AnswerAttention(
        text, tokens[: len(trace)], rows.unflatten(-1, (side, side)), rows.sum(-1)
    )


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

    maps      float[..., g, g];  cells  float[g, g] from `box_cells`
    source    Wang et al. 2020 (Score-CAM)
    """
    total = maps.sum(dim=(-2, -1)).clamp(min=1e-12)
    return (maps * cells).sum(dim=(-2, -1)) / total


# cell c04f2b0a
def lift(maps: Tensor, cells: Tensor) -> Tensor:
    """Energy in the box over the box's share of the picture; chance is 1."""
    return energy_in_box(maps, cells) / cells.mean()


# cell 4008d6b1
def pointing_hit(maps: Tensor, cells: Tensor) -> Tensor:
    """Whether the strongest cell lies in the box (at least half covered).

    returns   bool[...];  source  Zhang et al. 2018
    """
    best = maps.flatten(-2).argmax(dim=-1)
    return cells.flatten()[best] >= 0.5


# cell 3681f601
def contrast(maps: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Energy in the box asked for, less energy in another object's box.

    The one score that a habit of looking at the middle, or at bright colours,
    cannot raise: ask for the other object and the sign must turn.
    """
    return energy_in_box(maps, own) - energy_in_box(maps, other)


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
    score = (seen.shares * (torch.tensor(cells).log() - spread(seen.maps))).mean(dim=0)
    best = score.flatten().topk(count).indices.tolist()
    return [divmod(i, score.shape[1]) for i in best]


# cell 4bf8cce7
def attention_figure(image, prompt: str, seen: AnswerAttention, heads: Sequence):
    """The picture beside one map for each answer token, on one common scale.

    heads      (layer, head) pairs whose maps are averaged
    returns    matplotlib Figure, not shown; cells are "times uniform"
    """
    image = open_picture(image)
    maps = torch.stack([seen.maps[:, i, j] for i, j in heads]).mean(dim=0)
    count = min(len(seen.tokens), 11)
    columns = min(count + 1, 4)
    rows = -(-(count + 1) // columns)
    with plt.ioff():
        viz.use_style()
        figure, axes = plt.subplots(
            rows, columns, figsize=(2 * columns, 2.3 * rows), squeeze=False
        )
    flat = list(axes.flat)
    viz.picture(image, title=prompt, ax=flat[0])
    top = float(maps[:count].max()) * maps[0].numel()
    for token, one, ax in zip(seen.tokens, maps, flat[1:], strict=False):
        shown = ax.imshow(one * one.numel(), cmap="cividis", vmin=0, vmax=top)
        ax.set_title(f"{token}\nimage share {one.sum():.0%}", fontsize=9)
        ax.set_axis_off()
    for ax in flat[count + 1 :]:
        ax.set_axis_off()
    figure.colorbar(shown, ax=axes, label="times uniform", shrink=0.7)
    return figure
