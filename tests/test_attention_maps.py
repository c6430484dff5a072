"""Attention maps: the right rows and columns, and scores that are known in advance."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pali
from pali import attention_maps as am
from pali import scenes
from pali.tokens import Box

EVEN = torch.full((16, 16), 1 / 256)


@pytest.fixture(scope="module")
def mini():
    model, processor = pali.load("mini")
    return model.requires_grad_(False), processor


@pytest.fixture(scope="module")
def scene():
    return scenes.scene(2)


def random_maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 16, 16, generator=generator)


# -- rows and columns --------------------------------------------------------


def lit(model, processor, image, patch, padding="left", longer="caption en caption en"):
    """Maps of the last row when it may see one patch and itself; and the columns."""
    batch = processor([image, image], ["caption en", longer], padding=padding)
    B, T = batch.ids.shape
    is_image = batch.ids == processor.image_id
    last = (torch.arange(T) * batch.valid).argmax(dim=1)
    mask = batch.valid[:, None, None].repeat(1, 1, T, 1)
    mask[~batch.valid[:, None]] = True  # padding rows may look anywhere
    for b in range(B):
        mask[b, 0, last[b]] = False
        mask[b, 0, last[b], is_image[b].nonzero()[patch, 0]] = True
    trace = {}
    model(batch.pixels, batch.ids, valid=batch.valid, mask=mask, trace=trace)
    return trace, is_image, last


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("patch", [0, 60, 255])
def test_a_lit_patch_lights_its_cell_and_no_other(mini, scene, patch, padding):
    trace, is_image, last = lit(*mini, scene.image, patch, padding)
    for b in range(2):
        row = slice(int(last[b]), int(last[b]) + 1)
        maps = am.read_maps(trace, is_image, row)[b, :, :, 0]
        want = torch.zeros(256)
        want[patch] = 1.0
        assert torch.equal(maps, want.view(16, 16).expand_as(maps))


@pytest.mark.parametrize("shift", [-1, 1, 16])
def test_columns_that_start_elsewhere_are_noticed(mini, scene, shift):
    """The chapter's fault: as if `<bos>` stood before the picture."""
    trace, is_image, last = lit(*mini, scene.image, 60, longer="caption en " * 9)
    row = slice(int(last[0]), int(last[0]) + 1)
    lit_here = am.read_maps(trace, is_image, row)[0, 0, 0, 0]
    moved = am.read_maps(trace, is_image.roll(shift, dims=1), row)[0, 0, 0, 0]
    assert lit_here.flatten()[60] == 1
    assert moved.flatten()[60] == 0


def test_patches_are_cells_in_reading_order(mini):
    """Cell (row, column) is the patch at these pixels: change it, its vector moves."""
    model, processor = mini
    image = Image.new("RGB", (128, 128), "white")
    spot = image.copy()
    spot.paste((0, 0, 0), (12 * 8, 3 * 8, 13 * 8, 4 * 8))
    pixels = processor([image, spot], ["ocr", "ocr"]).pixels
    a, b = model.vision.patch(pixels)
    changed = (a - b).abs().amax(dim=-1).nonzero()[:, 0].tolist()
    assert changed == [3 * 16 + 12]


def test_rows_sum_to_one_with_the_text(mini, scene):
    model, processor = mini
    batch, trace = processor(scene.image, "caption en"), {}
    model(batch.pixels, batch.ids, trace=trace)
    is_image = batch.ids == processor.image_id
    maps = am.read_maps(trace, is_image, slice(None))
    text = torch.stack([trace[f"decoder.{i}.attention"] for i in range(4)], dim=1)
    total = maps.sum(dim=(-2, -1)) + text[..., 256:].sum(dim=-1)
    # worst of 260 rows x 16 heads: 4e-7
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=5e-6)


def test_the_traced_model_is_the_model_that_answers(mini, scene):
    model, processor = mini
    batch = processor([scene.image] * 2, ["caption en", "detect cat ; dog"])
    given = {"valid": batch.valid, "last_only": True}
    fused = model(batch.pixels, batch.ids, **given)
    eager = model(batch.pixels, batch.ids, trace={}, **given)
    # measured 6e-6 on logits of spread 3; a mask that is left out: above 1e-2
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)


def test_one_pass_reads_the_rows_of_the_cached_steps(mini, scene):
    """Each cached step has one row only, so there is no wrong one to take."""
    model, processor = mini
    steps: list[dict] = []
    text = pali.generate(model, processor, scene.image, "caption en", trace=steps)[0]
    seen = am.answer_attention(model, processor, scene.image, "caption en")
    assert seen.text == text and len(seen.tokens) == len(steps)
    cached = torch.stack(
        [
            torch.stack([s[f"decoder.{i}.attention"][0, :, -1, :256] for i in range(4)])
            for s in steps
        ]
    )
    # measured 2e-6; the row after it: above 0.1
    torch.testing.assert_close(seen.maps.flatten(-2), cached, rtol=0, atol=2e-5)
    off_by_one = (seen.maps.flatten(-2)[1:] - cached[:-1]).abs().max()
    assert off_by_one > 0.01


