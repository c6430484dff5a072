"""Does a stage before the tasks help the little model? Measured at small scale.

    python benchmarks/ablate_mini.py                 goes on where it was stopped
    python benchmarks/ablate_mini.py --steps 20      a look at whether it runs

PaliGemma's tower first learned which caption belongs to which picture, its decoder to
write text, and only then both the tasks. Here the little model gets the same stages in
the first world, with the same task steps after them:

- together      fresh weights, tasks from the first step
- contrastive   before it, the tower and the sigmoid loss of `pali.contrastive`: the
                mean patch against the sum of vectors of the caption's tokens
- text          before it, the decoder alone on the answers, without pictures

After every 100 task steps: the loss on lessons about unseen scenes. At the end: 200
unseen scenes. Kept in `src/pali/mini/training/ablation.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import pali
from pali import scenes
from pali._export import write_atomically
from pali.contrastive import cross_entropy, siglip_loss
from pali.patches import preprocess
from pali.train import (
    Lessons,
    Settings,
    one_step,
    optimisers,
    pack,
    quick_check,
    rate_factor,
    start_model,
    suffix_loss,
)

RESULTS = Path(pali.__file__).parent / "mini" / "training" / "ablation.json"
VARIANTS = ("together", "contrastive", "text")
EARLY = 3_000_000_000  # seeds of the stage, far from those of the lessons
BATCH = 64  # pictures, or answers, a step of the stage


def drawn_at(step: int) -> list[scenes.Scene]:
    """The scenes of one step of a stage, each with a caption of its own."""
    found = {}
    for seed in range(EARLY + step * BATCH, EARLY + (step + 1) * BATCH):
        scene = scenes.scene(seed)
        found.setdefault(scenes.caption(scene), scene)
    return list(found.values())


def fit(name: str, groups: list[dict], loss_at: Callable, steps: int) -> None:
    """Minimise by AdamW: the rate goes up in a twentieth of the steps, then down."""
    course = Settings(steps=steps, warmup=max(1, steps // 20), decay=0.95)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(rate_factor, settings=course)
    )
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"    {name} {step}: loss {loss.item():.3f}", flush=True)


def contrastive_stage(model, processor, steps: int) -> None:
    """Teach the tower which caption belongs to which picture."""
    width, tokenizer = model.config.vision.width, processor.tokenizer
    head = nn.Linear(width, width)
    words = nn.EmbeddingBag(len(model.decoder.embedding), width, mode="sum")
    log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
    bias = nn.Parameter(torch.tensor(-math.log(BATCH - 1.0)))

    def loss_at(step: int) -> torch.Tensor:
        drawn = drawn_at(step)
        pixels = [preprocess(s.image, processor.image_size) for s in drawn]
        ids = [torch.tensor(tokenizer.encode(scenes.caption(s))) for s in drawn]
        starts = torch.tensor([0, *map(len, ids)])[:-1].cumsum(0)
        seen = head(model.vision(torch.stack(pixels)).mean(dim=1))
        return siglip_loss(seen, words(torch.cat(ids), starts), log_scale, bias)

    weights = [*model.vision.parameters(), *head.parameters(), *words.parameters()]
    own = {"params": [log_scale, bias], "lr": 5e-3}
    fit("contrastive", [{"params": weights, "lr": 1e-3}, own], loss_at, steps)


def text_stage(model, processor, steps: int) -> None:
    """Teach the decoder to write the answers, blindly."""

    def loss_at(step: int) -> torch.Tensor:
        pairs = [
            pair
            for s in drawn_at(step)
            for pair in scenes.examples(s, scenes.question_stream(s), 2)
        ]
        prompts, answers = map(list, zip(*pairs, strict=True))
        batch = processor([None] * len(prompts), prompts, answers, "right")
        logits = model(None, batch.ids, valid=batch.valid, suffix=batch.suffix)
        taught = batch.suffix[:, 1:]
        return cross_entropy(logits[:, :-1][taught], batch.ids[:, 1:][taught]).mean()

    weights = list(model.decoder.parameters())
    fit("text", [{"params": weights, "lr": 1e-3}], loss_at, steps)


STAGES = {"contrastive": contrastive_stage, "text": text_stage}


@torch.no_grad()
def unseen_loss(model, processor, number: int = 64) -> float:
    """Mean loss of the answers about test scenes, five questions each."""
    drawn = [scenes.scene(seed) for seed in range(number)]
    rows = [scenes.examples(s, scenes.question_stream(s), 5) for s in drawn]
    lesson = pack(processor, [s.image for s in drawn], rows)
    return suffix_loss(model, *lesson).item()


def run(variant: str, steps: int, stage_steps: int, seed: int) -> dict:
    """One variant from its fresh weights to its numbers."""
    settings = Settings(
        seed=seed,
        steps=steps,
        batch_size=16,
        decay=0.5,
        plain=0.1,
        precision="bfloat16",
        eval_scenes=0,
        warmup=50,
    )
    with tempfile.TemporaryDirectory() as folder:
        model, processor = start_model(Path(folder), settings)
    began, stage = time.perf_counter(), 0.0
    if variant in STAGES:
        STAGES[variant](model, processor, stage_steps)
        model.zero_grad(set_to_none=True)
        stage = time.perf_counter() - began
    optimizers, curve, spent = optimisers(model, settings), [], 0.0
    lessons = Lessons(settings, processor)
    for step in range(steps):
        lesson = lessons[step]
        factor = rate_factor(step, settings)
        began = time.perf_counter()
        one_step(model, optimizers, lesson, factor, settings)
        spent += time.perf_counter() - began
        if (step + 1) % 100 == 0 or step + 1 == steps:
            curve.append([step + 1, round(unseen_loss(model, processor), 4)])
            print(f"  {variant}, step {step + 1}: {curve[-1][1]}", flush=True)
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "stage_steps": stage_steps if stage else 0,
        "stage_in_task_steps": round(stage / (spent / steps)),
        "curve": curve,
        "scores": quick_check(model, processor, range(200)),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, keep it, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--stage-steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for variant in VARIANTS:
        want = (variant, options.seed, options.steps)
        if any((r["variant"], r["seed"], r["steps"]) == want for r in rows):
            continue
        stage_steps = min(options.stage_steps, options.steps)
        rows.append(run(variant, options.steps, stage_steps, options.seed))
        lines = ",\n".join(json.dumps(row) for row in rows)
        write_atomically(options.out, f"[\n{lines}\n]\n")
    for row in rows:
        print(row["variant"], row["seed"], row["curve"][-1], row["scores"])


if __name__ == "__main__":
    main()
