"""Measure a model on unseen scenes and store every row beside its weights.

    python benchmarks/evaluate_mini.py                  seeds 0 to 499, a minute or two
    python benchmarks/evaluate_mini.py --scenes 60      fewer, printed only
    python benchmarks/evaluate_mini.py --world full     all tasks, 1,000 scenes; goes on
                                                        where it was stopped
    python benchmarks/evaluate_mini.py --model FOLDER   another model than the shipped

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

import evaluate_full
import torch

import pali
from pali import tasks
from pali._export import write_atomically
from pali.outlines import load_mask_codec

FOLDER = Path(pali.__file__).parent / "mini"
SCENES = 500  # of the first world
FULL_SCENES, ELSEWHERE = 1000, 500  # of the full one, and never trained on
NAMES = {"first": "evaluation.json", "full": "evaluation_full.json"}
ANSWERS = Path(__file__).resolve().parents[1] / "runs" / "evaluation"


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


def as_json(results: list[tasks.Result], folder: Path = FOLDER) -> str:
    """The whole file: small, one line a scene, the same bytes for the same rows."""
    head = {
        "command": "python benchmarks/evaluate_mini.py",
        "weights": fingerprint(folder),
        "scores": report(results),
    }
    lines = ",\n".join(json.dumps(row(r)) for r in results)
    return json.dumps(head, indent=1)[:-2] + f',\n "results": [\n{lines}\n]}}\n'


def first_world(folder: Path, scenes: int) -> str:
    """Three questions a scene of the first world, printed; returns the file."""
    model, processor = pali.load(folder)
    results = tasks.evaluate(model, processor, range(scenes))
    for group, scores in report(results).items():
        words = [
            f"{name} {s['value']:.3f} ({s['low']:.3f} to {s['high']:.3f})"
            for name, s in scores.items()
        ]
        print(f"{group:16}", "; ".join(words))
    return as_json(results, folder)


def find_codec(folder: Path, path: Path | None):
    """The mask codec that is named, else the model's own, else the shipped one."""
    own = folder / "mask_codec.npz"
    return load_mask_codec(path or (own if own.is_file() else FOLDER / own.name))


def full_world(
    folder: Path, scenes: int, elsewhere: int, codec: Path | None, work: Path
) -> str:
    """All tasks of the full world, printed; returns the file."""
    weights = fingerprint(folder)
    kept = evaluate_full.Kept(work / f"{weights}.jsonl")
    model, processor = pali.load(folder)
    examiner = evaluate_full.Examiner(model, processor, find_codec(folder, codec), kept)
    seeds = range(scenes), range(min(elsewhere, scenes))
    head, verdicts = evaluate_full.evaluate(examiner, *seeds)
    print(evaluate_full.table(head))
    command = "python benchmarks/evaluate_mini.py --world full"
    if (len(seeds[0]), len(seeds[1])) != (FULL_SCENES, ELSEWHERE):
        command += f" --scenes {len(seeds[0])} --elsewhere {len(seeds[1])}"
    return evaluate_full.as_json(
        {"command": command, "weights": weights} | head, verdicts
    )


def parser() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--world", choices=NAMES, default="first")
    made.add_argument("--model", type=Path, default=FOLDER, metavar="FOLDER")
    made.add_argument("--scenes", type=int, help=f"{SCENES}, or {FULL_SCENES} (full)")
    made.add_argument(
        "--elsewhere", type=int, default=ELSEWHERE, metavar="N",
        help="scenes of each condition never trained on (full), at most --scenes",
    )  # fmt: skip
    made.add_argument("--codec", type=Path, help="mask codec, with its encoder")
    made.add_argument(
        "--out", type=Path, help="write here, whatever the number of scenes"
    )
    made.add_argument(
        "--work", type=Path, default=ANSWERS, help="where answers are kept (full)"
    )
    made.add_argument("--threads", type=int)
    return made


def main(argv: list[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(argv)
    if not (options.model / "model.safetensors").is_file():
        made.error(f"{options.model} holds no model.safetensors")
    if min(options.scenes or 1, options.elsewhere) < 1:
        made.error("--scenes and --elsewhere must be 1 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    whole = SCENES if options.world == "first" else FULL_SCENES
    scenes = options.scenes or whole
    if options.world == "first":
        text = first_world(options.model, scenes)
    else:
        text = full_world(
            options.model, scenes, options.elsewhere, options.codec, options.work
        )
    if options.out:
        write_atomically(options.out, text)
    elif scenes == whole and (
        options.world == "first" or options.elsewhere == ELSEWHERE
    ):
        write_atomically(options.model / NAMES[options.world], text)


if __name__ == "__main__":
    # a model may write boxes that are none; here that is a result, not a surprise
    logging.getLogger("pali").setLevel(logging.ERROR)
    main()
