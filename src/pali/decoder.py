"""The decoder: Gemma and Gemma 2.

Generated from notebooks/10_decoder.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pali.attention import Trace
from pali.gqa import GroupedQueryAttention
from pali.mlp import GeGLU
from pali.norm import RMSNorm
from pali.rope import rope_angles, rope_table

__all__ = [
    "BLOCKS",
    "Decoder",
    "DecoderConfig",
    "Gemma2Block",
    "GemmaBlock",
    "at_places",
    "soft_cap",
]


# cell ad8f17e4
@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; defaults: Gemma 2B, as in PaliGemma 1.

    architecture     "gemma" or "gemma2"
    query_scale      factor on query-key products
    attention_cap    soft cap on scores, None without
    logit_cap        soft cap on logits, None without
    sliding_window   tokens an even layer may look back, None without
    max_positions    longest sequence it was trained for
    """

    architecture: str = "gemma"
    vocab_size: int = 257_216
    width: int = 2048
    num_layers: int = 18
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    mlp_width: int = 16_384
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    query_scale: float = 256**-0.5
    attention_cap: float | None = None
    logit_cap: float | None = None
    sliding_window: int | None = None
    max_positions: int = 8192

    def window(self, layer: int) -> int | None:
        """How far back a layer may look: even ones slide, odd do
        not."""
        return self.sliding_window if layer % 2 == 0 else None


# cell 1c412461
def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Squeeze values into (-cap, cap); small ones hardly change."""
    return x if cap is None else cap * torch.tanh(x / cap)


# cell 8212917d
class GemmaBlock(nn.Module):
    """Attention, then MLP; each reads a normed copy, adds its result.

    x         float[B, T, width] -> float[B, T, width]
    trace     receives f"{name}.attention" and f"{name}.residual"
    source    Gemma Team 2024
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = GroupedQueryAttention(
            config.width, config.num_heads, config.num_kv_heads,
            config.head_dim, scale=config.query_scale,
            softcap=config.attention_cap,
        )  # fmt: skip
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GeGLU(config.width, config.mlp_width)

    def forward(
        self, x: Tensor, table, mask=None, cache=None,
        trace: Trace = None, name: str = "",
    ) -> Tensor:  # fmt: skip
        x = x + self.attention(
            self.attention_norm(x), table, mask, cache, trace, name
        )
        x = x + self.mlp(self.mlp_norm(x))
        if trace is not None:
            trace[f"{name}.residual"] = x
        return x


# cell 1aafec09
class Gemma2Block(GemmaBlock):
    """As `GemmaBlock`, with a second norm on what each half adds.

    source    Gemma Team 2024, "Gemma 2"
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.attention_out_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp_out_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x: Tensor, table, mask=None, cache=None,
        trace: Trace = None, name: str = "",
    ) -> Tensor:  # fmt: skip
        y = self.attention(
            self.attention_norm(x), table, mask, cache, trace, name
        )
        x = x + self.attention_out_norm(y)
        x = x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        if trace is not None:
            trace[f"{name}.residual"] = x
        return x


# cell d43e7fc6
def at_places(x: Tensor, places: Tensor) -> Tensor:
    """One place of each row: float[B, T, D], int64[B] -> float[B, 1,
    D]."""
    rows = torch.arange(len(x), device=x.device)
    return x[rows, places][:, None]


# cell 3e134d52
BLOCKS = {"gemma": GemmaBlock, "gemma2": Gemma2Block}


# cell 987dec32
class Decoder(nn.Module):
    """Token vectors in, vectors that predict the next token out.

    embed(ids)       int64[B, T] -> float[B, T, width], times √width
    forward(x, …)    float[B, T, width] -> the same, final norm
                     included; with `last`, float[B, 1, width]
    logits(x)        float[..., width] -> float[..., vocab_size], by the
                     same matrix that embeds ("tied head")
    trace            receives decoder.embedded, all that layer i records
                     as decoder.{i}, and decoder.output, behind the norm
    raises           ValueError for an architecture not in BLOCKS
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.architecture not in BLOCKS:
            raise ValueError(
                "unknown decoder architecture "
                f"{config.architecture!r}; "
                f"this book builds {' and '.join(BLOCKS)}"
            )
        self.config = config
        table = torch.empty(config.vocab_size, config.width)
        self.embedding = nn.Parameter(table)
        nn.init.normal_(self.embedding, std=config.width**-0.5)
        block = BLOCKS[config.architecture]
        self.blocks = nn.ModuleList(
            block(config) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.width, config.norm_eps)

    def embed(self, ids: Tensor) -> Tensor:
        root, dtype = self.config.width**0.5, self.embedding.dtype
        scale = torch.tensor(root, dtype=dtype).item()  # as in training
        return F.embedding(ids, self.embedding) * scale

    def forward(
        self, x: Tensor, positions: Tensor, mask=None, cache=None,
        trace: Trace = None, last: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """positions int[B, T]; mask bool[B, 1, T, S] or one a layer;
        last int64[B]: this place of each row alone comes out."""
        base = self.config.rope_base
        angles = rope_angles(positions, self.config.head_dim, base)
        table = rope_table(angles)  # once for all layers
        if trace is not None:
            trace["decoder.embedded"] = x
        for i, block in enumerate(self.blocks):
            one_each = isinstance(mask, (list, tuple))
            here = mask[i] if one_each else mask
            store = None if cache is None else cache.layer(i)
            x = block(x, table, here, store, trace, f"decoder.{i}")
        x = self.norm(x)
        if trace is not None:
            trace["decoder.output"] = x
        return x if last is None else at_places(x, last)

    def logits(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.embedding)
        return soft_cap(scores, self.config.logit_cap)
