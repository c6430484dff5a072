"""PaliGemma, built from nothing, one chapter at a time.

    import pali

    model, processor = pali.load("mini")
    pali.generate(model, processor, "picture.png", "caption en")

Names are looked up when they are first used, so `import pali` itself costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_NAMES = {
    "Batch": "tokens",
    "Box": "tokens",
    "Cache": "cache",
    "PaliGemma": "paligemma",
    "PaliGemmaConfig": "paligemma",
    "Processor": "tokens",
    "generate": "generation",
    "load": "weights",
    "load_mask_codec": "outlines",
    "load_model": "weights",
    "load_processor": "weights",
    "read_boxes": "tokens",
    "read_masks": "outlines",
    "save_model": "weights",
}
_MODULES = (  # in reading order; viz has no chapter
    "patches",
    "attention",
    "vision",
    "contrastive",
    "tokens",
    "norm",
    "rope",
    "gqa",
    "mlp",
    "decoder",
    "cache",
    "masks",
    "fusion",
    "paligemma",
    "weights",
    "generation",
    "scenes",
    "outlines",
    "train",
    "speed",
    "tasks",
    "attention_maps",
    "viz",
)

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"pali.{name}")
    if name in _NAMES:
        value = getattr(import_module(f"pali.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pali' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
