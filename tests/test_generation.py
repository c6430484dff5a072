"""Choosing tokens against `transformers` and by law; the loop against recomputing."""

import math
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import pali
import pali.paligemma
from pali import scenes
from pali.generation import (
    TextStream,
    check_sampling,
    generate,
    keep_top_k,
    keep_top_p,
    pick,
    steps,
)
from pali.masks import token_positions
from pali.tokens import EOS, PAD, Batch
from tiny import PATCHES, tiny_model, tiny_pixels, tiny_rows

# Choosing a token

TABLE = torch.tensor([[0.50, 0.25, 0.15, 0.07, 0.03]])


@pytest.mark.parametrize(
    ("p", "kept"), [(0.3, 1), (0.5, 1), (0.74, 2), (0.76, 3), (0.9, 3), (1.0, 5)]
)
def test_top_p_keeps_what_the_table_says(p, kept):
    # shuffled, so that an answer in sorted order would be noticed
    order = torch.tensor([3, 0, 4, 1, 2])
    got = keep_top_p(TABLE.log()[:, order], p).isfinite()[0]
    assert got.tolist() == (order < kept).tolist()


def drops_the_crossing_token(logits, p):
    """The fault of the chapter."""
    ordered, order = logits.sort(dim=-1, descending=True)
    over = ordered.softmax(-1).cumsum(dim=-1) > p
    over[:, 0] = False
    drop = torch.zeros_like(over).scatter(1, order, over)
    return logits.masked_fill(drop, float("-inf"))


def random_logits(seed: int, spread: float, rows: int = 3, size: int = 40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator) * spread


def kept_mass_reaches(keep, logits, p) -> bool:
    """The law: kept probability is at least p, and no kept token could be spared."""
    weights = logits.double().softmax(-1)
    kept = keep(logits, p).isfinite()
    mass = weights.where(kept, 0.0).sum(-1)
    least = weights.where(kept, 2.0).amin(-1)
    return bool((mass > p - 1e-5).all() and (mass - least < p + 1e-5).all())


@given(seed=st.integers(0, 2**16), spread=st.floats(0.1, 5), p=st.floats(0.01, 0.999))
def test_top_p_keeps_at_least_p_and_nothing_to_spare(seed, spread, p):
    assert kept_mass_reaches(keep_top_p, random_logits(seed, spread), p)


def test_the_law_of_top_p_notices_that_the_crossing_token_is_dropped():
    found = [
        not kept_mass_reaches(drops_the_crossing_token, random_logits(s, 2.0), 0.6)
        for s in range(50)
    ]
    assert sum(found) == 50


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**16),
    spread=st.floats(0.1, 5),
    p=st.floats(0.05, 0.99),
    k=st.integers(1, 60),
    temperature=st.floats(0.2, 3),
)
def test_what_is_drawn_from_equals_the_warpers_of_transformers(
    seed, spread, p, k, temperature
):
    logits = random_logits(seed, spread)
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)]
    )
    want = warpers(None, logits.clone()).softmax(-1)
    # where a sum falls on p within rounding, either set is right
    cumulative = want.sort(descending=True).values.cumsum(-1)
    scaled = TopKLogitsWarper(k)(None, logits / temperature).softmax(-1)
    sums = scaled.sort(descending=True).values.cumsum(-1)
    assume((sums - p).abs().min() > 1e-5 and cumulative.isfinite().all())
    seen = []

    def draw(weights, count, generator=None):
        seen.append(weights)
        return weights.argmax(dim=-1, keepdim=True)

    with patch("torch.multinomial", draw):
        pick(logits, temperature=temperature, top_k=k, top_p=p)
    # worst of 1000 draws: 1.2e-7; temperature after the cuts moves half of them by 0.1
    torch.testing.assert_close(seen[0], want, rtol=0, atol=2e-6)


def test_top_k_beyond_the_vocabulary_keeps_all():
    logits = random_logits(0, 1.0)
    assert keep_top_k(logits, 1000).equal(logits)


