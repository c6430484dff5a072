"""Run notebooks in place, keep their files stable, edit them as text.

    python -m pali._notebook                 run all, print the seconds of each
    python -m pali._notebook rope 11 PATH     run these
    python -m pali._notebook --check          run nothing, say what is wrong
    python -m pali._notebook to-py rope       notebooks/07_rope.py, a draft to edit
    python -m pali._notebook from-py rope     draft back into the notebook

A notebook is run from top to bottom in a fresh kernel and stored only if every cell
succeeds. What is stored depends on nothing but the cells: no times, versions, paths or
widget state, so a second run changes no byte. `from-py` keeps the ids of cells, and the
outputs of the cells whose source stayed the same.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import hashlib
import json
import re
import struct
import sys
import time
from pathlib import Path

from pali import _address
from pali._export import ROOT, write_atomically

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGETS = (
    "application/vnd.jupyter.widget-view+json",
    "application/vnd.jupyter.widget-state+json",
)
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
CELL_NOISE = ("execution", "lines_to_next_cell", "ExecuteTime", "collapsed", "scrolled")
SECONDS_PER_CELL = 300
PATHS = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|Users|mnt|work|content)/|site-packages|[A-Z]:\\\\?Users"
)
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b")


class NotebookError(ValueError):
    """A notebook cannot be found, run or converted; the message says why."""


def find(names: list[str], root: Path = ROOT, suffix: str = ".ipynb") -> list[Path]:
    """Paths for names such as `rope`, `07`, `07_rope` or a path; all when empty."""
    if not names and suffix != ".ipynb":
        raise NotebookError("name the notebooks to convert, for example: rope")
    known = sorted((root / "notebooks").glob(f"*{suffix}"))
    if not names:
        return known
    found = []
    for name in names:
        fits = [p for p in known if name in (p.stem, p.stem[:2], p.stem[3:])]
        path = Path(name).with_suffix(suffix)
        if "/" in name or name.endswith((".ipynb", ".py")):
            fits = [path] if path.exists() else []
        if not fits:
            raise NotebookError(f"no notebook {name!r} ({suffix}) in {root}/notebooks")
        found += fits
    return found


# -- the stored form ---------------------------------------------------------


def plain_png(data: str) -> str:
    """A base64 PNG without its text and time chunks, which hold versions and dates."""
    raw = base64.b64decode(data)
    kept, at = [raw[:8]], 8
    while at < len(raw):
        length, kind = struct.unpack(">I4s", raw[at : at + 8])
        if kind not in (b"tEXt", b"iTXt", b"zTXt", b"tIME"):
            kept.append(raw[at : at + 12 + length])
        at += 12 + length
    return base64.b64encode(b"".join(kept)).decode("ascii")


def joined_streams(outputs: list[dict]) -> list[dict]:
    """Neighbouring prints to the same stream as one output, however they arrived."""
    merged: list[dict] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        is_stream = output["output_type"] == "stream"
        if is_stream and last.get("name") == output["name"]:
            last["text"] = text_of(last["text"]) + text_of(output["text"])
        else:
            merged.append(dict(output))
    return merged


def text_of(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def new_id(cell: dict, used: set[str]) -> str:
    """A short id from what the cell says when it is first stored."""
    salt = ""
    while True:
        text = f"{cell['cell_type']}{text_of(cell['source'])}{salt}"
        found = hashlib.sha256(text.encode()).hexdigest()[:8]
        if found not in used:
            return found
        salt += "+"


def normalise(notebook: dict) -> dict:
    """The notebook in the form in which it is stored; the argument is not changed."""
    used: set[str] = set()
    cells = []
    for old in json.loads(json.dumps(notebook))["cells"]:
        cell = dict(old)
        source = text_of(cell["source"])
        if cell["cell_type"] == "code":
            source = "\n".join(line.rstrip() for line in source.split("\n"))
        cell["source"] = source.strip("\n").splitlines(keepends=True)
        if not cell.get("id") or cell["id"] in used:
            cell["id"] = new_id(cell, used)
        used.add(cell["id"])
        for key in CELL_NOISE:
            cell["metadata"].pop(key, None)
        if cell["cell_type"] == "code":
            cell["outputs"] = [stored(o) for o in joined_streams(cell["outputs"])]
            cell["outputs"] = [o for o in cell["outputs"] if o]
        if not cell.get("attachments", True):
            del cell["attachments"]
        cells.append(cell)
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def stored(output: dict) -> dict | None:
    """One output without widget state and versions; None if nothing is left."""
    if output["output_type"] == "stream":
        text = text_of(output["text"])
        return {**output, "text": text.splitlines(keepends=True)} if text else None
    if "data" not in output:
        return output
    output = {**output, "metadata": {}}
    data = {k: v for k, v in output["data"].items() if k not in WIDGETS}
    for kind, value in data.items():
        if kind == "image/png":
            data[kind] = plain_png(text_of(value))
        elif kind.startswith("text/") or kind == "image/svg+xml":
            data[kind] = text_of(value).splitlines(keepends=True)
    return {**output, "data": data} if data else None


def as_text(notebook: dict) -> str:
    """The bytes of the file, as Jupyter itself would order them."""
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


# -- what is wrong with a stored notebook ------------------------------------


def problems(path: Path) -> list[str]:
    """Everything about a stored notebook that is not as the book needs it."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    wrong = []
    if notebook["metadata"] != METADATA:
        wrong.append("metadata is not that of a plain python3 kernel")
    if not wrong and text != as_text(normalise(notebook)):
        wrong.append("not in its stored form; run python -m pali._notebook")
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        wrong.append(f"cells do not run 1 to {len(code)} in order: {counts}")
    for cell in notebook["cells"]:
        wrong += [f"cell {cell.get('id')}: {what}" for what in cell_problems(cell)]
    return [f"{path.name}: {sentence}" for sentence in wrong]


