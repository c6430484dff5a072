"""Tokens, prompts and boxes against the published processor and their own laws."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from pali.tokens import (
    BOS,
    EOS,
    IGNORE,
    PAD,
    Box,
    Processor,
    Tokenizer,
    location_tokens,
    pad_rows,
    read_boxes,
    read_objects,
)
from pieces import OUTLINES, PLACES, toy_pieces


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A list without places, as in a plain Gemma file."""
    return toy_pieces(tmp_path_factory.mktemp("gemma") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A list with places and outlines, as PaliGemma's file has them."""
    folder = tmp_path_factory.mktemp("paligemma")
    return toy_pieces(folder / "tokenizer.model", PLACES + OUTLINES)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, 16, 4, tokenizer.size)


def picture(seed=0, size=(20, 12)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3))
    return Image.fromarray(pixels.astype(np.uint8))


# -- text to ids and back ------------------------------------------------------


@given(text=st.text())
def test_any_text_comes_back(tokenizer, gemma, text):
    assume("▁" not in text)  # SentencePiece's own letter for a space
    for each in (tokenizer, gemma):
        assert each.decode(each.encode(text)) == text


@given(parts=st.lists(st.sampled_from([*PLACES[:3], *OUTLINES[:3], " ", "é", "cat"])))
def test_places_among_words_come_back(tokenizer, gemma, parts):
    text = "".join(parts)
    for each in (tokenizer, gemma):
        ids = each.encode(text)
        assert each.decode(ids) == text
        places = [part for part in parts if part.startswith("<")]
        assert [each.names[i] for i in ids if i in each.names] == places


def test_both_kinds_of_file_number_places_in_order(tokenizer, gemma):
    end = gemma.pieces.GetPieceSize()
    assert gemma.encode("".join(PLACES + OUTLINES)) == [*range(end, end + 1152)]
    assert gemma.size == end + 1152
    first = tokenizer.pieces.PieceToId("<loc0000>")
    got = tokenizer.encode("".join(PLACES + OUTLINES))
    assert got == [*range(first, first + 1152)]
    assert tokenizer.size == tokenizer.pieces.GetPieceSize()


def test_a_place_is_one_token_which_the_bare_list_shatters(tokenizer, gemma):
    def whole(encode):
        return all(len(encode(name)) == 1 for name in PLACES[:5] + OUTLINES[-5:])

    assert whole(tokenizer.encode) and whole(gemma.encode)
    assert not whole(gemma.pieces.EncodeAsIds)


@pytest.mark.parametrize(
    "text", ["<loc1024>", "<loc12>", "<loc٠٠٠١>", "<seg128>", "<bos>"]
)
def test_what_is_no_token_is_spelled(tokenizer, gemma, text):
    for each in (tokenizer, gemma):
        ids = each.encode(text)
        assert len(ids) > 1 and BOS not in ids
        assert each.decode(ids) == text


def test_a_character_in_four_bytes_is_put_together_again(tokenizer):
    ids = tokenizer.encode("a🐱")
    assert [tokenizer.piece(i) for i in ids[1:]] == [
        "<0xF0>",
        "<0x9F>",
        "<0x90>",
        "<0xB1>",
    ]
    assert tokenizer.decode(ids) == "a🐱"
    assert "a" in tokenizer.decode(ids[:-1])  # cut off in the middle: no error


