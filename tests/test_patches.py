"""patches: bit-exact with the published processor; every bad input one sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers.image_utils import load_image
from transformers.models.siglip.image_processing_pil_siglip import (
    SiglipImageProcessorPil,
)

from pali.patches import (
    PatchEmbedding,
    from_array,
    on_white,
    open_picture,
    patchify,
    preprocess,
    unpatchify,
    upright,
)


def random_array(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (height, width, channels) if channels > 1 else (height, width)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def random_picture(width, height, seed=0):
    return Image.fromarray(random_array(height, width, seed=seed))


def as_file(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reference(image, size):
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    return processor(image, return_tensors="pt")["pixel_values"][0]


# -- the same bits as the reference processor --------------------------------

SIZES = {
    "smaller on both sides": (31, 17),
    "larger on both sides": (301, 203),
    "wide and low": (500, 3),
    "narrow and high": (3, 500),
    "the target itself": (48, 48),
    "one side already right": (48, 77),
    "odd by one": (49, 47),
    "one pixel": (1, 1),
    "one row": (90, 1),
    "one column": (1, 90),
    "four by four, which an array reader could take for channels": (4, 4),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_pictures_of_any_size_equal_the_reference_bit_for_bit(size):
    picture = random_picture(*size)
    assert torch.equal(preprocess(picture, 48), reference(picture, 48))


def grey_alpha():
    bands = [Image.fromarray(random_array(37, 53, 1, seed)) for seed in (1, 2)]
    return Image.merge("LA", bands)


def stored(image, **options):
    return Image.open(io.BytesIO(as_file(image, **options)))


RGB = random_picture(53, 37)
MODES = {
    "grey": lambda: RGB.convert("L"),
    "black and white": lambda: RGB.convert("1"),
    "palette": lambda: RGB.quantize(16),
    "palette with one transparent colour": lambda: stored(
        RGB.quantize(8), transparency=3
    ),
    "palette with an opacity for each colour": lambda: stored(
        RGB.quantize(8), transparency=bytes([0, 50, 100, 255, 255, 200, 3, 9])
    ),
    "RGB with one transparent colour": lambda: stored(
        RGB, transparency=RGB.getpixel((0, 0))
    ),
    "grey with one transparent value": lambda: stored(RGB.convert("L"), transparency=7),
    "RGBA": lambda: Image.fromarray(random_array(37, 53, 4)),
    "RGBA, wholly transparent": lambda: Image.new("RGBA", (9, 7), (200, 10, 10, 0)),
    "grey with alpha": grey_alpha,
    "printing inks": lambda: RGB.convert("CMYK"),
    "JPEG colours": lambda: RGB.convert("YCbCr"),
    "LAB": lambda: RGB.convert("LAB"),
}


@pytest.mark.parametrize("make", MODES.values(), ids=MODES)
def test_every_mode_equals_the_reference_bit_for_bit(make):
    picture = make()
    assert torch.equal(preprocess(picture, 32), reference(picture, 32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_rotated_file_equals_the_reference_loader(orientation, tmp_path):
    tag = Image.Exif()
    tag[0x0112] = orientation
    path = tmp_path / "phone.jpg"
    RGB.save(path, exif=tag)
    want = reference(load_image(str(path)), 32)  # applies the tag, then RGB
    assert torch.equal(preprocess(path, 32), want)


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_an_exif_tag_counts_once_in_every_format(kind):
    tag = Image.Exif()
    tag[0x0112] = 6
    options = {"lossless": True} if kind == "webp" else {}
    file = as_file(RGB, kind, exif=tag, **options)
    want = np.asarray(RGB.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(open_picture(file), want)


def test_a_rotated_pil_image_that_is_already_open_is_turned_too():
    tag = Image.Exif()
    tag[0x0112] = 3
    opened = stored(RGB, exif=tag)
    want = ImageOps.exif_transpose(opened)
    assert np.array_equal(open_picture(opened), want)


def test_the_published_resolutions_equal_the_reference():
    picture = random_picture(640, 427)
    for size in (224, 448):
        assert torch.equal(preprocess(picture, size), reference(picture, size))


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_random_sizes_equal_the_reference(width, height, size, seed):
    picture = random_picture(width, height, seed)
    assert torch.equal(preprocess(picture, size), reference(picture, size))


def test_grey_levels_have_the_published_values():
    levels = np.array([[0, 127, 128, 255]], np.uint8).repeat(4, axis=0)
    got = preprocess(levels, 4)[0, 0]
    want = torch.tensor([-1, -0.00392157, 0.00392163, 1])
    # the literals have 6 digits; /256 instead of /255 moves 127 by 4e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_the_reference_check_rejects_a_bilinear_resize():
    picture = random_picture(101, 57)
    small = picture.resize((48, 48), Image.Resampling.BILINEAR)
    assert not torch.equal(preprocess(small, 48), reference(picture, 48))


def test_the_reference_check_rejects_imagenet_statistics():
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    spread = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    faulty = (preprocess(RGB, 48) * 0.5 + 0.5 - mean) / spread
    assert (faulty - reference(RGB, 48)).abs().max() > 1


# -- choices where the reference is not followed -----------------------------


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_grey_keeps_its_upper_8_bits(mode):
    values = np.random.default_rng(3).integers(0, 65536, (9, 7))
    raw = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    got = np.asarray(open_picture(Image.frombytes(mode, (7, 9), raw)))
    assert np.array_equal(got, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_a_16_bit_png_and_the_same_in_8_bits_agree():
    grey = random_array(9, 7, 1)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(open_picture(as_file(deep)), from_array(grey).convert("RGB"))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_numbers_without_a_known_range_are_refused(dtype):
    picture = Image.fromarray(random_array(4, 4, 1).astype(dtype))
    with pytest.raises(ValueError, match="no agreed black and white"):
        open_picture(picture)


# -- whatever holds a picture -------------------------------------------------


def test_path_text_bytes_image_and_array_give_the_same_picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(as_file(RGB))
    for source in (path, str(path), path.read_bytes(), RGB, np.asarray(RGB)):
        assert np.array_equal(open_picture(source), RGB)


def test_arrays_may_be_grey_rgba_or_not_contiguous():
    array = random_array(8, 9, 4)
    assert np.array_equal(open_picture(array), on_white(Image.fromarray(array)))
    grey = array[..., 0]
    assert np.array_equal(np.asarray(open_picture(grey))[..., 1], grey)
    flipped = array[::-1, ::-1, :3]
    assert np.array_equal(open_picture(flipped), flipped)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [random_picture(8, 6, seed).quantize(16) for seed in range(3)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    want = frames[0].convert("RGB")
    assert np.array_equal(open_picture(path), want)
    path.unlink()  # the file is closed: this fails on some systems otherwise


def test_the_picture_that_was_passed_is_not_changed():
    picture = random_picture(6, 5)
    open_picture(picture).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(picture, random_picture(6, 5))


def test_a_damaged_exif_block_costs_the_tag_not_the_picture():
    file = as_file(RGB, "jpeg")
    junk = b"Exif\0\0this is no TIFF header at all"
    block = b"\xff\xe1" + struct.pack(">H", len(junk) + 2) + junk
    broken = file[:2] + block + file[2:]
    assert np.array_equal(open_picture(broken), open_picture(file))


# -- bad input: one sentence, and only ValueError, TypeError or OSError ------


def bomb(side):
    """The first bytes of a PNG that claims side x side pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


