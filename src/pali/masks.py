"""Masks: who may look at whom.

Generated from notebooks/12_masks.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

import torch
from torch import Tensor

__all__ = [
    "cached_mask",
    "causal_mask",
    "prefix_lm_mask",
    "token_positions",
    "window_mask",
]


# cell 39703775
def token_positions(
    valid: Tensor, past: Tensor | None = None
) -> Tensor:
    """Count the valid tokens of each row: padding takes no position.

    valid     bool[B, T];  past  int64[B], valid tokens in earlier calls
    returns   int64[B, T], from 0; padding repeats its neighbour's
    """
    positions = valid.long().cumsum(dim=1) - 1
    if past is not None:
        positions = positions + past[:, None]
    return positions.clamp(min=0)


# cell 19aabe0c
def causal_mask(length: int) -> Tensor:
    """bool[1, 1, T, T]: every token sees itself and what is before."""
    full = torch.ones(length, length, dtype=torch.bool)
    return full.tril()[None, None]


# cell f1d589c8
def prefix_lm_mask(valid: Tensor, suffix: Tensor) -> Tensor:
    """Prefix tokens see the whole prefix; suffix tokens look back.

    valid     bool[B, T], False on padding, which nobody else sees
    suffix    bool[B, T], True where attention is causal
    returns   bool[B, 1, T, T]; every token sees itself: no row is empty
    source    Raffel et al. 2020; Beyer et al. 2024, section 3.1
    """
    index = torch.arange(valid.shape[1], device=valid.device)
    past = index <= index[:, None]  # [T, T]
    prefix = ~suffix
    both = prefix[:, :, None] & prefix[:, None, :]  # [B, T, T]
    allowed = (past | both) & valid[:, None, :]
    return (allowed | (index == index[:, None]))[:, None]


# cell 75cdafa7
def cached_mask(valid: Tensor, past: int) -> Tensor:
    """New suffix tokens see valid tokens before them, and themselves.

    valid     bool[B, S], cached and new tokens;  past  number cached
    returns   bool[B, 1, S - past, S]
    """
    index = torch.arange(valid.shape[1], device=valid.device)
    rows = index[past:, None]
    seen = (index <= rows) & valid[:, None, :]
    return (seen | (index == rows))[:, None]


# cell 99dd05c4
def window_mask(
    queries: Tensor, keys: Tensor, suffix: Tensor, window: int
) -> Tensor:
    """Where a sliding layer may look: suffix tokens only `window` back.

    queries   int64[B, T], positions;  keys  int64[B, S], positions
    suffix    bool[B, T]: prefix tokens are exempt
    returns   bool[B, 1, T, S], to be combined with another mask by `&`
    """
    near = queries[:, :, None] - keys[:, None, :] < window
    return (near | ~suffix[:, :, None])[:, None]
