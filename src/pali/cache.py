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

    config        a DecoderConfig, or anything with a `.decoder` that is one
    batch_size    rows;  capacity  tokens a row can hold, picture included
    length        tokens written so far
    valid         bool[B, capacity], False on padding
    positions     int64[B, capacity], position of each token in its row

    Dtype and device are those of the first write. A layer of 18 with one
    key/value head of 256 costs 1,024 bytes a token in bfloat16.
    """

    def __init__(self, config, batch_size: int, capacity: int) -> None:
        self.config = getattr(config, "decoder", config)
        self.batch_size, self.capacity, self.length = batch_size, capacity, 0
        self.valid = torch.zeros(batch_size, capacity, dtype=torch.bool)
        self.positions = torch.zeros(batch_size, capacity, dtype=torch.int64)
        self.keys: list[Tensor | None] = [None] * self.config.num_layers
        self.values: list[Tensor | None] = [None] * self.config.num_layers
        self.all_valid = True

    def begin(self, valid: Tensor, positions: Tensor) -> None:
        """Reserve room for new tokens, before any layer writes them.

        valid, positions    [B, T] of the new tokens
        raises              ValueError if they do not fit
        """
        B, T = valid.shape
        if B != self.batch_size or self.length + T > self.capacity:
            raise ValueError(
                f"the cache holds {self.batch_size} rows of {self.capacity} tokens; "
                f"{B} rows of {self.length} + {T} do not fit: make a larger Cache"
            )
        if self.valid.device != valid.device:
            self.valid = self.valid.to(valid.device)
            self.positions = self.positions.to(valid.device)
        self.valid[:, self.length : self.length + T] = valid
        self.positions[:, self.length : self.length + T] = positions
        self.length += T

    def layer(self, index: int) -> "LayerCache":
        """What one layer sees of the cache."""
        return LayerCache(self, index)

    def next_positions(self) -> Tensor:
        """int64[B]: how many valid tokens each row holds."""
        return self.valid[:, : self.length].sum(dim=1)

    def nbytes(self) -> int:
        """Bytes in the key and value buffers."""
        return sum(t.nbytes for t in self.keys + self.values if t is not None)


# cell bbe63f0c
class LayerCache:
    """One layer's buffers: called with new keys and values, returns all.

    k, v      float[B, Hkv, T, Dh], keys already rotated
    returns   views float[B, Hkv, length, Dh] of the buffers, nothing copied
    """

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.index = cache, index

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cache, end = self.cache, self.cache.length
        for buffers, new in ((cache.keys, k), (cache.values, v)):
            if buffers[self.index] is None:
                B, H, _, D = new.shape
                buffers[self.index] = new.new_empty(B, H, cache.capacity, D)
            buffers[self.index][:, :, end - new.shape[2] : end] = new
        return cache.keys[self.index][:, :, :end], cache.values[self.index][:, :, :end]
