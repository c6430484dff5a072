"""The published implementation with small random weights, and the same in `pali`.

Weights are drawn so that a fault shows: norm weights away from 0 (a missing `1 + w` is
then visible), head_dim that is not width / heads, a query scale that is not
head_dim ** -0.5, and a small embedding, since with a large one a tied head copies its
last token whatever the rest of the model does.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor

import pali

IMAGE_ID, PAD, BOS, NEWLINE = 120, 0, 2, 108
# Worst of 200 random cases in float32: 3.5e-6, with logits of spread 0.11 to 0.13. The
# smallest fault that `test_checks.py` demands be noticed, erf for tanh in GELU, moves
# them by 2e-4.
ATOL = 3e-5


@dataclass(frozen=True)
class Shape:
    """What a reference model looks like."""

    kind: str = "gemma"
    kv_heads: int = 2
    head_dim: int = 16
    image_size: int = 56
    window: int = 4096
    embedding_std: float = 0.02
    seed: int = 0


PALIGEMMA_1 = Shape("gemma", kv_heads=1)
PALIGEMMA_2 = Shape("gemma2", kv_heads=2)
GROUPED = replace(PALIGEMMA_1, kv_heads=2)
NARROW_WINDOW = replace(PALIGEMMA_2, window=8)


def reference_config(shape: Shape) -> transformers.PaliGemmaConfig:
    text = {
        "model_type": shape.kind, "hidden_size": 32, "intermediate_size": 56,
        "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": 128, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": 1,
    }  # fmt: skip
    if shape.kind == "gemma2":
        text |= {"query_pre_attn_scalar": 24, "sliding_window": shape.window}
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "patch_size": 14, "image_size": shape.image_size, "vision_use_head": False,
    }  # fmt: skip
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_ID,
        projection_dim=32, hidden_size=32,
    )  # fmt: skip


def randomise(model: torch.nn.Module, embedding_std: float, seed: int) -> None:
    """Draw every parameter anew, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            std = embedding_std if "embed_tokens" in name else 0.3
            std = 0.5 if "norm" in name else std
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)


@cache
def folder(shape: Shape) -> Path:
    """A checkpoint folder of the reference model, float32."""
    model = transformers.PaliGemmaForConditionalGeneration(reference_config(shape))
    randomise(model, shape.embedding_std, shape.seed)
    model.tie_weights()
    path = Path(tempfile.mkdtemp(prefix="pali-reference-"))
    model.save_pretrained(path)
    return path


@cache
def reference(shape: Shape, dtype: torch.dtype = torch.float32):
    """The published model; "eager" is its attention that knows the soft cap."""
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder(shape), dtype=dtype, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def ours(shape: Shape, dtype: torch.dtype = torch.float32) -> pali.PaliGemma:
    """A fresh copy of our model with the same weights."""
    return pali.load_model(folder(shape), dtype=dtype)


@dataclass
class Rows:
    """A batch made by hand."""

    pixels: Tensor
    ids: Tensor
    valid: Tensor
    suffix: Tensor

    @property
    def prefix_length(self) -> int:
        """Columns before the first suffix token of any row."""
        columns = self.suffix.any(dim=0).nonzero()
        return int(columns[0]) if len(columns) else self.ids.shape[1]


def rows(
    shape: Shape, prompts=(5, 8), suffix: int = 0, padding: str = "left", seed: int = 1
) -> Rows:
    """Random pictures and prompts of these lengths, padded on the given side.

    With right padding and a suffix, the suffix follows the prompt directly, as in
    training.
    """
    generator = torch.Generator().manual_seed(seed)
    N, size = (shape.image_size // 14) ** 2, shape.image_size
    pixels = torch.rand(len(prompts), 3, size, size, generator=generator) * 2 - 1
    T = N + 2 + max(prompts) + suffix
    ids = torch.full((len(prompts), T), PAD)
    valid, is_suffix = torch.zeros(2, len(prompts), T, dtype=torch.bool)
    for row, length in enumerate(prompts):
        text = torch.randint(5, 108, (length + suffix,), generator=generator)
        head = [torch.full((N,), IMAGE_ID), torch.tensor([BOS]), text[:length]]
        full = torch.cat([*head, torch.tensor([NEWLINE]), text[length:]])
        start = T - len(full) if padding == "left" else 0
        ids[row, start : start + len(full)] = full
        valid[row, start : start + len(full)] = True
        end = start + len(full)
        is_suffix[row, end - suffix : end] = suffix > 0
    return Rows(pixels, ids, valid, is_suffix)


@torch.no_grad()
def reference_logits(shape: Shape, batch: Rows, dtype=torch.float32) -> Tensor:
    return reference(shape, dtype)(
        input_ids=batch.ids,
        pixel_values=batch.pixels.to(dtype),
        attention_mask=batch.valid.long(),
        token_type_ids=batch.suffix.long(),
    ).logits


@torch.no_grad()
def our_logits(model: pali.PaliGemma, batch: Rows, trace=None) -> Tensor:
    return model(
        batch.pixels, batch.ids, valid=batch.valid, suffix=batch.suffix, trace=trace
    )


@torch.no_grad()
def cached_logits(model: pali.PaliGemma, batch: Rows, cuts: list[int]) -> Tensor:
    """Logits from a prefill and then the suffix in pieces that end at `cuts`."""
    T = batch.ids.shape[1]
    cache = pali.Cache(model.config, len(batch.ids), T)
    parts, start = [], 0
    for end in [batch.prefix_length, *cuts, T]:
        if end > start:
            piece = slice(start, end)
            parts.append(
                model(
                    batch.pixels if start == 0 else None,
                    batch.ids[:, piece],
                    valid=batch.valid[:, piece],
                    cache=cache,
                )
            )
            start = end
    return torch.cat(parts, dim=1)


def assert_agree(got: Tensor, want: Tensor, valid: Tensor, atol: float = ATOL) -> None:
    """Logits are equal on every real token, and finite on padding too."""
    assert got.shape == want.shape
    assert got.isfinite().all()
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=atol)