def test_ties_at_the_edge_of_top_k_stay_in():
    kept = keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]]), 2).isfinite()
    assert kept.tolist() == [[True, False, True, True, False]]


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9, 1e-40, 1e-310])
def test_a_temperature_near_zero_takes_the_best(temperature):
    logits = random_logits(1, 100.0)
    assert pick(logits, temperature=temperature).equal(logits.argmax(-1))


def test_greedy_is_the_same_in_bfloat16_input():
    logits = random_logits(2, 3.0).bfloat16()
    assert pick(logits).equal(logits.argmax(-1))


def test_draws_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    drawn = pick(TABLE.log().expand(n, -1), temperature=1.0, generator=generator)
    share = np.bincount(drawn.numpy(), minlength=5) / n
    # 4.5 standard deviations; temperature 1.1 moves the first share by 0.024
    allowed = 4.5 * np.sqrt(TABLE[0] * (1 - TABLE[0]) / n)
    assert (np.abs(share - TABLE[0].numpy()) < allowed.numpy()).all()


def test_draws_obey_the_cuts():
    generator = torch.Generator().manual_seed(0)
    many = TABLE.log().expand(500, -1)
    for options, limit in (({"top_k": 2}, 2), ({"top_p": 0.76}, 3)):
        drawn = pick(many, temperature=1.0, generator=generator, **options)
        assert set(drawn.tolist()) == set(range(limit))


def test_a_generator_makes_draws_repeatable_whatever_the_global_state():
    many = TABLE.log().expand(200, -1)

    def draw(seed, state):
        torch.manual_seed(state)
        generator = torch.Generator().manual_seed(seed)
        return pick(many, temperature=1.0, generator=generator)

    assert draw(5, 1).equal(draw(5, 2))
    assert not draw(5, 1).equal(draw(6, 1))


