"""Write `src/pali/*.py` from the `#| export` cells of the notebooks.

    python -m pali._export              write every module
    python -m pali._export rope masks   write these
    python -m pali._export --check      change nothing; exit 1 if a module is stale

`notebooks/07_rope.ipynb` becomes `src/pali/rope.py`. Only the standard library is
used and no generated module is imported, so a broken one never stops its own repair.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 88
MARK = re.compile(r"^#\|\s*export\s*$")
CHAPTER = re.compile(r"^(\d\d)_([a-z][a-z0-9_]*)$")
GENERATED = "Generated from notebooks/"
IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class ExportError(ValueError):
    """An exported cell breaks a rule; the message names notebook, cell and rule."""


@dataclass(frozen=True)
class Cell:
    """One exported cell: where it is, its text without the mark, its statements."""

    where: str
    id: str
    text: str
    body: list[ast.stmt]

    def fail(self, message: str) -> ExportError:
        return ExportError(f"{self.where}: {message}")

    @property
    def is_imports(self) -> bool:
        return all(isinstance(node, IMPORTS) for node in self.body)


def chapters(root: Path = ROOT) -> list[Path]:
    """The notebooks in reading order."""
    found = sorted((root / "notebooks").glob("*.ipynb"))
    return [path for path in found if CHAPTER.match(path.stem)]


def source(cell: dict) -> str:
    """The text of a notebook cell, which may be stored as a list of lines."""
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def title(notebook: Path, cells: list[dict]) -> str:
    """The first level-one heading, as a sentence."""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            found = re.search(r"^# +(.+?)\s*$", source(cell), re.MULTILINE)
            if found:
                return found[1].rstrip(".") + "."
    raise ExportError(f"{notebook.name}: no title; start with a '# ...' heading")


def exported(notebook: Path, cells: list[dict]) -> list[Cell]:
    """The cells of a notebook that are marked, parsed and checked one by one."""
    found = []
    for index, cell in enumerate(cells):
        lines = source(cell).strip("\n").splitlines()
        if cell["cell_type"] != "code" or not lines:
            continue
        late = [line for line in lines[1:] if MARK.match(line)]
        where = f"{notebook.name}, cell {cell.get('id', index)}"
        if late:
            raise ExportError(f"{where}: `#| export` must be the first line")
        if not MARK.match(lines[0]):
            continue
        text = "\n".join(line.rstrip() for line in lines[1:]).strip("\n")
        try:
            body = ast.parse(text).body
        except SyntaxError as error:
            raise ExportError(
                f"{where}: not plain Python ({error.msg}, line {error.lineno}: "
                f"{(error.text or '').strip()!r}). No magics or `!` in exported cells."
            ) from error
        found.append(Cell(where, str(cell.get("id", index)), text, body))
        check(found[-1])
    return found


def check(cell: Cell) -> None:
    """Raise if a cell holds something that does not belong in a module."""
    if not cell.body:
        raise cell.fail("an exported cell is empty")
    if not cell.is_imports and any(isinstance(node, IMPORTS) for node in cell.body):
        raise cell.fail("put imports in an exported cell of their own")
    for node in ast.walk(ast.Module(cell.body, [])):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            raise cell.fail("no star import; name what is used")
        if isinstance(node, ast.ImportFrom) and node.level:
            raise cell.fail("write `from pali.x import y`, not a relative import")
        if isinstance(node, ast.Name) and node.id == "get_ipython":
            raise cell.fail("no magics in exported cells")
    for node in cell.body:
        if isinstance(node, (*IMPORTS, *DEFINITIONS)):
            continue
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            raise cell.fail(
                f"line {node.lineno + 1} only runs something; an exported cell "
                "defines functions, classes or constants. Move it to a plain cell."
            )
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Attribute) for target in targets):
            raise cell.fail("define methods inside their class, not from outside")


def defined(cell: Cell) -> list[str]:
    """Names that a cell binds at its top level, in order."""
    names = []
    for node in cell.body:
        if isinstance(node, DEFINITIONS):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                inside = ast.walk(target)
                names += [name.id for name in inside if isinstance(name, ast.Name)]
    return names


def sorted_imports(cells: list[Cell]) -> str:
    """Import statements merged and ordered as `ruff check --select I` wants them."""
    plain: set[tuple[str, str | None]] = set()
    members: dict[tuple[str, str | None], set[str]] = {}
    for node in (node for cell in cells for node in cell.body):
        for alias in node.names:
            if isinstance(node, ast.Import):
                plain.add((alias.name, alias.asname))
            elif alias.asname:
                line = f"{alias.name} as {alias.asname}"
                members.setdefault((node.module, line), set()).add(line)
            else:
                members.setdefault((node.module, None), set()).add(alias.name)

    def section(module: str) -> int:
        top = module.partition(".")[0]
        if top == "__future__":
            return 0
        return 1 if top in sys.stdlib_module_names else 3 if top == "pali" else 2

    def by_kind(name: str) -> tuple:  # CONSTANTS, Classes, functions
        kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
        return kind, name.lower(), name

    blocks = []
    for wanted in range(4):
        lines = [
            f"import {name} as {alias}" if alias else f"import {name}"
            for name, alias in sorted(
                plain, key=lambda p: (p[0].lower(), p[0], p[1] or "")
            )
            if section(name) == wanted
        ]
        for module, alias in sorted(
            members, key=lambda m: (m[0].lower(), m[0], m[1] or "")
        ):
            if section(module) == wanted:
                names = sorted(members[module, alias], key=by_kind)
                lines.append(fitted(f"from {module} import ", "()", names))
        if lines:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def fitted(start: str, brackets: str, items: list[str]) -> str:
    """A list on one line if it fits, else one item a line."""
    one = start + ", ".join(items)
    if brackets == "[]":
        one = start + "[" + ", ".join(items) + "]"
    if len(one) <= WIDTH:
        return one
    lines = "".join(f"    {item},\n" for item in items)
    return f"{start}{brackets[0]}\n{lines}{brackets[1]}"


def module_text(notebook: Path) -> str | None:
    """The module that a notebook exports, or None when no cell is marked."""
    raw = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    cells = exported(notebook, raw)
    if not cells:
        return None
    rest = [cell for cell in cells if not cell.is_imports]
    seen: dict[str, str] = {}
    for cell in rest:
        for name in defined(cell):
            if seen.get(name, cell.where) != cell.where:
                raise cell.fail(f"{name} is already defined in {seen[name]}")
            seen[name] = cell.where
    public = sorted(name for name in seen if not name.startswith("_"))
    notice = (
        f"{GENERATED}{notebook.name}: edit the notebook, then run `make export`. "
        "Each block names the cell it comes from."
    )
    parts = [
        '"""' + textwrap.fill(title(notebook, raw), WIDTH - 3),
        "\n\n" + textwrap.fill(notice, WIDTH, break_on_hyphens=False),
        '\n"""\n',
    ]
    imports = sorted_imports([cell for cell in cells if cell.is_imports])
    if imports:
        parts.append("\n" + imports + "\n")
    names = [f'"{name}"' for name in public]
    parts.append("\n" + fitted("__all__ = ", "[]", names) + "\n")
    for cell in rest:
        parts.append(f"\n\n# cell {cell.id}\n{cell.text}\n")
    return "".join(parts)