def test_control_tokens_and_unknown_ids_are_not_shown(tokenizer):
    cat = tokenizer.encode("cat")
    stray = [IGNORE, PAD, BOS, *cat, EOS, tokenizer.size, 10**6]
    assert tokenizer.decode(torch.tensor(stray)) == "cat"
    assert tokenizer.piece(tokenizer.size) == "<image>"


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 50])
def test_a_file_that_is_no_list_is_a_value_error(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(path)


def test_a_list_without_a_line_break_is_a_value_error(tmp_path):
    """Its id would be that of `<unk>`, and no prompt would end as trained."""
    with pytest.raises(ValueError, match="no piece for the line break"):
        toy_pieces(tmp_path / "tokenizer.model", breaks=())


def test_half_a_surrogate_pair_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("cat \ud83d")


# -- the prompt ----------------------------------------------------------------


def test_the_layout_is_the_documented_one(processor, tokenizer):
    """Beyer et al. 2024: the empty prompt at 224 px is [image] * 256 + [2, 108]."""
    image, newline = tokenizer.size, tokenizer.pieces.PieceToId("\n")
    assert processor.prompt_ids("") == [image] * 4 + [2, newline]
    words = tokenizer.pieces.EncodeAsIds("detect cat")
    assert processor.prompt_ids("detect cat") == [image] * 4 + [2, *words, newline]
    assert processor.prompt_ids("", 3) == [image] * 12 + [2, newline]
    assert processor.prompt_ids("", 0) == [2, newline]


@given(text=st.text(alphabet="ab \n", max_size=6))
def test_every_prompt_ends_in_one_line_break_of_its_own(processor, tokenizer, text):
    ids = processor.prompt_ids(text)
    assert ids[-1] == tokenizer.newline
    assert ids[5:-1] == tokenizer.encode(text)


def test_joining_the_line_break_would_give_another_token(tokenizer, processor):
    joined = tokenizer.encode("a\n" + "\n")
    assert joined[-1] == tokenizer.pieces.PieceToId("\n\n")
    assert processor.prompt_ids("a\n")[-2:] == [tokenizer.newline] * 2


def test_the_answer_follows_with_eos_and_only_it_has_labels(processor, tokenizer):
    batch = processor(picture(), "detect cat", "<loc0001> cat")
    head, tail = processor.prompt_ids("detect cat"), tokenizer.encode("<loc0001> cat")
    assert batch.ids[0].tolist() == [*head, *tail, EOS]
    assert batch.suffix[0].tolist() == [False] * len(head) + [True] * (len(tail) + 1)
    assert batch.labels[0].tolist() == [IGNORE] * len(head) + [*tail, EOS]
    assert batch.valid.all()


def test_without_answers_there_are_no_labels(processor):
    batch = processor([picture()] * 2, ["caption en", ""])
    assert batch.labels is None
    assert not batch.suffix.any()


def test_an_empty_answer_is_eos_alone(processor):
    batch = processor(picture(), "caption en", "")
    assert batch.labels[0, -1] == EOS
    assert batch.suffix.sum() == 1


def test_an_answer_may_be_missing_in_one_row(processor):
    batch = processor([None] * 2, ["a", "b"], ["cat", None])
    assert batch.suffix.any(dim=1).tolist() == [True, False]
    assert (batch.labels[1] == IGNORE).all()


@pytest.mark.parametrize("side", ["left", "right"])
@given(prompts=st.lists(st.text("abc ", max_size=8), min_size=1, max_size=4))
def test_padding_adds_nothing_but_padding(processor, side, prompts):
    answers = [prompt[::2] for prompt in prompts]
    batch = processor(None, prompts, answers, padding=side)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = processor(None, prompt, answer)
        keep = batch.valid[row]
        for name in ("ids", "suffix", "labels"):
            padded, want = getattr(batch, name)[row], getattr(alone, name)[0]
            assert torch.equal(padded[keep], want), name
        assert (batch.ids[row][~keep] == PAD).all()
        assert not batch.suffix[row][~keep].any()
        assert (batch.labels[row][~keep] == IGNORE).all()
        length = int(keep.sum())
        edge = keep[-length:] if side == "left" else keep[:length]
        assert edge.all()


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match='"left" or "right", not \'top\''):
        pad_rows([[1]], 0, "top")


# -- pictures and prompts that belong together ---------------------------------


def places(batch, processor):
    return (batch.ids == processor.image_id).sum(dim=1).tolist()


def test_several_pictures_come_in_row_order(processor):
    a, b, c = (picture(seed) for seed in range(3))
    batch = processor([[a, b], None, c], ["x", "y", "z"])
    single = [processor(one, "x").pixels[0] for one in (a, b, c)]
    assert torch.equal(batch.pixels, torch.stack(single))
    assert places(batch, processor) == [8, 0, 4]


def test_two_pictures_may_share_one_lone_prompt(processor):
    batch = processor([picture(0), picture(1)], "compare")
    assert batch.ids.shape[0] == 1
    assert places(batch, processor) == [8]


@pytest.mark.parametrize("images", [None, [None, None], [[], []]])
def test_no_picture_gives_no_pixels(processor, images):
    batch = processor(images, ["a", "b"])
    assert batch.pixels is None
    assert places(batch, processor) == [0, 0]


@pytest.mark.parametrize(
    ("images", "prompts", "suffixes"),
    [
        (2, 1, None),
        (1, 2, None),
        (2, 2, 1),
        (0, 0, None),
    ],
)
def test_unequal_numbers_are_refused(processor, images, prompts, suffixes):
    answers = None if suffixes is None else ["a"] * suffixes
    with pytest.raises(ValueError, match="must be equally many"):
        processor([picture()] * images, ["a"] * prompts, answers)


def test_one_answer_is_not_taken_letter_by_letter(processor):
    with pytest.raises(ValueError, match="got 3, 3 and 1"):
        processor([None] * 3, ["a", "b", "c"], "cat")


@pytest.mark.parametrize(("prompts", "suffixes"), [([1], None), (["a"], [7])])
def test_what_is_no_text_is_a_type_error(processor, prompts, suffixes):
    with pytest.raises(TypeError, match="prompts and suffixes are strings"):
        processor([None], prompts, suffixes)


