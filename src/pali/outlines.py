"""Outlines: a shape as sixteen words.

Generated from notebooks/18_outlines.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pali.tokens import Box, read_objects
from pali.weights import write_files

__all__ = [
    "GRID",
    "MaskCodec",
    "Residual",
    "SIDE",
    "codec_loss",
    "crop_mask",
    "load_mask_codec",
    "mask_decoder",
    "mask_encoder",
    "mask_tokens",
    "paste_mask",
    "pixel_box",
    "read_masks",
    "save_mask_codec",
    "shipped_codec",
]


# cell c65ea415
SIDE = 64  # a mask is coded at 64 x 64
GRID = 4  # as 4 x 4 codes


# cell 1b75a409
class Residual(nn.Module):
    """x plus three convolutions of x; the shape stays the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


# cell 93d21555
def mask_encoder(width: int, code_width: int) -> nn.Sequential:
    """float[B, 1, 64, 64] -> float[B, code_width, 4, 4], halving four times."""
    sizes = (1, width // 8, width // 4, width // 2, width)
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(
        *layers, Residual(width), Residual(width), nn.Conv2d(width, code_width, 1)
    )


# cell 96b4988a
def mask_decoder(width: int, code_width: int) -> nn.Sequential:
    """float[B, code_width, 4, 4] -> float[B, 1, 64, 64], about -1 to 1."""
    sizes = (width, width, width // 2, width // 4, width // 8)
    layers: list[nn.Module] = [nn.Conv2d(code_width, width, 1), nn.ReLU()]
    layers += [Residual(width), Residual(width)]
    for before, after in zip(sizes, sizes[1:], strict=False):
        up = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
        layers += [up, nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(sizes[-1], 1, 1))


# cell c99e1404
class MaskCodec(nn.Module):
    """A VQ-VAE that writes a 64 x 64 mask as 16 of 128 codes, and reads it back.

    codebook    float[codes, code_width]
    source      van den Oord et al. 2017; the layout is that of the decoder
                published with PaliGemma (`vae-oid.npz`)
    """

    def __init__(self, codes=128, code_width=512, width=128, encoder=True) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, code_width))
        self.encoder = mask_encoder(width, code_width) if encoder else None
        self.decoder = mask_decoder(width, code_width)

    def nearest(self, x: Tensor) -> Tensor:
        """The codes closest to the encoder's vectors: int64[B, 16], row by row."""
        x = x.flatten(2).transpose(1, 2)  # [B, 16, code_width]
        distance = (
            x.square().sum(-1, keepdim=True)
            - 2 * x @ self.codebook.T
            + self.codebook.square().sum(-1)
        )
        return distance.argmin(dim=-1)

    def encode(self, masks: Tensor) -> Tensor:
        """float[B, 1, 64, 64], values 0 to 1 -> int64[B, 16]."""
        if self.encoder is None:
            raise ValueError("this codec holds the decoder alone, so it cannot encode")
        return self.nearest(self.encoder(2 * masks - 1))

    def decode(self, codes: Tensor) -> Tensor:
        """int64[B, 16] -> float[B, 64, 64]; the mask is where it is above 0."""
        x = F.embedding(codes, self.codebook).transpose(1, 2)
        return self.decoder(x.unflatten(2, (GRID, GRID)))[:, 0]


# cell d1506fb2
def codec_loss(codec: MaskCodec, masks: Tensor, commit: float = 0.25) -> Tensor:
    """How far the mask that comes back is from the one that went in.

    masks     float[B, 1, 64, 64], 0 to 1
    note      no gradient passes the choice of a code, so the decoder's goes
              straight to the encoder; the codebook is drawn to the vectors
              that chose it, and these are held near it
    source    van den Oord et al. 2017, equation 3
    """
    x = codec.encoder(2 * masks - 1)
    codes = F.embedding(codec.nearest(x), codec.codebook)
    codes = codes.transpose(1, 2).unflatten(2, (GRID, GRID))
    through = x + (codes - x).detach()
    back = codec.decoder(through)
    return (
        F.mse_loss(back, 2 * masks - 1)
        + F.mse_loss(codes, x.detach())
        + commit * F.mse_loss(x, codes.detach())
    )


