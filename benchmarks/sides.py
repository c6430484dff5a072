"""One side of a comparison: a process that loads a model and answers commands.

    python benchmarks/sides.py ours|reference

One JSON object a line comes in, `{"do": "answer", …}`; one goes out, with what was
measured or with the key `error`. Each side has a process of its own, so that memory and
imports are its own; while one works, the other waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

clock = time.perf_counter


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say how much anonymous memory a process has")


def digest(pixels) -> str:
    """What tells two pictures as tensors apart."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def open_image(path: str):
    """A picture, wholly decoded: reading files is no part of what is timed."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image.load()
    return image


def repeat(action, count: int) -> list[float]:
    """Seconds of each of `count` runs."""
    seconds = []
    for _ in range(count):
        began = clock()
        action()
        seconds.append(clock() - began)
    return seconds


class Stamps:
    """When the logits of each token were there, and what the first two were."""

    def __init__(self) -> None:
        self.began, self.times, self.first = clock(), [], []

    def add(self, logits) -> None:
        self.times.append(clock())
        if len(self.first) < 2:
            self.first.append(logits.detach().clone())

    def report(self, path: str | None) -> dict:
        """Seconds of the first token and of each later one; two logits to disk."""
        if path is not None:
            import numpy as np

            np.save(path, np.stack([x.float().numpy() for x in self.first]))
        later = zip(self.times, self.times[1:], strict=False)
        return {
            "prefill": self.times[0] - self.began,
            "steps": [b - a for a, b in later],
        }


class Side:
    """What both sides can do."""

    def hello(self) -> dict:
        """How much memory the imports take; they are done when a side starts."""
        return {"anonymous": anonymous()}

    def prompt(self, rows: int, words: int = 8, seed: int = 1) -> dict:
        """The same random pictures and prompts on both sides: `rows` of them."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        size, patches, image_id = self.sizes()
        self.pixels = torch.rand(rows, 3, size, size, generator=generator) * 2 - 1
        text = torch.randint(300, 1700, (rows, words), generator=generator)
        head = torch.full((rows, patches), image_id)
        bos, newline = torch.full((rows, 1), 2), torch.full((rows, 1), 108)
        self.ids = torch.cat([head, bos, text, newline], dim=1)
        return {"tokens": self.ids.shape[1]}

    def preprocess(self, picture: str, size: int, count: int) -> dict:
        """Seconds of turning a picture into pixels, `count` times."""
        image = open_image(picture)
        work = self.pixels_of(image, size)
        seconds = repeat(lambda: self.pixels_of(image, size), count)
        return {"seconds": seconds, "digest": digest(work)}


