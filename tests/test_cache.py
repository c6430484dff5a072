"""The cache against the same computation without one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pali
from pali.cache import Cache
from pali.decoder import Decoder, DecoderConfig
from pali.paligemma import DECODERS
from pali.rope import apply_rope, rope_angles
from pali.vision import VisionConfig

PREFIX, SUFFIX = 5, 7
LENGTH = PREFIX + SUFFIX
SMALL = DecoderConfig(
    vocab_size=60, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    mlp_width=56, query_scale=0.25,
)  # fmt: skip
# Worst of 150 draws 1.1e-6 at logits of spread 0.12; the smallest fault below 0.02.
ATOL = 1e-5


def random_weights(module, seed=0, small=0.3):
    """Draw every weight anew, norms included, so that a fault shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        std = 0.5 if "norm" in name else 0.02 if "embedding" in name else small
        weight.data = torch.randn(weight.shape, generator=generator) * std
    return module.eval().requires_grad_(False)


DECODER = random_weights(Decoder(SMALL))
IDS = torch.randint(0, 60, (2, LENGTH), generator=torch.Generator().manual_seed(7))


def who_sees_whom(length=LENGTH):
    """Prefix sees prefix, suffix looks back: by the sentence, with a loop."""
    rows = [
        [(i < PREFIX and j < PREFIX) or j <= i for j in range(length)]
        for i in range(length)
    ]
    return torch.tensor(rows).expand(2, 1, length, length)


def whole(length=LENGTH, mask=None):
    """Logits without a cache."""
    at = torch.arange(length).expand(2, length)
    mask = who_sees_whom(length) if mask is None else mask
    return DECODER.logits(DECODER(DECODER.embed(IDS[:, :length]), at, mask))


def read(cache, start, end, positions=None, mask=None):
    """Logits of tokens start to end; the cache holds those before."""
    T, past = end - start, cache.length
    if positions is None:
        positions = torch.arange(start, end)
    if mask is None:
        mask = who_sees_whom()[:, :, start:end, : past + T]
    positions = positions.expand(2, T)
    cache.begin(torch.ones(2, T, dtype=torch.bool), positions)
    x = DECODER.embed(IDS[:, start:end])
    return DECODER.logits(DECODER(x, positions, mask, cache))


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, SUFFIX - 1), max_size=5))
def test_any_split_of_the_suffix_gives_the_logits_of_the_whole(cuts):
    cache = Cache(SMALL, 2, LENGTH)
    edges = [PREFIX, *sorted(PREFIX + cut for cut in set(cuts)), LENGTH]
    parts = [read(cache, 0, PREFIX)]
    parts += [read(cache, a, b) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.cat(parts, 1), whole(), rtol=0, atol=ATOL)


def test_a_prefix_cut_in_two_is_another_question():
    cache = Cache(SMALL, 2, LENGTH)
    read(cache, 0, 2)
    gap = (read(cache, 2, PREFIX) - whole()[:, 2:PREFIX]).abs().max()
    assert gap > 100 * ATOL


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), room=st.integers(0, 3)
)
def test_a_layer_gets_back_all_it_has_written_in_order(sizes, room):
    generator = torch.Generator().manual_seed(sum(sizes))
    pieces = [torch.randn(2, 2, 2, n, 4, generator=generator) for n in sizes]
    cache = Cache(SMALL, 2, sum(sizes) + room)
    for n, (k, v) in enumerate(pieces, 1):
        T = k.shape[2]
        cache.begin(torch.ones(2, T, dtype=torch.bool), torch.zeros(2, T).long())
        for layer in range(3):
            got_k, got_v = cache.layer(layer)(k + layer, v - layer)
            want_k = torch.cat([k for k, _ in pieces[:n]], dim=2)
            want_v = torch.cat([v for _, v in pieces[:n]], dim=2)
            assert torch.equal(got_k, want_k + layer)
            assert torch.equal(got_v, want_v - layer)


def test_buffers_are_made_once_and_never_copied():
    cache = Cache(SMALL, 2, LENGTH)
    read(cache, 0, PREFIX)
    places = [t.data_ptr() for t in cache.keys + cache.values]
    for i in range(PREFIX, LENGTH):
        read(cache, i, i + 1)
    assert [t.data_ptr() for t in cache.keys + cache.values] == places
    cache.begin(torch.ones(2, 0, dtype=torch.bool), torch.zeros(2, 0).long())
    k, _ = cache.layer(1)(torch.empty(2, 2, 0, 16), torch.empty(2, 2, 0, 16))
    assert k.data_ptr() == places[1], "what a layer gets is a view"


