"""RoPE: attention that knows how far apart two tokens are.

Generated from notebooks/07_rope.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

import torch
from torch import Tensor

__all__ = ["apply_rope", "rope_angles", "rope_table", "rotate_pairs"]


# cell 152658e3
def rope_angles(
    positions: Tensor, head_dim: int, base: float = 10_000.0
) -> Tensor:
    """How far each feature pair has turned at each position.

    positions   int[B, T], index of the token in the whole sequence,
                from 0
    returns     float32[B, T, Dh/2], radians; pair i turns
                base**(-2i/Dh) per token
    raises      ValueError if head_dim is odd
    source      Su et al. 2021, section 3
    """
    if head_dim % 2:
        raise ValueError(
            f"head_dim must be even to form pairs, got {head_dim}"
        )
    pair = torch.arange(head_dim // 2, device=positions.device)
    # float32[Dh/2]
    per_token = 1.0 / base ** (2 * pair.float() / head_dim)
    return positions[..., None].float() * per_token


# cell 73b8e676
def rope_table(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, laid out for every head at once.

    angles    float32[B, T, Dh/2]
    returns   two float32[B, 1, T, Dh/2]; computed once, used by every
              layer
    """
    return angles.cos()[:, None], angles.sin()[:, None]


# cell b81a3ec6
def rotate_pairs(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every pair (x[i], x[i + Dh/2]) of a head vector.

    x         float[B, H, T, Dh]
    table     cosine and sine of the pairs' angles, from `rope_table`
    returns   float[B, H, T, Dh], dtype of x, lengths unchanged
    """
    cos, sin = table
    a, b = x.float().chunk(2, dim=-1)  # halves, as in Gemma
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(
        x.dtype
    )


# cell 22134dd2
def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Turn head vectors by angles: `rope_table`, then `rotate_pairs`.

    x         float[B, H, T, Dh]
    angles    float32[B, T, Dh/2], radians, from `rope_angles`
    returns   float[B, H, T, Dh], dtype of x
    """
    return rotate_pairs(x, rope_table(angles))
