"""The whole model: its published sizes, and what `forward` guarantees, line by line."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pali.cache import Cache
from pali.paligemma import PaliGemma, PaliGemmaConfig, last_valid, published_config
from tiny import IMAGE_ID, PATCHES, tiny_config, tiny_model, tiny_pixels, tiny_rows

# Counted once by somebody else's program: `transformers` 5.23 on the device "meta".
TOTALS = {
    ("paligemma-3b", 224): 2_923_466_480,
    ("paligemma-3b", 448): 2_924_351_216,
    ("paligemma-3b", 896): 2_927_890_160,
    ("paligemma2-3b", 224): 3_032_242_416,
    ("paligemma2-3b", 448): 3_033_127_152,
    ("paligemma2-3b", 896): 3_036_666_096,
    ("paligemma2-10b", 224): 9_662_638_832,
    ("paligemma2-10b", 448): 9_663_523_568,
    ("paligemma2-10b", 896): 9_667_062_512,
    ("paligemma2-28b", 224): 27_650_487_024,
    ("paligemma2-28b", 448): 27_651_371_760,
    ("paligemma2-28b", 896): 27_654_910_704,
}
DECODERS = {
    "paligemma-3b": (2_361_344, 2_508_662_784),
    "paligemma2-3b": (2_656_512, 2_617_143_552),
    "paligemma2-10b": (4_132_352, 9_246_064_128),
    "paligemma2-28b": (5_313_024, 27_232_731_648),
}
# Logits of these models have a spread of about 0.12; what counts as equal beside it.
ATOL = 3e-5


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name, size=224):
    with torch.device("meta"):
        return PaliGemma(published_config(name, size))


@pytest.mark.parametrize(("name", "size"), TOTALS)
def test_published_sizes_are_met_to_the_last_parameter(name, size):
    assert count(on_meta(name, size)) == TOTALS[name, size]


@pytest.mark.parametrize("name", DECODERS)
def test_projector_and_decoder_have_their_share(name):
    model = on_meta(name)
    assert (count(model.projector), count(model.decoder)) == DECODERS[name]


def test_the_default_configuration_is_paligemma_3b():
    assert PaliGemmaConfig() == published_config("paligemma-3b")


@pytest.mark.parametrize("wrong", [("paligemma-7b", 224), ("paligemma-3b", 336)])
def test_an_unpublished_configuration_is_refused(wrong):
    with pytest.raises(ValueError, match="published are paligemma-3b, .* 448 and 896"):
        published_config(*wrong)


# What forward returns


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_last_only_gives_the_last_valid_place_of_each_row(model, padding):
    ids, valid = tiny_rows([3, 9], padding)
    pixels = tiny_pixels(2)
    full = model(pixels, ids, valid=valid)
    last = model(pixels, ids, valid=valid, last_only=True)
    assert last.shape == (2, 1, 128)
    for row in range(2):
        at = valid[row].nonzero().max()
        # worst of 200 cases: 1.8e-7; the place before it is off by 0.08 and more
        torch.testing.assert_close(last[row, 0], full[row, at], rtol=0, atol=2e-6)


def test_last_valid_of_a_single_place_is_that_place():
    assert last_valid(torch.tensor([[True], [False]])).tolist() == [0, 0]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_row_says_the_same_alone_and_in_company(model, padding):
    ids, valid = tiny_rows([3, 9], padding)
    pixels = tiny_pixels(2)
    both = model(pixels, ids, valid=valid)
    alone = model(pixels[:1], ids[:1, valid[0]])
    # worst of 200 cases: 1.3e-6; padding that is seen moves logits by 0.2 and more
    torch.testing.assert_close(both[:1, valid[0]], alone, rtol=0, atol=ATOL)


def test_logits_on_padding_are_finite_even_in_a_row_of_nothing_else(model):
    ids, valid = tiny_rows([3, 9])
    valid[0] = False
    assert model(tiny_pixels(2), ids, valid=valid).isfinite().all()


def test_logits_have_the_type_of_the_model():
    model = tiny_model().bfloat16()
    ids, _ = tiny_rows([3])
    assert model(tiny_pixels(1), ids).dtype == torch.bfloat16


def test_features_replace_pixels(model):
    ids, _ = tiny_rows([3, 3])
    pixels = tiny_pixels(2)
    want = model(pixels, ids)
    assert model(None, ids, features=model.encode(pixels)).equal(want)
    assert model(pixels, ids, features=model.encode(pixels)).equal(want)


def test_text_alone_is_the_decoder_alone(model):
    ids = tiny_rows([7])[0][:, PATCHES:]
    x = model.decoder.embedding[ids] * 32**0.5
    want = model.decoder.logits(model.decoder(x, torch.arange(8)[None]))
    # equal in 100 models; another prompt moves logits by 0.3 and more
    torch.testing.assert_close(model(None, ids), want, rtol=0, atol=2e-6)


def test_an_image_id_beyond_the_vocabulary_serves_as_well():
    model, ids = tiny_model(), tiny_rows([5])[0]
    pixels = tiny_pixels(1)
    want = model(pixels, ids)
    model.config = replace(model.config, image_id=9000)
    moved = ids.masked_fill(ids == IMAGE_ID, 9000)
    assert model(pixels, moved).equal(want)


def test_two_pictures_in_one_prompt_are_read_in_order(model):
    ids, _ = tiny_rows([4 + PATCHES])
    ids[0, : 2 * PATCHES] = IMAGE_ID
    pixels = tiny_pixels(2)
    want = model(pixels, ids)
    features = model.encode(pixels)
    assert model(None, ids, features=features).equal(want)
    # trading places changes what is said: order counts
    assert (model(pixels.flip(0), ids) - want)[:, -1].abs().max() > 1e-3


def test_a_trace_selects_the_written_out_attention_which_agrees(model):
    ids, valid = tiny_rows([3, 9])
    pixels, trace = tiny_pixels(2), {}
    traced = model(pixels, ids, valid=valid, trace=trace)
    want = model(pixels, ids, valid=valid)
    # worst of 100 models: 2.7e-6; erf for tanh in GELU moves logits by 2e-4
    torch.testing.assert_close(traced[valid], want[valid], rtol=0, atol=ATOL)
    assert trace["decoder.3.attention"].shape == (2, 4, 26, 26)
    assert trace["vision.1.attention"].shape == (2, 4, PATCHES, PATCHES)


def test_a_trace_keeps_the_graph():
    model = tiny_model().requires_grad_(True)
    trace = {}
    logits = model(tiny_pixels(1), tiny_rows([3])[0], trace=trace)
    weights = trace["decoder.0.attention"]
    (slope,) = torch.autograd.grad(logits[0, -1].max(), weights)
    assert slope.abs().max() > 0


# Suffix and cache


def cached(model, pixels, ids, valid, prefix, cuts):
    """Logits of a prefix and then the rest in pieces that end at `cuts`."""
    cache = Cache(model.config, len(ids), ids.shape[1])
    parts, ends = [], [prefix, *sorted(cuts), ids.shape[1]]
    for start, end in zip([0, *ends], ends, strict=False):
        if end > start:
            piece = slice(start, end)
            parts.append(
                model(
                    None if start else pixels, ids[:, piece],
                    valid=valid[:, piece], cache=cache,
                )
            )  # fmt: skip
    return torch.cat(parts, dim=1)


WINDOWED = tiny_model("gemma2", sliding_window=6)


@settings(max_examples=25)
@given(
    cuts=st.sets(st.integers(1, 9)),
    lengths=st.lists(st.integers(3, 13), min_size=1, max_size=3),
    padding=st.sampled_from(["left", "right"]),
)
def test_any_split_of_the_suffix_agrees_with_the_whole(cuts, lengths, padding):
    head, valid = tiny_rows(lengths, padding)
    B, T = head.shape
    generator = torch.Generator().manual_seed(5)
    ids = torch.cat([head, torch.randint(5, 108, (B, 10), generator=generator)], dim=1)
    valid = torch.cat([valid, torch.ones(B, 10, dtype=torch.bool)], dim=1)
    suffix = (torch.arange(T + 10) >= T).expand_as(ids)
    pixels = tiny_pixels(B)
    whole = WINDOWED(pixels, ids, valid=valid, suffix=suffix)
    pieces = cached(WINDOWED, pixels, ids, valid, T, {T + c for c in cuts})
    # worst of 300 draws: 1.6e-6; one position off moves logits by 0.2 and more
    torch.testing.assert_close(pieces[valid], whole[valid], rtol=0, atol=ATOL)


def test_a_prefix_in_two_pieces_is_another_model(model):
    # the fault of the chapter: the second half of the prompt called suffix
    ids, valid = tiny_rows([9])
    whole = model(tiny_pixels(1), ids)
    halves = cached(model, tiny_pixels(1), ids, valid, 20, set())
    assert (halves - whole)[0, -1].abs().max() > 1e-2


def test_after_the_prefix_all_is_suffix():
    model, (ids, _) = tiny_model(), tiny_rows([9])
    caches = [Cache(model.config, 1, 26) for _ in range(3)]
    for cache in caches:
        model(tiny_pixels(1), ids[:, :20], cache=cache)
    new = ids[:, 20:]
    left_out = model(None, new, cache=caches[0])
    told = model(None, new, cache=caches[1], suffix=torch.ones_like(new).bool())
    assert left_out.equal(told)
    mixed = torch.tensor([[True, True, False, True, True, True]])
    with pytest.raises(ValueError, match="after the prefix every token is suffix"):
        model(None, new, cache=caches[2], suffix=mixed)


def test_overflow_names_both_sizes_and_leaves_the_cache_as_it_was():
    model, (ids, _) = tiny_model(), tiny_rows([9])
    cache, roomy = Cache(model.config, 1, 22), Cache(model.config, 1, 26)
    for c in (cache, roomy):
        model(tiny_pixels(1), ids[:, :20], cache=c)
    with pytest.raises(ValueError, match=r"1 rows of 22 tokens.* 20 \+ 3 do not fit"):
        model(None, ids[:, 20:23], cache=cache)
    assert cache.length == 20
    after = model(None, ids[:, 20:22], cache=cache)
    torch.testing.assert_close(after, model(None, ids[:, 20:22], cache=roomy))


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        (Cache(tiny_config(), 2, 40), "holds 2 rows, not 1"),
        (Cache(tiny_config(width=16), 1, 40), "made with this model's config"),
        ([], "made with this model's config"),
    ],
)
def test_a_cache_of_something_else_is_refused(cache, says):
    with pytest.raises(ValueError, match=says):
        tiny_model()(tiny_pixels(1), tiny_rows([9])[0], cache=cache)


# Masks and positions by hand


def everything(B, T, S=None):
    return torch.ones(B, 1, T, S or T, dtype=torch.bool)


def test_the_derived_mask_given_by_hand_changes_nothing(model):
    ids, valid = tiny_rows([3, 9])
    pixels = tiny_pixels(2)
    want = model(pixels, ids, valid=valid)
    mask = (valid[:, None] | torch.eye(26).bool())[:, None]
    for given_mask in (mask, [mask] * 4, (mask,) * 4):
        got = model(pixels, ids, valid=valid, mask=given_mask)
        # equal in 100 models
        torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=2e-6)


def test_a_list_gives_each_layer_its_own_mask(model):
    ids, _ = tiny_rows([9])
    free, shut = everything(1, 26), everything(1, 26)
    shut[..., PATCHES:, :PATCHES] = False
    trace = {}
    model(tiny_pixels(1), ids, mask=[free, shut, free, free], trace=trace)
    seen = [trace[f"decoder.{i}.attention"][0, :, 16:, :16].sum() for i in range(4)]
    assert seen[1] == 0
    assert min(seen[0], seen[2], seen[3]) > 0


def test_several_questions_packed_in_one_row_are_answered_as_if_alone(model):
    # picture, question A, question B: B may not see A and counts on from the picture
    (a, _), (b, _) = tiny_rows([4], seed=3), tiny_rows([6], seed=4)
    pixels = tiny_pixels(1)
    packed = torch.cat([a, b[:, PATCHES:]], dim=1)
    first, second = slice(PATCHES, 21), slice(21, 28)
    positions = torch.cat([torch.arange(21), torch.arange(16, 23)])[None]
    mask = everything(1, 28)
    for part, other in ((first, second), (second, first)):
        mask[..., part, other] = False
    mask[..., :PATCHES, PATCHES:] = False
    out = model(pixels, packed, mask=mask, positions=positions)
    for ids, part in ((a, first), (b, second)):
        closed = everything(1, ids.shape[1])
        closed[..., :PATCHES, PATCHES:] = False  # one picture cannot hear two questions
        want = model(pixels, ids, mask=closed)[:, PATCHES:]
        # worst of 200 cases: 7e-7; a question that hears the other moves by 0.1
        torch.testing.assert_close(out[:, part], want, rtol=0, atol=ATOL)


def test_a_mask_by_hand_covers_the_cache_too():
    model, (ids, valid) = tiny_model(), tiny_rows([9])
    pixels = tiny_pixels(1)
    want = cached(model, pixels, ids, valid, 20, set())
    cache = Cache(model.config, 1, 26)
    model(pixels, ids[:, :20], cache=cache, mask=everything(1, 20))
    got = model(None, ids[:, 20:], cache=cache, mask=everything(1, 6, 26).tril(20))
    torch.testing.assert_close(got, want[:, 20:], rtol=0, atol=2e-6)


def test_sliding_layers_keep_their_window_under_a_mask_by_hand():
    model, (ids, _) = tiny_model("gemma2", sliding_window=6), tiny_rows([9])
    suffix = torch.ones_like(ids).bool()
    trace = {}
    model(
        tiny_pixels(1), ids, suffix=suffix, mask=everything(1, 26).tril(), trace=trace
    )
    near = (torch.ones(26, 26).triu(-5) * torch.ones(26, 26).tril()).bool()
    for layer, limit in ((0, near), (1, torch.ones(26, 26).tril().bool())):
        assert (trace[f"decoder.{layer}.attention"] > 0).all(dim=1)[0].equal(limit)


BAD_MASKS = {
    "three for four layers": ([everything(1, 26)] * 3, "3 masks for 4 layers"),
    "too short": (everything(1, 25), r"\[1, 1, 26, 26\], got torch.bool \[1, 1, 25"),
    "no head axis": (everything(1, 26)[0], "mask must be torch.bool"),
    "numbers": (everything(1, 26).float(), "got torch.float32"),
    "no tensor": ("causal", "masks for 4 layers"),
    "none inside": ([None] * 4, "got NoneType"),
    "an empty row": (everything(1, 26).tril(-1), "row without any True in layer 0"),
    "in one layer": (
        [everything(1, 26)] * 3 + [everything(1, 26).tril(-1)],
        "row without any True in layer 3",
    ),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_mask_of_a_wrong_form_is_refused(name):
    mask, says = BAD_MASKS[name]
    with pytest.raises(ValueError, match=says):
        tiny_model()(tiny_pixels(1), tiny_rows([9])[0], mask=mask)


def test_a_row_that_the_window_empties_is_refused_and_the_cache_stays_usable():
    model, (ids, valid) = tiny_model("gemma2", sliding_window=6), tiny_rows([9])
    want = cached(model, tiny_pixels(1), ids, valid, 20, set())
    cache = Cache(model.config, 1, 26)
    model(tiny_pixels(1), ids[:, :20], cache=cache)
    far = everything(1, 6, 26)
    far[..., 8:] = False  # allowed by hand, out of reach of the window
    with pytest.raises(ValueError, match="row without any True in layer 0"):
        model(None, ids[:, 20:], cache=cache, mask=far)
    assert cache.length == 20
    torch.testing.assert_close(model(None, ids[:, 20:], cache=cache), want[:, 20:])


@pytest.mark.parametrize("start", [-40, 1, 300])
@pytest.mark.parametrize("window", [6, 4096])
def test_positions_may_start_anywhere(start, window):
    model, (ids, _) = tiny_model("gemma2", sliding_window=window), tiny_rows([9])
    suffix = (torch.arange(26) >= 18).expand_as(ids)
    pixels = tiny_pixels(1)
    want = model(pixels, ids, suffix=suffix)
    positions = torch.arange(26)[None] + start
    got = model(pixels, ids, suffix=suffix, positions=positions)
    # worst of 300 cases: 5.2e-6; one place left out moves logits by 0.05 and more
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5)


# What is refused at the door

IDS = tiny_rows([9])[0]
BAD_INPUTS = {
    "ids are floats": ({"ids": IDS.float()}, r"ids must be torch.int64 \[B, T\]"),
    "ids are a list": ({"ids": IDS.tolist()}, "ids must be .*, got list"),
    "ids of one axis": ({"ids": IDS[0]}, r"got torch.int64 \[26\]"),
    "no ids": ({"ids": IDS[:, :0]}, "at least one token"),
    "an id too large": ({"ids": IDS + 100}, "ids run from .* 0 to 127"),
    "an id below 0": ({"ids": IDS - 6}, "ids run from -"),
    "valid of another length": ({"valid": torch.ones(1, 5).bool()}, "valid must be"),
    "valid of numbers": ({"valid": torch.ones(1, 26)}, "valid must be torch.bool"),
    "suffix a list": ({"suffix": [True] * 26}, "suffix must be .* got list"),
    "positions of floats": ({"positions": torch.ones(1, 26)}, "positions must be"),
    "pixels of whole numbers": (
        {"pixels": torch.ones(1, 3, 16, 16).byte()},
        "pixels must be float",
    ),
    "pixels of another size": ({"pixels": torch.ones(1, 3, 20, 20)}, r"3, 16, 16\]"),
    "pixels without a batch": ({"pixels": torch.ones(3, 16, 16)}, "reads pixels"),
    "two pictures for one place": ({"pixels": tiny_pixels(2)}, "give 32 features"),
    "no picture": ({"pixels": None}, "reserve 16 <image> tokens but no picture"),
    "a picture without a place": ({"ids": IDS[:, PATCHES:]}, "reserve 0 <image>"),
    "features too wide": ({"features": torch.ones(1, 16, 33)}, "features must be"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_input_of_a_wrong_form_gets_one_sentence(name):
    change, says = BAD_INPUTS[name]
    inputs = {"pixels": tiny_pixels(1), "ids": IDS} | change
    with pytest.raises(ValueError, match=says) as caught:
        tiny_model()(**inputs)
    assert "\n" not in str(caught.value)
