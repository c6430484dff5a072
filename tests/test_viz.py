"""Drawings are read back from the Axes; displays are read as HTML."""

import base64
import html
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

mpl.use("agg")

import matplotlib.pyplot as plt  # noqa: E402

from pali import viz  # noqa: E402


@pytest.fixture(autouse=True)
def house_style():
    with mpl.rc_context():
        viz.use_style()
        yield
        plt.close("all")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def png(figure=None) -> bytes:
    file = io.BytesIO()
    (figure or plt.gcf()).savefig(file, metadata={"Software": None})
    return file.getvalue()


def box(label="cat", xyxy=(2, 3, 9, 12)):
    return SimpleNamespace(label=label, xyxy=xyxy)


# ------------------------------------------------------------------ style


def test_figures_are_the_same_bytes_twice_and_carry_no_date_or_version(rng):
    values = rng.random((4, 4))
    first, second = (png(viz.heatmap(values, title="x").figure) for _ in range(2))
    assert first == second
    info = Image.open(io.BytesIO(first)).info
    assert set(info) <= {"dpi"}, info


def test_figures_are_opaque_and_as_wide_as_the_page():
    viz.bars([1, 2], ["a", "b"])
    image = Image.open(io.BytesIO(png()))
    assert image.width == 1280  # 6.4 inches, twice 100 dots an inch
    assert image.mode == "RGB" or image.getextrema()[3] == (255, 255)


def test_all_text_is_at_least_nine_points(rng):
    viz.score_matrix(rng.random((3, 3)), "abc", "t")
    viz.mask_picture(np.tril(np.ones((4, 4))), list("abcd"), [("p", 2), ("a", 2)], "t")
    viz.contact_sheet(rng.random((2, 3, 16, 16)), "t")
    viz.boxes(np.zeros((16, 16, 3), np.uint8), [box()], "t")
    viz.lines([1, 2], {"a": [1, 2], "b": [2, 1]}, title="t")
    for number in plt.get_fignums():
        for text in plt.figure(number).findobj(mpl.text.Text):
            assert text.get_fontsize() >= 9, text


def test_viz_imports_no_model_module():
    code = (
        "import sys, pali.viz as v; print([m for m in sys.modules "
        "if m.startswith('pali.') and m != 'pali.viz' or m == 'torch' "
        "or m == 'ipywidgets'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ numbers


def test_heatmap_shows_the_matrix_and_takes_bfloat16():
    values = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)
    ax = viz.heatmap(values, annotate=True, digits=0)
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0, 1, 2], [3, 4, 5]])
    assert [t.get_text() for t in ax.texts] == list("012345")


def test_signed_heatmap_is_centred_at_zero():
    norm = viz.heatmap([[-1.0, 3.0]], signed=True).images[0].norm
    assert (norm.vmin, norm.vmax) == (-3.0, 3.0)


def test_heatmap_of_equal_values_has_a_scale():
    assert viz.heatmap(np.ones((2, 2)), colorbar="x").images[0].norm.vmin == 1.0


def test_heatmaps_share_one_scale():
    axes = viz.heatmaps([[[0, 1]], [[5, 2]]], ["a", "b"], colorbar="w")
    assert {(ax.images[0].norm.vmin, ax.images[0].norm.vmax) for ax in axes} == {(0, 5)}


def test_score_matrix_names_queries_and_keys():
    ax = viz.score_matrix(np.eye(2), ["the", "cat"], "title")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["the", "cat"]
    assert ax.get_ylabel().startswith("query") and ax.get_xlabel().startswith("key")
    assert ax.get_title(loc="left") == "title"


def test_mask_picture_shows_allowed_cells_and_block_borders():
    mask = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    ax = viz.mask_picture(mask, None, [("image", 2), ("prompt", 1), ("answer", 2)])
    np.testing.assert_array_equal(ax.images[0].get_array(), np.tril(np.ones((5, 5))))
    across = [
        line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) < 2
    ]
    assert across == [1.5, 2.5]


def test_mask_picture_of_a_cached_step_puts_borders_at_its_own_rows():
    ax = viz.mask_picture(np.ones((2, 5)), list("abcde"), [("image", 2), ("answer", 3)])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["d", "e"]
    with pytest.raises(ValueError, match="do not add up"):
        viz.mask_picture(np.ones((2, 5)), blocks=[("image", 2)])


