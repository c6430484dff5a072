"""Grouped-query attention against a loop over heads, PyTorch and published Gemma."""

from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaAttention

import pali.gqa
from pali.attention import attend
from pali.gqa import GroupedQueryAttention, attend_grouped, repeat_heads
from pali.rope import rope_angles, rope_table

NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}


def draw(heads=8, kv_heads=2, T=5, S=7, seed=0, dtype=torch.float32):
    """Queries, keys, values and a mask of its own for each of two rows."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, T, 16, generator=rng, dtype=dtype)
    k, v = torch.randn(2, 2, kv_heads, S, 16, generator=rng, dtype=dtype)
    mask = torch.rand(2, 1, T, S, generator=rng) < 0.6
    mask[..., 0] = True
    return q, k, v, mask


def by_hand(q, k, v, mask=None, scale=None, softcap=None):
    """Head by head, row by row of the batch, in double precision."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    maps = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            own_k, own_v = (t[b, i // groups].double() for t in (k, v))
            s = q[b, i].double() @ own_k.T * (scale or q.shape[-1] ** -0.5)
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            s = s if mask is None else s.masked_fill(~mask[b, 0], float("-inf"))
            maps[b, i] = s.softmax(dim=-1)
            out[b, i] = maps[b, i] @ own_v
    return out, maps