BAD_NUMBERS = {
    "no new token": ((0, 0.0, None, None), "max_new_tokens must be 1 or more"),
    "half a token": ((1.5, 0.0, None, None), "max_new_tokens"),
    "tokens as text": (("9", 0.0, None, None), "max_new_tokens"),
    "true tokens": ((True, 0.0, None, None), "max_new_tokens"),
    "cold": ((9, -0.1, None, None), "temperature must be 0 or more"),
    "infinitely hot": ((9, math.inf, None, None), "temperature"),
    "not a number": ((9, math.nan, None, None), "temperature"),
    "no temperature": ((9, None, None, None), "temperature"),
    "top 0": ((9, 1.0, 0, None), "top_k must be a whole number from 1"),
    "top 2.5": ((9, 1.0, 2.5, None), "top_k"),
    "p 0": ((9, 1.0, None, 0.0), "top_p must be above 0 and at most 1"),
    "p 90": ((9, 1.0, None, 90), "top_p"),
    "p not a number": ((9, 1.0, None, math.nan), "top_p"),
    "seed as text": ((9, 1.0, None, None, "a"), "seed must be a whole number"),
    "seed too large": ((9, 1.0, None, None, 2**64), "seed"),
    "seed below 0": ((9, 1.0, None, None, -1), "seed"),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_a_number_out_of_range_is_refused(name):
    numbers, says = BAD_NUMBERS[name]
    with pytest.raises(ValueError, match=says):
        check_sampling(*numbers)


def test_numbers_in_range_are_accepted_from_numpy_too():
    check_sampling(1, 0, None, None)
    check_sampling(np.int64(9), np.float32(0.5), np.int32(1), np.float64(1))
    check_sampling(9, 0.5, None, None, np.int64(3))


# The loop


WORDS = 108  # ids from here on are places and the mark of a picture


def make_batch(lengths, padding="left", seed=2):
    ids, valid = tiny_rows(lengths, padding, seed)
    pixels = tiny_pixels(len(lengths), seed)
    return Batch(pixels, ids, valid, torch.zeros_like(valid))


def recorded(model, batch, count, **options):
    """Tokens int64[B, n] and the logits float[B, n, V] they were chosen from."""
    rows = []

    def choose(logits):
        rows.append(logits)
        return logits[:, :WORDS].argmax(-1)

    tokens = list(steps(model, batch, count, choose, **options))
    return torch.stack(tokens, dim=1), torch.stack(rows, dim=1)


def recomputed(model, batch, count, answer_is_suffix=True):
    """The slow way, row by row: no padding, no cache, the prefix keeps its length."""
    all_tokens, all_rows = [], []
    for row in range(len(batch.ids)):
        ids = batch.ids[row : row + 1, batch.valid[row]]
        P, tokens, rows = ids.shape[1], [], []
        for _ in range(count):
            suffix = (torch.arange(ids.shape[1]) >= P)[None]
            suffix = suffix if answer_is_suffix else torch.zeros_like(suffix)
            logits = model(batch.pixels[row : row + 1], ids, suffix=suffix)[:, -1]
            tokens.append(logits[:, :WORDS].argmax(-1))
            rows.append(logits)
            ids = torch.cat([ids, tokens[-1][:, None]], dim=1)
        all_tokens.append(torch.cat(tokens))
        all_rows.append(torch.cat(rows))
    return torch.stack(all_tokens), torch.stack(all_rows)


MODELS = {
    "gemma": tiny_model("gemma"),
    "gemma2": tiny_model("gemma2"),
    "narrow window": tiny_model("gemma2", sliding_window=6),
    "one key/value head": tiny_model("gemma", num_kv_heads=1),
}
# Logits have a spread of about 0.12.
ATOL = 3e-5


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loop_equals_recomputing_everything(name, padding):
    model, batch = MODELS[name], make_batch([3, 11, 6], padding)
    tokens, logits = recorded(model, batch, 12, stop=None)
    want_tokens, want = recomputed(model, batch, 12)
    # worst of 400 cases: 3.0e-6; a position off by one moves logits by 0.09 and more
    torch.testing.assert_close(logits, want, rtol=0, atol=ATOL)
    assert tokens.equal(want_tokens)
    assert len(set(tokens[0].tolist())) > 3  # it does not repeat one token


def new_tokens_at_zero(valid, past=None):
    return token_positions(valid, None if past is None else torch.zeros_like(past))


def one_place_off(valid, past=None):
    return token_positions(valid, None if past is None else past + 1)


@pytest.mark.parametrize("fault", [new_tokens_at_zero, one_place_off])
@pytest.mark.parametrize("name", MODELS)
def test_the_comparison_notices_wrong_positions_after_a_right_first_token(name, fault):
    model, batch = MODELS[name], make_batch([3, 11])
    with patch.object(pali.paligemma, "token_positions", fault):
        _, logits = recorded(model, batch, 4, stop=None)
    _, want = recomputed(model, batch, 4)
    gaps = (logits - want).abs().amax(dim=(0, 2))
    assert gaps[0] < ATOL
    assert gaps[1] > 100 * ATOL


def test_recomputing_with_the_answer_as_prefix_is_another_model():
    model, batch = MODELS["gemma"], make_batch([3, 11])
    _, want = recomputed(model, batch, 4)
    _, leaky = recomputed(model, batch, 4, answer_is_suffix=False)
    gaps = (leaky - want).abs().amax(dim=(0, 2))
    assert gaps[0] < ATOL
    assert gaps[2] > 1e-3


@contextmanager
def counted(model):
    runs = []
    handle = model.vision.register_forward_hook(lambda *_: runs.append(1))
    yield runs
    handle.remove()


def test_the_pictures_are_encoded_once():
    model, batch = MODELS["gemma"], make_batch([3, 11, 6])
    with counted(model) as runs:
        recorded(model, batch, 10, stop=None)
    assert len(runs) == 1


def test_each_step_after_the_first_reads_one_token_a_row():
    model, batch = MODELS["gemma"], make_batch([3, 11])
    widths = []
    handle = model.decoder.register_forward_pre_hook(
        lambda _, inputs: widths.append(inputs[0].shape[1])
    )
    recorded(model, batch, 5, stop=None)
    handle.remove()
    assert widths == [batch.ids.shape[1], 1, 1, 1, 1]


def scripted(script):
    """A choice that follows a script, int[rows, steps], whatever the logits say."""
    columns = iter(torch.tensor(script).T)
    return lambda logits: next(columns)


def test_a_row_that_has_ended_gets_padding_and_the_others_go_on():
    model, batch = MODELS["gemma"], make_batch([3, 11])
    script = [[7, EOS, 9, 9, 9, 9], [5, 6, 7, 8, EOS, 9]]
    out = torch.stack(list(steps(model, batch, 6, scripted(script))), dim=1)
    assert out.tolist() == [[7, EOS, PAD, PAD, PAD], [5, 6, 7, 8, EOS]]


def test_a_row_that_has_ended_does_not_disturb_the_others():
    model, batch = MODELS["gemma2"], make_batch([3, 11])
    alone = Batch(*(t[1:] for t in (batch.pixels, batch.ids, batch.valid)), None)
    rows = {}
    for name, b, script in (
        ("company", batch, [[EOS, 9, 9, 9, 9], [5, 6, 7, 8, 9]]),
        ("alone", alone, [[5, 6, 7, 8, 9]]),
    ):
        follow = scripted(script)
        seen = rows.setdefault(name, [])

        def choose(logits, seen=seen, follow=follow):
            seen.append(logits[-1])
            return follow(logits)

        list(steps(model, b, 5, choose))
    got, want = torch.stack(rows["company"]), torch.stack(rows["alone"])
    # worst of 100 models: 9.4e-7; padding that is seen moves logits by 0.2
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)