class Ours(Side):
    """`pali`, as it is or prepared for this machine."""

    def imports(self) -> None:
        import pali

        _ = pali.load, pali.generate, pali.Cache

    def load(
        self,
        folder: str,
        dtype: str | None,
        precision: str | None = None,
        layers: list[int] | None = None,
        rows: list[int] = (1, 266),
    ) -> dict:
        """Load a folder; with a precision, prepare it for this machine.

        layers    how many of the tower's and of the decoder's are kept
        rows      numbers of rows to prepare for
        """
        import torch

        import pali
        from pali.weights import find_folder

        began = clock()
        kind = None if dtype is None else getattr(torch, dtype)
        self.model, self.processor = pali.load(folder, dtype=kind)
        loaded = clock()
        memory = anonymous()
        self.model.requires_grad_(False)
        if layers is not None:
            side = self.model.config.vision.image_size
            self.model = shortened(self.model, side, *layers)
        report = []
        if precision is not None:
            from pali.speed import prepare

            self.model = prepare(self.model, precision, rows=tuple(rows), report=report)
        return {
            "seconds": loaded - began,
            "anonymous": memory,
            "prepare_seconds": clock() - loaded,
            "chosen": [{k: r[k] for k in ("shape", "rows", "chosen")} for r in report],
            "folder": str(find_folder(folder)),
        }

    def sizes(self) -> tuple[int, int, int]:
        config = self.model.config
        return config.vision.image_size, config.vision.num_patches, config.image_id

    def answer(self, count: int, attention=None, path: str | None = None) -> dict:
        """Greedy tokens for the prompt, as `pali.generate` makes them, with times."""
        import torch

        from pali.generation import steps
        from pali.tokens import Batch

        valid = torch.ones_like(self.ids, dtype=torch.bool)
        batch = Batch(self.pixels, self.ids, valid, ~valid)
        stamps = Stamps()

        def choose(logits):
            stamps.add(logits)
            return logits.argmax(dim=-1)

        with torch.inference_mode():
            made = steps(self.model, batch, count, choose, stop=None)
            tokens = torch.stack(list(made), dim=1).tolist()
        return stamps.report(path) | {"tokens": tokens}

    def text(self, prompt: str, picture: str, tokens: int) -> dict:
        """`pali.generate` as it is, with the processor."""
        import pali

        image = open_image(picture)
        options = {"max_new_tokens": tokens}
        began = clock()
        texts = pali.generate(self.model, self.processor, image, prompt, **options)
        return {"seconds": clock() - began, "text": texts[0]}

    def scene(self, seed: int, path: str, size: list[int] | None = None) -> dict:
        """Draw a scene into a file; a kind of thing that is in it."""
        from pali import scenes

        drawn = scenes.scene(seed)
        image = drawn.image if size is None else drawn.image.resize(size)
        image.save(path)
        return {"kind": drawn.things[0].kind}

    def prompt_ids(self, prompt: str) -> dict:
        return {"ids": self.processor.prompt_ids(prompt)}

    def decode(self, ids: list[int]) -> dict:
        return {"text": self.processor.decode(ids)}

    def pixels_of(self, image, size: int):
        from pali.patches import preprocess

        return preprocess(image, size)

    def resize(self, picture: str, size: int, count: int) -> dict:
        """Pillow's part of the preprocessing alone."""
        from PIL import Image

        image, how = open_image(picture), Image.Resampling.BICUBIC
        return {"seconds": repeat(lambda: image.resize((size, size), how), count)}

    def step_bytes(self, length: int, dtype: str) -> dict:
        """Bytes that a step must read: decoder and head, keys and values."""
        import torch

        from pali.speed import step_bytes

        config, kind = self.model.config, getattr(torch, dtype)
        return {"bytes": step_bytes(config, kind, length)}

    def bandwidth(self, gigabytes: float, seconds: float) -> dict:
        """Bytes per second at which this machine reads."""
        from pali.speed import read_bandwidth

        return {"best": read_bandwidth(gigabytes, seconds)}

    def machine(self, side: int) -> dict:
        """What this machine is, for whoever reads the figures."""
        import platform
        from importlib import metadata

        import torch

        from pali import speed

        kinds = ("float32", "bfloat16", "int8")
        return speed.machine() | {
            "python": platform.python_version(),
            "transformers": metadata.version("transformers"),
            "matmul_peak": {
                kind: speed.matmul_peak(getattr(torch, kind), side) for kind in kinds
            },
        }

    def at_lengths(self, lengths: list[int], count: int) -> dict:
        """Seconds of `count` steps with so many tokens generated before.

        The cache is filled up with copies of what it holds, since a step's cost does
        not depend on the numbers in it.
        """
        import torch

        import pali

        B, T = self.ids.shape
        room = T + max(lengths) + count * len(lengths)
        cache = pali.Cache(self.model.config, B, room)
        seconds = {}
        with torch.inference_mode():
            self.model(self.pixels, self.ids, cache=cache, last_only=True)
            for n in lengths:
                self.fill_up(cache, T + n - 1)
                ids = self.ids[:, -1:]
                step = lambda ids=ids: self.model(  # noqa: E731
                    None, ids, cache=cache, last_only=True
                )
                seconds[n] = repeat(step, count)
        return {"seconds": seconds}

    def fill_up(self, cache, length: int) -> None:
        """Let a cache hold `length` tokens."""
        import torch

        missing = length - cache.length
        if missing <= 0:
            return
        past = cache.length
        at = torch.arange(past, length)[None].expand(cache.batch_size, -1)
        cache.begin(torch.ones_like(at, dtype=torch.bool), at)
        source = torch.arange(missing) % past
        for buffers in (cache.keys, cache.values):
            for b in buffers:
                b[:, :, past:length] = b[:, :, source]

    def load_curve(self, folder: str, sides: list[int], layers: list[int]) -> dict:
        """Models for pictures of several sizes: the first layers of a checkpoint."""
        import pali
        from pali.speed import prepare

        whole = pali.load_model(folder, dtype=None).requires_grad_(False)
        self.curve_models = []
        for side in sides:
            self.curve_models.append(prepare(shortened(whole, side, *layers)))
        return {}

    def curve(self) -> dict:
        """Prefill of each, with ten tokens of text."""
        import torch

        from pali.speed import prefill_flops

        rows = []
        for model in self.curve_models:
            config = model.config
            side, patches = config.vision.image_size, config.vision.num_patches
            pixels = torch.zeros(1, 3, side, side)
            ids = torch.full((1, patches), config.image_id)
            ids = torch.cat([ids, torch.arange(300, 310)[None]], dim=1)
            with torch.inference_mode():
                began = clock()
                model(pixels, ids, last_only=True)
                seconds = clock() - began
            flop = prefill_flops(config, 10)
            rows.append({"patches": patches, "flop": flop, "seconds": seconds})
        return {"rows": rows}

    def baseline(self, ideas: list[str], count: int) -> dict:
        """The usual from-scratch loop with these ideas switched on."""
        from baseline import answer

        stamps = Stamps()
        tokens = answer(
            self.model, self.pixels, self.ids, count, frozenset(ideas), stamps.add
        )
        return stamps.report(None) | {"tokens": tokens}

    def agreement(self, folder: str, precision: str, scenes: int) -> dict:
        """How often a prepared model picks the same next token as float32.

        Both read the float32 model's own answers about scenes never trained on.
        """
        import torch
        from torch.nn import functional as F

        import pali
        from pali.scenes import scene
        from pali.speed import prepare

        model, processor = pali.load(folder)
        other = prepare(model, precision)
        same, cosines = [], []
        for seed in range(scenes):
            drawn = scene(seed)
            kind = drawn.things[0].kind
            asked = f"answer en how many {kind}?"
            prompts = ["caption en", f"detect {kind}", asked]
            images = [drawn.image] * len(prompts)
            texts = pali.generate(model, processor, images, prompts)
            batch = processor(images, prompts, texts)
            with torch.inference_mode():
                form = {"valid": batch.valid, "suffix": batch.suffix}
                a = model(batch.pixels, batch.ids, **form).float()
                b = other(batch.pixels, batch.ids, **form).float()
            here = batch.labels[:, 1:] >= 0  # logits before each answered token
            a, b = a[:, :-1][here], b[:, :-1][here]
            same.append(a.argmax(-1) == b.argmax(-1))
            cosines.append(F.cosine_similarity(a, b, dim=-1))
        same, cosines = torch.cat(same), torch.cat(cosines)
        return {
            "tokens": len(same),
            "agreement": same.float().mean().item(),
            "cosine": cosines.mean().item(),
            "lowest": cosines.min().item(),
        }


