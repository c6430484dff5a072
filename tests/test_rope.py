"""RoPE against complex numbers in double precision, published Gemma, and its law."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import (
    GemmaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from pali.rope import apply_rope, rope_angles, rope_table, rotate_pairs


def complex_rope(x, positions, base=10_000.0):
    """The same turn, written as multiplication by exp(i·angle) in complex128."""
    half = x.shape[-1] // 2
    theta = base ** (-np.arange(half) / half)
    turn = np.exp(1j * positions[:, None, :, None] * theta)
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate((z.real, z.imag), axis=-1)


def neighbours(x, angles):
    """The chapter's fault: pairs (0, 1), (2, 3), … instead of halves."""
    cos, sin = rope_table(angles)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def backwards(x, angles):
    return apply_rope(x, -angles)


def low_precision(positions, head_dim, base=10_000.0):
    """The chapter's second fault: positions and speeds in bfloat16."""
    per_token = rope_angles(torch.tensor([[1]]), head_dim, base)[0, 0].bfloat16()
    return (positions[..., None].bfloat16() * per_token).float()


def draw(seed=7):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, 3, 5, 8)), rng.integers(0, 1024, (2, 5))


def check_complex(turn=apply_rope, angles=rope_angles, seed=7, **base):
    """The chapter's outside check, for any rotation and any angles."""
    x, positions = draw(seed)
    ours = turn(torch.tensor(x).float(), angles(torch.tensor(positions), 8, **base))
    want = torch.tensor(complex_rope(x, positions)).float()
    # worst of 300 draws: 2e-5 (float32 angles to 1,023 rad); base 9,999: 4e-3
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-4)


def test_rope_is_complex_multiplication():
    check_complex()


@pytest.mark.parametrize(
    "fault",
    [
        {"turn": neighbours},
        {"turn": backwards},
        {"turn": lambda x, angles: x},
        {"angles": low_precision},
        {"base": 9_999.0},
    ],
    ids=["neighbours", "backwards", "no turn", "bfloat16 angles", "another base"],
)
def test_the_check_rejects(fault):
    with pytest.raises(AssertionError):
        check_complex(**fault)


@pytest.mark.parametrize("head_dim", [8, 32, 256])
def test_rope_agrees_with_published_gemma(head_dim):
    rng = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 2, 4, 9, head_dim, generator=rng)
    positions = torch.randint(0, 8192, (2, 9), generator=rng)
    table = GemmaRotaryEmbedding(GemmaConfig(head_dim=head_dim))(q, positions)
    angles = rope_angles(positions, head_dim)
    for ours, want in zip((q, k), apply_rotary_pos_emb(q, k, *table), strict=True):
        # worst of 200 draws here: 0.0, the order of operations is the same;
        # another libm may differ in the last bit; base 9,999: 0.03
        torch.testing.assert_close(apply_rope(ours, angles), want, rtol=0, atol=1e-5)


def score(turn, q, k, m, n):
    at_m, at_n = (rope_angles(torch.tensor([[p]]), q.shape[-1]) for p in (m, n))
    return (turn(q, at_m) * turn(k, at_n)).sum()


@given(shift=st.integers(0, 512), seed=st.integers(0, 2**16))
def test_score_depends_on_distance_only(shift, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=rng)
    # worst of 2,000 draws: 5e-5; turning k backwards: 3 (median), 7e-3 (least of 500)
    shifted = score(apply_rope, q, k, 9 + shift, 4 + shift)
    torch.testing.assert_close(
        shifted, score(apply_rope, q, k, 9, 4), rtol=0, atol=5e-4
    )


def test_before_and_after_score_differently():
    """Else `cat ; dog` and `dog ; cat` would stay the same bag of words."""
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=rng)
    assert (score(apply_rope, q, k, 5, 3) - score(apply_rope, q, k, 3, 5)).abs() > 0.1


@given(seed=st.integers(0, 2**16), width=st.integers(1, 5))
def test_lengths_stay_the_same(seed, width):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 4, 2 * width, generator=rng)
    angles = rope_angles(torch.randint(0, 8192, (1, 4), generator=rng), 2 * width)
    # worst of 2,000 draws: 2e-7 relative; cos² + sin² off by 1e-4 shows as 5e-5
    torch.testing.assert_close(
        apply_rope(x, angles).norm(dim=-1), x.norm(dim=-1), rtol=2e-6, atol=1e-6
    )


def test_inside_laws_cannot_see_the_wrong_pairs():
    """Why an outside reference is needed: the fault keeps lengths and distances."""
    rng = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=rng)
    near, far = (score(neighbours, q, k, 9 + s, 4 + s) for s in (0, 100))
    torch.testing.assert_close(near, far, rtol=0, atol=5e-4)
    turned = neighbours(q, rope_angles(torch.tensor([[77]]), 16))
    torch.testing.assert_close(turned.norm(), q.norm())
    assert (near - score(apply_rope, q, k, 9, 4)).abs() > 0.1


def test_a_quarter_turn_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    angles = torch.tensor([[[math.pi / 2, math.pi]]])  # pair 0: 90°, pair 1: 180°
    want = torch.tensor([-3.0, -2.0, 1.0, -4.0]).view(1, 1, 1, 4)
    # float32 pi is off by 9e-8; rotating the other way is off by 6
    torch.testing.assert_close(apply_rope(x, angles), want, rtol=0, atol=2e-6)


def test_one_table_serves_every_row_and_head():
    """Rows with positions of their own: each turns by its own, all heads alike."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(1, 1, 3, 8, generator=rng).expand(2, 4, 3, 8)
    positions = torch.tensor([[0, 1, 2], [7, 7, 1]])
    y = rotate_pairs(x, rope_table(rope_angles(positions, 8)))
    for row, places in enumerate(positions):
        for t, place in enumerate(places):
            alone = apply_rope(x[:1, :1, t : t + 1], rope_angles(place.view(1, 1), 8))
            for head in range(4):
                assert torch.equal(y[row, head, t], alone[0, 0, 0])


def test_angles_keep_float32_accuracy_over_the_longest_sequence():
    positions = torch.arange(8192)[None]
    speeds = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    want = positions[0, :, None] * speeds
    error = (rope_angles(positions, 256)[0].double() - want).abs().max()
    # worst: 6e-4 rad near position 8,191 (float32 speeds, then one product);
    # bfloat16 positions and speeds: 39 rad
    assert rope_angles(positions, 256).dtype == torch.float32
    assert error < 5e-3


def test_bfloat16_vectors_are_turned_in_float32_and_cast_once():
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(1, 2, 6, 32, generator=rng).bfloat16()
    angles = rope_angles(torch.arange(6)[None] + 300, 32)
    want = apply_rope(x.float(), angles).bfloat16()
    got = apply_rope(x, angles)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_an_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="must be even to form pairs, got 7"):
        rope_angles(torch.tensor([[0]]), head_dim=7)
