"""The cache: never compute a key twice.

Generated from notebooks/11_cache.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

import torch
from torch import Tensor

__all__ = ["Cache", "LayerCache"]


# cell ec7b4948
class Cache:
    """Keys and values of all earlier tokens, in buffers made once.

    config        a DecoderConfig, or one that holds it as `.decoder`
    batch_size    rows;  capacity  tokens a row holds, picture included
    length        tokens written so far
    valid         bool[B, capacity], False on padding
    positions     int64[B, capacity], position of each token in its row
    raises        ValueError if there is no row or no room at all

    Dtype and device are those of the first write. A layer with one
    key/value head of 256 costs 1,024 bytes a token in bfloat16.
    """

    def __init__(self, config, batch_size: int, capacity: int) -> None:
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                "a cache needs at least one row and one token, "
                f"not {batch_size} x {capacity}"
            )
        self.config = getattr(config, "decoder", config)
        self.batch_size, self.capacity = batch_size, capacity
        self.length = 0
        self.valid = torch.zeros(batch_size, capacity, dtype=torch.bool)
        self.positions = self.valid.long()
        layers = self.config.num_layers
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def begin(self, valid: Tensor, positions: Tensor) -> None:
        """Reserve room for new tokens, before any layer writes them.

        valid, positions    [B, T] of the new tokens
        raises              ValueError if they do not fit
        """
        B, T = valid.shape
        start, end = self.length, self.length + T
        if self.batch_size != B or end > self.capacity:
            raise ValueError(
                f"the cache holds {self.batch_size} rows of "
                f"{self.capacity} tokens; {B} rows of {start} + {T} "
                "do not fit: make a larger Cache"
            )
        if self.valid.device != valid.device:
            self.valid = self.valid.to(valid.device)
            self.positions = self.positions.to(valid.device)
        self.valid[:, start:end] = valid
        self.positions[:, start:end] = positions
        self.length = end

    def layer(self, index: int) -> "LayerCache":
        """What one layer sees of the cache."""
        return LayerCache(self, index)

    def next_positions(self) -> Tensor:
        """int64[B]: how many valid tokens each row holds."""
        return self.valid[:, : self.length].sum(dim=1)

    def nbytes(self) -> int:
        """Bytes in the key and value buffers."""
        written = [t for t in self.keys + self.values if t is not None]
        return sum(t.nbytes for t in written)


# cell bbe63f0c
class LayerCache:
    """One layer's buffers: given new keys and values, returns all.

    k, v      float[B, K, T, Dh], keys already rotated
    returns   views float[B, K, length, Dh] of the buffers, not copies
    """

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.index = cache, index

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cache, i, end = self.cache, self.index, self.cache.length
        for buffers, new in ((cache.keys, k), (cache.values, v)):
            if buffers[i] is None:
                B, H, _, D = new.shape
                buffers[i] = new.new_empty(B, H, cache.capacity, D)
            buffers[i][:, :, end - new.shape[2] : end] = new
        return cache.keys[i][:, :, :end], cache.values[i][:, :, :end]