class Reference(Side):
    """`transformers`, asked the same."""

    def imports(self) -> None:
        import transformers
        from transformers.models.siglip import image_processing_pil_siglip

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.kind = transformers.PaliGemmaForConditionalGeneration
        self.processors = image_processing_pil_siglip.SiglipImageProcessorPil

    def load(self, folder: str, dtype: str | None, precision=None) -> dict:
        import torch

        began = clock()
        kind = "auto" if dtype is None else getattr(torch, dtype)
        self.model = self.kind.from_pretrained(folder, dtype=kind)
        seconds, memory = clock() - began, anonymous()
        self.model.eval()
        self.model.generation_config.pad_token_id = 0
        self.images = self.processors.from_pretrained(folder)
        return {"seconds": seconds, "anonymous": memory}

    def sizes(self) -> tuple[int, int, int]:
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return vision.image_size, patches, self.model.config.image_token_id

    def inputs(self, ids, pixels) -> dict:
        import torch

        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "pixel_values": pixels.to(self.model.dtype),
        }

    def answer(self, count: int, attention="sdpa", path: str | None = None) -> dict:
        """Greedy tokens for the prompt by its own `generate`, with times."""
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        self.model.generation_config.eos_token_id = None
        stamps = Stamps()

        def stamp(ids, logits):
            stamps.add(logits)
            return logits

        made = self.model.generate(
            **self.inputs(self.ids, self.pixels), do_sample=False,
            max_new_tokens=count, logits_processor=[stamp],
        )  # fmt: skip
        tokens = made[:, self.ids.shape[1] :].tolist()
        return stamps.report(path) | {"tokens": tokens}

    def text(self, prompt: list[int], picture: str, tokens: int, attention: str):
        """A whole answer from a picture and the ids of a prompt."""
        import torch

        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        self.model.generation_config.eos_token_id = 1
        image = open_image(picture)
        began = clock()
        pixels = self.pixels_of(image, None)[None]
        ids = torch.tensor([prompt])
        made = self.model.generate(
            **self.inputs(ids, pixels), do_sample=False, max_new_tokens=tokens
        )
        ids = made[0, len(prompt) :].tolist()
        return {"seconds": clock() - began, "ids": ids}

    def pixels_of(self, image, size: int | None):
        if size is not None:
            self.images = self.processors(
                size={"height": size, "width": size}, image_mean=[0.5] * 3,
                image_std=[0.5] * 3, resample=3,
            )  # fmt: skip
        return self.images(images=image, return_tensors="pt")["pixel_values"][0]


def shortened(whole, side: int, vision_layers: int, decoder_layers: int):
    """A model of the first layers of another one, for pictures of another size.

    Nothing is copied: the weights are the other's.
    """
    import torch

    import pali

    config = whole.config
    vision = replace(
        config.vision,
        image_size=side,
        num_layers=min(vision_layers, config.vision.num_layers),
    )
    decoder = replace(
        config.decoder, num_layers=min(decoder_layers, config.decoder.num_layers)
    )
    config = replace(config, vision=vision, decoder=decoder)
    with torch.device("meta"):
        model = pali.PaliGemma(config)
    weights = whole.state_dict()
    state = {name: weights[name] for name in model.state_dict()}
    table = state["vision.position"]
    copies = -(-vision.num_patches // len(table))
    state["vision.position"] = table.repeat(copies, 1)[: vision.num_patches]
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def serve(side: Side) -> None:
    """Answer commands from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    side.imports()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(side, request.pop("do"))(**request)
        except Exception as error:
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve({"ours": Ours, "reference": Reference}[sys.argv[1]]())
