"""What is measured, against what, and how good it has to be.

A row's value is ours divided by the reference, unless the row says otherwise; limits
are for machines without and with a unit that multiplies bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

Limits = tuple[float | None, float | None]  # the target, and a stretch beyond it


@dataclass(frozen=True)
class Row:
    """One line of the table.

    unit       of ours and of the reference
    value      what is held against the target
    higher     the value must be at least the target, not at most
    """

    name: str
    group: str
    what: str
    without_unit: Limits
    with_unit: Limits
    unit: str = "s"
    value: str = "ratio"
    higher: bool = False

    def limits(self, column: str) -> Limits:
        return self.with_unit if column == "unit" else self.without_unit


REPORTED: Limits = (None, None)

# Estimates, for full size and five rounds on two cores with the unit.
SECONDS = {
    "half": 420, "single": 300, "load": 130, "mini": 40, "preprocess": 15,
    "import": 40, "growth": 150, "quality": 40, "steps": 120,
}  # fmt: skip

ROWS = [
    Row("prefill_bf16", "half", "prefill, bf16", (0.42, 0.27), (0.97, None)),
    Row("prefill_float32", "single", "prefill, float32", (0.95, None), (0.95, None)),
    Row(
        "prefill_int8", "half", "prefill, int8 against bf16", (0.15, 0.11), (0.60, 0.46)
    ),
    Row("decode_bf16", "half", "decode a token, bf16", (0.72, None), (0.75, 0.55)),
    Row(
        "decode_float32", "single", "decode a token, float32", (0.98, None),
        (0.75, 0.60),
    ),
    Row(
        "roofline_bf16", "half", "share of the roofline, bf16", (0.85, None),
        (None, 0.60), "GB/s", "ours / read bandwidth", True,
    ),
    Row(
        "roofline_float32", "single", "share of the roofline, float32", (0.92, None),
        (None, 0.60), "GB/s", "ours / read bandwidth", True,
    ),
    Row(
        "decode_int8", "half", "decode a token, int8 against own bf16", (0.60, None),
        (0.60, None), value="ours / own bf16",
    ),
    Row("batch4", "half", "four prompts at once, bf16", (0.90, None), (0.90, None)),
    Row("mini_answer", "mini", "shipped model, whole answer", (0.5, None), (0.5, None)),
    Row(
        "load_seconds", "load", "load of the 3B folder, mapped", (0.5, None),
        (0.5, None), value="seconds",
    ),
    Row("load_ratio", "load", "load, against the reference", (1.1, None), (1.1, None)),
    Row(
        "load_memory", "load", "anonymous memory of loading", (0.1, None), (0.1, None),
        "GB", "GB more than after importing",
    ),
    Row("first_prefill", "load", "first prefill after loading", REPORTED, REPORTED),
    Row(
        "peak_memory", "load", "peak anonymous memory, generating", (0.5, None),
        (0.5, None), "GB", "GB more than after importing",
    ),
    Row("preprocess", "preprocess", "picture to pixels", (0.85, None), (0.85, None)),
    Row(
        "import_load", "import", "import pali and load the shipped model", (0.4, None),
        (0.4, None), value="seconds more than importing torch",
    ),
    Row(
        "growth_decode", "growth", "decode step, token 1 to 512", (0.10, None),
        (0.10, None), value="largest change against token 1",
    ),
    Row(
        "growth_prefill", "growth", "prefill, 16 times the patches", REPORTED, REPORTED,
        value="seconds / FLOP, most against fewest patches",
    ),
    Row(
        "int8_agreement", "quality", "int8: next tokens as in float32", (0.99, None),
        (0.99, None), "share", "share", True,
    ),
    Row(
        "int8_cosine", "quality", "int8: cosine of the logits", (0.999, None),
        (0.999, None), "cosine", "mean cosine", True,
    ),
    Row(
        "steps", "steps", "from scratch as usual, idea by idea", REPORTED, REPORTED,
        value="last step / first step, a whole answer",
    ),
]  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
GROUPS = list(SECONDS)


def met(row: Row, column: str, value: float) -> bool | None:
    """Whether a value reaches the target; None where there is none."""
    limit = row.limits(column)[0]
    if limit is None:
        return None
    return value >= limit if row.higher else value <= limit


def wanted(names: str | None) -> list[str]:
    """Row names for `--only`: names of rows or of groups, with commas between."""
    if names is None:
        return list(BY_NAME)
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in BY_NAME and name not in GROUPS:
            known = ", ".join([*BY_NAME, *GROUPS])
            raise ValueError(f"there is no row {name!r}; the rows are {known}")
    if not asked:
        raise ValueError("--only names no row")
    return [r.name for r in ROWS if r.name in asked or r.group in asked]
