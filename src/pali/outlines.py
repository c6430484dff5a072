"""Outlines: a shape as sixteen words.

Generated from notebooks/18_outlines.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

import logging
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pali import scenes
from pali.tokens import Box, read_objects
from pali.weights import write_files

__all__ = [
    "CODEBOOK",
    "GRID",
    "Halve",
    "MaskCodec",
    "Residual",
    "SIDE",
    "codec_loss",
    "collect_masks",
    "crop_mask",
    "encoder_like",
    "load_mask_codec",
    "log",
    "mask_decoder",
    "mask_encoder",
    "mask_iou",
    "mask_tokens",
    "outline_codes",
    "paste_mask",
    "pixel_box",
    "read_arrays",
    "read_masks",
    "revive_codes",
    "save_mask_codec",
    "shipped_codec",
    "sizes_of",
    "there_and_back",
    "train_codec",
]


# cell c65ea415
SIDE = 64  # a mask is coded at 64 x 64
GRID = 4  # as 4 x 4 codes
CODEBOOK = "_vq_vae._embedding"  # what the official file calls it
log = logging.getLogger(__name__)


# cell a0b2b0a1
def pixel_box(
    box: Box, image_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Whole pixels of a box: left, top, right, bottom, in the picture.

    note    rounded, as when the official training masks are cut out;
            cutting off the fraction would move every second edge
    """
    width, height = image_size
    x0, y0, x1, y1 = (round(v) for v in box.xyxy)
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
def paste_mask(
    part: Tensor, box: Box, image_size: tuple[int, int]
) -> np.ndarray:
    """A decoded 64 x 64 map put back into its box: bool[H, W].

    part          float[64, 64], the mask is where it is above 0
    image_size    (width, height)
    note          all False if the box holds no whole pixel
    """
    width, height = image_size
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = pixel_box(box, image_size)
    if x1 > x0 and y1 > y0:
        image = Image.fromarray(part.detach().float().cpu().numpy())
        bilinear = Image.Resampling.BILINEAR
        image = image.resize((x1 - x0, y1 - y0), bilinear)
        mask[y0:y1, x0:x1] = np.asarray(image) > 0
    return mask


