"""Training: from noise to a model that sees.

Generated from notebooks/19_train.ipynb: edit the notebook, then run `make export`. Each
block names the cell it comes from.
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from tqdm import tqdm

from pali import scenes
from pali.contrastive import cross_entropy
from pali.decoder import DecoderConfig
from pali.generation import generate
from pali.masks import prefix_lm_mask
from pali.outlines import outline_codes
from pali.paligemma import PaliGemma, PaliGemmaConfig
from pali.patches import preprocess
from pali.tokens import (
    EOS,
    IGNORE,
    NUM_LOCATIONS,
    NUM_SEGMENTS,
    PAD,
    Batch,
    Box,
    Processor,
    Tokenizer,
    pad_rows,
    read_boxes,
)
from pali.vision import VisionConfig
from pali.weights import load, save_model, write_files

__all__ = [
    "ByProducts",
    "FIRST_TRAINING_SEED",
    "Lessons",
    "Settings",
    "WORLDS",
    "attend_by_products",
    "carry_over",
    "check_settings",
    "cut_log",
    "lesson_loss",
    "lessons_from",
    "load_checkpoint",
    "mini_config",
    "one_step",
    "optimisers",
    "overlap",
    "pack",
    "packed_mask",
    "pair_best",
    "pair_boxes",
    "parts",
    "quick_check",
    "rate_factor",
    "read_log",
    "save_checkpoint",
    "smooth_locations",
    "start_model",
    "suffix_loss",
    "timed_step",
    "train",
    "train_tokenizer",
    "true_boxes",
]


# cell 9375a5ed
FIRST_TRAINING_SEED = scenes.TRAINING_SEEDS.start  # below: tests
# the world that is taught, its crowded variant for practice, and the
# pieces in the tokenizer of its texts
WORLDS = {
    "first": (scenes.FIRST_WORLD, scenes.CROWDED_WORLD, 1792),
    "full": (scenes.FULL_WORLD, scenes.CROWDED_FULL_WORLD, 2816),
}


# cell fef56688
@dataclass(frozen=True)
class Settings:
    """All that decides a training run; the same settings give the same
    curve.

    seed             of fresh weights and of the pictures
    steps            optimiser steps;  batch_size  pictures a step
    questions        about one picture in one sequence, while packed
    matrix_rate      learning rate of Muon, for the matrices of the
                     blocks
    other_rate       learning rate of AdamW, for all else
    weight_decay     of Muon; AdamW has none
    warmup           steps until the full rate
    decay            last share of the steps, in which the rate falls to
                     0
    plain            last share of the steps, one question a picture
                     under the mask that inference uses
    part             pictures that are computed at once; smaller parts
                     stay in the CPU's caches, the gradients add up to
                     the same
    precision        "float32" or "bfloat16" (autocast)
    checkpoint_every  steps between checkpoints, each with an evaluation
    eval_scenes      unseen scenes it is asked about; 0: none
    start            a model folder whose weights to go on from, or
                     "mini"; empty: fresh weights
    crowded          share of the pictures that come from the crowded
                     variant of the world, where the hard cases are
    world            "first", or "full", which has all tasks and needs
                     the shipped mask codec
    """

    seed: int = 1
    steps: int = 4000
    batch_size: int = 32
    questions: int = 5
    matrix_rate: float = 0.01
    other_rate: float = 0.002
    weight_decay: float = 0.05
    warmup: int = 100
    decay: float = 0.4
    plain: float = 0.12
    part: int = 16
    precision: str = "float32"
    checkpoint_every: int = 200
    eval_scenes: int = 24
    start: str = ""
    crowded: float = 0.0
    world: str = "first"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            share = name in ("matrix_rate", "other_rate", "decay")
            least = {"seed": value, "eval_scenes": 0}.get(name, 1)
            if isinstance(value, int) and value < least:
                raise ValueError(
                    f"{name} must be {least} or more, not {value}"
                )
            if share and not 0 < value <= 1:
                raise ValueError(
                    f"{name} must be above 0, at most 1, not {value}"
                )
        for name in ("plain", "crowded"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is from 0 to 1, not {value}")
        if self.world not in WORLDS:
            raise ValueError(
                f"world is first or full, not {self.world}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(
                "precision is float32 or bfloat16, not "
                f"{self.precision}"
            )


# cell 4509abd5
def mini_config(tokenizer: Tokenizer) -> PaliGemmaConfig:
    """The shape of the shipped model: PaliGemma 1, only smaller.

    The vocabulary is the tokenizer's, then `<image>`, filled up to a
    multiple of 64 as in the released models.
    """
    vision = VisionConfig(
        image_size=128, patch_size=8, width=128, num_layers=4, num_heads=4,
        mlp_width=512,
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=math.ceil((tokenizer.size + 1) / 64) * 64, width=128,
        num_layers=4, num_heads=4, num_kv_heads=1, head_dim=32, mlp_width=384,
        query_scale=32**-0.5, max_positions=1024,
    )  # fmt: skip
    return PaliGemmaConfig(vision, decoder, image_id=tokenizer.size)


# cell fada8884
def train_tokenizer(
    texts: Iterable[str], path: Path, vocab_size: int
) -> None:
    """Learn SentencePiece pieces from texts and write
    `tokenizer.model`.

    vocab_size    all pieces, the 1,152 location and outline tokens
                  included
    note          the settings are those of Gemma's tokenizer: byte-pair
                  merges, bytes for what is unknown, digits apart, no
                  space put in front
    """
    names = [f"<loc{i:04d}>" for i in range(NUM_LOCATIONS)]
    names += [f"<seg{i:03d}>" for i in range(NUM_SEGMENTS)]

    def write(part: Path) -> None:
        with part.open("wb") as file:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(texts), model_writer=file,
                model_type="bpe", vocab_size=vocab_size, pad_id=0, eos_id=1,
                bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
                bos_piece="<bos>", unk_piece="<unk>", byte_fallback=True,
                split_digits=True,
                add_dummy_prefix=False, remove_extra_whitespaces=False,
                normalization_rule_name="identity", character_coverage=1.0,
                user_defined_symbols=["<mask>", "\n", "\n\n", *names],
                minloglevel=2,
            )  # fmt: skip

    write_files(path.parent, {path.name: write})


# cell d248bd16
def smooth_locations(
    model: PaliGemma, tokenizer: Tokenizer, seed: int
) -> None:
    """Start location tokens as a smooth curve: neighbours nearly alike.

    Sines of random phase and frequency, low ones more often, replace
    independent noise of the same size.
    """
    generator = torch.Generator().manual_seed(seed)
    width = model.config.decoder.width
    place = torch.linspace(0, 1, NUM_LOCATIONS)[:, None]
    waves = 24 * torch.rand(width, generator=generator) ** 2
    phase = math.tau * torch.rand(width, generator=generator)
    curve = (
        torch.sin(math.tau * waves * place + phase) * (2 / width) ** 0.5
    )
    first = tokenizer.special["<loc0000>"]
    with torch.no_grad():
        model.decoder.embedding[first : first + NUM_LOCATIONS] = curve


# cell e0ec66c6
def packed_mask(
    lengths: list[list[tuple[int, int]]], patches: int, T: int
) -> Tensor:
    """Several questions about one picture, none of which sees another.

    lengths   for each row, (prefix, suffix) lengths of its pairs, in
              order
    patches   image tokens, which come first and see only each other
    returns   bool[B, 1, T, T]; each pair sees the picture and, as a
              prefix-LM, itself
    """
    mask = torch.eye(T, dtype=torch.bool).repeat(len(lengths), 1, 1)
    mask[:, :patches, :patches] = True
    for row, pairs in zip(mask, lengths, strict=True):
        start = patches
        for prefix, suffix in pairs:
            end = start + prefix + suffix
            is_suffix = torch.arange(prefix + suffix)[None] >= prefix
            inside = prefix_lm_mask(
                torch.ones_like(is_suffix), is_suffix
            )
            row[start:end, :patches] = True
            row[start:end, start:end] = inside[0, 0]
            start = end
    return mask[:, None]


# cell 0de976de
def pack(
    processor: Processor,
    images: list,
    rows: list[list[tuple[str, str]]],
):
    """A batch with all questions about a picture in one sequence.

    rows      for each picture, (prompt, answer) pairs
    returns   Batch, mask bool[B, 1, T, T], positions int64[B, T];
              positions of each pair start again behind the picture
    """
    N = processor.num_patches
    ids, labels, places, lengths = [], [], [], []
    for pairs in rows:
        ids.append([processor.image_id] * N)
        labels.append([IGNORE] * N)
        places.append(list(range(N)))
        lengths.append([])
        for prompt, answer in pairs:
            head = processor.prompt_ids(prompt, num_images=0)
            tail = processor.tokenizer.encode(answer) + [EOS]
            ids[-1] += head + tail
            labels[-1] += [IGNORE] * len(head) + tail
            places[-1] += range(N, N + len(head + tail))
            lengths[-1].append((len(head), len(tail)))
    valid = pad_rows([[True] * len(row) for row in ids], False, "right")
    targets = pad_rows(labels, IGNORE, "right")
    pixels = torch.stack(
        [preprocess(i, processor.image_size) for i in images]
    )
    batch = Batch(
        pixels,
        pad_rows(ids, PAD, "right"),
        valid,
        targets != IGNORE,
        targets,
    )
    mask = packed_mask(lengths, N, valid.shape[1])
    return batch, mask, pad_rows(places, 0, "right")


# cell e1b4cb3b
def suffix_loss(
    model: PaliGemma,
    batch: Batch,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of answer tokens, each predicted from the one
    before.

    mask, positions    override what would be derived, as in
                       `PaliGemma.forward`
    returns            float32, a scalar, nats a token
    note               logits are made for the supervised places alone
    source             Beyer et al. 2024, section 3.1
    """
    x = model.embed(batch.ids, model.encode(batch.pixels))
    if mask is None:
        mask = prefix_lm_mask(batch.valid, batch.suffix)
    if positions is None:
        positions = (batch.valid.long().cumsum(1) - 1).clamp(min=0)
    x = model.decoder(x, positions, mask)
    targets = batch.labels[:, 1:]  # the token after each place
    taught = targets != IGNORE
    logits = model.decoder.logits(x[:, :-1][taught])
    return cross_entropy(logits, targets[taught]).mean()