def cell_problems(cell: dict) -> list[str]:
    """The same for one cell, without saying where."""
    source, wrong = text_of(cell["source"]), []
    if not source.strip():
        wrong.append("empty")
    if PATHS.search(source):
        wrong.append("a path of one machine in the source")
    if re.search(r"!\[\s*\]\(", source) and cell["cell_type"] == "markdown":
        wrong.append("a picture without alt text")
    if cell["cell_type"] != "code":
        return wrong
    alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
    hidden = "remove-output" in cell["metadata"].get("tags", [])
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            wrong.append(f"stopped with {output['ename']}")
        if output.get("name") == "stderr":
            wrong.append("printed to stderr")
        data = output.get("data", {})
        said = {k: text_of(v) for k, v in data.items() if isinstance(v, str | list)}
        shown = "\n".join(v for k, v in said.items() if k.startswith("text/"))
        shown += text_of(output.get("text", ""))
        if set(data) & set(WIDGETS):
            wrong.append("holds widget state")
        if set(data) & set(PICTURES) and not alt.strip() and not hidden:
            wrong.append("a figure without alt text (mystnb.image.alt)")
        if PATHS.search(shown):
            wrong.append("a path of one machine in the output")
        if ADDRESS.search(shown):
            wrong.append("a memory address in the output")
        if "<dc:date>" in said.get("image/svg+xml", ""):
            wrong.append("a date inside an SVG figure")
        wrong += html_problems(said.get("text/html", ""))
    return wrong


def html_problems(html: str) -> list[str]:
    """Pictures inside HTML outputs that say nothing to a screen reader."""
    wrong = []
    for tag in re.findall(r"<img\b[^>]*>", html):
        if not re.search(r"""\balt=["'][^"']""", tag):
            wrong.append("an <img> without alt text in the output")
    for tag in re.findall(r"<svg\b[^>]*>", html):
        if "aria-label" not in tag and 'aria-hidden="true"' not in tag:
            wrong.append("an <svg> without aria-label (role=img) in the output")
    return wrong


# -- running -----------------------------------------------------------------