# cell a0b2b0a1
def pixel_box(box: Box, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels of a box: left, top, right, bottom, inside the picture."""
    width, height = image_size
    x0, y0, x1, y1 = (int(v) for v in box.xyxy)
    return max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)


# cell 406bc4c9
def crop_mask(mask: np.ndarray, box: Box) -> Tensor:
    """The part of a mask in a box, stretched to what the encoder reads.

    mask      bool[H, W];  returns  float32[1, 64, 64], 0 to 1
    raises    ValueError if the box holds no pixel
    """
    x0, y0, x1, y1 = pixel_box(box, mask.shape[::-1])
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"the box {box.xyxy} holds no whole pixel")
    part = Image.fromarray(mask[y0:y1, x0:x1].astype(np.uint8) * 255)
    part = part.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(part, np.float32) / 255)[None]


# cell c9d0aba7
def paste_mask(part: Tensor, box: Box, image_size: tuple[int, int]) -> np.ndarray:
    """A decoded 64 x 64 map put back into its box: bool[H, W].

    part          float[64, 64], the mask is where it is above 0
    image_size    (width, height)
    """
    width, height = image_size
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = pixel_box(box, image_size)
    if x1 > x0 and y1 > y0:
        image = Image.fromarray(part.detach().float().cpu().numpy())
        image = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        mask[y0:y1, x0:x1] = np.asarray(image) > 0
    return mask


# cell 72dbb83e
def mask_tokens(codes) -> str:
    """Sixteen codes as text: "<seg000><seg127>…"."""
    return "".join(f"<seg{int(code):03d}>" for code in codes)


# cell c22eb65a
def load_mask_codec(path: str | Path) -> MaskCodec:
    """A codec from the official `vae-oid.npz`, or from a file of our own.

    path      npz archive; sizes are read from its arrays
    raises    ValueError naming the file and the key that is missing or wrong
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: torch.from_numpy(np.array(file[k])) for k in file.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no npz archive of a codec: {error}") from error
    state = {k.replace("_vq_vae._embedding", "codebook"): v for k, v in arrays.items()}
    for key in ("codebook", "decoder.0.weight"):
        if key not in state:
            raise ValueError(f"{path} lacks {key}, so it is no mask codec")
    codes, code_width = state["codebook"].shape
    has_encoder = any(key.startswith("encoder.") for key in state)
    codec = MaskCodec(
        codes, code_width, state["decoder.0.weight"].shape[0], encoder=has_encoder
    )
    try:
        codec.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit a mask codec: {error}") from error
    return codec.eval()


# cell 06e61997
def save_mask_codec(codec: MaskCodec, path: str | Path) -> None:
    """Write a codec in the official layout, float16, whole or not at all."""
    arrays = {
        k.replace("codebook", "_vq_vae._embedding"): v.detach().half().numpy()
        for k, v in codec.state_dict().items()
    }

    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_files(Path(path).parent, {Path(path).name: write})


# cell 1f90e69c
@lru_cache(maxsize=1)
def shipped_codec() -> MaskCodec:
    """The codec of the shipped model.

    raises    ValueError while the shipped model has none
    """
    path = Path(__file__).parent / "mini" / "mask_codec.npz"
    if not path.is_file():
        raise ValueError(
            "the shipped model has no mask codec yet: pass codec=load_mask_codec(…)"
        )
    return load_mask_codec(path)


# cell 051eb36d
@torch.no_grad()
def read_masks(
    text: str, image_size: tuple[int, int], codec: MaskCodec | None = None
) -> list[tuple[Box, np.ndarray]]:
    """The outlined things in an answer: boxes with masks of the whole picture.

    text          such as "<loc…>×4 <seg…>×16 cat ; …"
    image_size    (width, height) of the original picture
    codec         None: the shipped model's
    returns       list of (Box, bool[H, W]); things without an outline, and
                  malformed parts, are left out
    """
    found = [(box, codes) for box, codes in read_objects(text, image_size) if codes]
    if not found:
        return []
    codec = codec or shipped_codec()
    device = codec.codebook.device
    maps = codec.decode(torch.tensor([codes for _, codes in found], device=device))
    return [
        (box, paste_mask(part, box, image_size))
        for (box, _), part in zip(found, maps, strict=True)
    ]