BAD = {
    "no picture": (b"to whom it may concern", "no picture format"),
    "nothing at all": (b"", "0 bytes: it is no picture format"),
    "a truncated PNG": (as_file(RGB)[:900], "truncated"),
    "a truncated JPEG": (as_file(RGB, "jpeg")[:700], "truncated"),
    "a decompression bomb": (bomb(40_000), "decompression bomb"),
    "an image without pixels": (Image.new("RGB", (0, 5)), "no pixel"),
    "an array without pixels": (random_array(0, 5), r"got uint8\[0, 5, 3\]"),
    "a float array": (random_array(5, 5) / 255, r"got float64\[5, 5, 3\]"),
    "a 16-bit array": (random_array(5, 5).astype(np.uint16), "got uint16"),
    "a bool array": (random_array(5, 5) > 99, "got bool"),
    "channels first": (random_array(3, 5, 5), r"got uint8\[3, 5, 5\]"),
    "two channels": (random_array(5, 5, 2), r"got uint8\[5, 5, 2\]"),
    "a batch of arrays": (random_array(5, 5)[None], r"got uint8\[1, 5, 5, 3\]"),
    "a line of numbers": (random_array(5, 5)[0, :, 0], r"got uint8\[5\]"),
}


@pytest.mark.parametrize("source, says", BAD.values(), ids=BAD)
def test_a_bad_picture_is_a_value_error_that_says_why(source, says):
    with pytest.raises(ValueError, match=says) as caught:
        preprocess(source, 16)
    text = str(caught.value)
    assert "\n" not in text
    assert "0x7" not in text, "a memory address helps nobody"