def test_without_a_stop_every_step_is_taken():
    model, batch = MODELS["gemma"], make_batch([3])
    script = [[EOS, EOS, 5, EOS]]
    out = torch.cat(list(steps(model, batch, 4, scripted(script), stop=None)))
    assert out.tolist() == script[0]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_more_tokens_than_asked_for(count):
    model, batch = MODELS["gemma"], make_batch([3, 4])
    assert recorded(model, batch, count, stop=None)[0].shape == (2, count)


# Text


@pytest.fixture(scope="module")
def mini():
    return pali.load("mini")


def stream_of(processor, text, *extra):
    pieces = []
    row = TextStream(3, processor.decode, lambda r, piece: pieces.append((r, piece)))
    for i in [*processor.tokenizer.encode(text), *extra]:
        row.add(i)
    return row, pieces


@pytest.mark.parametrize("text", ["a cat", "café 😀", "<loc0001><loc1023> ü ; x", ""])
def test_pieces_are_whole_characters_and_join_to_the_text(mini, text):
    row, pieces = stream_of(mini[1], text, EOS)
    assert "".join(piece for _, piece in pieces) == row.text == text
    assert not any("\ufffd" in piece or not piece for _, piece in pieces)
    assert {r for r, _ in pieces} <= {3}


def test_what_follows_the_end_is_not_text(mini):
    word = mini[1].tokenizer.encode("dog")
    row, pieces = stream_of(mini[1], "a cat", EOS, *word, PAD)
    assert row.text == "a cat"


def test_a_character_that_is_cut_off_still_comes_at_the_end(mini):
    first_byte = mini[1].tokenizer.encode("ů")[:1]
    row, pieces = stream_of(mini[1], "a", *first_byte)
    assert [piece for _, piece in pieces] == ["a"]
    row.end()
    assert "".join(piece for _, piece in pieces) == row.text == "a\ufffd"


PROMPTS = ["caption en", "detect cat ; dog", "answer en how many dogs are there?", ""]


@pytest.fixture(scope="module")
def pictures():
    return [scenes.scene(seed).image for seed in range(4)]


def test_a_batch_says_what_its_rows_say_alone(mini, pictures):
    together = generate(*mini, pictures, PROMPTS, max_new_tokens=12)
    alone = [
        generate(*mini, image, prompt, max_new_tokens=12)[0]
        for image, prompt in zip(pictures, PROMPTS, strict=True)
    ]
    assert together == alone


def test_streamed_pieces_join_to_the_answers(mini, pictures):
    rows = [""] * 4

    def stream(row, piece):
        rows[row] += piece

    texts = generate(*mini, pictures, PROMPTS, max_new_tokens=12, stream=stream)
    assert rows == texts