# cell 828ddd7e
def attend_by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention as two matrix products; `bias` is 0, or -inf for
    hidden.

    q       float[B, H, T, Dh];  k, v    float[B, H, S, Dh]
    note    `attend_written_out` takes the softmax in float32; here it
            stays in the dtype of v, which halves what is moved
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale).to(v.dtype) @ k.to(v.dtype).mT
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


# cell 802ce405
class ByProducts(TorchFunctionMode):
    """Inside it, attention is computed by `attend_by_products`.

    patches    0; or, in a packed lesson, the number of image tokens,
               which come first and see only each other
    note       for training alone, one instance for each pass: with a
               mask, all keys are new (no cache), and every layer has
               the same mask, which is kept
    """

    def __init__(self, patches: int = 0) -> None:
        super().__init__()
        self.patches, self.bias = patches, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            func = self.attend
        return func(*args, **(kwargs or {}))

    def attend(self, q, k, v, mask=None, scale=None) -> Tensor:
        if mask is None:
            return attend_by_products(q, k, v, scale=scale)
        S, N = k.shape[2], self.patches
        q, mask = q.unflatten(2, (-1, S)), mask.unflatten(2, (-1, S))
        if self.bias is None:  # the same in every layer
            rows = ~mask[..., N:, :].flatten(2, 3)
            zero = torch.zeros(rows.shape, dtype=v.dtype)
            self.bias = zero.masked_fill_(rows, float("-inf"))
        text = q[..., N:, :].flatten(2, 3)
        image = q[..., :N, :].flatten(2, 3)
        y = (
            attend_by_products(
                image, k[:, :, :N], v[:, :, :N], scale=scale
            ),
            attend_by_products(text, k, v, self.bias, scale),
        )
        groups = q.shape[2]
        y = [rows.unflatten(2, (groups, -1)) for rows in y]
        return torch.cat(y, dim=3).flatten(2, 3)