@pytest.mark.parametrize(
    "source", [None, 7, [1, 2], torch.zeros(3, 4, 4), io.BytesIO()]
)
def test_other_objects_are_a_type_error_that_names_what_is_read(source):
    with pytest.raises(TypeError, match="a path, bytes, a PIL image or a uint8 array"):
        open_picture(source)


def test_a_folder_is_a_value_error_and_a_missing_file_an_os_error(tmp_path):
    with pytest.raises(ValueError, match="cannot read a picture"):
        open_picture(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.png"):
        open_picture(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp"])
def test_files_with_random_damage_fail_with_a_sentence_or_not_at_all(kind):
    rng = np.random.default_rng(5)
    tag = Image.Exif()
    tag[0x0112] = 6
    options = {"exif": tag} if kind in ("png", "jpeg", "webp") else {}
    sound = as_file(RGB, kind, **options)
    for _ in range(150):
        file = bytearray(sound[: int(rng.integers(1, len(sound) + 1))])
        for at in rng.integers(0, min(len(file), 400), size=4):
            file[at] = rng.integers(0, 256)
        try:
            assert preprocess(bytes(file), 8).isfinite().all()
        except ValueError as error:
            assert str(error).startswith("cannot read a picture from")


# -- patches -------------------------------------------------------------------


def patches_by_slicing(pixels, P):
    """The same with two loops and nothing but slices."""
    pictures = []
    for picture in pixels:
        rows = range(0, picture.shape[1], P)
        columns = range(0, picture.shape[2], P)
        cut = [picture[:, y : y + P, x : x + P] for y in rows for x in columns]
        pictures.append(torch.stack([square.flatten() for square in cut]))
    return torch.stack(pictures)


small = st.integers(1, 4)


@given(B=small, C=small, rows=small, columns=small, P=small)
def test_patchify_is_cutting_row_by_row(B, C, rows, columns, P):
    shape = (B, C, rows * P, columns * P)
    pixels = torch.arange(float(np.prod(shape))).view(shape)
    assert torch.equal(patchify(pixels, P), patches_by_slicing(pixels, P))


@given(B=small, C=small, rows=small, columns=small, P=small)
def test_unpatchify_undoes_patchify(B, C, rows, columns, P):
    shape = (B, C, rows * P, columns * P)
    pixels = torch.arange(float(np.prod(shape))).view(shape)
    assert torch.equal(unpatchify(patchify(pixels, P), P, rows * P), pixels)


def lit_rows(cut, row, column):
    """Which rows of the sequence answer to one lit patch of 16 x 16."""
    lit = torch.zeros(1, 3, 64, 64)
    lit[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    return cut(lit, 4)[0].any(dim=1).nonzero().flatten().tolist()


@given(row=st.integers(0, 15), column=st.integers(0, 15))
def test_one_lit_patch_lights_its_own_row_only(row, column):
    assert lit_rows(patchify, row, column) == [row * 16 + column]


def test_the_lit_patch_check_rejects_a_cut_without_permutation():
    def viewed(pixels, P):
        return pixels.reshape(len(pixels), -1, 3 * P * P)

    assert viewed(torch.zeros(1, 3, 64, 64), 4).shape == (1, 256, 48)  # looks right
    assert lit_rows(viewed, 7, 7) != [7 * 16 + 7]


def test_a_picture_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="10 x 8 picture does not divide into 4 px"):
        patchify(torch.zeros(1, 3, 8, 10), 4)


@pytest.mark.parametrize("width, P, C", [(7, 2, 3), (32, 4, 1), (24, 14, 3)])
def test_the_embedding_is_a_convolution_with_the_patch_as_stride(width, P, C):
    generator = torch.Generator().manual_seed(1)
    embed = PatchEmbedding(width, P, C).double()
    torch.nn.init.normal_(embed.bias, generator=generator)
    pixels = torch.randn(2, C, 3 * P, 5 * P, generator=generator).double()
    conv = F.conv2d(pixels, embed.weight, embed.bias, stride=P)
    want = conv.flatten(2).transpose(1, 2)
    # worst of 300 draws: 5e-15; colours last instead of first: 0.5 and more
    torch.testing.assert_close(embed(pixels), want, rtol=0, atol=5e-14)


def test_a_fresh_embedding_keeps_the_spread_of_its_input():
    torch.manual_seed(0)
    embed = PatchEmbedding(256, 8)
    generator = torch.Generator().manual_seed(2)
    spread = embed(torch.randn(4, 3, 64, 64, generator=generator)).std()
    # 100 seeds: 0.987 to 1.018; torch's default for convolutions gives 0.58
    assert 0.9 < spread < 1.1


def test_upright_leaves_a_picture_without_tag_alone():
    assert upright(RGB) is RGB
