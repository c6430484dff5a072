"""Masks: against tables written by hand, a slow loop, and the published model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pali.attention import attend_written_out
from pali.decoder import Decoder, DecoderConfig
from pali.masks import (
    cached_mask,
    causal_mask,
    prefix_lm_mask,
    token_positions,
    window_mask,
)
from reference import GROUPED, NARROW_WINDOW, PALIGEMMA_1, PALIGEMMA_2, reference, rows


def table(text):
    """A mask drawn with 1 and ., one row a line."""
    lines = text.split()
    return torch.tensor([[cell == "1" for cell in line] for line in lines])


def bits(text):
    """One row of flags, bool[1, T]."""
    return table(text)


@pytest.mark.parametrize(
    ("valid", "suffix", "drawn"),
    [
        pytest.param(
            "11111", ".....",
            """11111
               11111
               11111
               11111
               11111""",
            id="a question alone",
        ),
        pytest.param(
            "11111", "11111",
            """1....
               11...
               111..
               1111.
               11111""",
            id="an answer alone",
        ),
        pytest.param(
            "11111", "...11",
            """111..
               111..
               111..
               1111.
               11111""",
            id="question and answer",
        ),
        pytest.param(
            ".1111", "...11",
            """111..
               .11..
               .11..
               .111.
               .1111""",
            id="padded left",
        ),
        pytest.param(
            "1111.", "..11.",
            """11...
               11...
               111..
               1111.
               11111""",
            id="padded right",
        ),
        pytest.param(
            "11.11", "...11",
            """11...
               11...
               111..
               11.1.
               11.11""",
            id="padded between question and answer",
        ),
    ],
)  # fmt: skip
def test_prefix_lm_mask_is_the_table_drawn_by_hand(valid, suffix, drawn):
    got = prefix_lm_mask(bits(valid), bits(suffix))
    assert got.shape == (1, 1, 5, 5)
    assert torch.equal(got[0, 0], table(drawn))


def test_causal_mask_is_the_table_drawn_by_hand():
    drawn = table("1.... 11... 111.. 1111. 11111")
    assert torch.equal(causal_mask(5)[0, 0], drawn)


@pytest.mark.parametrize(
    ("valid", "past", "drawn"),
    [
        ("11111", 4, "11111"),
        ("11111", 3, "1111. 11111"),
        (".1111", 3, ".111. .1111"),
        ("11.11", 3, "11.1. 11.11"),
        ("1111.", 3, "1111. 11111"),  # a row that has ended still sees itself
        ("11111", 1, "11... 111.. 1111. 11111"),
    ],
)
def test_cached_mask_is_the_table_drawn_by_hand(valid, past, drawn):
    assert torch.equal(cached_mask(bits(valid), past)[0, 0], table(drawn))


@pytest.mark.parametrize(
    ("window", "drawn"),
    [
        (1, "11111 11111 11111 ...11 ....1"),
        (2, "11111 11111 11111 ..111 ...11"),
        (4, "11111 11111 11111 11111 .1111"),
        (5, "11111 11111 11111 11111 11111"),
    ],
)
def test_window_mask_is_the_table_drawn_by_hand(window, drawn):
    at = torch.arange(5)[None]
    got = window_mask(at, at, bits("...11"), window)
    assert torch.equal(got[0, 0], table(drawn))


def test_a_window_counts_positions_and_not_places():
    valid = bits("11.11")
    at = token_positions(valid)  # 0 1 1 2 3
    got = window_mask(at[:, 3:], at, bits("11"), 3)
    assert torch.equal(got[0, 0], table("11111 .1111"))


def flags(size):
    """Some rows of `size` flags."""
    row = st.lists(st.booleans(), min_size=size, max_size=size)
    return st.lists(row, min_size=1, max_size=3).map(torch.tensor)


@st.composite
def batches(draw):
    """valid and suffix of any kind, prefix and suffix mixed as they come."""
    T, B = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    numbers = st.lists(st.booleans(), min_size=B * T, max_size=B * T)
    valid, suffix = (torch.tensor(draw(numbers)).view(B, T) for _ in range(2))
    return valid, suffix


@given(batches())
def test_prefix_lm_mask_is_the_sentence_in_a_slow_loop(batch):
    valid, suffix = batch
    B, T = valid.shape
    got = prefix_lm_mask(valid, suffix)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                together = not suffix[b, i] and not suffix[b, j]
                may = bool(valid[b, j]) and (j <= i or together)
                assert got[b, 0, i, j] == (may or i == j)


@given(batches())
def test_every_row_sees_itself_and_attention_has_no_nan(batch):
    mask = prefix_lm_mask(*batch)
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    B, _, T, _ = mask.shape
    q = torch.randn(B, 2, T, 4, generator=torch.Generator().manual_seed(T))
    mixed, weights = attend_written_out(q, q, q, mask)
    assert mixed.isfinite().all()
    assert (weights[~mask.expand_as(weights)] == 0).all()


@given(batches(), st.data())
def test_one_more_suffix_token_never_lets_anybody_see_more(batch, data):
    valid, suffix = batch
    token = data.draw(st.integers(0, valid.shape[1] - 1))
    more = suffix.clone()
    more[:, token] = True
    before, after = prefix_lm_mask(valid, suffix), prefix_lm_mask(valid, more)
    assert not (after & ~before).any()


@given(batches(), st.data())
def test_one_more_padding_token_changes_its_own_column_only(batch, data):
    valid, suffix = batch
    token = data.draw(st.integers(0, valid.shape[1] - 1))
    less = valid.clone()
    less[:, token] = False
    before, after = prefix_lm_mask(valid, suffix), prefix_lm_mask(less, suffix)
    others = torch.arange(valid.shape[1]) != token
    assert torch.equal(before[..., others], after[..., others])
    hidden = torch.eye(valid.shape[1], dtype=torch.bool)[:, token]
    assert torch.equal(after[..., token], hidden.expand_as(after[..., token]))


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_cached_step_is_the_bottom_of_the_whole_mask(prefix, suffix, data):
    T = prefix + suffix
    valid = data.draw(flags(T))
    is_suffix = (torch.arange(T) >= prefix).expand_as(valid)
    whole = prefix_lm_mask(valid, is_suffix)
    for past in range(prefix, T):
        assert torch.equal(cached_mask(valid, past), whole[:, :, past:])


@given(batches(), st.integers(1, 8))
def test_a_window_keeps_suffix_rows_near_and_prefix_rows_whole(batch, window):
    valid, suffix = batch
    at = token_positions(valid)
    got = window_mask(at, at, suffix, window)
    B, T = valid.shape
    for b in range(B):
        for i in range(T):
            for j in range(T):
                near = int(at[b, i]) - int(at[b, j]) < window
                assert got[b, 0, i, j] == (near or not suffix[b, i])
    assert got.diagonal(dim1=-2, dim2=-1).all()


@given(flags(6), st.integers(0, 5))
def test_positions_count_the_real_tokens_of_each_row(valid, cut):
    got = token_positions(valid)
    for b, row in enumerate(valid.tolist()):
        count = 0
        for i, real in enumerate(row):
            if real:
                assert got[b, i] == count
                count += 1
    assert (got >= 0).all()
    seen = valid[:, :cut].sum(1)  # the same in two calls
    later = token_positions(valid[:, cut:], seen)
    real = valid[:, cut:]
    assert torch.equal(later[real], got[:, cut:][real])


# --- the published model ---


@torch.no_grad()
def published_masks(shape, batch, **more):
    """Where any head of a layer has weight: bool[layers, B, T, S]."""
    out = reference(shape)(
        input_ids=batch.ids, pixel_values=batch.pixels,
        attention_mask=batch.valid.long(), output_attentions=True, **more,
    )  # fmt: skip
    return torch.stack([(w > 0).any(dim=1) for w in out.attentions])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("suffix", [0, 12])
@pytest.mark.parametrize(
    "shape",
    [PALIGEMMA_1, GROUPED, PALIGEMMA_2, NARROW_WINDOW],
    ids=["gemma", "gemma-grouped", "gemma2", "gemma2-narrow-window"],
)
def test_the_published_model_looks_at_the_same_cells(shape, suffix, padding):
    batch = rows(shape, prompts=(3, 9), suffix=suffix, padding=padding)
    theirs = published_masks(shape, batch, token_type_ids=batch.suffix.long())
    whole = prefix_lm_mask(batch.valid, batch.suffix)
    at = token_positions(batch.valid)
    near = window_mask(at, at, batch.suffix, shape.window)
    for layer, cells in enumerate(theirs):
        slides = shape.kind == "gemma2" and layer % 2 == 0
        mine = (whole & near if slides else whole)[:, 0]
        assert torch.equal(mine[batch.valid], cells[batch.valid]), layer


# --- the faults of the chapter, and the checks that find them ---

WIDTH, IMAGE, PROMPT, ANSWER = 32, 4, 3, 4
LENGTH = IMAGE + PROMPT + ANSWER
ANSWERS = torch.arange(LENGTH)[None] >= IMAGE + PROMPT


def random_decoder(seed=0):
    config = DecoderConfig(
        vocab_size=60, width=WIDTH, num_layers=3, num_heads=4, num_kv_heads=1,
        head_dim=16, mlp_width=56, query_scale=0.25,
    )  # fmt: skip
    decoder = Decoder(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in decoder.named_parameters():
        std = 0.5 if "norm" in name else 0.02 if "embedding" in name else 0.3
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return decoder


DECODER = random_decoder()


def hidden_states(ids, mask, valid=None):
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    return DECODER(DECODER.embed(ids), token_positions(valid), mask)


def random_ids(length=LENGTH, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 60, (1, length), generator=generator)


def moved(mask, changed, watched):
    """How far some states move when other tokens are replaced."""
    ids, other = random_ids(), random_ids(seed=6)
    swapped = ids.clone()
    swapped[:, changed] = other[:, changed]
    gap = hidden_states(ids, mask) - hidden_states(swapped, mask)
    return gap[:, watched].abs().max().item()


ALL = torch.ones(1, LENGTH, dtype=torch.bool)
SOUND = prefix_lm_mask(ALL, ANSWERS)
OPEN_ANSWER = prefix_lm_mask(ALL, ~ALL)  # everybody sees everybody
CAUSAL_PREFIX = prefix_lm_mask(ALL, ALL)


@pytest.mark.parametrize(("mask", "leaks"), [(SOUND, False), (OPEN_ANSWER, True)])
def test_the_last_word_of_the_answer_moves_nothing_before_it(mask, leaks):
    # 20 draws, states of size 1: 0 when sound, at least 3 with the answer visible
    assert (moved(mask, changed=[-1], watched=slice(0, -1)) > 1e-3) == leaks


@pytest.mark.parametrize(("mask", "know"), [(SOUND, True), (CAUSAL_PREFIX, False)])
def test_patches_know_the_question(mask, know):
    question, patches = slice(IMAGE, IMAGE + PROMPT), slice(0, IMAGE)
    # 20 draws, states of size 1: at least 2.9 when sound, 0 with a causal prefix
    assert (moved(mask, changed=question, watched=patches) > 1e-3) == know


@settings(max_examples=30)
@given(
    padding=st.integers(1, 4),
    side=st.sampled_from(["left", "right"]),
    hidden=st.booleans(),
)
def test_a_padded_row_is_as_if_alone_only_if_padding_is_hidden(padding, side, hidden):
    ids, T = random_ids(), LENGTH + padding
    start = padding if side == "left" else 0
    place = slice(start, start + LENGTH)
    long, valid = torch.zeros(1, T).long(), torch.zeros(1, T).bool()
    suffix = torch.zeros(1, T).bool()
    long[:, place], valid[:, place], suffix[:, place] = ids, True, ANSWERS
    mask = prefix_lm_mask(valid if hidden else torch.ones_like(valid), suffix)
    padded = hidden_states(long, mask, valid)[:, place]
    gap = (padded - hidden_states(ids, SOUND)).abs().max()
    # 160 draws, states of size 1: at most 1.2e-5 when hidden, at least 1.2 when visible
    assert gap < 1e-4 if hidden else gap > 0.1
