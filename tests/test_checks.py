"""The checks of the checks: each fault on purpose must be noticed by the parity test.

A fault is a context in which one piece of the model is wrong. The check is the same
`assert_agree` on the same batches that `test_parity.py` uses.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

import pali.cache
import pali.decoder
import pali.gqa
import pali.masks
import pali.mlp
import pali.norm
import pali.paligemma
import pali.rope
import pali.vision
from reference import (
    GROUPED,
    NARROW_WINDOW,
    PALIGEMMA_1,
    PALIGEMMA_2,
    Shape,
    assert_agree,
    cached_logits,
    our_logits,
    ours,
    reference_logits,
    replace,
    rows,
)


def swap(target: str, new):
    """A fault that replaces one function of the package."""
    return lambda model: patch(target, new)


def causal_prefix(valid, suffix):
    return pali.masks.causal_mask(valid.shape[1]) & valid[:, None, None] | torch.eye(
        valid.shape[1], dtype=torch.bool
    )


def padding_seen(valid, suffix):
    return pali.masks.prefix_lm_mask(torch.ones_like(valid), suffix)


def suffix_sees_ahead(valid, suffix):
    return pali.masks.prefix_lm_mask(valid, torch.zeros_like(suffix))


def scale_features(factor: float):
    true = pali.paligemma.place_features

    def place(x, is_image, features):
        return true(x, is_image, features * factor)

    return swap("pali.paligemma.place_features", place)


def text_not_scaled(model):
    def embed(self, ids):
        return F.embedding(ids, self.embedding)

    return patch.object(pali.decoder.Decoder, "embed", embed)


def norm_without_one(model):
    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)

    return patch.object(pali.norm.RMSNorm, "forward", forward)


def rotate_neighbours(x, table):
    cos, sin = table
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotate_backwards(x, table):
    return pali.rope.rotate_pairs(x, (table[0], -table[1]))


def heads_tiled(model):
    true = pali.gqa.attend_grouped

    def attend(q, k, v, mask=None, **options):
        copies = q.shape[1] // k.shape[1]
        return true(q, k.repeat(1, copies, 1, 1), v.repeat(1, copies, 1, 1), mask,
                    **options)  # fmt: skip

    return patch("pali.gqa.attend_grouped", attend)


@contextmanager
def erf_gelu(model):
    true = F.gelu
    with patch.object(F, "gelu", lambda x, approximate="none": true(x)):
        yield


def change_blocks(**attributes):
    """A fault in every attention of the decoder."""

    @contextmanager
    def fault(model):
        for block in model.decoder.blocks:
            for name, value in attributes.items():
                setattr(block.attention, name, value)
        yield

    return fault


@contextmanager
def no_logit_cap(model):
    model.decoder.config = replace(model.decoder.config, logit_cap=None)
    yield


@contextmanager
def no_window(model):
    decoder = replace(model.config.decoder, sliding_window=None)
    model.config = replace(model.config, decoder=decoder)
    yield


@contextmanager
def window_on_odd_layers(model):
    def window(self, layer):
        return self.sliding_window if layer % 2 else None

    with patch.object(pali.decoder.DecoderConfig, "window", window):
        yield


@contextmanager
def norm_eps_too_large(model):
    for module in model.vision.modules():
        if isinstance(module, pali.vision.LayerNorm):
            module.eps = 1e-3
    yield


@contextmanager
def no_norms_after(model):
    for block in model.decoder.blocks:
        block.attention_out_norm = block.mlp_out_norm = torch.nn.Identity()
    yield


def gate_on_the_other_branch(model):
    def forward(self, x):
        return self.down(self.gate(x) * F.gelu(self.up(x), approximate="tanh"))

    return patch.object(pali.mlp.GeGLU, "forward", forward)


def patches_scrambled(model):
    def patchify(pixels, size):
        B, C = pixels.shape[:2]
        return pixels.reshape(B, -1, C * size * size)

    return patch("pali.patches.patchify", patchify)


def positions_from(start: int):
    true = pali.masks.token_positions

    def positions(valid, past=None):
        return true(valid, past) + start

    return swap("pali.paligemma.token_positions", positions)


def values_rotated(model):
    true = pali.gqa.attend_grouped

    def attend(q, k, v, mask=None, **options):
        angles = pali.rope.rope_angles(torch.arange(v.shape[2])[None], v.shape[-1])
        return true(q, k, pali.rope.apply_rope(v, angles), mask, **options)

    return patch("pali.gqa.attend_grouped", attend)


MASK = "pali.paligemma.prefix_lm_mask"
ROTATE = "pali.gqa.rotate_pairs"
LOUD = replace(PALIGEMMA_2, embedding_std=6.0)  # logits large enough for the final cap


@dataclass(frozen=True)
class Fault:
    name: str
    break_it: object
    shapes: tuple[Shape, ...] = (PALIGEMMA_1, PALIGEMMA_2)
    padding: str = "left"


FAULTS = [
    Fault("the prefix is causal", swap(MASK, causal_prefix)),
    Fault("padding is attended", swap(MASK, padding_seen)),
    Fault("the suffix sees ahead", swap(MASK, suffix_sees_ahead)),
    Fault("image features divided by sqrt(width)", scale_features(32**-0.5)),
    Fault("image features times sqrt(width)", scale_features(32**0.5)),
    Fault("text not times sqrt(width)", text_not_scaled),
    Fault("RMSNorm with w for 1 + w", norm_without_one),
    Fault("RoPE pairs neighbours", swap(ROTATE, rotate_neighbours)),
    Fault("RoPE missing", swap(ROTATE, lambda x, table: x)),
    Fault("values are rotated", values_rotated),
    Fault("key/value heads tiled", heads_tiled, (GROUPED, PALIGEMMA_2)),
    Fault("head_dim ** -0.5 for the query scale", change_blocks(scale=16**-0.5),
          (PALIGEMMA_2,)),
    Fault("no soft cap on scores", change_blocks(softcap=None), (PALIGEMMA_2,)),
    Fault("erf for tanh in GELU", erf_gelu),
    Fault("no final soft cap", no_logit_cap, (LOUD,)),
    Fault("no sliding window", no_window, (NARROW_WINDOW,)),
    Fault("the window slides on odd layers", window_on_odd_layers, (NARROW_WINDOW,)),
    Fault("no norms after attention and MLP", no_norms_after, (PALIGEMMA_2,)),
    Fault("eps 1e-3 for 1e-6 in the tower's norms", norm_eps_too_large, (PALIGEMMA_1,)),
    Fault("the gate's activation on the other branch", gate_on_the_other_branch),
    Fault("patches in scrambled order", patches_scrambled),
]  # fmt: skip
CASES = [(f, s) for f in FAULTS for s in f.shapes]


def name(value) -> str:
    if isinstance(value, Fault):
        return value.name
    return f"{value.kind}-{value.kv_heads}kv"


@pytest.mark.parametrize(("fault", "shape"), CASES, ids=name)
def test_parity_notices(fault, shape):
    batch = rows(shape, prompts=(3, 9), suffix=9, padding=fault.padding)
    want = reference_logits(shape, batch)
    model = ours(shape)
    # the sound model passes; with logits of spread 30 rounding is larger too
    atol = {"atol": 3e-3} if shape is LOUD else {}
    assert_agree(our_logits(model, batch), want, batch.valid, **atol)
    with fault.break_it(model):
        broken = our_logits(model, batch)
    with pytest.raises(AssertionError):
        assert_agree(broken, want, batch.valid, **atol)


def test_one_key_value_head_hides_tiling():
    """Why the parity tests need more than PaliGemma 1."""
    batch = rows(PALIGEMMA_1, suffix=4)
    model = ours(PALIGEMMA_1)
    with heads_tiled(model):
        got = our_logits(model, batch)
    assert_agree(got, reference_logits(PALIGEMMA_1, batch), batch.valid)


@pytest.mark.parametrize("start", [1, 100])
def test_positions_that_start_elsewhere_are_no_fault(start):
    """Rotary positions are relative: from 0 or from 1 is a matter of taste."""
    batch = rows(PALIGEMMA_1, suffix=4)
    model = ours(PALIGEMMA_1)
    with positions_from(start)(model):
        got = our_logits(model, batch)
    assert_agree(got, reference_logits(PALIGEMMA_1, batch), batch.valid)


def test_turning_everything_backwards_is_noticed_only_by_the_reference():
    batch = rows(PALIGEMMA_1, suffix=4)
    with swap(ROTATE, rotate_backwards)(None):
        got = our_logits(ours(PALIGEMMA_1), batch)
    with pytest.raises(AssertionError):
        assert_agree(got, reference_logits(PALIGEMMA_1, batch), batch.valid)


def cached_faults():
    def restart(self):
        return torch.zeros(self.batch_size, dtype=torch.int64)

    def columns(self):
        return torch.full((self.batch_size,), self.length + 7)

    def keys_forgotten(self, k, v):
        return k, v

    def top_left(valid, past):
        T = valid.shape[1] - past
        return torch.ones(T, valid.shape[1], dtype=torch.bool).tril()[None, None]

    def pads_seen(valid, past):
        return pali.masks.cached_mask(torch.ones_like(valid), past)

    return {
        "positions restart": patch.object(pali.cache.Cache, "next_positions", restart),
        "positions jump": patch.object(pali.cache.Cache, "next_positions", columns),
        "earlier keys forgotten": patch.object(
            pali.cache.LayerCache, "__call__", keys_forgotten
        ),
        "triangle at the top left": patch("pali.paligemma.cached_mask", top_left),
        "cached padding seen": patch("pali.paligemma.cached_mask", pads_seen),
    }


@pytest.mark.parametrize("fault", cached_faults())
def test_cached_parity_notices(fault):
    batch = rows(PALIGEMMA_1, prompts=(3, 9), suffix=9)
    want = reference_logits(PALIGEMMA_1, batch)
    model, first = ours(PALIGEMMA_1), batch.prefix_length
    cuts = [first + 1, first + 4]
    assert_agree(cached_logits(model, batch, cuts), want, batch.valid)
    with cached_faults()[fault], pytest.raises((AssertionError, RuntimeError)):
        assert_agree(cached_logits(model, batch, cuts), want, batch.valid)