# cell 85447480
class Lessons(torch.utils.data.Dataset):
    """What is shown at each step: a function of the settings and the
    step."""

    def __init__(
        self, settings: Settings, processor: Processor
    ) -> None:
        self.settings, self.processor = settings, processor

    def __len__(self) -> int:
        return self.settings.steps

    def is_packed(self, step: int) -> bool:
        return step < round(
            self.settings.steps * (1 - self.settings.plain)
        )

    def __getitem__(self, step: int):
        s = self.settings
        packed = self.is_packed(step)
        start = (
            FIRST_TRAINING_SEED + s.seed * 2**32 + step * s.batch_size
        )
        world, crowded, _ = WORLDS[s.world]
        hard = round(s.crowded * s.batch_size)
        worlds = [crowded] * hard + [world] * (s.batch_size - hard)
        drawn = [
            scenes.scene(start + i, world=each)
            for i, each in enumerate(worlds)
        ]
        rows = [
            scenes.examples(
                scene, scenes.question_stream(scene), s.questions, each,
                encode=outline_codes if s.world == "full" else None,
            )
            for scene, each in zip(drawn, worlds, strict=True)
        ]  # fmt: skip
        images = [scene.image for scene in drawn]
        if packed:
            return pack(self.processor, images, rows)
        pairs = [row[i % s.questions] for i, row in enumerate(rows)]
        prompts, answers = zip(*pairs, strict=True)
        return (
            self.processor(
                images, list(prompts), list(answers), "right"
            ),
            None,
            None,
        )