def run(path: Path) -> float:
    """Run one notebook in place; the seconds it took."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    started = time.perf_counter()
    notebook = nbformat.from_dict(normalise(json.loads(path.read_text("utf-8"))))
    for cell in notebook.cells:
        cell.source = text_of(cell.source)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS_PER_CELL,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.km = client.create_kernel_manager()
    # No kernel folders: python3 is then this interpreter, whatever a user installed.
    client.km.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
        raise NotebookError(f"{path.name}: a cell failed\n{text}") from error
    store(path, notebook)
    return time.perf_counter() - started


def store(path: Path, notebook: dict) -> None:
    """Write the normalised notebook; leave the file alone if nothing changed."""
    text = as_text(normalise(notebook))
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def run_all(paths: list[Path]) -> int:
    """Run several, say how long each took, report the failures at the end."""
    failures, total = [], 0.0
    for path in paths:
        try:
            seconds = run(path)
        except NotebookError as error:
            failures.append(error)
            print(f"{path.stem:<22} FAILED", flush=True)
            continue
        total += seconds
        print(f"{path.stem:<22} {seconds:6.1f} s", flush=True)
    if len(paths) > 1:
        print(f"{'all':<22} {total:6.1f} s")
    for error in failures:
        print(f"\n{error}", file=sys.stderr)
    return 1 if failures else 0


# -- editing as text ---------------------------------------------------------


def to_py(path: Path, force: bool = False) -> Path:
    """Write a notebook as a percent script beside it."""
    import jupytext

    draft = path.with_suffix(".py")
    text = jupytext.writes(jupytext.read(path), fmt="py:percent")
    newer = draft.exists() and draft.stat().st_mtime > path.stat().st_mtime
    if newer and not force and draft.read_text("utf-8") != text:
        raise NotebookError(
            f"{draft.name} is newer than the notebook: bring it in with from-py, "
            "or overwrite it with --force"
        )
    write_atomically(draft, text)
    return draft


def from_py(draft: Path) -> Path:
    """Bring a percent script into its notebook, which is made if it is missing."""
    import jupytext

    path = draft.with_suffix(".ipynb")
    new = json.loads(json.dumps(jupytext.read(draft, fmt="py:percent")))
    root = draft.resolve().parents[1]
    if (root / "pyproject.toml").exists():
        _address.settle(new, path.stem, _address.read(root))
    old = json.loads(path.read_text("utf-8")) if path.exists() else {"cells": []}
    new["cells"] = matched(old["cells"], new["cells"])
    store(path, new)
    return path


def matched(old: list[dict], new: list[dict]) -> list[dict]:
    """New cells with the ids, and if unchanged the outputs, of the old ones."""

    def key(cell: dict) -> tuple[str, str]:
        lines = text_of(cell["source"]).split("\n")
        return cell["cell_type"], "\n".join(line.rstrip() for line in lines).strip()

    pairs: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(
        None, [key(cell) for cell in old], [key(cell) for cell in new], autojunk=False
    )
    for a, b, size in matcher.get_matching_blocks():
        pairs |= {b + i: a + i for i in range(size)}
    free = [i for i in range(len(old)) if i not in pairs.values()]
    for wanted in (1.0, 0.5):  # first the cells that moved, then those that changed
        for j in (j for j in range(len(new)) if j not in pairs):
            scored = [(alike(key(old[i]), key(new[j])), -i) for i in free]
            score, best = max(scored, default=(0.0, 0))
            if score >= wanted:
                pairs[j] = -best
                free.remove(-best)
    cells = []
    for j, cell in enumerate(new):
        cell = {key: value for key, value in cell.items() if key != "id"}
        if j in pairs:
            twin = old[pairs[j]]
            cell["id"] = twin.get("id")
            if cell["cell_type"] == "code" and key(twin) == key(cell):
                cell["outputs"] = twin["outputs"]
                cell["execution_count"] = twin["execution_count"]
            if "attachments" in twin:
                cell["attachments"] = twin["attachments"]
        cells.append(cell)
    used = {cell["id"] for cell in cells if cell.get("id")}
    for cell in cells:
        if not cell.get("id"):
            cell["id"] = new_id(cell, used)
            used.add(cell["id"])
    return cells


def alike(a: tuple[str, str], b: tuple[str, str]) -> float:
    """How much of two cells is the same, 0 to 1; cells of two kinds share nothing."""
    if a[0] != b[0]:
        return 0.0
    return difflib.SequenceMatcher(None, a[1], b[1], autojunk=False).ratio()


# -- the command -------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pali._notebook",
        description="Run notebooks in place; `to-py` and `from-py` convert drafts.",
    )
    parser.add_argument("names", nargs="*", help="chapters or paths, default all")
    parser.add_argument("--check", action="store_true", help="run and change nothing")
    parser.add_argument("--force", action="store_true", help="to-py: overwrite a draft")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    verb = args.names[0] if args.names[:1] in (["to-py"], ["from-py"]) else ""
    names = args.names[1:] if verb else args.names
    try:
        paths = find(names, args.root, ".py" if verb == "from-py" else ".ipynb")
        if verb == "to-py" and not names:
            raise NotebookError("name the notebooks to convert, for example: rope")
        if verb:
            for path in paths:
                made = to_py(path, args.force) if verb == "to-py" else from_py(path)
                print("wrote", made.name)
            return 0
        if not args.check:
            return run_all(paths)
        wrong = [sentence for path in paths for sentence in problems(path)]
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(wrong) if wrong else f"{len(paths)} notebooks are clean")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
