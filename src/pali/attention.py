"""Attention: every patch asks, every patch answers.

Generated from notebooks/02_attention.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "MultiHeadAttention",
    "Trace",
    "attend",
    "attend_written_out",
    "merge_heads",
    "softmax",
    "split_heads",
]


# cell 6d2fd0ab
def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """Turn scores into positive weights that sum to 1 along `dim`.

    scores    float, any shape
    returns   float32, same shape
    note      the maximum is taken off first: the weights stay the same
              and exp never overflows
    """
    scores = scores.float()
    scores = scores - scores.amax(dim, keepdim=True)
    weights = scores.exp()
    return weights / weights.sum(dim, keepdim=True)


# cell 58e862dc
def attend_written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix values by the softmax of scaled query-key products.

    q         float[B, H, T, Dh];  k, v  float[B, H, S, Dh]
    mask      bool, broadcasts to [B, H, T, S], True: may look
    scale     factor on the products, Dh ** -0.5 if None
    softcap   if given, scores become softcap * tanh(scores / softcap)
    returns   mixed values float[B, H, T, Dh], weights float[B, H, T, S]
    source    Vaswani et al. 2017; the soft cap is Gemma 2's
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-2, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.float().softmax(dim=-1).to(v.dtype)  # stable
    return weights @ v, weights


# cell aef4ce2d
Trace = dict[str, Tensor] | None


# cell 8dbbd468
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    trace: Trace = None,
    name: str = "",
) -> Tensor:
    """Attention by the fused kernel; written out to show the weights.

    q, k, v, mask, scale, softcap    as in `attend_written_out`
    trace     if given, receives f"{name}.attention", float[B, H, T, S],
              graph kept: gradient maps need it
    returns   float[B, H, T, Dh]
    """
    if trace is None and softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, mask, scale=scale
        )
    y, weights = attend_written_out(
        q, k, v, mask, scale=scale, softcap=softcap
    )
    if trace is not None:
        trace[f"{name}.attention"] = weights
    return y


# cell af8f5d00
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """float[B, T, H * Dh] -> float[B, H, T, Dh]: each head its
    slice."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


# cell 20983b15
def merge_heads(x: Tensor) -> Tensor:
    """float[B, H, T, Dh] -> float[B, T, H * Dh], undoes
    `split_heads`."""
    return x.transpose(1, 2).flatten(2)


# cell 133767ea
class MultiHeadAttention(nn.Module):
    """Several attentions side by side, each in its slice of the width.

    x         float[B, T, width]
    returns   float[B, T, width]
    source    Vaswani et al. 2017, section 3.2.2
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"width {width} does not split into {num_heads} heads"
            )
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        trace: Trace = None,
        name: str = "",
    ) -> Tensor:
        q = split_heads(self.query(x), self.num_heads)
        k = split_heads(self.key(x), self.num_heads)
        v = split_heads(self.value(x), self.num_heads)
        y = attend(q, k, v, mask, trace=trace, name=name)
        return self.output(merge_heads(y))
