"""Small models of our own with random weights, norms included, in which faults show."""

import torch

from pali.decoder import DecoderConfig
from pali.paligemma import PaliGemma, PaliGemmaConfig
from pali.tokens import BOS, PAD
from pali.vision import VisionConfig

IMAGE_ID, PATCHES = 120, 16


def tiny_config(kind: str = "gemma", **decoder) -> PaliGemmaConfig:
    """16 patches a picture; sizes that differ wherever a mix-up could hide."""
    vision = VisionConfig(
        image_size=16, patch_size=4, width=24, num_layers=2, num_heads=4, mlp_width=40
    )
    sizes = {
        "architecture": kind, "vocab_size": 128, "width": 32, "num_layers": 4,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_width": 56,
        "query_scale": 0.25, "max_positions": 512,
    }  # fmt: skip
    if kind == "gemma2":
        sizes |= {"query_scale": 24**-0.5, "attention_cap": 50.0, "logit_cap": 30.0}
        sizes |= {"sliding_window": 4096}
    return PaliGemmaConfig(vision, DecoderConfig(**(sizes | decoder)), IMAGE_ID)


def tiny_model(kind: str = "gemma", seed: int = 0, **decoder) -> PaliGemma:
    """Every parameter drawn anew: a small embedding, since with a large one a tied
    head copies its last token whatever the rest of the model does."""
    model = PaliGemma(tiny_config(kind, **decoder)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        std = 0.02 if "embedding" in name else 0.5 if "norm" in name else 0.3
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def tiny_pixels(count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1


def tiny_rows(lengths, padding: str = "left", seed: int = 2):
    """ids and valid of prompts with these numbers of words, one picture each."""
    generator = torch.Generator().manual_seed(seed)
    T = PATCHES + 1 + max(lengths)
    ids = torch.full((len(lengths), T), PAD)
    valid = torch.zeros(len(lengths), T, dtype=torch.bool)
    for row, length in enumerate(lengths):
        words = torch.randint(5, 108, (length,), generator=generator)
        full = torch.cat([torch.full((PATCHES,), IMAGE_ID), torch.tensor([BOS]), words])
        start = T - len(full) if padding == "left" else 0
        ids[row, start : start + len(full)] = full
        valid[row, start : start + len(full)] = True
    return ids, valid
