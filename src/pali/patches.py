"""Patches: a picture becomes a sequence.

Generated from notebooks/01_patches.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

__all__ = [
    "PatchEmbedding",
    "from_array",
    "on_white",
    "open_picture",
    "patchify",
    "preprocess",
    "read_picture",
    "unpatchify",
    "upright",
]


# cell 4e3946a4
def on_white(image: Image.Image) -> Image.Image:
    """A copy in RGB; a transparent picture is laid on white first.

    note      16-bit grey keeps its upper 8 bits
    raises    ValueError for modes I and F: their range is not known
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"numbers of mode {image.mode} have no agreed black and "
            "white; scale them to 0..255 and uint8 first"
        )
    if image.mode.startswith("I;16"):
        high = np.asarray(image) >> 8
        image = Image.fromarray(high.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# cell 65dcc2e9
def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF tag asks; a damaged tag is ignored."""
    T = Image.Transpose
    turns = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
    }
    turns |= {5: T.TRANSPOSE, 6: T.ROTATE_270, 7: T.TRANSVERSE}
    turns |= {8: T.ROTATE_90}
    image.load()  # a TIFF turns itself here, and drops the tag
    try:
        turn = turns.get(image.getexif().get(0x0112))  # orientation
    except Exception:  # the picture itself may still be sound
        turn = None
    return image if turn is None else image.transpose(turn)


# cell 9ec9a835
def from_array(array: np.ndarray) -> Image.Image:
    """A uint8 array [H, W], [H, W, 3] or [H, W, 4] as a PIL image."""
    channels = array.shape[2:]
    sound = array.ndim == 2 or channels in {(3,), (4,)}
    if array.dtype != np.uint8 or not sound or array.size == 0:
        raise ValueError(
            "a picture array is uint8[H, W], [H, W, 3] or [H, W, 4], "
            f"got {array.dtype}{list(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


# cell 34f422f5
def read_picture(
    source: str | Path | bytes | Image.Image,
) -> Image.Image:
    """A file (of a film the first frame) or an image, upright and RGB.

    raises    ValueError for an image of 0 pixels; for a damaged file
              whatever Pillow raises
    """
    if isinstance(source, Image.Image):
        if 0 in source.size:
            raise ValueError("it has no pixel")
        return on_white(upright(source))
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file) as image:
        return on_white(upright(image))


# cell 6fa9855d
def open_picture(source) -> Image.Image:
    """Read a picture from anything that holds one, upright and in RGB.

    source    path, bytes, PIL image, or array uint8[H, W],
              uint8[H, W, 3] or uint8[H, W, 4]
    returns   PIL image in mode RGB
    raises    ValueError if it is no picture, FileNotFoundError if there
              is none, TypeError for other objects
    note      EXIF rotation is applied; what is transparent shows white
    """
    if isinstance(source, np.ndarray):
        return on_white(from_array(source))
    if not isinstance(source, (str, Path, bytes, Image.Image)):
        raise TypeError(
            "a picture is a path, bytes, a PIL image or a uint8 array, "
            f"not {type(source).__name__}"
        )
    try:
        return read_picture(source)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        name, why = source, error
        if isinstance(source, bytes):
            name = f"{len(source)} bytes"
        if isinstance(source, Image.Image):
            name = f"an image of {source.width} x {source.height} px"
        if isinstance(error, UnidentifiedImageError):
            why = "it is no picture format that Pillow knows"
        text = f"cannot read a picture from {name}: {why}"
        raise ValueError(text) from error


# cell b7322d01
def preprocess(source, size: int) -> Tensor:
    """What the vision tower expects: a squashed square, values -1 to 1.

    source    whatever `open_picture` reads
    size      side of the square in pixels; the aspect ratio is not kept
    returns   float32[3, size, size]
    note      resize with Pillow's bicubic filter on uint8, then
              x / 127.5 - 1, as the published processor does
    """
    image = open_picture(source)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    pixels = (pixels - np.float32(0.5)) / np.float32(0.5)
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(pixels)


# cell f5bb39bf
def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut pictures into square patches, row by row, and flatten each.

    pixels    float[B, C, H, W], H and W multiples of patch_size
    returns   float[B, N, C * P * P], N = (H / P) * (W / P); patch k is
              at row k // (W / P), column k % (W / P)
    """
    B, C, H, W = pixels.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(
            f"a {W} x {H} picture does not divide into {P} px patches"
        )
    grid = pixels.view(B, C, H // P, P, W // P, P)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)


# cell b9d48298
def unpatchify(patches: Tensor, patch_size: int, height: int) -> Tensor:
    """Put flattened patches back together: the inverse of `patchify`.

    patches   float[B, N, C * P * P];  height  picture height in pixels
    returns   float[B, C, H, W]
    """
    B, N, D = patches.shape
    P = patch_size
    rows = height // P
    grid = patches.view(B, rows, N // rows, D // (P * P), P, P)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(
        B, D // (P * P), rows * P, N // rows * P
    )


# cell 23a9201a
class PatchEmbedding(nn.Module):
    """Cut the picture into patches and map each to a vector: one
    product.

    pixels    float[B, C, S, S]
    returns   float[B, N, width]
    weight    float[width, C, P, P]: stored as the filters of a
              convolution with stride P, which is the same computation
    source    Dosovitskiy et al. 2021
    """

    def __init__(
        self, width: int, patch_size: int, channels: int = 3
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        shape = (width, channels, patch_size, patch_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(
            self.weight, std=(channels * patch_size**2) ** -0.5
        )

    def forward(self, pixels: Tensor) -> Tensor:
        patches = patchify(pixels, self.patch_size)  # [B, N, C * P * P]
        filters = self.weight.flatten(1)  # [width, C * P * P]
        return nn.functional.linear(patches, filters, self.bias)