def layer_keys(length, mask):
    """Keys of each layer before rotation, from what entered the layer."""
    trace, at = {}, torch.arange(length).expand(2, length)
    DECODER(DECODER.embed(IDS[:, :length]), at, mask, trace=trace)
    inputs = [trace["decoder.embedded"]]
    inputs += [trace[f"decoder.{i}.residual"] for i in range(2)]
    return [
        block.attention.key(block.attention_norm(x))
        for block, x in zip(DECODER.blocks, inputs, strict=True)
    ]


@pytest.mark.parametrize(
    ("looks_back", "stay"), [(True, [1, 1, 1]), (False, [1, 0, 0])]
)
def test_old_keys_stay_only_if_nobody_looks_ahead(looks_back, stay):
    masks = [who_sees_whom(n) for n in (LENGTH - 1, LENGTH)]
    if not looks_back:
        masks = [torch.ones_like(m) for m in masks]
    before, after = layer_keys(LENGTH - 1, masks[0]), layer_keys(LENGTH, masks[1])
    for old, new, same in zip(before, after, stay, strict=True):
        gap = (new[:, :-1] - old).abs().max()  # keys of spread 2
        assert gap < 1e-4 if same else gap > 1e-2


# --- the four faults of the chapter, and the test that finds them ---


def sound(cache, i):
    return read(cache, i, i + 1)


def wrong_corner(cache, i):
    mask = torch.ones(2, 1, 1, cache.length + 1).bool().tril()
    return read(cache, i, i + 1, mask=mask)


def position_zero(cache, i):
    return read(cache, i, i + 1, positions=torch.zeros(1).long())


def everything_again(cache, i):
    past, T = cache.length, i + 1
    mask = torch.ones(2, 1, T, past + T).bool().tril(past)
    return read(cache, 0, T, mask=mask)


def turned_again(cache, i):
    old = slice(0, cache.length)
    angles = rope_angles(cache.positions[:, old], SMALL.head_dim)
    for keys in cache.keys:
        keys[:, :, old] = apply_rope(keys[:, :, old], angles)
    return read(cache, i, i + 1)


def cached_equals_whole(step, tokens):
    """The check of the chapter: prefill, then so many tokens."""
    cache = Cache(SMALL, 2, 5 * LENGTH)
    got = [read(cache, 0, PREFIX)[:, -1]]
    got += [step(cache, PREFIX + n)[:, -1] for n in range(tokens)]
    want = whole()[:, PREFIX - 1 : PREFIX + tokens].transpose(0, 1)
    return bool((torch.stack(got) - want).abs().max() < ATOL)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize(
    "fault", [wrong_corner, position_zero, everything_again, turned_again]
)
def test_the_check_rejects_each_fault_but_not_from_the_prefill(fault, tokens):
    assert cached_equals_whole(sound, tokens)
    assert cached_equals_whole(fault, tokens) == (tokens == 0)


def test_the_length_of_the_cache_tells_that_everything_came_again():
    lengths = {}
    for step in (sound, everything_again):
        cache = Cache(SMALL, 2, 5 * LENGTH)
        read(cache, 0, PREFIX)
        lengths[step] = [step(cache, PREFIX + n) is not None and cache.length
                         for n in range(3)]  # fmt: skip
    assert lengths[sound] == [6, 7, 8]
    assert lengths[everything_again] == [11, 18, 26]


# --- padding ---

TINY = pali.PaliGemmaConfig(
    VisionConfig(image_size=8, patch_size=4, width=16, num_layers=1, num_heads=2,
                 mlp_width=24),
    SMALL, image_id=59,
)  # fmt: skip
MODEL = random_weights(pali.PaliGemma(TINY), small=0.25)


def questions(prompts, padding):
    """Ids and valid of pictures (4 patches) with prompts, padded."""
    T = 4 + max(map(len, prompts))
    ids, valid = (
        torch.zeros(len(prompts), T).long(),
        torch.zeros(len(prompts), T).bool(),
    )
    for row, prompt in enumerate(prompts):
        full = torch.tensor([59] * 4 + prompt)
        place = slice(T - len(full), T) if padding == "left" else slice(0, len(full))
        ids[row, place], valid[row, place] = full, True
    return ids, valid