def test_bars_have_the_heights_given():
    ax = viz.bars({"a": [1, 2], "b": [3, 4]}, ["x", "y"], reference=(2.5, "chance"))
    heights = [bar.get_height() for group in ax.containers for bar in group]
    assert heights == [1, 2, 3, 4]
    hatches = [group[0].get_hatch() for group in ax.containers]
    assert hatches[0] != hatches[1]  # not by colour alone


def test_stacked_bars_start_where_the_last_ended():
    ax = viz.bars({"a": [1, 2], "b": [3, 4]}, ["x", "y"], stacked=True)
    assert [bar.get_y() for bar in ax.containers[1]] == [1, 2]


def test_horizontal_bars_run_across():
    ax = viz.bars([1, 2], ["x", "y"], horizontal=True, errors=[0.1, 0.2])
    assert [bar.get_width() for bar in ax.patches] == [1, 2]


def test_lines_differ_by_more_than_colour():
    ax = viz.lines([1, 2, 4], {"a": [1, 2, 3], "b": [3, 2, 1]}, logx=True)
    a, b = ax.lines
    np.testing.assert_array_equal(b.get_ydata(), [3, 2, 1])
    assert a.get_marker() != b.get_marker() and a.get_linestyle() != b.get_linestyle()
    assert ax.get_xscale() == "log"


def test_histogram_counts_everything_in_common_bins(rng):
    a, b = rng.normal(size=50), rng.normal(size=(7, 10))
    ax = viz.histogram({"a": a, "b": b}, bins=5)
    first, second = (patch.get_data() for patch in ax.patches)
    assert first.values.sum() == 50 and second.values.sum() == 70
    np.testing.assert_array_equal(first.edges, second.edges)


def test_scatter_keeps_points_of_a_kind_together():
    ax = viz.scatter2d([[0, 0], [1, 1], [2, 2]], kinds="aba", names="xyz")
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[0, 0], [2, 2]])
    assert [t.get_text() for t in ax.texts] == ["x", "y", "z"]


# ------------------------------------------------------------------ pictures


def test_picture_reads_every_form_alike(rng):
    values = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    model = torch.tensor(values / 127.5 - 1).permute(2, 0, 1)
    for form in (Image.fromarray(values), values, values / 255, model):
        shown = viz.picture(form).images[0]
        np.testing.assert_array_equal(shown.get_array(), values)
        assert shown.get_interpolation() == "nearest"


def test_picture_puts_transparent_parts_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert viz.picture(clear).images[0].get_array().min() == 255


def test_picture_refuses_what_is_not_a_picture():
    with pytest.raises(ValueError, match="lie in"):
        viz.picture(np.full((4, 4, 3), 200.0))
    with pytest.raises(ValueError, match="shape"):
        viz.picture(np.zeros((4, 4, 2)))


def test_pictures_make_a_sheet():
    axes = viz.pictures([np.zeros((4, 4, 3), np.uint8)] * 5, list("abcde"), 3)
    assert [ax.get_title(loc="left") for ax in axes] == list("abcde")


def test_filters_stand_in_reading_order_on_one_scale():
    kernels = np.zeros((3, 3, 2, 2))
    kernels[1] = 1.0
    kernels[2] = -0.5
    sheet = viz.filters(kernels, columns=2).images[0].get_array()
    assert sheet.shape == (5, 5, 3)
    assert sheet[0, 0, 0] == 0.5 and sheet[0, 3, 0] == 1.0 and sheet[3, 0, 0] == 0.25


def test_patch_grid_draws_every_border_and_refuses_a_remainder():
    ax = viz.patch_grid(np.zeros((16, 24, 3), np.uint8), 8, highlight=[(1, 2)])
    across, down = ax.collections
    assert len(across.get_segments()) == 3 and len(down.get_segments()) == 4
    assert ax.patches[0].get_xy() == (15.5, 7.5)
    with pytest.raises(ValueError, match="whole number"):
        viz.patch_grid(np.zeros((16, 20, 3), np.uint8), 8)