def test_a_batch_moves_as_a_whole(processor):
    batch = processor([picture(), None], ["a", "b"]).to("meta")
    assert {x.device.type for x in vars(batch).values() if x is not None} == {"meta"}
    assert batch.labels is None


# -- against the published processor -------------------------------------------


@pytest.fixture(scope="module")
def published(tokenizer):
    from transformers import GemmaTokenizer, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import (
        SiglipImageProcessorPil,
    )

    sp = tokenizer.pieces
    ids = {sp.IdToPiece(i): i for i in range(sp.GetPieceSize())}
    merges = [
        (-sp.GetScore(i), ids[piece[:k]], ids[piece[k:]], piece[:k], piece[k:])
        for piece, i in ids.items()
        for k in range(1, len(piece))
        if piece[:k] in ids and piece[k:] in ids
    ]
    theirs = GemmaTokenizer(vocab=ids, merges=[m[3:] for m in sorted(merges)])
    theirs.add_tokens(["\n", "\n\n"])
    reader = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    reader.image_seq_length = 4
    return PaliGemmaProcessor(reader, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_that_of_the_published_processor(processor, published, side):
    prompts = ["caption en", "detect cat ; dog", "", "wie viele Hunde? 猫 é 12"]
    suffixes = ["a cat", "<loc0001><loc0500><loc0700><loc1023> cat", "0", "<seg007>"]
    images = [picture(seed) for seed in range(4)]
    ours = processor(images, prompts, suffixes, padding=side)
    theirs = published(
        images=[[image] for image in images],
        text=["<image>" + prompt for prompt in prompts],
        suffix=suffixes,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    assert torch.equal(ours.ids, theirs["input_ids"])
    assert torch.equal(ours.valid, theirs["attention_mask"].bool())
    assert torch.equal(ours.suffix, theirs["token_type_ids"].bool())
    assert torch.equal(ours.labels, theirs["labels"])
    assert torch.equal(ours.pixels, theirs["pixel_values"])


def test_two_pictures_are_laid_out_as_published(processor, published):
    images = [picture(0), picture(1)]
    theirs = published(
        images=[images], text=["<image><image>compare"], return_tensors="pt"
    )
    ours = processor([images], ["compare"])
    assert torch.equal(ours.ids, theirs["input_ids"])
    assert torch.equal(ours.pixels, theirs["pixel_values"])


# -- boxes ---------------------------------------------------------------------


def test_the_order_is_top_left_bottom_right():
    """The upper right quarter of a wide picture: no two numbers can be exchanged."""
    assert location_tokens((150, 0, 200, 50), (200, 100)) == (
        "<loc0000><loc0767><loc0512><loc1023>"
    )
    [box] = read_boxes("<loc0000><loc0767><loc0512><loc1023> key", (200, 100))
    assert box.label == "key"
    assert box.xyxy == pytest.approx((149.95, 0, 200, 50.05), abs=0.01)


def test_the_published_answer_about_a_shoe_is_a_wide_box():
    """paligemma-3b-pt-224, prompt "detect shoe", as its documentation prints it."""
    [box] = read_boxes("<loc0051><loc0309><loc0708><loc0646> shoe", (1023, 1023))
    assert box == Box("shoe", (309.0, 51.0, 646.0, 708.0))


@given(
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
)
def test_a_box_comes_back_to_half_a_step(corners, width, height):
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    assume(x1 - x0 > 2 / 1023 and y1 - y0 > 2 / 1023)
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    text = location_tokens(box, (width, height)) + " thing"
    [found] = read_boxes(text, (width, height))
    for got, want, side in zip(found.xyxy, box, (width, height) * 2, strict=True):
        # the law is 1 / 2046 of the side; read with 1024: up to 1.5 / 1023
        assert abs(got - want) <= side / 2046 + 1e-9 * side


SPANS = st.lists(st.integers(0, 1023), min_size=2, max_size=2, unique=True).map(sorted)


@given(ys=SPANS, xs=SPANS)
def test_tokens_come_back_exactly(ys, xs):
    text = "".join(PLACES[step] for step in (ys[0], xs[0], ys[1], xs[1]))
    [box] = read_boxes(text, (640, 427))
    assert location_tokens(box.xyxy, (640, 427)) == text


def test_a_box_that_leaves_the_picture_is_cut_at_its_border():
    assert location_tokens((-5, -1e9, 300, 101), (200, 100)) == (
        "<loc0000><loc0000><loc1023><loc1023>"
    )


def test_halves_are_rounded_to_even():
    """As numpy and TensorFlow do in the original encoder."""
    shares = [k + 0.5 for k in (0, 1, 2, 1021)]
    got = location_tokens(shares, (1023, 1023))
    y0, x0, y1, x1 = np.round(np.array(shares)[[1, 0, 3, 2]]).astype(int)
    assert got == PLACES[y0] + PLACES[x0] + PLACES[y1] + PLACES[x1]


# -- reading what a model wrote ------------------------------------------------

BITS = [*PLACES[::100], *OUTLINES[::30], "<loc", "<seg001", ">", ";", " ", "\n", "cat"]
GOOD = "<loc0100><loc0200><loc0300><loc0400>"


@given(text=st.one_of(st.text(), st.lists(st.sampled_from(BITS)).map("".join)))
def test_any_text_is_read_without_an_error(text):
    for box, codes in read_objects(text, (640, 480)):
        x0, y0, x1, y1 = box.xyxy
        assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 480
        assert box.label == box.label.strip()
        assert not set(box.label) & set(";<")
        assert len(codes) in (0, 16) and all(0 <= code <= 127 for code in codes)


@given(
    objects=st.lists(
        st.tuples(
            st.tuples(*[st.integers(0, 1022)] * 2),
            st.one_of(
                st.just([]), st.lists(st.integers(0, 127), min_size=16, max_size=16)
            ),
            st.text("abc é", max_size=8),
        ),
        max_size=4,
    )
)
def test_every_well_formed_object_is_found(objects):
    parts = []
    for (y, x), codes, label in objects:
        codes = "".join(OUTLINES[code] for code in codes)
        parts.append(
            f"{PLACES[y]}{PLACES[x]}{PLACES[y + 1]}{PLACES[1023]}{codes} {label}"
        )
    found = read_objects(" ; ".join(parts), (1023, 1023))
    assert [(b.label, b.xyxy[1], b.xyxy[0], codes) for b, codes in found] == [
        (label.strip(), pytest.approx(y), pytest.approx(x), codes)
        for (y, x), codes, label in objects
    ]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a cat on a mat", []),
        ("", []),
        (f"{GOOD} black dog", ["black dog"]),
        (f"{GOOD}dog", ["dog"]),
        (GOOD, [""]),
        (f"\nlook: {GOOD} cat\n", ["cat"]),
        (f"{GOOD} cat ; <loc0100><loc0200><loc03", ["cat"]),
        (f"<loc0100><loc0200> cat ; {GOOD} dog", ["dog"]),
        (f"{GOOD}<loc0500> five ; {GOOD} dog", ["dog"]),
        (f"{GOOD}{GOOD} eight ; {GOOD} dog", ["dog"]),
        (f"<loc1024>{GOOD[9:]} beyond ; {GOOD} dog", ["dog"]),
        ("<loc0300><loc0200><loc0100><loc0400> upside down", []),
        ("<loc0100><loc0400><loc0300><loc0400> no width", []),
        (f"{GOOD} cat ;; {GOOD} dog ;", ["cat", "dog"]),
        (f"{GOOD} cat {GOOD} dog", ["cat", "dog"]),
        ("<loc٠١٠٠><loc٠٢٠٠><loc٠٣٠٠><loc٠٤٠٠> other digits", []),
    ],
)
def test_broken_answers_give_what_is_whole(text, labels):
    assert [box.label for box in read_boxes(text, (128, 128))] == labels