def targets(root: Path = ROOT, names: list[str] | None = None) -> dict[Path, str]:
    """Every generated file and the text that it should hold."""
    found: dict[Path, str] = {}
    for notebook in chapters(root):
        name = CHAPTER.match(notebook.stem)[2]
        if names and name not in names and notebook.stem not in names:
            continue
        text = module_text(notebook)
        if text is None:
            continue
        path = root / "src" / "pali" / f"{name}.py"
        if path in found:
            raise ExportError(f"{notebook.name}: another chapter exports {name}.py")
        if path.exists() and GENERATED not in path.read_text(encoding="utf-8"):
            raise ExportError(
                f"{notebook.name}: {path.name} is written by hand; rename one of them"
            )
        found[path] = text
    return found


def orphans(root: Path = ROOT) -> list[Path]:
    """Generated modules whose notebook is gone or exports nothing any more."""
    wanted = targets(root)
    written = (root / "src" / "pali").glob("*.py")
    return [
        path
        for path in sorted(written)
        if path not in wanted
        and not path.name.startswith("_")
        and GENERATED in path.read_text(encoding="utf-8")
    ]


def stale(root: Path = ROOT, names: list[str] | None = None) -> dict[Path, str]:
    """The generated files whose text differs from what the notebooks say."""
    return {
        path: text
        for path, text in targets(root, names).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def imports_ahead(root: Path = ROOT) -> list[str]:
    """What exported cells import against the reading order, as sentences."""
    numbers = {CHAPTER.match(p.stem)[2]: int(p.stem[:2]) for p in chapters(root)}
    wrong = []
    for notebook in chapters(root):
        raw = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        name = CHAPTER.match(notebook.stem)[2]
        for cell in exported(notebook, raw):
            for used in pali_imports(ast.Module(cell.body, [])):
                if used == "viz":
                    if name not in ("tasks", "attention_maps"):
                        wrong.append(f"{cell.where}: only tasks and maps import viz")
                elif used not in numbers:
                    wrong.append(f"{cell.where}: pali.{used} is no chapter")
                elif numbers[used] >= numbers[name]:
                    wrong.append(f"{cell.where}: pali.{used} comes later or is itself")
    return wrong


def pali_imports(tree: ast.AST) -> set[str]:
    """Modules of this package that a piece of code imports, wherever it does so."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, inner = alias.name.partition(".")
                if top == "pali":
                    used.add(inner.partition(".")[0] or "the package itself")
        elif isinstance(node, ast.ImportFrom) and node.module:
            top, _, inner = node.module.partition(".")
            if top == "pali" and inner:
                used.add(inner.partition(".")[0])
            elif top == "pali":
                used |= {alias.name for alias in node.names}
    return used


def write_atomically(path: Path, text: str) -> None:
    """Write beside the place, then move there, so that no reader sees a half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pali._export")
    parser.add_argument(
        "names", nargs="*", help="chapters, for example rope or 07_rope"
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        changed = stale(args.root, args.names)
        left = [] if args.names else orphans(args.root)
        ahead = imports_ahead(args.root) if args.check else []
    except ExportError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in changed.items():
        print("stale:" if args.check else "wrote", path.relative_to(args.root))
        if not args.check:
            write_atomically(path, text)
    for path in left:
        print("no notebook:", path.relative_to(args.root), "(delete it)")
    for sentence in ahead:
        print(sentence)
    return 1 if left or ahead or (args.check and changed) else 0


if __name__ == "__main__":
    sys.exit(main())
