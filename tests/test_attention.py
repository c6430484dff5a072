"""attention: equal to PyTorch's fused kernel and layer, and to a slow loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pali.attention import (
    MultiHeadAttention,
    attend,
    attend_written_out,
    merge_heads,
    softmax,
    split_heads,
)


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_mask(T, S, seed=0):
    """Half of the cells, and in every row at least one."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(T, S, generator=generator) < 0.5
    mask[torch.arange(T), torch.arange(T) % S] = True
    return mask


def attend_with_loops(q, k, v, mask, scale, softcap=None):
    """One number at a time, in Python floats (64 bit)."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])):
        scores = []
        for s in range(k.shape[2]):
            product = sum(
                x * y
                for x, y in zip(q[b, h, t].tolist(), k[b, h, s].tolist(), strict=True)
            )
            score = product * scale
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            scores.append(score if mask[t, s] else -math.inf)
        powers = [math.exp(score - max(scores)) for score in scores]
        for s, power in enumerate(powers):
            out[b, h, t] += power / sum(powers) * v[b, h, s].double()
    return out


axis = st.integers(1, 5)


@settings(max_examples=20)
@given(B=axis, T=axis, S=axis, Dh=axis, seed=st.integers(0, 999))
def test_written_out_attention_is_the_formula_number_by_number(B, T, S, Dh, seed):
    q, k, v = (random(B, 2, n, Dh, seed=seed + n) for n in (T, S, S))
    mask = random_mask(T, S, seed)
    got, _ = attend_written_out(q, k, v, mask)
    want = attend_with_loops(q, k, v, mask, Dh**-0.5)
    # worst of 300 draws: 4e-7; scale of twice the width: 0.1 in the median
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def test_scale_and_soft_cap_act_before_the_mask():
    q, k, v = (random(1, 2, 4, 8, seed=n) * 3 for n in range(3))
    mask = random_mask(4, 4)
    got, weights = attend_written_out(q, k, v, mask, scale=0.7, softcap=2.0)
    want = attend_with_loops(q, k, v, mask, 0.7, 2.0)
    # measured 8e-7; the cap after the mask lets forbidden cells in: 1 and more
    torch.testing.assert_close(got.double(), want, rtol=0, atol=8e-6)
    assert (weights[..., ~mask] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T, S", [(50, 50), (1, 300), (256, 256)])
def test_fused_and_written_out_attention_agree(T, S, masked):
    q, k, v = (random(2, 4, n, 16, seed=n) for n in (T, S, S + 1))
    v = v[:, :, :S]
    mask = random_mask(T, S) if masked else None
    fused = attend(q, k, v, mask)
    trace = {}
    written = attend(q, k, v, mask, trace=trace, name="here")
    # worst of 110 draws: 1.4e-6; one wrong cell of the mask: 1.2 and more
    torch.testing.assert_close(fused, written, rtol=0, atol=1e-5)
    assert list(trace) == ["here.attention"]


def test_a_trace_holds_the_weights_that_made_the_answer_with_their_graph():
    q, k, v = (random(1, 2, 5, 8, seed=n).requires_grad_() for n in range(3))
    trace = {}
    y = attend(q, k, v, trace=trace, name="vision.3")
    weights = trace["vision.3.attention"]
    # the same product, so equal up to the blocking of the kernel: measured 0
    torch.testing.assert_close(weights @ v, y, rtol=0, atol=1e-6)
    gradient = torch.autograd.grad(weights[0, 0, 0, 0], q)[0]
    assert gradient[0, 0, 0].abs().max() > 0


@given(seed=st.integers(0, 999), T=axis, S=axis)
def test_rows_of_weights_sum_to_1_and_forbidden_cells_are_exactly_0(seed, T, S):
    q, k, v = (random(1, 2, n, 4, seed=seed + n) for n in (T, S, S))
    mask = random_mask(T, S, seed)
    _, weights = attend_written_out(q, k, v, mask)
    # worst of 1,000 draws: 2e-7; softmax over the queries instead: 0.1 and more
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, T), rtol=0, atol=2e-6)
    assert (weights[..., ~mask] == 0).all()


def test_the_check_of_the_row_sums_rejects_softmax_over_the_queries():
    scores = random(4, 4)
    assert (softmax(scores, dim=0).sum(-1) - 1).abs().max() > 0.1


def test_both_checks_of_a_mask_are_needed_to_reject_the_usual_slips():
    scores, mask = random(6, 6), random_mask(6, 6)
    added = softmax(scores + mask.float())  # 1 and 0 as an additive mask
    zeroed = softmax(scores) * mask  # cut away after the softmax
    assert (added[~mask] > 0).all(), "forbidden cells find this one"
    assert torch.allclose(added.sum(-1), torch.ones(6), atol=1e-6)
    assert (zeroed[~mask] == 0).all()
    # half of the cells are cut: what is left sums to 0.59 to 0.79 here
    assert (zeroed.sum(-1) < 0.95).all(), "the sums of rows find this one"


def test_permuting_keys_and_values_together_changes_nothing():
    q, k, v = (random(1, 2, 6, 8, seed=n) for n in range(3))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    got = attend(q, k[:, :, order], v[:, :, order])
    # worst of 200 draws: 5e-7; permuting the values alone: 1
    torch.testing.assert_close(got, attend(q, k, v), rtol=0, atol=5e-6)


# -- softmax -------------------------------------------------------------------


@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 999))
def test_softmax_is_the_formula_and_ignores_a_common_shift(shift, seed):
    scores = random(3, 7, seed=seed, dtype=torch.float64)
    want = scores.exp() / scores.exp().sum(-1, keepdim=True)
    moved = (scores.float() + shift) - shift  # what float32 keeps of the scores
    room = (moved - scores.float()).abs().max().item()
    # 500 draws: never beyond what the shift itself rounds away
    gap = (softmax(scores.float() + shift).double() - want).abs().max().item()
    assert gap <= 2 * room + 1e-6


def test_softmax_of_huge_scores_is_finite_along_every_axis():
    scores = random(4, 5) * 1e30
    for dim in (0, 1):
        weights = softmax(scores, dim)
        assert weights.isfinite().all()
        want = torch.nn.functional.one_hot(scores.argmax(dim), scores.shape[dim])
        want = want.T if dim == 0 else want
        assert torch.equal(weights, want.float())


def test_softmax_of_half_precision_is_computed_in_float32():
    scores = random(3, 300).bfloat16()
    got = softmax(scores)
    assert got.dtype == torch.float32
    # measured 4e-9; computed in bfloat16 the weights are off by 1e-4
    torch.testing.assert_close(got, scores.float().softmax(-1), rtol=0, atol=4e-8)


# -- heads ---------------------------------------------------------------------


def test_a_head_is_a_slice_of_the_width_of_every_token():
    x = random(2, 5, 12)
    heads = split_heads(x, 3)
    for head in range(3):
        assert torch.equal(heads[:, head], x[:, :, 4 * head : 4 * head + 4])


@given(B=axis, H=axis, T=axis, Dh=axis)
def test_merge_undoes_split(B, H, T, Dh):
    x = random(B, T, H * Dh)
    assert torch.equal(merge_heads(split_heads(x, H)), x)


def lit_tokens(merge):
    lit = torch.zeros(1, 2, 5, 4)
    lit[:, :, 3] = 1
    return merge(lit)[0].any(dim=1).nonzero().flatten().tolist()


def test_merging_keeps_tokens_apart_and_the_check_rejects_a_plain_reshape():
    assert lit_tokens(merge_heads) == [3]
    assert lit_tokens(lambda x: x.reshape(1, 5, 8)) != [3]


# -- the layer -------------------------------------------------------------------


def pair_of_layers(width, num_heads, seed=0, dtype=torch.float32):
    """Ours and PyTorch's with the same weights, none of them at a default."""
    ours = MultiHeadAttention(width, num_heads)
    theirs = nn.MultiheadAttention(width, num_heads, batch_first=True)
    with torch.no_grad():
        for i, parameter in enumerate(ours.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed + i) * 0.3)
        parts = (ours.query, ours.key, ours.value)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    return ours.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize("width, num_heads", [(32, 1), (32, 4), (48, 3), (24, 24)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_layer_equals_pytorchs_own(width, num_heads, masked):
    ours, theirs = pair_of_layers(width, num_heads)
    x = random(2, 9, width, seed=7)
    mask = random_mask(9, 9) if masked else None
    closed = None if mask is None else ~mask  # there True means forbidden
    want, weights = theirs(x, x, x, attn_mask=closed, average_attn_weights=False)
    trace = {}
    got = ours(x, mask, trace=trace, name="a")
    # worst of 200 draws: 8e-6 at outputs of spread 4; wrong scale: 2 and more
    torch.testing.assert_close(got, want, rtol=0, atol=8e-5)
    # worst of 200 draws: 6e-7
    torch.testing.assert_close(trace["a.attention"], weights, rtol=0, atol=6e-6)
    torch.testing.assert_close(ours(x, mask), want, rtol=0, atol=8e-5)  # fused


def test_the_comparison_rejects_a_scale_by_the_width_of_the_model():
    ours, theirs = pair_of_layers(32, 4)
    x = random(2, 9, 32, seed=7)
    with torch.no_grad():  # the same as 32 ** -0.5 in the place of 8 ** -0.5
        ours.query.weight *= 4**-0.5
        ours.query.bias *= 4**-0.5
    assert (ours(x) - theirs(x, x, x)[0]).abs().max() > 1


def test_the_comparison_rejects_heads_glued_without_the_transpose(monkeypatch):
    ours, theirs = pair_of_layers(32, 4)
    x = random(2, 9, 32, seed=7)

    def glued(y):
        return y.reshape(len(y), y.shape[2], -1)

    monkeypatch.setattr("pali.attention.merge_heads", glued)
    assert ours(x).shape == x.shape  # looks right
    # 12 seeds: 8.2 to 12.3, where rounding explains 8e-6
    assert (ours(x) - theirs(x, x, x)[0]).abs().max() > 1


def test_scores_of_unit_vectors_have_unit_spread_for_any_head_width():
    for Dh in (4, 64, 256):
        q, k = random(1, 1, 256, Dh, seed=1), random(1, 1, 256, Dh, seed=2)
        _, weights = attend_written_out(q, k, k)
        # the spread of log weights along a row is that of the scores
        spread = weights.log().std(dim=-1).mean().item()
        # 90 draws: 0.88 to 1.02; the width of a model with 4 heads: 0.5
        assert spread == pytest.approx(1, abs=0.2)


def test_the_layer_in_bfloat16_stays_close_to_float64():
    ours, _ = pair_of_layers(32, 4)
    x = random(2, 9, 32, seed=7)
    want = ours.double()(x.double())
    got = ours.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 2**-8 of values near 5 is 0.02, over four products;
    # 50 seeds: 0.03 to 0.1; scale by the model's width: 2 and more
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.5)


def test_shuffled_tokens_give_shuffled_answers():
    ours, _ = pair_of_layers(32, 4)
    x, order = random(1, 6, 32), torch.tensor([3, 0, 5, 1, 4, 2])
    # worst of 50 seeds: 2e-6; without the shuffle of the answers: 5
    torch.testing.assert_close(ours(x[:, order]), ours(x)[:, order], rtol=0, atol=2e-5)


def test_a_width_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="width 10 does not split into 4 heads"):
        MultiHeadAttention(10, 4)


def test_cross_check_with_the_function_behind_the_fused_kernel():
    q, k, v = (random(1, 2, 6, 8, seed=n) for n in range(3))
    want = F.scaled_dot_product_attention(q, k, v, random_mask(6, 6), scale=0.3)
    got, _ = attend_written_out(q, k, v, random_mask(6, 6), scale=0.3)
    # worst of 100 draws: 6e-7; the default scale of 0.35 instead: 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=6e-6)
