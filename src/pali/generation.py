"""Generation: one token after another.

Generated from notebooks/16_generation.ipynb: edit the notebook, then run `make export`.
Each block names the cell it comes from.
"""

import math
from collections.abc import Callable, Iterator
from numbers import Integral, Real

import torch
from torch import Tensor

from pali.attention import softmax
from pali.cache import Cache
from pali.decoder import DecoderConfig
from pali.paligemma import PaliGemma
from pali.tokens import EOS, PAD, Batch, Processor

__all__ = [
    "TextStream",
    "check_room",
    "check_sampling",
    "generate",
    "is_a",
    "keep_top_k",
    "keep_top_p",
    "only_tokens",
    "pick",
    "steps",
]


# cell 5e5e3340
def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leave the k largest logits of each row, the rest -inf; ties stay
    in.

    logits    float[B, V] -> float[B, V]
    """
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, float("-inf"))


# cell f41daa67
def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Leave the likeliest tokens that together reach probability p.

    logits    float[B, V] -> float[B, V], the rest -inf
    note      a token stays if those before it sum to less than p, so
              the one that crosses p stays too and the set is never
              empty
    source    Holtzman et al. 2020
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    weights = softmax(ordered)
    before = weights.cumsum(dim=-1) - weights
    drop = torch.zeros_like(before, dtype=torch.bool).scatter(
        1, order, before >= p
    )
    return logits.masked_fill(drop, float("-inf"))


# cell b8e744ec
def pick(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the next token of each row: the best one, or a weighted
    draw.

    logits    float[B, V];  returns  int64[B]
    note      in this order: temperature, top-k, top-p, draw;
              temperature 0 takes the best
    """
    logits = logits.float()
    # greedy in all but name, and division could overflow
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(softmax(logits), 1, generator=generator)[
        :, 0
    ]


# cell 6a3bace7
def is_a(kind: type, x) -> bool:
    """Whether x is such a number; True and False are none."""
    return isinstance(x, kind) and not isinstance(x, bool)


# cell de168bd3
def check_sampling(
    max_new_tokens, temperature, top_k, top_p, seed=None
) -> None:
    """One clear sentence for a sampling number out of its range."""
    if not is_a(Integral, max_new_tokens) or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens must be 1 or more, not {max_new_tokens!r}"
        )
    if not is_a(Real, temperature) or not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must be 0 or more, not {temperature!r}"
        )
    if top_k is not None and not (is_a(Integral, top_k) and top_k >= 1):
        raise ValueError(
            f"top_k must be a whole number from 1, not {top_k!r}"
        )
    if top_p is not None and not (is_a(Real, top_p) and 0 < top_p <= 1):
        raise ValueError(
            f"top_p must be above 0 and at most 1, not {top_p!r}"
        )
    whole = seed is None or is_a(Integral, seed)
    if not whole or not 0 <= (seed or 0) < 2**63:
        raise ValueError(
            f"seed must be a whole number from 0, not {seed!r}"
        )


# cell 0cdb0b4f
def steps(
    model: PaliGemma,
    batch: Batch,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    *,
    stop: int | None = EOS,
    trace: list | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, int64[B], until all have
    stopped.

    batch     prompts, padded on either side; the picture is encoded
              once
    choose    float[B, V] -> int64[B]
    stop      the id that ends a row; a row that has ended yields
              `<pad>`
    trace     a list that receives one dict a step
    """
    B, T = batch.ids.shape
    cache = Cache(model.config, B, T + max_new_tokens - 1)
    inputs = (batch.pixels, batch.ids, batch.valid)
    running = torch.ones(B, dtype=torch.bool, device=batch.ids.device)
    for _ in range(max_new_tokens):
        step = None if trace is None else {}
        pixels, ids, valid = inputs
        logits = model(
            pixels,
            ids,
            valid=valid,
            cache=cache,
            last_only=True,
            trace=step,
        )
        if trace is not None:
            trace.append(step)
        ids = choose(logits[:, 0]).masked_fill(~running, PAD)
        yield ids
        inputs = (None, ids[:, None], running[:, None])
        running = (
            running & (ids != stop) if stop is not None else running
        )
        if not running.any():
            return


# cell b912d485
class TextStream:
    """Collect the ids of one row and hand on each finished piece of
    text."""

    def __init__(
        self, row: int, decode: Callable, stream: Callable | None
    ) -> None:
        self.row, self.decode, self.stream = row, decode, stream
        self.ids: list[int] = []
        self.text, self.sent, self.ended = "", 0, False

    def add(self, i: int) -> None:
        """Take one id; a character of several bytes waits for its last
        byte."""
        if self.ended:
            return
        if i == EOS:
            self.end()
            return
        self.ids.append(i)
        self.text = self.decode(self.ids)
        if not self.text.endswith("\ufffd"):
            self.send()

    def send(self) -> None:
        """Hand on what has not been handed on yet."""
        piece, self.sent = self.text[self.sent :], len(self.text)
        if piece and self.stream is not None:
            self.stream(self.row, piece)

    def end(self) -> None:
        """No more ids: an unfinished character comes as it is."""
        self.ended = True
        self.send()


# cell d0b0ba55
def only_tokens(logits: Tensor, size: int) -> Tensor:
    """Put what is no token's out of reach: -inf from row `size` on.

    raises    ValueError if a logit is not finite
    """
    if not logits.isfinite().all():
        raise ValueError(
            "the logits are not finite: load with dtype=torch.float32"
        )
    logits = logits.clone()
    logits[:, size:] = float("-inf")
    return logits


# cell ba46cede
def check_room(
    config: DecoderConfig, length: int, max_new_tokens: int
) -> None:
    """Prompt and answer must fit into what the decoder was trained
    for."""
    room = config.max_positions - length
    if max_new_tokens > room:
        raise ValueError(
            f"prompt and picture take {length} tokens, which leaves "
            f"{max(room, 0)} of {config.max_positions}: shorten the "
            f"prompt or lower max_new_tokens ({max_new_tokens})"
        )


# cell 8128a0c9
@torch.inference_mode()
def generate(
    model: PaliGemma,
    processor: Processor,
    images,
    prompts,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stream: Callable[[int, str], None] | None = None,
    trace: list | None = None,
) -> list[str]:
    """Answer prompts about pictures: one text a row, without `<eos>`.

    images, prompts    as for `Processor`: one or many
    temperature        0 takes the best token, larger values draw more
                       freely
    seed               makes draws repeatable
    stream             called as stream(row, piece) while text comes
    trace              a list that receives one dict a step
    raises             ValueError for numbers out of range or too long a
                       prompt
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    device = model.decoder.embedding.device
    batch = processor(images, prompts).to(device)
    check_room(model.config.decoder, batch.ids.shape[1], max_new_tokens)
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return pick(
            only_tokens(logits, processor.tokenizer.size),
            temperature=temperature, top_k=top_k, top_p=top_p,
            generator=generator,
        )  # fmt: skip

    decode, B = processor.decode, len(batch.ids)
    rows = [TextStream(row, decode, stream) for row in range(B)]
    for ids in steps(model, batch, max_new_tokens, choose, trace=trace):
        for row, i in zip(rows, ids.tolist(), strict=True):
            row.add(i)
    for row in rows:
        row.end()
    return [row.text for row in rows]