@pytest.mark.parametrize(
    "outline", ["<seg001>", "<seg001>" * 15, "<seg001>" * 17, "<seg128>" * 16]
)
def test_a_broken_outline_leaves_the_box(outline, caplog):
    [(box, codes)] = read_objects(f"{GOOD}{outline} cat", (128, 128))
    assert (box.label, codes) == ("cat", [])
    assert "an outline is 16 codes" in caplog.text


def test_what_is_skipped_is_reported(caplog):
    with caplog.at_level(logging.WARNING, "pali.tokens"):
        read_boxes(f"<loc0100> cat ; {GOOD} dog", (128, 128))
    assert caplog.messages == ["skipped '<loc0100>': a box is four tokens up to 1023"]


def test_a_very_long_answer_is_read_in_good_time():
    text = "<loc0100>" * 20_000 + " " * 20_000 + "<" * 20_000 + GOOD
    assert len(read_boxes(text, (128, 128))) == 1


# -- the fault of the chapter --------------------------------------------------


def test_the_check_of_the_chapter_rejects_x_before_y():
    def swapped(box, size):
        x0, y0, x1, y1 = box
        return location_tokens((y0, x0, y1, x1), size)

    def check(write):
        tokens = write((96, 0, 128, 64), (128, 128))
        return tokens == "<loc0000><loc0767><loc0512><loc1023>"

    def check_with_a_square_in_the_middle(write):
        return write((32, 32, 96, 96), (128, 128)) == (
            "<loc0256><loc0256><loc0767><loc0767>"
        )

    assert check(location_tokens)
    assert not check(swapped)
    assert check_with_a_square_in_the_middle(swapped)  # which is why it is no check