@settings(max_examples=30)
@given(
    prompts=st.lists(
        st.lists(st.integers(1, 58), min_size=1, max_size=5), min_size=2, max_size=3
    ),
    padding=st.sampled_from(["left", "right"]),
)
def test_a_row_is_answered_as_if_it_were_alone(prompts, padding):
    generator = torch.Generator().manual_seed(len(prompts))
    pixels = torch.rand(len(prompts), 3, 8, 8, generator=generator) * 2 - 1
    answer = torch.randint(1, 58, (len(prompts), 3), generator=generator)

    def logits(rows, side):
        ids, valid = questions([prompts[r] for r in rows], side)
        cache = Cache(TINY, len(rows), ids.shape[1] + 3)
        first = MODEL(pixels[rows], ids, valid=valid, cache=cache, last_only=True)
        steps = [MODEL(None, answer[rows, i : i + 1], cache=cache) for i in range(3)]
        return torch.cat([first, *steps], dim=1)

    together = logits(list(range(len(prompts))), padding)
    for row in range(len(prompts)):
        alone = logits([row], "left")
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=ATOL)


@given(rows=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1,
                     max_size=3))  # fmt: skip
def test_the_next_position_of_a_row_is_its_number_of_real_tokens(rows):
    cache = Cache(SMALL, len(rows), 6)
    valid = torch.tensor(rows)
    cache.begin(valid[:, :3], torch.zeros(len(rows), 3).long())
    cache.begin(valid[:, 3:], torch.zeros(len(rows), 1).long())
    assert cache.next_positions().tolist() == [sum(row) for row in rows]
    assert torch.equal(cache.valid[:, :4], valid)
    assert not cache.valid[:, 4:].any()


# --- size ---


@pytest.mark.parametrize(("start", "more"), [(6, 5), (1, 11), (10, 1)])
def test_overflow_is_refused_and_leaves_the_books_alone(start, more):
    cache = Cache(SMALL, 2, 10)
    cache.begin(torch.ones(2, start, dtype=torch.bool), torch.zeros(2, start).long())
    with pytest.raises(ValueError, match=rf"10 tokens; 2 rows of {start} \+ {more}"):
        cache.begin(torch.ones(2, more, dtype=torch.bool), torch.zeros(2, more).long())
    assert cache.length == start
    assert cache.next_positions().tolist() == [start, start]


def test_another_number_of_rows_is_refused():
    cache = Cache(SMALL, 2, 10)
    with pytest.raises(ValueError, match="2 rows of 10 tokens; 3 rows"):
        cache.begin(torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1).long())


@pytest.mark.parametrize(("rows", "capacity"), [(0, 5), (2, 0), (-1, 5), (2, -3)])
def test_a_cache_without_room_is_refused(rows, capacity):
    with pytest.raises(ValueError, match=f"not {rows} x {capacity}"):
        Cache(SMALL, rows, capacity)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("paligemma-3b", 18_432),
        ("paligemma2-3b", 106_496),
        ("paligemma2-10b", 344_064),
        ("paligemma2-28b", 376_832),
    ],
)
def test_a_token_costs_what_the_published_sizes_say(name, size):
    config = DECODERS[name]
    cache = Cache(pali.PaliGemmaConfig(decoder=config), 1, 3)
    assert cache.nbytes() == 0
    cache.begin(torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2).long())
    new = torch.empty(
        1, config.num_kv_heads, 2, config.head_dim, dtype=torch.bfloat16, device="meta"
    )
    for layer in range(config.num_layers):
        cache.layer(layer)(new, new)
    assert cache.nbytes() == 3 * size  # all of the capacity, written or not


@pytest.mark.parametrize("count_from", [1, 7])
def test_counting_from_another_number_changes_keys_and_no_answer(count_from):
    """As the published code counts from 1: its cache holds other keys."""
    caches, logits = [], []
    for first in (0, count_from):
        cache = Cache(SMALL, 2, LENGTH)
        at = torch.arange(LENGTH) + first
        parts = [read(cache, 0, PREFIX, positions=at[:PREFIX])]
        for i in range(PREFIX, LENGTH):
            parts.append(read(cache, i, i + 1, positions=at[i : i + 1]))
        caches.append(cache)
        logits.append(torch.cat(parts, dim=1))
    # worst of 200 draws 3e-6; the faults above: at least 0.02
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=3e-5)
    further = rope_angles(torch.full((1, LENGTH), count_from), SMALL.head_dim)
    for layer in range(SMALL.num_layers):
        here, there = (cache.keys[layer] for cache in caches)
        # keys of spread 2; worst of 200 draws 2.1e-5, unturned at least 3
        torch.testing.assert_close(apply_rope(here, further), there, rtol=0, atol=2e-4)
        assert (here - there).abs().max() > 0.3