def test_a_given_answer_is_read_and_not_the_models_own(mini, scene):
    model, processor = mini
    text = "two rockets and a key"
    seen = am.answer_attention(model, processor, scene.image, "caption en", text)
    assert seen.text == text
    assert "".join(seen.tokens).replace("▁", " ") == f"{text}<eos>"
    assert seen.maps.shape == (len(seen.tokens), 4, 4, 16, 16)
    assert torch.allclose(seen.shares, seen.maps.sum(dim=(-2, -1)))


def test_an_empty_answer_is_one_row(mini, scene):
    seen = am.answer_attention(*mini, scene.image, "detect cat", "")
    assert seen.tokens == ["<eos>"] and len(seen.maps) == 1


def test_row_maps_agree_with_one_picture_at_a_time(mini):
    model, processor = mini
    drawn = [scenes.scene(seed) for seed in range(3)]
    prompts = ["caption en", "detect cat ; dog", scenes.count_prompt("fox")]
    texts = ["a cat", "<loc0100><loc0200><loc0300><loc0400> cat", "2"]
    images = [s.image for s in drawn]
    first = am.row_maps(model, processor, images, prompts, batch=2)
    for k in range(3):
        one = am.answer_attention(model, processor, images[k], prompts[k], texts[k])
        # measured 1e-6 between padded batch and single
        torch.testing.assert_close(first[k, :, :, 0], one.maps[0], rtol=0, atol=2e-5)
    last = am.row_maps(model, processor, images, prompts, texts, slice(-2, -1))
    for k in range(3):
        one = am.answer_attention(model, processor, images[k], prompts[k], texts[k])
        torch.testing.assert_close(last[k, :, :, 0], one.maps[-1], rtol=0, atol=2e-5)


# -- scores ------------------------------------------------------------------


def test_box_cells_equal_a_count_of_pixels():
    box, size = Box("", (13, 40, 77, 91)), (128, 128)
    pixels = np.zeros((128, 128), np.float32)
    pixels[40:91, 13:77] = 1
    want = pixels.reshape(16, 8, 16, 8).mean(axis=(1, 3))
    got = am.box_cells(box, size, 16)
    assert np.abs(got.numpy() - want).max() < 1e-5


corners = st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 40)] * 2)


@given(corners)
def test_an_even_map_is_at_chance_and_the_box_is_perfect(box):
    x, y, wide, tall = box
    cells = am.box_cells(Box("", (x, y, x + wide, y + tall)), (80, 80), 16)
    assert am.lift(EVEN, cells).item() == pytest.approx(1.0, rel=1e-4)
    assert am.energy_in_box(EVEN, cells).item() == pytest.approx(
        wide * tall / 80**2, rel=1e-4
    )
    chance = (cells >= 0.5).float().mean()
    assert am.pointing_hit(EVEN, cells).item() == pytest.approx(chance.item())
    solid = (cells >= 1 - 1e-4).float()
    if solid.any():
        assert am.energy_in_box(solid, cells).item() == pytest.approx(1.0, rel=1e-3)
        assert am.pointing_hit(solid, cells) == 1


def test_pointing_takes_the_strongest_cell():
    cells = am.box_cells(Box("", (0, 0, 8, 8)), (128, 128), 16)
    one = random_maps(1)[0]
    one[0, 0] = 2
    assert am.pointing_hit(one, cells) == 1
    one[9, 9] = 3
    assert am.pointing_hit(one, cells) == 0
    one[0, 0] = 3  # a tie: half a hit, whichever comes first
    assert am.pointing_hit(one, cells) == 0.5


@given(st.integers(0, 1000))
def test_a_map_that_ignores_the_question_has_no_contrast(seed):
    """Whatever its habits: the middle, bright things, both things at once."""
    habit = random_maps(1, seed=seed)[0] ** 4
    a = am.box_cells(Box("", (5, 5, 40, 33)), (128, 128), 16)
    b = am.box_cells(Box("", (60, 70, 100, 128)), (128, 128), 16)
    assert am.contrast(habit, habit, a, b).item() == pytest.approx(0, abs=1e-6)
    assert am.contrast(habit + a, habit + b, a, b) > 0.1
    # asking for one thing at two places is the same question the other way round
    there, back = am.contrast(a, b, a, b), am.contrast(b, a, a, b)
    assert there.item() == pytest.approx(-back.item()) and there > 0.8