def test_one_picture_and_prompt_give_a_list_of_one(mini, pictures):
    assert len(generate(*mini, pictures[0], "caption en", max_new_tokens=2)) == 1


def test_generate_encodes_the_pictures_once(mini, pictures):
    with counted(mini[0]) as runs:
        generate(*mini, pictures, PROMPTS, max_new_tokens=6)
    assert len(runs) == 1


def test_a_prompt_without_a_picture_is_answered(mini):
    with counted(mini[0]) as runs:
        assert isinstance(generate(*mini, None, "hello", max_new_tokens=3)[0], str)
    assert not runs


def test_greedy_needs_no_seed_and_draws_repeat_with_one(mini, pictures):
    def tell(seed, temperature):
        options = {"seed": seed, "temperature": temperature, "max_new_tokens": 12}
        return generate(*mini, pictures, PROMPTS, **options)

    assert tell(None, 0.0) == tell(7, 0.0)
    # so hot that 1,792 tokens are nearly even: no two runs agree by chance
    assert tell(7, 30.0) == tell(7, 30.0)
    assert tell(7, 30.0) != tell(8, 30.0)
    assert tell(None, 30.0) != tell(None, 30.0)


def test_the_trace_holds_one_dict_a_step_without_a_graph(mini, pictures):
    trace = []
    texts = generate(*mini, pictures[:1], PROMPTS[:1], max_new_tokens=5, trace=trace)
    tokens = mini[1].tokenizer.encode(texts[0])
    assert len(trace) == min(5, len(tokens) + 1)  # <eos> is a step too
    assert trace[0]["decoder.0.attention"].shape[2:] == (260, 260)
    assert trace[1]["decoder.0.attention"].shape[2:] == (1, 261)
    assert "vision.0.attention" in trace[0] and "vision.0.attention" not in trace[1]
    assert not any(t.requires_grad for step in trace for t in step.values())


def test_rows_that_are_no_token_are_never_chosen(mini, pictures):
    model, processor = mini
    size = processor.tokenizer.size
    chosen = []

    real = type(model.decoder).logits

    def logits(self, x):
        z = real(self, x).clone()
        z[..., size:] += 1000
        return z

    def spy(z, **options):
        chosen.append(pick(z, **options))
        return chosen[-1]

    with (
        patch.object(type(model.decoder), "logits", logits),
        patch("pali.generation.pick", spy),
    ):
        generate(*mini, pictures[0], "caption en", max_new_tokens=4)
    assert max(int(ids.max()) for ids in chosen) < size


def test_logits_that_are_not_finite_stop_with_advice(pictures):
    model, processor = pali.load("mini")
    model.projector.linear.bias.data[0] = float("inf")
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match="not finite: load with dtype"):
            generate(model, processor, pictures[0], "caption en", **options)


def test_an_answer_that_has_no_room_is_refused(mini, pictures):
    with pytest.raises(ValueError, match=r"take 260 tokens, which leaves 764 of 1024"):
        generate(*mini, pictures[0], "caption en", max_new_tokens=765)
    with pytest.raises(ValueError, match=r"which leaves 0 of 1024"):
        generate(*mini, [pictures], ["caption en"], max_new_tokens=1)


def test_the_last_token_that_has_room_fits():
    model = tiny_model(max_positions=PATCHES + 8)
    batch = make_batch([5])
    assert recorded(model, batch, 2, stop=None)[0].shape == (1, 2)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"seed": 0.5}]
)
def test_generate_refuses_numbers_before_it_works(mini, pictures, options):
    with counted(mini[0]) as runs, pytest.raises(ValueError):
        generate(*mini, pictures, PROMPTS, **options)
    assert not runs


def test_the_global_random_state_is_left_alone(mini, pictures):
    torch.manual_seed(3)
    want = torch.get_rng_state()
    generate(*mini, pictures[0], "caption en", temperature=1.0, max_new_tokens=4)
    assert torch.get_rng_state().equal(want)
