"""Grouped queries: many questions, few keys.

Generated from notebooks/08_gqa.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

from torch import Tensor, nn

from pali.attention import Trace, attend, merge_heads, split_heads
from pali.rope import rotate_pairs

__all__ = ["GroupedQueryAttention", "attend_grouped", "repeat_heads"]


# cell f75e9d35
def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """float[B, K, S, Dh] -> float[B, K * groups, S, Dh], head by head.

    Each key/value head stands `groups` times in a row, so query head i
    meets key/value head i // groups. Plain, and needs memory:
    `attend_grouped` gives the same without copies.
    """
    return x.repeat_interleave(groups, dim=1)


# cell 1cb3233a
def attend_grouped(
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
    """Attention in which groups of query heads share a key/value head.

    q         float[B, H, T, Dh];  k, v  float[B, K, S, Dh]
    mask      bool[B, 1, T, S], True where a query may look
    trace     receives f"{name}.attention", float[B, H, T, S]
    returns   float[B, H, T, Dh]
    note      the queries of a group are stacked as rows of one product,
              so keys and values are neither repeated nor copied; with a
              trace they are repeated, so that each head's weights can
              be seen
    source    Ainslie et al. 2023; with K = 1, Shazeer 2019
    """
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    options = {"scale": scale, "softcap": softcap}
    if trace is not None:  # weights of each head, in the graph: plainly
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
        return attend(q, k, v, mask, **options, trace=trace, name=name)
    # [B, K, G * T, Dh]
    q = q.unflatten(1, (-1, groups)).flatten(2, 3)
    # a single row fits every group as it is
    if mask is not None and T > 1:
        mask = mask.repeat(1, 1, groups, 1)
    y = attend(q, k, v, mask, **options)
    return y.unflatten(2, (groups, T)).flatten(1, 2)


# cell 630028e8
class GroupedQueryAttention(nn.Module):
    """The decoder's attention: rotary positions, shared keys, no
    biases.

    x         float[B, T, width]
    table     cosine and sine for these T tokens, from `rope_table`
    mask      bool[B, 1, T, S], True where a query may look; None:
              everywhere
    cache     if given, called with the new keys and values, returns all
              of them
    returns   float[B, T, width]
    raises    ValueError if num_kv_heads does not divide num_heads
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{num_heads} query heads cannot share {num_kv_heads} key/value heads"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.scale, self.softcap = scale, softcap
        self.query = nn.Linear(width, num_heads * head_dim, bias=False)
        self.key = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(
            width, num_kv_heads * head_dim, bias=False
        )
        self.output = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache=None,
        trace: Trace = None,
        name: str = "",
    ) -> Tensor:
        q = rotate_pairs(
            split_heads(self.query(x), self.num_heads), table
        )
        k = rotate_pairs(
            split_heads(self.key(x), self.num_kv_heads), table
        )
        # never rotated
        v = split_heads(self.value(x), self.num_kv_heads)
        if cache is not None:
            k, v = cache(k, v)
        y = attend_grouped(
            q, k, v, mask,
            scale=self.scale, softcap=self.softcap, trace=trace, name=name,
        )  # fmt: skip
        return self.output(merge_heads(y))
