"""Train the mask codec of the shipped model on the masks of its world.

    python tools/make_codec.py [--folder src/pali/mini]    some minutes on one core
    python tools/make_codec.py --check

Writes `mask_codec.npz` and, beside it, `training/codec.json`: the recipe, the log of
the training, and what the written file does to masks that it was not trained on.
It also says how many held-out words are those of the codec that was shipped before;
on the machine that made it, all of them. `--check` trains nothing and writes nothing:
it measures the codec that lies there and says whether the numbers are as recorded.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from pali import scenes
from pali.outlines import (
    MaskCodec,
    collect_masks,
    load_mask_codec,
    save_mask_codec,
    there_and_back,
    train_codec,
)
from pali.weights import write_files

MINI = Path(__file__).resolve().parents[1] / "src" / "pali" / "mini"
START = scenes.TRAINING_SEEDS.start
TRAINING = range(START, START + 8000)  # scenes
HELD_OUT = range(500)  # test seeds, of which nothing is ever trained
RECIPE = {
    "steps": 3200,
    "batch_size": 32,
    "rate": 0.002,
    "width": 64,
    "code_width": 64,
    "seed": 1,
}
EVERY = 200  # steps from one line of the log to the next


def grey(seeds: range) -> Tensor:
    """Masks of the full world, float16[N, 1, 64, 64]: 8 bits of grey need no more."""
    return collect_masks(seeds, scenes.FULL_WORLD).half()


def measure(codec: MaskCodec, masks: Tensor) -> dict[str, float]:
    """Mean IoU there and back with its 95 % interval, and the codes that are used."""
    codes, shares = there_and_back(codec, masks)
    return {
        "iou": round(shares.mean().item(), 4),
        "iou_95": round(1.96 * shares.std().item() / math.sqrt(len(shares)), 4),
        "iou_of_the_worst_tenth": round(shares.quantile(0.1).item(), 4),
        "codes_in_use": codes.unique().numel(),
    }


def train(held_out: Tensor) -> tuple[MaskCodec, dict]:
    """The codec of RECIPE and the record of how it was made."""
    masks = grey(TRAINING)
    print(f"{len(masks):,} masks to train on, {len(held_out):,} held out")
    log, losses, start = [], [], time.monotonic()

    def watch(step: int, loss: float, codec: MaskCodec) -> None:
        losses.append(loss)
        if step % EVERY:
            return
        found = measure(codec, held_out)
        line = {"step": step, "loss": round(sum(losses) / len(losses), 4), **found}
        losses.clear()
        log.append(line)
        seconds = time.monotonic() - start
        print(
            f"step {step}: loss {line['loss']:.4f}, held-out IoU {line['iou']:.4f}, "
            f"{line['codes_in_use']} codes in use, {seconds:.0f} s",
            flush=True,
        )

    codec = train_codec(masks, **RECIPE, watch=watch)
    record = {
        "world": "full",
        "training_seeds": [TRAINING.start, TRAINING.stop],
        "training_masks": len(masks),
        "held_out_seeds": [HELD_OUT.start, HELD_OUT.stop],
        "held_out_masks": len(held_out),
        "recipe": RECIPE,
        "torch": torch.__version__,
        "log": log,
    }
    return codec, record


def make(folder: Path) -> None:
    """Train, say what became of it, and write codec and record."""
    held_out = grey(HELD_OUT)
    codec, record = train(held_out)
    shipped = MINI / "mask_codec.npz"
    before = load_mask_codec(shipped) if shipped.is_file() else None
    path = folder / "mask_codec.npz"
    save_mask_codec(codec, path)
    written = load_mask_codec(path)
    record["file"] = measure(written, held_out) | {"bytes": path.stat().st_size}
    text = json.dumps(record, indent=2) + "\n"
    write_files(folder / "training", {"codec.json": lambda part: part.write_text(text)})
    print(f"{path}: {json.dumps(record['file'])}")
    if before:
        new, old = (c.encode(held_out.float()) for c in (written, before))
        same = (new == old).float().mean().item()
        print(f"held-out words as from the codec that was shipped: {same:.2%}")


def check(folder: Path) -> int:
    """0 if the codec in the folder measures as its record says, else 1."""
    record = json.loads((folder / "training" / "codec.json").read_text())
    path = folder / "mask_codec.npz"
    found = measure(load_mask_codec(path), grey(range(*record["held_out_seeds"])))
    found |= {"bytes": path.stat().st_size}
    print(json.dumps(found))
    # other kernels may turn a few near ties: one word of 10,000 moves less than this
    same = all(
        math.isclose(found[key], value, abs_tol=0 if key == "bytes" else 5e-4)
        for key, value in record["file"].items()
    )
    print("as recorded" if same else f"recorded: {json.dumps(record['file'])}")
    return 0 if same else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=MINI)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(check(arguments.folder))
    make(arguments.folder)
