"""Patches: a picture becomes a sequence.

Generated from notebooks/01_patches.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

__all__ = [
    "PatchEmbedding",
    "from_array",
    "on_white",
    "open_picture",
    "patchify",
    "preprocess",
    "unpatchify",
]


# cell 6fa9855d
def open_picture(source) -> Image.Image:
    """Read a picture from anything that holds one, upright and in RGB.

    source    path, bytes, PIL image, or array uint8[H, W], [H, W, 3 or 4]
    returns   PIL image in mode RGB
    raises    ValueError if it is no picture, TypeError for other objects
    note      EXIF rotation is applied; what is transparent shows white
    """
    if isinstance(source, (str, Path, bytes)):
        name = f"{len(source)} bytes" if isinstance(source, bytes) else source
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            image = Image.open(file)
            image.load()
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read a picture from {name}: {error}") from error
    elif isinstance(source, np.ndarray):
        image = from_array(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        raise TypeError(
            "a picture is a path, bytes, a PIL image or a uint8 array, "
            f"not {type(source).__name__}"
        )
    return on_white(ImageOps.exif_transpose(image))


# cell 9ec9a835
def from_array(array: np.ndarray) -> Image.Image:
    """A uint8 array [H, W], [H, W, 3] or [H, W, 4] as a PIL image."""
    flat = array.ndim == 2
    if array.dtype != np.uint8 or not (flat or array.shape[2:] in {(3,), (4,)}):
        raise ValueError(
            "a picture array is uint8[H, W], [H, W, 3] or [H, W, 4], "
            f"got {array.dtype}{list(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


# cell 4e3946a4
def on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB; a transparent picture is laid on white first."""
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# cell b7322d01
def preprocess(source, size: int) -> Tensor:
    """The tensor the vision tower expects: squashed square, values -1 to 1.

    source    whatever `open_picture` reads
    size      side of the square in pixels; the aspect ratio is not kept
    returns   float32[3, size, size]
    source    resize with Pillow's bicubic filter on uint8, then x / 127.5 - 1,
              as the published processor does (Beyer et al. 2024)
    """
    image = open_picture(source)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    pixels = (pixels - np.float32(0.5)) / np.float32(0.5)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


# cell f5bb39bf
def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut pictures into square patches, row by row, and flatten each.

    pixels    float[B, C, H, W], H and W multiples of patch_size
    returns   float[B, N, C * P * P], N = (H / P) * (W / P); patch k is at
              row k // (W / P), column k % (W / P)
    """
    B, C, H, W = pixels.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"a {W} x {H} picture does not divide into {P} px patches")
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
    """Cut the picture into patches and map each to a vector: one product.

    pixels    float[B, C, S, S]
    returns   float[B, N, width]
    weight    float[width, C, P, P]: stored as the filters of a convolution
              with stride P, which is the same computation
    source    Dosovitskiy et al. 2021
    """

    def __init__(self, width: int, patch_size: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, channels, *[patch_size] * 2))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight, std=(channels * patch_size**2) ** -0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = patchify(pixels, self.patch_size)  # [B, N, C * P * P]
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias)
