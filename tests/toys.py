"""Small notebooks and repositories that tests write, right or wrong on purpose."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from pali._notebook import METADATA


def markdown(text: str, id: str = "m") -> dict:
    return {"cell_type": "markdown", "id": id, "metadata": {}, "source": [text]}


def code(text: str, id: str, count: int | None = 1, outputs=(), **metadata) -> dict:
    return {
        "cell_type": "code",
        "execution_count": count,
        "id": id,
        "metadata": metadata,
        "outputs": copy.deepcopy(list(outputs)),
        "source": text.splitlines(keepends=True),
    }


def notebook(*cells: dict) -> dict:
    parts = {"cells": list(cells), "metadata": METADATA}
    return copy.deepcopy({**parts, "nbformat": 4, "nbformat_minor": 5})


def exporting(*blocks: str, title: str = "# Toy: a lesson") -> dict:
    """A notebook with a title and exported cells named a, b, c …"""
    cells = [markdown(title)]
    for number, block in enumerate(blocks, 1):
        cells.append(code(f"#| export\n{block}", "?abcdefgh"[number], number))
    return notebook(*cells)


def repository(root: Path, **notebooks: dict) -> Path:
    """A folder with notebooks, named like c01_toy="…", and an empty package."""
    (root / "notebooks").mkdir(parents=True)
    (root / "src" / "pali").mkdir(parents=True)
    for name, content in notebooks.items():
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        (root / "notebooks" / f"{name.removeprefix('c')}.ipynb").write_text(text)
    return root
