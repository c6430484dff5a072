"""Measure the shipped model on unseen scenes and store every row beside its weights.

    python benchmarks/evaluate_mini.py                  seeds 0 to 499, a minute or two
    python benchmarks/evaluate_mini.py --scenes 60      fewer, printed only

The chapter on tasks shows what is stored here, and a test measures a part of it again.
Run it after every change of the weights: the file names the weights it belongs to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

import pali
from pali import tasks
from pali._export import write_atomically

FOLDER = Path(pali.__file__).parent / "mini"
SCENES = 500


def fingerprint(folder: Path = FOLDER) -> str:
    """What tells these weights from others: the start of the file's SHA-256."""
    data = (folder / "model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]


def row(result: tasks.Result) -> dict:
    """A result as it is stored: overlaps to three digits."""
    return asdict(result) | {"overlaps": [round(v, 3) for v in result.overlaps]}


def groups(results: list[tasks.Result]) -> dict[str, list[tasks.Result]]:
    """All scenes, then those with so many things, then those on each ground."""
    chosen = {"all": results}
    for n in sorted({r.things for r in results}):
        chosen[f"things {n}"] = [r for r in results if r.things == n]
    for ground in sorted({r.ground for r in results}):
        chosen[f"ground {ground}"] = [r for r in results if r.ground == ground]
    return chosen


def found_by_size(results: list[tasks.Result]) -> dict[str, tasks.Score]:
    """The share of things that were found, small, middling and large."""
    things = [p for r in results for p in zip(r.sizes, r.overlaps, strict=True)]
    edges = {"28-35": (28, 35), "36-43": (36, 43), "44-52": (44, 52)}
    return {
        name: tasks.share(v >= 0.5 for size, v in things if low <= size <= high)
        for name, (low, high) in edges.items()
    }


def rounded(score: tasks.Score) -> dict:
    return {k: round(v, 4) for k, v in asdict(score).items()}


def report(results: list[tasks.Result]) -> dict:
    """Every score with its interval, ready for JSON."""
    scores = {
        group: {name: rounded(s) for name, s in tasks.summary(chosen).items()}
        for group, chosen in groups(results).items()
    }
    sizes = found_by_size(results).items()
    return scores | {f"size {n}": {"found": rounded(s)} for n, s in sizes}


def as_json(results: list[tasks.Result]) -> str:
    """The whole file: small, one line a scene, the same bytes for the same rows."""
    head = {
        "command": "python benchmarks/evaluate_mini.py",
        "weights": fingerprint(),
        "scores": report(results),
    }
    lines = ",\n".join(json.dumps(row(r)) for r in results)
    return json.dumps(head, indent=1)[:-2] + f',\n "results": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.getLogger("pali").setLevel(logging.ERROR)
    model, processor = pali.load("mini")
    results = tasks.evaluate(model, processor, range(options.scenes))
    for group, scores in report(results).items():
        words = [
            f"{name} {s['value']:.3f} ({s['low']:.3f} to {s['high']:.3f})"
            for name, s in scores.items()
        ]
        print(f"{group:16}", "; ".join(words))
    if options.scenes == SCENES:
        write_atomically(FOLDER / "evaluation.json", as_json(results))


if __name__ == "__main__":
    main()
