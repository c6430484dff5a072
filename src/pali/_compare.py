"""What differs between two values, as one sentence that a learner can use.

`difference` compares type, shape, dtype and numbers in this order and names the first
clear difference and, where the numbers show it, a likely cause. `copied` makes the
second set of arguments that a fair comparison needs.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
import traceback
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from torch import Tensor, nn

ELSEWHERE = re.compile(
    r"<string>|site-packages|lib/python3|pali/(workbook|_compare)\.py"
)


class Different(AssertionError):
    """One sentence on the first clear difference; notebooks show it alone."""

    def _render_traceback_(self) -> list[str]:  # asked by IPython
        return [str(self)]


def shown(value, limit: int = 60) -> str:
    """A value in a few characters: tensors by dtype and shape, small ones in full."""
    if isinstance(value, Tensor | np.ndarray):
        kind = str(value.dtype).removeprefix("torch.")
        small = value.size if isinstance(value, np.ndarray) else value.numel()
        if small <= 4 and getattr(value, "device", None) != torch.device("meta"):
            return f"{kind}{rounded(value.tolist())}"
        return f"{kind}{list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}(...)"
    if inspect.isroutine(value) or inspect.isclass(value):
        return getattr(value, "__name__", "a function")
    if isinstance(value, list | tuple) and len(value) <= 6:
        inside = ", ".join(shown(item, limit // 2) for item in value)
        text = f"[{inside}]" if isinstance(value, list) else f"({inside})"
    else:
        text = " ".join(repr(value).split())
        if " object at 0x" in text:
            text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def rounded(value):
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def shown_call(name: str, args: tuple, kwargs: Mapping) -> str:
    parts = [shown(a) for a in args] + [f"{k}={shown(v)}" for k, v in kwargs.items()]
    return f"{name}({', '.join(parts)})"


def tolerance(dtype: torch.dtype) -> float:
    """Room for another order of the same operations; a slip is far larger."""
    if dtype in (torch.bfloat16, torch.float16):
        return 0.02
    return 1e-9 if dtype == torch.float64 else 2e-5


def difference(got, want, rtol=None, atol=None, at: str = "the result") -> str | None:
    """The first clear difference between two values as a sentence, None if they agree.

    rtol, atol   by default what rounding in the dtype explains
    at           what the sentence calls the value
    """
    if isinstance(want, Tensor | np.ndarray):
        return tensor_difference(got, want, rtol, atol, at)
    if isinstance(got, Tensor) and got.numel() == 1 and is_number(want):
        got = got.item()
    if want is None or isinstance(want, str | bytes | bool):
        same = type(got) is type(want) and got == want
        return None if same else f"{at} is {shown(got)}, expected {shown(want)}"
    if is_number(want):
        return number_difference(got, want, rtol, atol, at)
    if isinstance(want, Mapping):
        return mapping_difference(got, want, rtol, atol, at)
    if isinstance(want, list | tuple):
        return sequence_difference(got, want, rtol, atol, at)
    if type(got).__name__ != type(want).__name__:
        return f"{at} is {described(got)}, expected {described(want)}"
    if isinstance(want, nn.Module):
        parts = ({k: v.shape for k, v in m.state_dict().items()} for m in (got, want))
        return difference(*parts, at=f"the weights of {at}")
    if is_dataclass(want) and not isinstance(want, type):
        parts = (
            {f.name: getattr(v, f.name, None) for f in fields(want)}
            for v in (got, want)
        )
        return difference(*parts, rtol, atol, at)
    if hasattr(want, "tobytes") and hasattr(want, "size"):  # a PIL picture
        return difference(np.asarray(got), np.asarray(want), rtol, atol, at)
    if type(got) is type(want) and type(want).__eq__ is not object.__eq__:
        return None if got == want else f"{at} is {shown(got)}, expected {shown(want)}"
    return None  # nothing is known of its insides


def is_number(value) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def described(value) -> str:
    """What a value is, for a sentence: 'a float', 'a tensor float32[2, 3]'."""
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, Tensor):
        return f"a tensor {shown(value)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def number_difference(got, want, rtol, atol, at) -> str | None:
    if not is_number(got):
        return f"{at} is {described(got)}, expected the number {shown(want)}"
    if isinstance(want, int) and rtol is None and atol is None:
        close = got == want
    else:
        rtol = 1e-5 if rtol is None else rtol
        close = math.isclose(got, want, rel_tol=rtol, abs_tol=atol or 0)
        close |= got != got and want != want  # nan
    return None if close else f"{at} is {shown(got)}, expected {shown(want)}"


def mapping_difference(got, want, rtol, atol, at) -> str | None:
    if not isinstance(got, Mapping):
        return f"{at} is {described(got)}, expected a dict"
    missing = [str(k) for k in want if k not in got]
    extra = [str(k) for k in got if k not in want]
    if missing or extra:
        words = ["no " + ", ".join(missing[:4])] * bool(missing)
        words += ["besides " + ", ".join(extra[:4])] * bool(extra)
        return f"{at} has {' but '.join(words)}; expected {', '.join(map(str, want))}"
    for key in want:
        found = difference(got[key], want[key], rtol, atol, f"{key} of {at}")
        if found:
            return found
    return None


def sequence_difference(got, want, rtol, atol, at) -> str | None:
    if not isinstance(got, list | tuple):
        return f"{at} is {described(got)}, expected {described(want)} of {len(want)}"
    if isinstance(want, torch.Size) or all(is_number(v) for v in want):
        same = len(got) == len(want) and not any(
            difference(x, y, rtol, atol) for x, y in zip(got, want, strict=True)
        )
        return None if same else f"{at} is {shown(got)}, expected {shown(want)}"
    if len(got) != len(want):
        return f"{at} has {len(got)} items, expected {len(want)}"
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        found = difference(x, y, rtol, atol, f"item {i} of {at}")
        if found:
            return found
    return None


def tensor_difference(got, want, rtol, atol, at) -> str | None:
    """Shape first, then dtype, then numbers, then what could have caused it."""
    if isinstance(want, np.ndarray) and not isinstance(got, np.ndarray):
        return f"{at} is {described(got)}, expected an array {shown(want)}"
    if isinstance(want, Tensor) and not isinstance(got, Tensor):
        return f"{at} is {described(got)}, expected a tensor {shown(want)}"
    if isinstance(want, np.ndarray):
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{at} is an array {shown(got)}, expected {shown(want)}"
        if want.dtype.kind not in "biufc" or want.dtype == np.uint16:
            return None if np.array_equal(got, want) else f"{at} holds other values"
        got, want = torch.from_numpy(got.copy()), torch.from_numpy(want.copy())
    got, want = got.detach(), want.detach()
    if got.shape != want.shape:
        hint = (
            " Are two axes swapped?" if sorted(got.shape) == sorted(want.shape) else ""
        )
        return f"{at} has shape {list(got.shape)}, expected {list(want.shape)}.{hint}"
    if got.dtype != want.dtype:
        kinds = [str(t.dtype).removeprefix("torch.") for t in (got, want)]
        return f"{at} has dtype {kinds[0]}, expected {kinds[1]}"
    if want.is_meta or got.is_meta or not want.numel():
        return None
    atol = tolerance(want.dtype) if atol is None else atol
    rtol = tolerance(want.dtype) if rtol is None else rtol
    return value_difference(got.cpu(), want.cpu(), rtol, atol, at)


def value_difference(got: Tensor, want: Tensor, rtol, atol, at) -> str | None:
    if not want.dtype.is_floating_point and not want.dtype.is_complex:
        off = got != want
    else:
        got, want = (t if t.is_complex() else t.double() for t in (got, want))
        off = ~torch.isclose(got, want, rtol=rtol, atol=atol, equal_nan=True)
    if not off.any():
        return None
    gap = (
        (got.double() - want.double()).abs()
        if not want.is_complex()
        else (got - want).abs()
    )
    gap = gap.nan_to_num(math.inf).where(off, torch.zeros(()))
    worst = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
    count = f"{int(off.sum()):,} of {off.numel():,} numbers differ"
    if off.numel() == 1:
        count = "the number differs"
    place = f"at {list(worst)} " if worst else ""
    got_there, want_there = (shown(rounded(t[worst].item())) for t in (got, want))
    pair = f"it is {got_there}, expected {want_there}"
    return (
        f"{at} has the right shape but {count}; {place}{pair}.{cause(got, want, off)}"
    )


def cause(got: Tensor, want: Tensor, off: Tensor) -> str:
    """A likely reason that shows in the numbers alone, or nothing."""
    if want.dtype == torch.bool:
        return " Every truth value is the opposite." if off.all() else where(off)
    if want.is_complex():
        return where(off)
    g, w = got.double(), want.double()
    finite = torch.isfinite(w)
    if (g.isnan() & ~w.isnan()).any():
        return " There is nan where there should be none: was something divided by 0?"
    if (g.isinf() & finite).any():
        return " There is infinity where there should be none."
    if not g.any():
        return " All that came is 0."
    if torch.allclose(g, -w, rtol=1e-4, atol=1e-6, equal_nan=True):
        return " Every sign is the opposite."
    keep = finite & (w.abs() > 1e-3 * w[finite].abs().max()) if finite.any() else finite
    if keep.sum() > 1:
        ratio = (g[keep] / w[keep]).median()
        if ratio and torch.allclose(g[finite], ratio * w[finite], rtol=1e-3, atol=1e-6):
            return f" Everything is {float(ratio):.4g} times what it should be."
        shift = (g[finite] - w[finite]).median()
        if torch.allclose(g[finite], shift + w[finite], rtol=1e-4, atol=1e-5):
            return f" Everything is {float(shift):+.4g} away from what it should be."
    for i in range(g.ndim):
        for j in range(i + 1, g.ndim):
            if g.shape[i] == g.shape[j] > 1 and torch.allclose(g.transpose(i, j), w):
                return f" Axes {i} and {j} are swapped."
        if g.shape[i] > 1 and torch.allclose(g.flip(i), w):
            return f" Axis {i} is turned round."
    if torch.allclose(g.flatten().sort().values, w.flatten().sort().values, atol=1e-5):
        return " They are the right numbers in another order."
    return where(off)


def where(off: Tensor) -> str:
    """Along which axis the differences keep to some indices, if they do."""
    for axis, size in enumerate(off.shape):
        others = [i for i in range(off.ndim) if i != axis]
        bad = off.any(dim=others) if others else off
        good = (~bad).nonzero().flatten().tolist()
        if size > 1 and good and not bad.all():
            listed = ", ".join(map(str, good[:6])) + (", ..." if len(good) > 6 else "")
            return f" Along axis {axis} it is right at {listed} only."
    return ""


def ended(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else text + "."


def stopped(error: Exception) -> str:
    """An exception of the reader's code in one sentence, with its line."""
    frames = traceback.extract_tb(error.__traceback__)
    here = [f for f in frames if not ELSEWHERE.search(f.filename)]
    line = f" in the line `{here[-1].line}`" if here and here[-1].line else ""
    text = str(error).strip().splitlines()
    return ended(
        f"it stopped{line} with {type(error).__name__}: {text[0] if text else ''}"
    )


class Incomparable(Exception):
    """A call that cannot be made twice."""


def copied(value, memo: dict | None = None):
    """A copy for the second of two runs; random generators keep their state."""
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        new = value.detach().clone().requires_grad_(value.requires_grad)
    elif isinstance(value, torch.Generator):
        new = torch.Generator(value.device)
        new.set_state(value.get_state())
    elif type(value) in (list, tuple, set):
        new = type(value)([copied(item, memo) for item in value])
    elif type(value) is dict:
        new = {key: copied(item, memo) for key, item in value.items()}
    elif isinstance(value, Iterator | io.IOBase):
        raise Incomparable
    elif (
        isinstance(value, types.ModuleType) or callable(value) and not is_object(value)
    ):
        new = value
    else:
        try:
            new = copy.deepcopy(value, memo)
        except Exception:
            new = value
    memo[id(value)] = new
    return new


def is_object(value) -> bool:
    return not inspect.isroutine(value) and not inspect.isclass(value)