def tiled(q, k, v, mask=None, **options):
    """The chapter's fault: query head i asks head i % K."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat(1, groups, 1, 1) for t in (k, v))
    return attend(q, k, v, mask, **options)


# worst of 300 draws, all sizes below: 7e-7 in float32; tiled keys: 1.5 at least
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_folded_attention_is_a_loop_over_heads(kv_heads, T, masked):
    q, k, v, mask = draw(kv_heads=kv_heads, T=T)
    mask = mask if masked else None
    want, _ = by_hand(q, k, v, mask)
    torch.testing.assert_close(attend_grouped(q, k, v, mask), want.float(), **CLOSE)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scale_and_soft_cap_reach_the_scores(kv_heads):
    q, k, v, mask = draw(kv_heads=kv_heads, seed=1)
    want, _ = by_hand(q, k, v, mask, scale=0.7, softcap=2.0)
    got = attend_grouped(q, k, v, mask, scale=0.7, softcap=2.0)
    # without the cap: 0.5 away at least; with the default scale: 0.4
    torch.testing.assert_close(got, want.float(), **CLOSE)


def test_folded_attention_agrees_with_pytorch():
    q, k, v, mask = draw(heads=6, kv_heads=3, seed=2)
    want = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(attend_grouped(q, k, v, mask), want, **CLOSE)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_repeated_heads_give_the_same_as_folded_queries(kv_heads):
    q, k, v, mask = draw(kv_heads=kv_heads, seed=3)
    groups = 8 // kv_heads
    plain = attend(q, repeat_heads(k, groups), repeat_heads(v, groups), mask)
    torch.testing.assert_close(attend_grouped(q, k, v, mask), plain, **CLOSE)


def test_each_key_head_stands_in_a_row():
    heads = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    assert repeat_heads(heads, 3).flatten().tolist() == [3, 3, 3, 5, 5, 5]


@pytest.mark.parametrize("T", [1, 5])
def test_the_trace_holds_one_map_for_each_query_head(T):
    q, k, v, mask = draw(T=T, seed=4)
    trace = {}
    y = attend_grouped(q, k, v, mask, trace=trace, name="layer")
    want, maps = by_hand(q, k, v, mask)
    assert list(trace) == ["layer.attention"]
    torch.testing.assert_close(trace["layer.attention"], maps.float(), **CLOSE)
    torch.testing.assert_close(y, want.float(), **CLOSE)


def test_keys_and_values_are_neither_repeated_nor_copied():
    q, k, v, mask = draw()
    with mock.patch.object(pali.gqa, "attend", wraps=attend) as spy:
        attend_grouped(q, k, v, mask)
    _, got_k, got_v, _ = spy.call_args.args
    assert got_k is k and got_v is v


def test_the_order_of_keys_does_not_matter():
    q, k, v, mask = draw(seed=5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    moved = attend_grouped(q, k[:, :, order], v[:, :, order], mask[..., order])
    torch.testing.assert_close(attend_grouped(q, k, v, mask), moved, **CLOSE)


# ------------------------------------------------------------------ the fault


@pytest.mark.parametrize(
    "kv_heads, right",
    [(8, range(8)), (4, [0, 7]), (2, [0, 2, 5, 7]), (1, range(8))],
)
def test_tiling_is_right_by_luck_for_these_heads(kv_heads, right):
    q, k, v, mask = draw(kv_heads=kv_heads, seed=6)
    want, _ = by_hand(q, k, v, mask)
    gap = (tiled(q, k, v, mask) - want).abs().amax(dim=(0, 2, 3))
    assert (gap < 1e-5).nonzero().flatten().tolist() == list(right)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_comparison_with_gemma_rejects_tiling(kv_heads):
    with (
        mock.patch.object(pali.gqa, "attend_grouped", tiled),
        pytest.raises(AssertionError),
    ):
        check_against_gemma(kv_heads)


def test_one_key_head_hides_the_fault():
    with mock.patch.object(pali.gqa, "attend_grouped", tiled):
        check_against_gemma(1)


# ------------------------------------------------------------------ the layer


def layer_and_reference(kv_heads, seed=0, head_dim=16):
    """Our layer and the published one, width 48, the same random weights."""
    theirs = GemmaAttention(
        GemmaConfig(
            hidden_size=48,
            num_attention_heads=8,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            attn_implementation="eager",
        ),
        layer_idx=0,
    )
    ours = GroupedQueryAttention(48, 8, kv_heads, head_dim)
    rng = torch.Generator().manual_seed(seed)
    for a, b in NAMES.items():
        mine, other = getattr(ours, a).weight, getattr(theirs, b).weight
        assert mine.shape == other.shape
        mine.data = torch.randn(mine.shape, generator=rng) * 0.2
        other.data = mine.data
    return ours.requires_grad_(False), theirs.requires_grad_(False), rng


def check_against_gemma(kv_heads, seed=0, head_dim=16):
    ours, theirs, rng = layer_and_reference(kv_heads, seed, head_dim)
    x = torch.randn(2, 9, 48, generator=rng)
    mask = torch.rand(2, 1, 9, 9, generator=rng) < 0.5
    mask = mask | torch.eye(9, dtype=torch.bool)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min)
    cos, sin = rope_table(rope_angles(torch.arange(9)[None] + 30, head_dim))
    twice = tuple(torch.cat((t, t), dim=-1)[:, 0] for t in (cos, sin))
    want, _ = theirs(x, position_embeddings=twice, attention_mask=bias)
    # worst of 200 draws: 3e-6, outputs reach 13; tiled keys: 6 at least
    torch.testing.assert_close(ours(x, (cos, sin), mask), want, rtol=0, atol=4e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [6, 16])
def test_the_layer_agrees_with_published_gemma(kv_heads, head_dim):
    check_against_gemma(kv_heads, head_dim=head_dim)


def test_a_shift_of_all_positions_changes_nothing():
    """Rotated values would keep every weight and move every output."""
    ours, _, rng = layer_and_reference(2)
    x = torch.randn(1, 6, 48, generator=rng)
    tables = [rope_table(rope_angles(torch.arange(6)[None] + s, 16)) for s in (0, 99)]
    near, far = (ours(x, table) for table in tables)
    # worst of 200 draws: 2e-5; with rotated values: 6 at least
    torch.testing.assert_close(near, far, rtol=0, atol=2e-4)


def test_the_cache_is_given_rotated_keys_and_its_answer_is_used():
    ours, _, rng = layer_and_reference(2)
    x = torch.randn(1, 6, 48, generator=rng)
    cos, sin = rope_table(rope_angles(torch.arange(6)[None], 16))
    stored = []

    def cache(k, v):
        assert k.shape == v.shape == (1, 2, k.shape[2], 16)  # key heads, not query
        stored.append((k, v))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*stored, strict=True))

    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    whole = ours(x, (cos, sin), mask)
    parts = [
        ours(x[:, a:b], (cos[:, :, a:b], sin[:, :, a:b]), mask[:, :, a:b, :b], cache)
        for a, b in ((0, 4), (4, 5), (5, 6))
    ]
    # worst of 200 draws: 5e-6; keys rotated again after the cache: 3 at least
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=5e-5)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="8 query heads cannot share 3 key/value"):
        GroupedQueryAttention(48, 8, 3, 16)
