"""PaliGemma: the whole model.

Generated from notebooks/14_paligemma.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pali.attention import Trace
from pali.cache import Cache
from pali.decoder import Decoder, DecoderConfig
from pali.fusion import Projector, place_features
from pali.masks import cached_mask, prefix_lm_mask, token_positions, window_mask
from pali.vision import VisionConfig, VisionTower

__all__ = [
    "DECODERS",
    "GEMMA2",
    "PaliGemma",
    "PaliGemmaConfig",
    "cached_length",
    "check_inputs",
    "check_rows",
    "derived_mask",
    "fill_in",
    "form",
    "last_valid",
    "mask_per_layer",
    "published_config",
]


# cell 9e32a592
@dataclass(frozen=True)
class PaliGemmaConfig:
    """The shape of the whole model; the defaults are PaliGemma 3B at
    224 px."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    image_id: int = 257_152


# cell ba191b72
GEMMA2 = DecoderConfig(
    architecture="gemma2",
    width=2304,
    num_layers=26,
    num_kv_heads=4,
    mlp_width=9216,
    attention_cap=50.0,
    logit_cap=30.0,
    sliding_window=4096,
)
DECODERS = {
    "paligemma-3b": DecoderConfig(),
    "paligemma2-3b": GEMMA2,
    "paligemma2-10b": replace(
        GEMMA2, width=3584, num_layers=42, num_heads=16, num_kv_heads=8,
        mlp_width=14_336,
    ),
    "paligemma2-28b": replace(
        GEMMA2, width=4608, num_layers=46, num_heads=32,
        num_kv_heads=16, mlp_width=36_864, head_dim=128,
        query_scale=144**-0.5,
    ),
}  # fmt: skip


# cell 3c2a5837
def published_config(
    name: str, image_size: int = 224
) -> PaliGemmaConfig:
    """The configuration of a published checkpoint.

    name          "paligemma-3b", "paligemma2-3b", "paligemma2-10b" or
                  "paligemma2-28b"
    image_size    224, 448 or 896
    source        Beyer et al. 2024; Steiner et al. 2024
    """
    if name not in DECODERS or image_size not in (224, 448, 896):
        raise ValueError(
            f"published are {', '.join(DECODERS)} at 224, 448 and "
            f"896 px, not {name!r} at {image_size}"
        )
    return PaliGemmaConfig(
        VisionConfig(image_size=image_size), DECODERS[name]
    )


# cell 62c7b342
def last_valid(valid: Tensor) -> Tensor:
    """The place of each row's last valid token: bool[B, T] ->
    int64[B]."""
    places = torch.arange(valid.shape[1], device=valid.device)
    return (places * valid).argmax(dim=1)