# cell cba5d0ce
def mask_iou(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> Tensor:
    """Pixels in both masks over pixels in either: 0 to 1.

    a, b       bool[..., H, W], broadcast
    returns    float32[...]; 1 where both masks are empty
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    both, either = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


# cell 2e7282ff
def collect_masks(
    seeds: Iterable[int], world: scenes.World = scenes.FULL_WORLD
) -> Tensor:
    """Crops of every thing in the scenes: float32[N, 1, 64, 64].

    note    a mask is what is seen: what lies in front is cut out of it
    """
    crops = []
    for seed in seeds:
        drawn = scenes.scene(seed, world=world)
        for mask, xyxy in zip(drawn.masks, drawn.boxes, strict=True):
            crops.append(crop_mask(mask, Box("", xyxy)))
    return torch.stack(crops)


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


# cell 6eb72f4c
class Halve(nn.Conv2d):
    """A convolution that halves height and width, whatever its kernel.

    note    zeros are added all around; one more below and to the right
            where the kernel is odd, as TensorFlow's "SAME" does
    """

    def forward(self, x: Tensor) -> Tensor:
        more = max(self.kernel_size[0] - 2, 0)
        first, last = more // 2, more - more // 2
        x = F.pad(x, (first, last, first, last))
        return F.conv2d(x, self.weight, self.bias, stride=2)


# cell 93d21555
def mask_encoder(
    width: int,
    code_width: int,
    *,
    sizes: Sequence[int] | None = None,
    kernel: int = 4,
    last_kernel: int = 1,
) -> nn.Sequential:
    """float[B, 1, 64, 64] -> float[B, code_width, 4, 4], halved 4 times.

    sizes    channels after each halving; the last one is the width
    """
    sizes = sizes or (width // 8, width // 4, width // 2, width)
    layers: list[nn.Module] = []
    for before, after in zip((1, *sizes), sizes, strict=False):
        layers += [Halve(before, after, kernel), nn.ReLU()]
    last = nn.Conv2d(width, code_width, last_kernel, padding="same")
    return nn.Sequential(
        *layers, Residual(width), Residual(width), last
    )


# cell 96b4988a
def mask_decoder(width: int, code_width: int) -> nn.Sequential:
    """float[B, code_width, 4, 4] -> float[B, 1, 64, 64], about -1 to 1."""
    sizes = (width, width, width // 2, width // 4, width // 8)
    layers: list[nn.Module] = [
        nn.Conv2d(code_width, width, 1),
        nn.ReLU(),
    ]
    layers += [Residual(width), Residual(width)]
    for before, after in zip(sizes, sizes[1:], strict=False):
        up = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
        layers += [up, nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(sizes[-1], 1, 1))


# cell c99e1404
class MaskCodec(nn.Module):
    """A VQ-VAE that writes a 64 x 64 mask as 16 of 128 codes, and back.

    codebook    float[codes, code_width]
    encoder     None in a codec that can only decode
    raises      ValueError if the width is not a multiple of 8
    source      van den Oord et al. 2017; the layout is that of the
                decoder published with PaliGemma (`vae-oid.npz`)
    """

    def __init__(
        self, codes=128, code_width=512, width=128, encoder=True
    ) -> None:
        super().__init__()
        if width % 8 or width < 8:
            raise ValueError(
                f"width must be a multiple of 8, not {width}"
            )
        self.codebook = nn.Parameter(torch.randn(codes, code_width))
        self.encoder = (
            mask_encoder(width, code_width) if encoder else None
        )
        self.decoder = mask_decoder(width, code_width)

    def nearest(self, x: Tensor) -> Tensor:
        """The codes closest to float[B, code_width, 4, 4]: int64[B, 16]."""
        x = x.flatten(2).transpose(1, 2)  # the grid, row by row
        distance = (
            x.square().sum(-1, keepdim=True)
            - 2 * x @ self.codebook.T
            + self.codebook.square().sum(-1)
        )
        return distance.argmin(dim=-1)

    def encode(self, masks: Tensor) -> Tensor:
        """float[B, 1, 64, 64], values 0 to 1 -> int64[B, 16]."""
        if self.encoder is None:
            raise ValueError(
                "this codec holds the decoder alone, so it cannot encode"
            )
        return self.nearest(self.encoder(2 * masks - 1))

    def decode(self, codes: Tensor) -> Tensor:
        """int64[B, 16] -> float[B, 64, 64]; the mask is where it is > 0."""
        x = F.embedding(codes, self.codebook).transpose(1, 2)
        return self.decoder(x.unflatten(2, (GRID, GRID)))[:, 0]


# cell d1506fb2
def codec_loss(
    codec: MaskCodec, masks: Tensor, commit: float = 0.25
) -> Tensor:
    """How far the mask that comes back is from the one that went in.

    masks     float[B, 1, 64, 64], 0 to 1
    note      no gradient passes the choice of a code, so the decoder's
              goes straight to the encoder; the codebook is drawn to the
              vectors that chose it, and these are held near it
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


# cell 8eb71c7c
@torch.no_grad()
def revive_codes(
    codec: MaskCodec,
    masks: Tensor,
    generator: torch.Generator | None = None,
) -> int:
    """Put codes that none of the masks uses onto vectors of the masks.

    masks      float[B, 1, 64, 64], 0 to 1
    returns    how many codes moved
    """
    x = codec.encoder(2 * masks - 1)
    count = torch.bincount(
        codec.nearest(x).flatten(), minlength=len(codec.codebook)
    )
    dead = (count == 0).nonzero()[:, 0]
    x = x.flatten(2).transpose(1, 2).flatten(0, 1)  # [16 B, code_width]
    pick = torch.randperm(len(x), generator=generator)[: len(dead)]
    dead = dead[: len(pick)]
    codec.codebook[dead] = x[pick.to(x.device)]
    return len(dead)


# cell 8f91ae9e
def train_codec(
    masks: Tensor,
    *,
    steps: int = 3200,
    batch_size: int = 32,
    rate: float = 2e-3,
    width: int = 64,
    code_width: int = 64,
    revive: bool = True,
    seed: int = 1,
    watch: Callable[[int, float, MaskCodec], None] | None = None,
) -> MaskCodec:
    """A codec of 128 codes, learned from masks; the same from a seed.

    masks      float[N, 1, 64, 64], 0 to 1; half precision will do
    rate       of Adam: up for a tenth of the steps, then down to 0
    revive     move dead codes, every 25 steps of the first three
               quarters; later ones would have no time to settle
    watch      called after each step: number, loss, codec so far
    note       defaults make the shipped codec (`tools/make_codec.py`)
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layers draw their weights from it
        codec = MaskCodec(code_width=code_width, width=width)
    optimiser = torch.optim.Adam(codec.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps, pct_start=0.1
    )

    def draw(n: int) -> Tensor:
        pick = torch.randint(len(masks), (n,), generator=generator)
        return masks[pick].float()

    for step in range(steps):
        batch = draw(batch_size)
        if revive and step % 25 == 0 and step < 0.75 * steps:
            revive_codes(codec, draw(256), generator)
        loss = codec_loss(codec, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if watch:
            watch(step + 1, loss.item(), codec)
    return codec.eval()


# cell 094b4290
@torch.no_grad()
def there_and_back(
    codec: MaskCodec, masks: Tensor
) -> tuple[Tensor, Tensor]:
    """Code masks, decode them, and measure what is left.

    masks      float[B, 1, 64, 64], 0 to 1; half precision will do
    returns    codes int64[B, 16], IoU float32[B]
    """
    codes, shares = [], []
    for part in masks.split(256):  # the maps of more would fill memory
        codes.append(codec.encode(part.float()))
        back = codec.decode(codes[-1]) > 0
        shares.append(mask_iou(back, part[:, 0] > 0.5))
    return torch.cat(codes), torch.cat(shares)


# cell 72dbb83e
def mask_tokens(codes) -> str:
    """Sixteen codes as text: "<seg000><seg127>…"."""
    return "".join(f"<seg{int(code):03d}>" for code in codes)


# cell 051eb36d
@torch.no_grad()
def read_masks(
    text: str,
    image_size: tuple[int, int],
    codec: MaskCodec | None = None,
) -> list[tuple[Box, np.ndarray]]:
    """The outlined things in an answer: boxes with whole-picture masks.

    text          such as "<loc…>×4 <seg…>×16 cat ; …"
    image_size    (width, height) of the original picture
    codec         None: the shipped model's
    returns       list of (Box, bool[H, W]); things without an outline,
                  and malformed parts, are left out
    """
    found = [
        (box, codes)
        for box, codes in read_objects(text, image_size)
        if codes
    ]
    if not found:
        return []
    codec = codec or shipped_codec()
    known = [f for f in found if max(f[1]) < len(codec.codebook)]
    if len(known) < len(found):
        log.warning(
            "skipped an outline: its codes are not in the codec"
        )
    if not known:
        return []
    device = codec.codebook.device
    codes = torch.tensor([codes for _, codes in known], device=device)
    return [
        (box, paste_mask(part, box, image_size))
        for (box, _), part in zip(
            known, codec.decode(codes), strict=True
        )
    ]


# cell 61be26c1
def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """The arrays of an npz file, as float32.

    raises    OSError if there is no such file; ValueError naming the
              file, and the array, that cannot be read
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is no npz archive")
        file.seek(0)
        arrays, key = {}, "its list of arrays"
        try:
            archive = np.load(file, allow_pickle=False)
            for key in archive.files:
                array = np.array(archive[key], np.float32)
                arrays[key] = torch.from_numpy(array)
        except Exception as error:  # each library raises its own
            raise ValueError(
                f"{path} is damaged: {key} cannot be read ({error})"
            ) from error
    return arrays


# cell 5ddff39d
def sizes_of(
    arrays: dict[str, Tensor], key: str, axes: int, path: str | Path
) -> tuple[int, ...]:
    """The shape of one array; ValueError if missing or of other axes."""
    if key not in arrays:
        raise ValueError(f"{path} lacks {key}, so it is no mask codec")
    shape = tuple(arrays[key].shape)
    if len(shape) != axes or 0 in shape:
        raise ValueError(
            f"{path}: {key} has the shape {shape}, not {axes} axes"
        )
    return shape


# cell 6237f2ea
def encoder_like(
    arrays: dict[str, Tensor], code_width: int, path: str | Path
) -> nn.Sequential | None:
    """An encoder with the sizes of a file; None if it holds none."""
    if not any(key.startswith("encoder.") for key in arrays):
        return None
    keys = [f"encoder.{i}.weight" for i in (0, 2, 4, 6, 10)]
    shapes = [sizes_of(arrays, key, 4, path) for key in keys]
    sizes = [shape[0] for shape in shapes[:4]]
    return mask_encoder(
        sizes[-1],
        code_width,
        sizes=sizes,
        kernel=shapes[0][-1],
        last_kernel=shapes[4][-1],
    )


# cell c6c115b9
def load_mask_codec(path: str | Path) -> MaskCodec:
    """A codec from the official `vae-oid.npz`, or a file of our own.

    path      npz archive; sizes are read from its arrays, and arrays that
              belong to neither encoder nor decoder are left aside
    raises    OSError if there is no such file; ValueError naming the
              file and the key that is missing or wrong
    """
    arrays = read_arrays(path)
    codes, code_width = sizes_of(arrays, CODEBOOK, 2, path)
    width = sizes_of(arrays, "decoder.0.weight", 4, path)[0]
    if width % 8:
        raise ValueError(
            f"{path}: decoder.0.weight has {width} rows, not 8, 16 …"
        )
    codec = MaskCodec(codes, code_width, width, encoder=False)
    codec.encoder = encoder_like(arrays, code_width, path)
    state = {}
    for name, value in codec.state_dict().items():
        key = CODEBOOK if name == "codebook" else name
        shape = sizes_of(arrays, key, value.dim(), path)
        if shape != value.shape:
            raise ValueError(
                f"{path}: {key} has the shape {shape}, but "
                f"{tuple(value.shape)} goes with the other arrays"
            )
        state[name] = arrays.pop(key)
    for key in arrays:
        if key.startswith(("encoder.", "decoder.")):
            raise ValueError(
                f"{path}: {key} has no place in a mask codec"
            )
    codec.load_state_dict(state)
    return codec.eval()


# cell 06e61997
def save_mask_codec(codec: MaskCodec, path: str | Path) -> None:
    """Write a codec in the official layout, float16, whole or not at all."""
    keys = {"codebook": CODEBOOK}
    arrays = {
        keys.get(name, name): value.half().cpu().numpy()
        for name, value in codec.state_dict().items()
    }

    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_files(Path(path).parent, {Path(path).name: write})


# cell 1f90e69c
@lru_cache(maxsize=1)
def shipped_codec() -> MaskCodec:
    """The codec of the shipped model: `mini/mask_codec.npz`."""
    folder = Path(__file__).parent / "mini"
    return load_mask_codec(folder / "mask_codec.npz")


# cell 70b75b66
@torch.no_grad()
def outline_codes(
    mask: np.ndarray, box: Box, codec: MaskCodec | None = None
) -> list[int]:
    """The 16 codes that stand for an outline in an answer.

    mask     bool[H, W], the picture's size
    box      the part of it that is coded
    codec    None for the shipped one
    raises   ValueError if the codec holds no encoder
    """
    codec = codec or shipped_codec()
    return codec.encode(crop_mask(mask, box)[None])[0].tolist()
