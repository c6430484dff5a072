"""Norm: vectors of one length.

Generated from notebooks/06_norm.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

import torch
from torch import Tensor, nn

__all__ = ["RMSNorm"]


# cell 002fb23d
class RMSNorm(nn.Module):
    """Give every vector unit root-mean-square, then rescale by (1 +
    weight).

    x         float[..., D] -> float[..., D], dtype kept, statistics in
              float32
    weight    float[D], the distance from 1: zeros mean "only normalise"
    source    Zhang & Sennrich 2019; the 1 + weight form is Gemma's
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(
            y.square().mean(dim=-1, keepdim=True) + self.eps
        )
        return (y * (1 + self.weight.float())).to(x.dtype)  # cast last