# cell c3d9171e
def form(x) -> str:
    """How an error describes a value: "torch.bool [2, 7]", or its
    type."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{x.dtype} {list(x.shape)}"


# cell 36fe9735
def check_inputs(ids: Tensor, config: PaliGemmaConfig, **like) -> None:
    """One clear sentence for ids, valid, suffix, positions."""
    tensor = isinstance(ids, Tensor) and ids.dim() == 2
    if not tensor or ids.dtype != torch.int64:
        raise ValueError(
            f"ids must be torch.int64 [B, T], got {form(ids)}"
        )
    if ids.numel() == 0:
        raise ValueError(
            f"ids must hold at least one token, got {list(ids.shape)}"
        )
    rows = config.decoder.vocab_size
    low, high = ids.masked_fill(ids == config.image_id, 0).aminmax()
    if low < 0 or high >= rows:
        raise ValueError(
            f"ids run from {low} to {high}, the vocabulary from 0 "
            f"to {rows - 1}"
        )
    for name, value in like.items():
        dtype = torch.int64 if name == "positions" else torch.bool
        want = f"{dtype} {list(ids.shape)}"
        if value is not None and form(value) != want:
            raise ValueError(
                f"{name} must be {want} like ids, got {form(value)}"
            )


# cell c6c19df1
def cached_length(
    cache: Cache | None, config: PaliGemmaConfig, rows: int
) -> int:
    """How many tokens of each row a cache holds; 0 without one.

    raises    ValueError for the cache of another model or batch
    """
    if cache is None:
        return 0
    if not isinstance(cache, Cache) or cache.config != config.decoder:
        raise ValueError(
            "cache must be a pali.Cache made with this model's config"
        )
    if cache.batch_size != rows:
        raise ValueError(
            f"the cache holds {cache.batch_size} rows, not {rows}"
        )
    return cache.length


# cell 4e44b3d7
def fill_in(
    ids: Tensor, valid: Tensor | None, suffix: Tensor | None, past: int
) -> tuple[Tensor, Tensor]:
    """`valid` and `suffix` where the caller left them out.

    past      tokens in the cache: after them, every token is suffix
    raises    ValueError for prefix after the prefix
    """
    if past and suffix is not None and not suffix.all():
        raise ValueError(
            "after the prefix every token is suffix: the prefix is "
            "bidirectional, so it must come whole in the first call"
        )
    valid = (
        torch.ones_like(ids, dtype=torch.bool)
        if valid is None
        else valid
    )
    return valid, torch.full_like(
        valid, past > 0
    ) if suffix is None else suffix


# cell 8837698f
def mask_per_layer(
    mask, shape: list[int], num_layers: int
) -> list[Tensor]:
    """A mask given by hand, or a list of them: one for each layer.

    raises    ValueError if their number, dtype or shape is wrong
    """
    several = isinstance(mask, Sequence)
    masks = list(mask) if several else [mask] * num_layers
    if len(masks) != num_layers:
        raise ValueError(
            f"{len(masks)} masks for {num_layers} layers: give one each"
        )
    for one in masks:
        if form(one) != f"torch.bool {shape}":
            raise ValueError(
                f"mask must be torch.bool {shape}, got {form(one)}"
            )
    return masks


# cell 5f5ced59
def derived_mask(
    keys: Tensor, valid: Tensor, suffix: Tensor, past: int
) -> Tensor | None:
    """The mask that follows from `valid` and `suffix`.

    keys      bool[B, past + T], valid of cached and new tokens
    returns   bool[B, 1, T, past + T], None if everything may be seen
    """
    alone = valid.shape[1] == 1  # one new token sees all before it
    if keys.all() and (alone or not (past or suffix.any())):
        return None
    if past:
        return cached_mask(keys, past)
    return prefix_lm_mask(valid, suffix)


# cell 88452814
def check_rows(masks: Sequence[Tensor]) -> None:
    """No token may have nothing to look at: its weights were NaN."""
    for i, mask in enumerate(masks):
        if not mask.any(dim=-1).all():
            raise ValueError(
                f"mask has a row without any True in layer {i} (its "
                "sliding window counted): every token must see at "
                "least one"
            )


# cell a93e28b4
class PaliGemma(nn.Module):
    """Pictures and token ids in, logits for the next token out.

    encode(pixels)            float[B, 3, S, S] -> features float[B, N,
                              width]
    forward(pixels, ids, …)   logits float[B, T, vocabulary], in the
                              dtype of the model; [B, 1, vocabulary]
                              with last_only
    source                    Beyer et al. 2024; Steiner et al. 2024
    """

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(
            config.vision.width, config.decoder.width
        )
        self.decoder = Decoder(config.decoder)

    def encode(self, pixels: Tensor, trace: Trace = None) -> Tensor:
        """Pictures as soft tokens of the decoder's width; do it once a
        picture."""
        if (
            not isinstance(pixels, Tensor)
            or not pixels.is_floating_point()
        ):
            raise ValueError(
                f"pixels must be float [B, 3, S, S], got {form(pixels)}"
            )
        x = self.vision(pixels.to(self.decoder.embedding.dtype), trace)
        return self.projector(x)

    def embed(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Token vectors, with image features in the place of
        `<image>`."""
        is_image = ids == self.config.image_id
        x = self.decoder.embed(ids.masked_fill(is_image, 0))
        if features is not None:
            return place_features(x, is_image, features)
        if is_image.any():
            raise ValueError(
                f"the prompts reserve {int(is_image.sum())} <image> "
                "tokens but no picture came: pass pixels or features"
            )
        return x

    def masks(
        self, valid, suffix, positions, cache: Cache | None, mask
    ) -> list[Tensor | None]:
        """What each layer may look at; None: everywhere."""
        config, (B, T) = self.config.decoder, valid.shape
        past, keys, at = 0, valid, positions
        if cache is not None:  # which holds the new tokens by now
            past = cache.length - T
            keys = cache.valid[:, : past + T]
            at = cache.positions[:, : past + T]
        if mask is None:
            one = derived_mask(keys, valid, suffix, past)
            given = [one] * config.num_layers
        else:
            shape = [B, 1, T, past + T]
            given = mask_per_layer(mask, shape, config.num_layers)
        window = config.sliding_window
        if window is not None and int(at.max() - at.min()) >= window:
            near = window_mask(positions, at, suffix, window)
            for i, m in enumerate(given):
                if config.window(i) is not None:
                    given[i] = near if m is None else m & near
        if mask is not None:
            check_rows(given)
        return given

    def forward(
        self,
        pixels: Tensor | None,
        ids: Tensor,
        *,
        valid: Tensor | None = None,
        suffix: Tensor | None = None,
        cache: Cache | None = None,
        features: Tensor | None = None,
        mask: Tensor | Sequence[Tensor] | None = None,
        positions: Tensor | None = None,
        last_only: bool = False,
        trace: Trace = None,
    ) -> Tensor:
        """Logits of the next token at every place, or at the last.

        pixels      float[M, 3, S, S]; None when `features` are given,
                    for text alone, after the first call with a cache
        ids         int64[B, T];  valid, suffix  bool[B, T]
        cache       a `Cache`; the first call holds the whole prefix,
                    later calls the new tokens only, all of them suffix
        mask        bool[B, 1, T, past + T] or a list, one a layer:
                    replaces the derived one
        positions   int64[B, T]: replace the derived ones
        last_only   logits of each row's last valid place alone
        trace       a dict to be filled with what happens inside
        raises      ValueError with one sentence for a wrong form
        """
        check_inputs(
            ids, self.config,
            valid=valid, suffix=suffix, positions=positions,
        )  # fmt: skip
        past = cached_length(cache, self.config, len(ids))
        valid, suffix = fill_in(ids, valid, suffix, past)
        if features is None and pixels is not None:
            features = self.encode(pixels, trace)
        x = self.embed(ids, features)
        if positions is None:
            seen = cache.next_positions() if past else None
            positions = token_positions(valid, seen)
        if cache is not None:
            cache.begin(valid, positions)
        try:
            masks = self.masks(valid, suffix, positions, cache, mask)
        except ValueError:
            if cache is not None:
                cache.length = past  # the tokens were refused
            raise
        choose = last_only and ids.shape[1] > 1  # one needs no choice
        last = last_valid(valid) if choose else None
        x = self.decoder(x, positions, masks, cache, trace, last)
        return self.decoder.logits(x)