def test_boxes_are_where_the_pixels_are():
    ax = viz.boxes(np.zeros((16, 16, 3), np.uint8), [box()])
    drawn = ax.patches[-1]
    assert drawn.get_xy() == (1.5, 2.5)
    assert (drawn.get_width(), drawn.get_height()) == (7, 9)
    assert ax.texts[0].get_text() == "cat"


def test_masks_tint_their_pixels_only():
    mask = np.zeros((16, 16), bool)
    mask[4:8, 5:9] = True
    ax = viz.masks(np.zeros((16, 16, 3), np.uint8), [(box(), mask), mask.T])
    tint = ax.images[1].get_array()
    np.testing.assert_array_equal(tint[..., 3] > 0, mask)
    assert len(ax.texts) == 1


# ------------------------------------------------------------------ attention


def test_even_attention_is_one_times_uniform_and_neutral():
    axes = viz.attention_overlay(
        np.zeros((32, 32, 3), np.uint8), np.full(256, 1 / 1024)
    )
    shown = axes[1].images[0]
    np.testing.assert_allclose(shown.get_array(), 1.0)
    assert shown.norm(1.0) == 0.5
    assert axes[1].get_title(loc="left") == "image share 25%"
    assert axes[0].images[1].get_array()[..., 3].max() == 0.0  # nothing is tinted


def test_a_bright_cell_of_attention_lands_on_its_corner_of_the_picture():
    weights = np.zeros((16, 16))
    weights[0, 15] = 1.0
    axes = viz.attention_overlay(np.zeros((32, 32, 3), np.uint8), weights, box=box())
    assert axes[1].images[0].get_array()[0, 15] == 256
    assert tuple(axes[1].images[0].get_extent()) == (-0.5, 31.5, 31.5, -0.5)
    assert axes[0].images[1].get_array()[0, 15, 3] > 0.8


def test_raw_attention_is_shown_as_it_is(rng):
    weights = rng.random(256) / 512
    axes = viz.attention_overlay(
        np.zeros((32, 32, 3), np.uint8), weights, uniform=False, vmax=0.01
    )
    np.testing.assert_array_equal(axes[1].images[0].get_array().ravel(), weights)
    assert axes[1].images[0].norm.vmax == 0.01


def test_contact_sheet_has_one_scale_and_prints_shares(rng):
    maps = rng.random((2, 3, 256))
    maps /= maps.sum(-1, keepdims=True) * 2
    axes = viz.contact_sheet(maps, "all heads")
    assert axes.shape == (2, 3)
    assert len({id(ax.images[0].norm) for ax in axes.flat}) == 1
    assert {ax.get_xlabel() for ax in axes.flat} == {"50%"}
    np.testing.assert_allclose(axes[1, 2].images[0].get_array().mean(), 1.0)


def test_weights_that_fill_no_square_are_refused():
    with pytest.raises(ValueError, match="square"):
        viz.attention_overlay(np.zeros((8, 8, 3), np.uint8), np.ones(10))


