"""Vision: the SigLIP tower.

Generated from notebooks/03_vision.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pali.attention import MultiHeadAttention, Trace
from pali.patches import PatchEmbedding

__all__ = ["LayerNorm", "VisionBlock", "VisionConfig", "VisionMLP", "VisionTower"]


# cell a789fc91
@dataclass(frozen=True)
class VisionConfig:
    """The shape of a vision tower; the defaults are PaliGemma's, 224
    px."""

    image_size: int = 224
    patch_size: int = 14
    channels: int = 3
    width: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    mlp_width: int = 4304
    norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        """Patches in a picture: the square of those along a side."""
        return (self.image_size // self.patch_size) ** 2


# cell 60fa27e6
class LayerNorm(nn.Module):
    """Give every vector mean 0 and variance 1, then scale and shift it.

    x         float[..., D] -> float[..., D]; statistics over D alone,
              so no token hears of another
    source    Ba et al. 2016
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[-1:]
        return F.layer_norm(x, shape, self.weight, self.bias, self.eps)


# cell ac3e2a49
class VisionMLP(nn.Module):
    """Two layers with a bend between them, for each patch on its own.

    x         float[B, N, width] -> float[B, N, width]
    source    GELU in its tanh form: Hendrycks & Gimpel 2016
    """

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


# cell 32489aef
class VisionBlock(nn.Module):
    """Attention, then MLP; each reads a normed copy and adds its
    result.

    x         float[B, N, width] -> float[B, N, width]
    trace     receives f"{name}.attention", and as f"{name}.residual"
              what is returned
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = MultiHeadAttention(
            config.width, config.num_heads
        )
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = VisionMLP(config.width, config.mlp_width)

    def forward(
        self, x: Tensor, trace: Trace = None, name: str = ""
    ) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.attention(normed, trace=trace, name=name)
        x = x + self.mlp(self.mlp_norm(x))
        if trace is not None:
            trace[f"{name}.residual"] = x
        return x


# cell 967ad93f
class VisionTower(nn.Module):
    """Pictures in, one vector for each patch out (SigLIP, not pooled).

    pixels    float[B, C, S, S], S = config.image_size
    returns   float[B, N, width]
    raises    ValueError for pixels of another size
    trace     receives vision.embedded, vision.{layer}.attention,
              vision.{layer}.residual and vision.output
    source    Zhai et al. 2023; the shape: Alabdulmohsin et al. 2023
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        D, N = config.width, config.num_patches
        self.patch = PatchEmbedding(
            D, config.patch_size, config.channels
        )
        self.position = nn.Parameter(torch.empty(N, D))
        nn.init.normal_(self.position, std=D**-0.5)
        self.blocks = nn.ModuleList(
            VisionBlock(config) for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(D, config.norm_eps)

    def forward(self, pixels: Tensor, trace: Trace = None) -> Tensor:
        want = (self.config.channels, *[self.config.image_size] * 2)
        if pixels.shape[1:] != want:
            raise ValueError(
                f"the vision tower reads pixels [B, {want[0]}, {want[1]}, "
                f"{want[2]}], got {list(pixels.shape)}; use "
                f"preprocess(picture, {want[1]})"
            )
        x = self.patch(pixels) + self.position
        if trace is not None:
            trace["vision.embedded"] = x
        for i, block in enumerate(self.blocks):
            x = block(x, trace=trace, name=f"vision.{i}")
        x = self.norm(x)
        if trace is not None:
            trace["vision.output"] = x
        return x