def test_spread_is_the_entropy():
    maps = random_maps(3)
    p = (maps / maps.sum(dim=(-2, -1), keepdim=True)).flatten(1).double()
    want = torch.distributions.Categorical(probs=p).entropy().float()
    torch.testing.assert_close(am.spread(maps), want, rtol=0, atol=1e-5)
    assert am.spread(EVEN).item() == pytest.approx(math.log(256), abs=1e-5)
    one = torch.zeros(16, 16)
    one[3, 4] = 0.2
    assert am.spread(one).item() == pytest.approx(0, abs=1e-6)


def test_localising_heads_look_at_few_places_of_the_picture():
    maps = EVEN.repeat(2, 3, 4, 1, 1).clone()  # every head even
    maps[:, 1, 2] = 0
    maps[:, 1, 2, 5, 5:9] = 0.24  # four cells, nearly all of the row
    maps[:, 2, 0] = 0
    maps[:, 2, 0, 5, 5] = 0.05  # one cell, but hardly any of the row
    maps[:, 0, 3] = 0
    maps[:, 0, 3, 4:8, 4:8] = 1 / 16  # 16 cells
    seen = am.AnswerAttention("", ["a", "b"], maps, maps.sum(dim=(-2, -1)))
    assert am.localising_heads(seen, 3) == [(1, 2), (0, 3), (2, 0)]


# -- the referee -------------------------------------------------------------


def test_log_chance_is_the_product_of_the_steps(mini, scene):
    """Against cached steps, token by token, of an answer that is forced."""
    model, processor = mini
    text, prompt = "a fox and a key", "caption en"
    ids = processor.tokenizer.encode(text) + [1]
    batch = processor(scene.image, prompt)
    cache = pali.Cache(model.config, 1, batch.ids.shape[1] + len(ids))
    logits = model(batch.pixels, batch.ids, cache=cache, last_only=True)
    want = 0.0
    for i in ids:
        want += logits[0, -1].log_softmax(-1)[i].item()
        logits = model(None, torch.tensor([[i]]), cache=cache)
    got = am.log_chance(
        model, processor, [scene.image] * 2, ["detect cat ; dog", prompt], ["", text]
    )
    # sums of a dozen terms of size 1 to 20; measured 2e-5
    assert got[1].item() == pytest.approx(want, abs=5e-4)


def test_hiding_paints_exactly_the_rectangle(scene):
    hidden = am.hide(scene.image, (10.2, 20, 30, 41.4), (1, 2, 3))
    a, b = np.asarray(scene.image), np.asarray(hidden)
    assert (b[20:41, 10:30] == (1, 2, 3)).all()
    b = b.copy()
    b[20:41, 10:30] = a[20:41, 10:30]
    assert (a == b).all()


def test_hiding_a_part_of_a_blank_picture_costs_nothing(mini):
    blank = Image.new("RGB", (128, 128), (120, 150, 180))
    lost = am.occlusion(*mini, blank, "caption en", "a fox", blocks=2)
    assert lost.abs().max() < 1e-4  # rounding in batches; measured 1e-5


def test_occlusion_blocks_lie_where_they_hide(mini, monkeypatch):
    """A model that only counts dark pixels in one corner stands in for ours."""

    def dark_corner(model, processor, images, prompts, texts, batch=16):
        corner = [np.asarray(i.convert("L"))[:32, 96:] for i in images]
        return torch.tensor([(c < 50).mean() for c in corner])

    monkeypatch.setattr(am, "log_chance", dark_corner)
    image = Image.new("RGB", (128, 128), "white")
    image.paste((0, 0, 0), (100, 4, 120, 28))
    lost = am.occlusion(None, None, image, "", "", blocks=4)
    assert lost[0, 3] > 0.4
    lost[0, 3] = 0
    assert lost.abs().max() == 0


# -- the figure --------------------------------------------------------------


def test_the_figure_shows_the_mean_of_the_heads_on_one_scale(mini, scene):
    seen = am.answer_attention(*mini, scene.image, "caption en", "a fox")
    heads = [(0, 1), (2, 3)]
    figure = am.attention_figure(scene.image, "caption en", seen, heads)
    shown = [ax.images[1] for ax in figure.axes if len(ax.images) == 2]
    assert len(shown) == len(seen.tokens)
    want = (seen.maps[:, 0, 1] + seen.maps[:, 2, 3]) / 2 * 256
    for image, one in zip(shown, want, strict=True):
        assert np.allclose(image.get_array(), one.numpy(), atol=1e-4)
    assert len({image.get_clim() for image in shown}) == 1
    plt.close(figure)


def test_a_long_answer_still_makes_a_figure(mini, scene):
    text = " ; ".join(["<loc0100><loc0200><loc0300><loc0400> cat"] * 6)
    seen = am.answer_attention(*mini, scene.image, "detect cat", text)
    wide = scene.image.resize((300, 100))
    figure = am.attention_figure(wide, "detect cat", seen, [(0, 0)])
    assert sum(len(ax.images) == 2 for ax in figure.axes) == 15
    plt.close(figure)
