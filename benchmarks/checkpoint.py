"""Checkpoint folders with random weights, for timing.

    python benchmarks/checkpoint.py FOLDER full|slice|tiny bfloat16|float32

The sizes are `full`, PaliGemma 3B at 224 px; `slice`, its widths with few layers and a
small vocabulary; `tiny`, for tests. Weights are scaled so that activations stay finite.
A folder that is whole and of the same recipe is used again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

RECIPE = 2  # raise it when the numbers in the folders change
MARK = "complete.json"
SIZES = ("full", "slice", "tiny")


def default_cache() -> Path:
    return Path(tempfile.gettempdir()) / "pali-bench"


def shape(size: str):
    """The configuration of a size; slice keeps every width of the whole model."""
    from pali.decoder import DecoderConfig
    from pali.paligemma import PaliGemmaConfig
    from pali.vision import VisionConfig

    if size == "full":
        return PaliGemmaConfig()
    if size == "slice":
        decoder = replace(DecoderConfig(), vocab_size=16_384, num_layers=2)
        vision = replace(VisionConfig(), num_layers=2)
        return PaliGemmaConfig(vision, decoder, image_id=16_320)
    decoder = DecoderConfig(
        vocab_size=2880, width=64, num_layers=3, num_heads=4, num_kv_heads=1,
        head_dim=32, mlp_width=128, query_scale=32**-0.5, max_positions=1024,
    )  # fmt: skip
    vision = VisionConfig(
        image_size=32, patch_size=8, width=48, num_layers=2, num_heads=4, mlp_width=96
    )
    return PaliGemmaConfig(vision, decoder, image_id=2816)


def spread(name: str, tensor) -> tuple[float, float]:
    """Mean and deviation with which a weight is drawn."""
    if name.startswith("decoder") and "norm" in name:
        return 0.0, 0.1  # stored as the distance from 1
    if "norm" in name and name.endswith("weight"):
        return 1.0, 0.1
    if name == "decoder.embedding":
        return 0.0, 0.002  # a larger one, being the head too, repeats its last token
    if "position" in name or tensor.dim() == 1:
        return 0.0, 0.02
    return 0.0, tensor[0].numel() ** -0.5


def fill(model, dtype, seed: int = 0):
    """Give every weight of a model without memory random numbers, in seconds.

    All are cut from one pool, each at its own place. The pool's length is odd, so that
    the rows of a large matrix differ from each other.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    largest = max(w.numel() for w in model.state_dict().values())
    # room for the largest matrix of a layer, and for it to begin anywhere in a million
    pool = torch.randn(min(largest, (1 << 25) + (1 << 20)) | 1, generator=generator)
    state, at = {}, 0
    for name, weight in model.state_dict().items():
        mean, deviation = spread(name, weight)
        count = weight.numel()
        if at + count > len(pool):
            at = at % 7919
        numbers = (pool[at : at + count] * deviation + mean).to(dtype)
        copies = -(-count // len(numbers))
        flat = numbers.repeat(copies)[:count]
        state[name] = flat.reshape(weight.shape)
        at += min(count, 7919)
    model.load_state_dict(state, assign=True)
    return model.eval()


def write(folder: Path, size: str, dtype: str) -> None:
    """Write a checkpoint folder, with the shipped model's tokenizer."""
    import torch

    import pali
    from pali.tokens import Processor

    config = shape(size)
    with torch.device("meta"):
        model = pali.PaliGemma(config)
    fill(model, getattr(torch, dtype))
    tokenizer = pali.load_processor("mini").tokenizer
    vision = config.vision
    processor = Processor(
        tokenizer, vision.image_size, vision.num_patches, config.image_id
    )
    pali.save_model(model, folder, processor)
    (folder / MARK).write_text(json.dumps(recipe(size, dtype)) + "\n")


def recipe(size: str, dtype: str) -> dict:
    """What a folder holds, as it is written beside its weights."""
    return json.loads(
        json.dumps({"recipe": RECIPE, "dtype": dtype, "config": asdict(shape(size))})
    )


def is_complete(folder: Path, size: str, dtype: str) -> bool:
    """Whether the folder was written whole, by this recipe."""
    mark = folder / MARK
    weights = folder / "model.safetensors"
    if not mark.is_file() or not weights.is_file():
        return False
    return json.loads(mark.read_text()) == recipe(size, dtype)


def main(argv: list[str]) -> None:
    folder, size, dtype = Path(argv[0]), argv[1], argv[2]
    if not is_complete(folder, size, dtype):
        (folder / MARK).unlink(missing_ok=True)
        write(folder, size, dtype)
    print((folder / "model.safetensors").stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:])
