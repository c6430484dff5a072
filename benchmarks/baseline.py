"""PaliGemma's loop as tutorials write it, and the ideas that make it fast, one by one.

The weights are ours, and so is the answer: a test compares the tokens. With no idea at
all, every token runs the vision tower again, joins its keys and values to a copy of the
earlier ones, repeats them for every query head, writes attention out under a mask of
zeros, and takes logits of all positions. Made for PaliGemma 1; rows without padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pali.attention import attend, attend_written_out, merge_heads, split_heads
from pali.cache import Cache
from pali.gqa import repeat_heads
from pali.rope import rope_angles, rope_table, rotate_pairs

IDEAS = {  # in the order in which they are switched on
    "encode once": "the vision tower runs before the first token only",
    "last logits": "logits of the last position alone",
    "in place": "keys and values are written into buffers made once",
    "folded": "query heads are rows of one product, keys are not repeated",
    "fused": "attention by the fused kernel",
    "no mask": "no mask where everything may be seen",
    "one table": "angles, cosine and sine once a step for all layers",
}


class Joined:
    """Keys and values of one layer, copied whenever some are added."""

    def __init__(self) -> None:
        self.k = self.v = None

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


def encode(model, pixels: Tensor, ideas: frozenset) -> Tensor:
    """Picture to features; a trace makes a block write its attention out."""
    tower = model.vision
    x = tower.patch(pixels.to(model.decoder.embedding.dtype)) + tower.position
    for block in tower.blocks:
        x = block(x, trace=None if "fused" in ideas else {})
    return model.projector(tower.norm(x))


def look(layer, x: Tensor, table, store, mask, ideas: frozenset) -> Tensor:
    """Attention of one decoder layer."""
    q = rotate_pairs(split_heads(layer.query(x), layer.num_heads), table)
    k = rotate_pairs(split_heads(layer.key(x), layer.num_kv_heads), table)
    k, v = store(k, split_heads(layer.value(x), layer.num_kv_heads))
    groups, T = layer.num_heads // layer.num_kv_heads, x.shape[1]
    if "folded" in ideas:
        q = q.unflatten(1, (-1, groups)).flatten(2, 3)
        mask = mask if mask is None else mask.repeat(1, 1, groups, 1)
    else:
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    if "fused" in ideas:
        y = attend(q, k, v, mask, scale=layer.scale)
    else:
        y, _ = attend_written_out(q, k, v, mask, scale=layer.scale)
    if "folded" in ideas:
        y = y.unflatten(2, (groups, T)).flatten(1, 2)
    return layer.output(merge_heads(y))


def run(model, x: Tensor, past: int, stores: list, ideas: frozenset) -> Tensor:
    """The decoder on new tokens: vectors in, vectors out."""
    config, (B, T, _) = model.decoder.config, x.shape
    positions = torch.arange(past, past + T).expand(B, T)

    def angles():
        return rope_table(rope_angles(positions, config.head_dim, config.rope_base))

    mask = None
    if "no mask" not in ideas:
        mask = torch.ones(B, 1, T, past + T, dtype=torch.bool)
    shared = angles() if "one table" in ideas else None
    for block, store in zip(model.decoder.blocks, stores, strict=True):
        table = shared or angles()
        normed = block.attention_norm(x)
        x = x + look(block.attention, normed, table, store, mask, ideas)
        x = x + block.mlp(block.mlp_norm(x))
    return model.decoder.norm(x)


@torch.no_grad()
def answer(
    model,
    pixels: Tensor,
    ids: Tensor,
    count: int,
    ideas: frozenset = frozenset(),
    stamp: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """`count` greedy tokens for each row of prompts.

    ideas    names from IDEAS that are switched on
    stamp    called with the logits of each new token, float[B, V]
    """
    config, (B, T) = model.decoder.config, ids.shape
    cache = Cache(config, B, T + count)
    stores = [Joined() for _ in range(config.num_layers)]
    if "in place" in ideas:
        stores = [cache.layer(i) for i in range(config.num_layers)]
    past, tokens, features = 0, [], None
    for _ in range(count):
        if features is None or "encode once" not in ideas:
            features = encode(model, pixels, ideas)
        cache.length = past + ids.shape[1]
        x = model.embed(ids, features) if past == 0 else model.decoder.embed(ids)
        x = run(model, x, past, stores, ideas)
        x = x[:, -1:] if "last logits" in ideas else x
        logits = model.decoder.logits(x)[:, -1]
        if stamp is not None:
            stamp(logits)
        past += ids.shape[1]
        ids = logits.argmax(dim=-1)[:, None]
        tokens.append(ids)
    return torch.cat(tokens, dim=1).tolist()
