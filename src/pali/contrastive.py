"""Contrastive: a picture meets its caption.

Generated from notebooks/04_contrastive.ipynb: edit the notebook, then run `make
export`. Each block names the cell it comes from.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "check_pairs",
    "clip_loss",
    "cross_entropy",
    "pair_logits",
    "siglip_loss",
    "siglip_loss_chunked",
    "summed_loss",
    "unit",
]


# cell 55c09f88
def unit(x: Tensor) -> Tensor:
    """Scale every vector to length 1.

    x       float[..., D] -> float[..., D]; 16-bit input comes back as
            float32
    note    1e-8 is added to the length, so a zero vector stays zero
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


# cell 1fdf6925
def pair_logits(
    images: Tensor, texts: Tensor, log_scale, bias=0.0
) -> Tensor:
    """Score every picture against every text: scaled cosine plus bias.

    images       float[C, D], vectors of any length
    texts        float[B, D]
    log_scale    float or Tensor: the logarithm of the scale
    returns      float[C, B]
    """
    cosines = unit(images) @ unit(texts).T
    return torch.as_tensor(log_scale).exp() * cosines + bias


# cell f332867d
def cross_entropy(logits: Tensor, right: Tensor) -> Tensor:
    """How surprised a softmax is by the right choice: -log p(right).

    logits    float[..., C], one for each of C choices
    right     int[...], the number of the right one
    returns   float[...], nats, 0 or more; float32 for 16-bit logits
    note      the highest logit is taken off first: nothing overflows,
              and no probability is ever computed
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    below = logits - logits.detach().amax(dim=-1, keepdim=True)
    own = below.gather(-1, right[..., None])[..., 0]
    return below.exp().sum(dim=-1).log() - own


# cell ef85df21
def check_pairs(images: Tensor, texts: Tensor) -> None:
    """Row i of both must be a pair: equal shapes [B, D], at least one
    row; ValueError if not."""
    if (
        images.shape != texts.shape
        or images.dim() != 2
        or not len(images)
    ):
        raise ValueError(
            "images and texts must both be [B, D], row i of one belonging to "
            f"row i of the other; got {list(images.shape)} and {list(texts.shape)}"
        )


# cell 78ffa2cb
def clip_loss(images: Tensor, texts: Tensor, log_scale) -> Tensor:
    """Find your caption among all, find your picture among all.

    images, texts    float[B, D], row i of both a pair
    log_scale        float or Tensor: the logarithm of the scale
    returns          scalar: mean cross-entropy of both directions
    source           Radford et al. 2021
    """
    check_pairs(images, texts)
    logits = pair_logits(images, texts, log_scale)
    own = torch.arange(len(logits), device=logits.device)
    by_image = cross_entropy(logits, own).mean()
    by_text = cross_entropy(logits.T, own).mean()
    return (by_image + by_text) / 2


# cell c9277959
def summed_loss(
    images: Tensor, texts: Tensor, log_scale, bias, first: int = 0
) -> Tensor:
    """Cross-entropy of "a pair or not" for every pair, added up.

    images    float[C, D]: rows first … first + C - 1 of the batch
    texts     float[B, D]: all of it
    returns   scalar
    """
    logits = pair_logits(images, texts, log_scale, bias)  # [C, B]
    rows = first + torch.arange(len(images), device=logits.device)
    own = rows[:, None] == torch.arange(
        len(texts), device=logits.device
    )
    # the stable form of ln(1 + exp(-s z))
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum()


# cell 57f2b146
def siglip_loss(
    images: Tensor, texts: Tensor, log_scale, bias
) -> Tensor:
    """Say for every pair, on its own, whether it belongs together.

    images, texts     float[B, D], row i of both a pair
    log_scale, bias   float or Tensor
    returns           scalar: sum over the B * B pairs, divided by B
    source            Zhai et al. 2023
    """
    check_pairs(images, texts)
    return summed_loss(images, texts, log_scale, bias) / len(images)


# cell 914dc45d
def siglip_loss_chunked(
    images: Tensor, texts: Tensor, log_scale, bias, *, chunk: int = 256
) -> Tensor:
    """The value and gradients of `siglip_loss`, without its [B, B]
    matrix.

    chunk     pictures at a time; at most a [chunk, B] matrix exists at
              once, and the backward pass computes it again instead of
              keeping it
    raises    ValueError if chunk is below 1
    source    Zhai et al. 2023, section 3.3, for chunks across devices
    """
    check_pairs(images, texts)
    if chunk < 1:
        raise ValueError(
            f"chunk is a number of pictures, at least 1, not {chunk}"
        )
    total = 0.0
    for first in range(0, len(images), chunk):
        total = total + checkpoint(
            summed_loss, images[first : first + chunk], texts, log_scale, bias,
            first, use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total / len(images)