# ------------------------------------------------------------------ HTML displays


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all of them were closed."""

    VOID = {"input", "img", "br"}

    def __init__(self, markup):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def parse(shown) -> Tags:
    markup = shown._repr_mimebundle_()["text/html"]
    tags = Tags(markup)
    assert not tags.open
    assert not any("id" in attrs for _, attrs in tags.tags), "ids could repeat"
    assert not re.search(r"(src|href)=\"https?:", markup)
    return tags


def test_model_map_is_one_labelled_picture_with_the_chapter_named():
    tags = parse(viz.model_map("rope"))
    (svg,) = tags.all("svg")
    assert svg["role"] == "img"
    assert "chapter 7, rope" in svg["aria-label"]
    filled = [r for r in tags.all("rect") if r["fill"] == viz.ACCENT]
    assert len(filled) == 1
    assert len(tags.all("rect")) == len(viz.CHAPTERS)
    assert viz.model_map("rope")._repr_mimebundle_()["text/plain"].startswith("<model")


def test_model_map_tells_what_is_built_from_what_is_to_come():
    dashed = {
        name: len(
            [
                r
                for r in parse(viz.model_map(name)).all("rect")
                if "stroke-dasharray" in r
            ]
        )
        for name in ("patches", "attention_maps")
    }
    assert dashed == {"patches": len(viz.CHAPTERS) - 1, "attention_maps": 0}


@pytest.mark.parametrize("lit", [None, "all", ["norm", "mlp"], "vision"])
def test_model_map_takes_none_all_and_several(lit):
    assert str(viz.model_map(lit)) == str(viz.model_map(lit))
    parse(viz.model_map(lit))


def test_model_map_refuses_an_unknown_part():
    with pytest.raises(ValueError, match="no box for"):
        viz.model_map("engine")


def test_model_map_boxes_that_do_not_hold_others_do_not_overlap():
    single = [c[2:] for n, c in viz.CHAPTERS.items() if n not in viz.GROUPS]
    for i, (x, y, w, h) in enumerate(single):
        for a, b, c, d in single[i + 1 :]:
            assert x + w <= a or a + c <= x or y + h <= b or b + d <= y


def test_token_strip_folds_long_runs_and_escapes():
    tokens = ["<image>"] * 256 + ["<bos>", "▁cat", "\n"]
    strip = viz.token_strip(tokens, ["image"] * 256 + ["bos", "prompt", "newline"])
    tags = parse(strip)
    label = tags.all("div")[0]["aria-label"]
    assert label == "Token strip: <image> × 256 <bos> ␣cat ⏎"
    assert "<image> ×" not in str(strip).replace(label, "")
    with pytest.raises(ValueError, match="kinds"):
        viz.token_strip(["a"], ["verb"])


def test_explore_holds_every_frame_and_shows_the_first():
    tags = parse(viz.explore(lambda size: f"<p>{size}</p>", size=[1, 2, 4]))
    frames = [a for a in tags.all("div") if "data-frame" in a]
    assert [f["data-frame"] for f in frames] == ["0", "1", "2"]
    assert ["hidden" in f for f in frames] == [False, True, True]
    (slider,) = tags.all("input")
    assert slider["type"] == "range" and slider["max"] == "2"
    assert slider["data-labels"] == '["1", "2", "4"]'
    assert len(tags.all("label")) == 1


def test_explore_takes_several_controls_and_words():
    def show(size, word):
        return f"<p>{html.escape(word)}{size}</p>"

    shown = viz.explore(show, size=[1, 2], word=["a", "b", "<c>"])
    tags = parse(shown)
    assert len([a for a in tags.all("div") if "data-frame" in a]) == 6
    assert len(tags.all("select")) == 1 and len(tags.all("option")) == 3
    assert shown.frames[1, 2] == "<p>&lt;c&gt;2</p>"


def test_explore_with_a_kernel_offers_the_same_frames_live():
    shown = viz.explore(lambda size: f"<p>{size}</p>", size=[1, 2])
    panel = shown._widget()
    slider, view = panel.children
    slider.value = 1
    assert view.value == "<p>2</p>"
    bundle = shown._repr_mimebundle_()
    assert {"text/plain", "text/html"} < set(bundle)


def test_explore_works_without_widgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    bundle = viz.explore(lambda size: "x", size=[1])._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}


def test_explore_refuses_nothing_and_too_much():
    with pytest.raises(ValueError, match="at least one"):
        viz.explore(lambda size: "x", size=[])
    with pytest.raises(ValueError, match="frames"):
        viz.explore(lambda a, b: "x", a=range(20), b=range(20))


def test_svg_helpers_print_rounded_numbers_without_minus_zero():
    markup = str(viz.svg_heatmap([[-0.001, 0.256]], label="two numbers", xnames="ab"))
    assert ">0.00<" in markup and ">0.26<" in markup and "-0.00" not in markup
    bars = Tags(str(viz.svg_bars([0.5, 1.0], ["a", "b"], label="two bars")))
    assert [r["width"] for r in bars.all("rect")] == ["150.0", "300.0"]


def test_picture_html_keeps_every_pixel(rng):
    values = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    (image,) = parse(viz.picture_html(values, 'a "quoted" alt')).all("img")
    assert image["alt"] == 'a "quoted" alt'
    data = base64.b64decode(image["src"].split(",")[1])
    np.testing.assert_array_equal(Image.open(io.BytesIO(data)), values)