# cell afd722e5
def optimisers(
    model: PaliGemma, settings: Settings
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything
    else.

    source    Jordan et al. 2024; Loshchilov & Hutter 2019
    """
    matrices, others = [], []
    for name, weight in model.named_parameters():
        inside = ".blocks." in name and weight.dim() == 2
        (matrices if inside else others).append(weight)
    return [
        torch.optim.Muon(
            matrices,
            lr=settings.matrix_rate,
            weight_decay=settings.weight_decay,
        ),
        torch.optim.AdamW(
            others,
            lr=settings.other_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
        ),
    ]


# cell 093bbdc5
def rate_factor(step: int, settings: Settings) -> float:
    """What the learning rates are multiplied by: up, level, then down
    to 0."""
    up = (step + 1) / settings.warmup
    down = (settings.steps - step) / (settings.decay * settings.steps)
    return min(1.0, up, down)


# cell c62e6852
def save_checkpoint(path: Path, model, optimizers, step: int) -> None:
    """All that is needed to go on, in one file: weights, moments,
    step."""
    tensors = {
        f"model.{k}": v.detach() for k, v in model.state_dict().items()
    }
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{i}.{j}.{key}"] = torch.as_tensor(
                    value
                )
    tensors = {
        k: v.contiguous().cpu().clone() for k, v in tensors.items()
    }
    meta = {"step": str(step)}
    write_files(
        path.parent,
        {path.name: lambda part: save_file(tensors, part, meta)},
    )


# cell 93d7eb71
def load_checkpoint(path: Path, model, optimizers) -> int:
    """Go back to a checkpoint; returns the number of steps done."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    model.load_state_dict(
        {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    )
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, j, key = name.split(".", 3)
                state.setdefault(int(j), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(
            {"state": state, "param_groups": groups}
        )
    return step


# cell f5334022
def read_log(path: Path, before: int | None = None) -> list[dict]:
    """The lines of a training log, at most those of the first `before`
    steps."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # a line cut off when the run was stopped
            break
    return [
        x for x in lines if before is None or x.get("step", 0) <= before
    ]


# cell f5096b54
def cut_log(path: Path, done: int) -> None:
    """Take out the lines of steps that a checkpoint does not hold."""
    lines = [json.dumps(x) + "\n" for x in read_log(path, before=done)]
    text = "".join(lines)
    write_files(path.parent, {path.name: lambda p: p.write_text(text)})


# cell ff1611a2
def check_settings(out: Path, settings: Settings) -> None:
    """Note the settings of a run; refuse to go on with others."""
    path = out / "settings.json"
    stated = asdict(settings)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [k for k in stated if before.get(k) != stated[k]]
        if other:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(other)}): choose "
                "another folder, or the settings it was begun with"
            )
    text = json.dumps(stated, indent=2) + "\n"
    write_files(
        out, {path.name: lambda p: p.write_text(text, encoding="utf-8")}
    )


# cell 8fb72332
def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    left, top = max(a.xyxy[0], b.xyxy[0]), max(a.xyxy[1], b.xyxy[1])
    right, bottom = min(a.xyxy[2], b.xyxy[2]), min(a.xyxy[3], b.xyxy[3])
    shared = max(right - left, 0) * max(bottom - top, 0)
    areas = [
        (x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a.xyxy, b.xyxy)
    ]
    return shared / (sum(areas) - shared)


# cell 2956bb74
def pair_best(found: Sequence, truth: Sequence, score) -> list[float]:
    """The score of each true thing with the one paired with it.

    score     called with a found and a true thing: 0 or more, 0 where
              the two are no pair
    returns   one score a true thing, 0 without a partner; the best
              pairs come first, nothing serves twice
    """
    pairs = sorted(
        (
            (score(a, b), i, j)
            for i, a in enumerate(found)
            for j, b in enumerate(truth)
        ),
        reverse=True,
    )
    scores, taken = [0.0] * len(truth), set()
    for value, i, j in pairs:
        if i not in taken and not scores[j]:
            taken.add(i)
            scores[j] = value
    return scores


# cell dd9c0e01
def pair_boxes(
    found: Sequence[Box], truth: Sequence[Box]
) -> list[float]:
    """`pair_best` of boxes: the IoU, where the labels are the same."""

    def score(a: Box, b: Box) -> float:
        return overlap(a, b) if a.label == b.label else 0.0

    return pair_best(found, truth, score)


# cell 8c19d35f
def true_boxes(scene: scenes.Scene, kinds: Iterable[str]) -> list[Box]:
    """The boxes of the things of these kinds."""
    wanted = set(kinds)
    return [
        Box(thing.kind, tuple(map(float, box)))
        for thing, box in zip(scene.things, scene.boxes, strict=True)
        if thing.kind in wanted
    ]


# cell 23e07e57
def quick_check(
    model: PaliGemma,
    processor: Processor,
    seeds: Iterable[int],
    world: scenes.World = scenes.FIRST_WORLD,
) -> dict[str, float]:
    """Captions and counts exactly right, and boxes found, on unseen
    scenes of a world.

    returns   shares from 0 to 1: caption, count, and detect, the F1 of
              boxes at IoU 0.5; nothing if no scene is asked about
    """
    drawn = [scenes.scene(seed, world=world) for seed in seeds]
    if not drawn:
        return {}
    images = [scene.image for scene in drawn]
    shares, rows = {}, {}
    for task in ("caption", "count", "detect"):
        asked = [
            scenes.question(s, scenes.question_stream(s), task, world)
            for s in drawn
        ]
        prompts, truth = map(list, zip(*asked, strict=True))
        said = generate(
            model, processor, images, prompts, max_new_tokens=64
        )
        rows[task] = said, truth
        right = [a == t for a, t in zip(said, truth, strict=True)]
        shares[task] = round(sum(right) / len(right), 4)
    size = drawn[0].image.size
    found, real = (
        [read_boxes(t, size) for t in row] for row in rows["detect"]
    )
    hits = sum(
        value >= 0.5
        for f, r in zip(found, real, strict=True)
        for value in pair_boxes(f, r)
    )
    boxes = sum(map(len, found)) + sum(map(len, real))
    return shares | {"detect": round(2 * hits / max(boxes, 1), 4)}


# cell e5546cbf
@torch.no_grad()
def carry_over(
    old: PaliGemma,
    old_processor: Processor,
    model: PaliGemma,
    tokenizer: Tokenizer,
) -> None:
    """Go on from another model's weights with another vocabulary.

    model        changed in place: all layers from `old`, and the row of
                 each piece, or the mean of the rows of its parts
    tokenizer    of `model`
    raises       ValueError if the layers have other shapes
    """
    before, rows = old_processor.tokenizer, model.decoder.embedding
    weights = old.state_dict()
    table = weights.pop("decoder.embedding").float()
    weights["decoder.embedding"] = rows.detach().clone()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            "the model to start from has layers of other shapes"
        ) from error
    for i in range(tokenizer.size):
        piece = tokenizer.pieces.id_to_piece(i)
        parts = [before.pieces.piece_to_id(piece)]
        if parts == [before.pieces.unk_id()]:
            parts = before.encode(tokenizer.decode([i])) or parts
        rows[i] = table[parts].mean(dim=0)


# cell b7594162
def start_model(
    out: Path, settings: Settings
) -> tuple[PaliGemma, Processor]:
    """A model with fresh or given weights, and its world's tokenizer."""
    given = load(settings.start) if settings.start else None
    if given and settings.world == "first":
        return given
    path = out / "tokenizer.model"
    if not path.is_file():
        world, _, vocabulary = WORLDS[settings.world]
        train_tokenizer(scenes.all_texts(world), path, vocabulary)
    tokenizer = Tokenizer(path)
    config = mini_config(tokenizer)
    torch.manual_seed(settings.seed)
    model = PaliGemma(config)
    smooth_locations(model, tokenizer, settings.seed)
    vision = config.vision
    processor = Processor(
        tokenizer,
        vision.image_size,
        vision.num_patches,
        config.image_id,
    )
    if given:
        carry_over(*given, model, tokenizer)
    return model, processor


# cell ed45ee12
def parts(lesson, size: int):
    """A lesson cut into smaller ones of at most `size` pictures."""
    batch, mask, positions = lesson
    for start in range(0, len(batch.ids), size):
        rows = slice(start, start + size)
        cut = {k: v[rows] for k, v in vars(batch).items()}
        yield (
            Batch(**cut),
            None if mask is None else mask[rows],
            None if positions is None else positions[rows],
        )


# cell 19c42483
def lesson_loss(model: PaliGemma, lesson, precision: str) -> Tensor:
    """The loss of a lesson, in float32 or with bfloat16 products."""
    if precision == "float32":
        return suffix_loss(model, *lesson)
    packed = lesson[1] is not None
    patches = model.config.vision.num_patches if packed else 0
    with torch.autocast("cpu", torch.bfloat16), ByProducts(patches):
        return suffix_loss(model, *lesson)


# cell e147fe0d
def one_step(
    model, optimizers, lesson, factor: float, settings: Settings
) -> float:
    """Loss, gradients, one step of every optimiser; returns the
    loss."""
    taught = (lesson[0].labels[:, 1:] != IGNORE).sum()
    total = 0.0
    for part in parts(lesson, settings.part):
        loss = lesson_loss(model, part, settings.precision)
        loss = loss * (part[0].labels[:, 1:] != IGNORE).sum() / taught
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    rates = (settings.matrix_rate, settings.other_rate)
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()
    return total


# cell a25bc011
def lessons_from(
    done: int, settings: Settings, processor: Processor, workers: int
) -> DataLoader:
    """The lessons still to come, drawn ahead by other processes."""
    return DataLoader(
        Lessons(settings, processor), batch_size=None,
        num_workers=workers, sampler=range(done, settings.steps),
    )  # fmt: skip


# cell 5bd1a6fd
def timed_step(
    model, optimizers, lesson, step: int, settings: Settings
) -> dict:
    """One step and the line it leaves in the log; steps count from
    1."""
    began = time.perf_counter()
    factor = rate_factor(step - 1, settings)
    loss = one_step(model, optimizers, lesson, factor, settings)
    seconds = round(time.perf_counter() - began, 3)
    return {
        "step": step, "loss": round(loss, 5), "rate": round(factor, 5),
        "seconds": seconds,
    }  # fmt: skip


# cell 227a17e1
def train(
    settings: Settings, out: str | Path, workers: int = 1
) -> Path:
    """Train the little model, or go on where a run was stopped.

    out       folder of the run: tokenizer, log.jsonl, checkpoint, and
              at the end `model`, a checkpoint folder like any other
    workers   processes that draw scenes; 0 draws them in this one
    returns   the folder of the finished model
    raises    ValueError if `out` holds a run with other settings
    """
    out = Path(out)
    check_settings(out, settings)
    model, processor = start_model(out, settings)
    optimizers = optimisers(model, settings)
    path, log = out / "checkpoint.safetensors", out / "log.jsonl"
    done = (
        load_checkpoint(path, model, optimizers) if path.exists() else 0
    )
    cut_log(log, done)
    bar = tqdm(
        lessons_from(done, settings, processor, workers),
        initial=done, total=settings.steps, unit="step",
    )  # fmt: skip
    for step, lesson in enumerate(bar, start=done + 1):
        line = timed_step(model, optimizers, lesson, step, settings)
        due = (
            step == settings.steps
            or not step % settings.checkpoint_every
        )
        if due:
            seeds = range(settings.eval_scenes)
            world = WORLDS[settings.world][0]
            scores = quick_check(model, processor, seeds, world)
            tqdm.write(
                f"step {step}: loss {line['loss']:.3f}, {scores}"
            )
            line |= scores
        bar.set_postfix(loss=f"{line['loss']:.3f}")
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if due:  # after its line: cut_log removes lines, never adds one
            save_checkpoint(path, model, optimizers, step)
    save_model(model.half(), out / "model", processor)
    return out / "model"
