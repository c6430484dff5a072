"""GeGLU: a gate for every feature.

Generated from notebooks/09_mlp.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GeGLU"]


# cell 959add71
class GeGLU(nn.Module):
    """The decoder's MLP: one layer makes features, another opens or
    shuts them.

    x         float[..., width] -> float[..., width]
    note      only the gate passes through GELU (tanh form); no biases
    source    Shazeer 2020
    """

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, mlp_width, bias=False)
        self.up = nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(
            F.gelu(self.gate(x), approximate="tanh") * self.up(x)
        )
