"""The repository's web address and release tag, kept in one place.

    python -m pali._address                    rewrite what follows from them
    python -m pali._address --check             exit 1 if something differs
    python -m pali._address --set URL TAG       change them first

They are written down in `[tool.pali]` of `pyproject.toml`. Derived are: project.urls,
the version, `_config.yml`, `CITATION.cff`, links in README and pages, and in every
notebook the line below the title that opens it in Colab and the cell that installs
the package there; the last two are put in where they are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pali._export import CHAPTER, ROOT, chapters, source, write_atomically

SLUG = r"[\w.-]+/[\w.-]+"
REPOSITORY = re.compile(rf"^https://[\w.-]+/({SLUG})$")
TAG = re.compile(r"^v(\d+\.\d+\.\d+[\w.]*)$")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "book/**/*.md")
COLAB = "https://colab.research.google.com/github/"
COLAB_LINE = re.compile(rf"^\[Open in Colab\]\({COLAB}[^)]*\)$", re.MULTILINE)
INSTALL = re.compile(r"git\+https://[^\"'@\s]+@[^\"'\s]+")
BOOTSTRAP = """\
# On Colab this installs the book's package; elsewhere it does nothing.
import importlib.util

if importlib.util.find_spec("pali") is None:
    import subprocess
    import sys

    book = "git+{repository}@{tag}"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", book])
    importlib.invalidate_caches()"""


@dataclass(frozen=True)
class Address:
    """Where the repository is, and the tag of the release that Colab installs."""

    repository: str
    tag: str

    def __post_init__(self) -> None:
        if not REPOSITORY.match(self.repository):
            raise ValueError(
                f"{self.repository!r} is not an address like https://github.com/OWNER/NAME"
            )
        if not TAG.match(self.tag):
            raise ValueError(f"{self.tag!r} is not a tag like v1.2.3")

    @property
    def slug(self) -> str:
        return REPOSITORY.match(self.repository)[1]

    @property
    def version(self) -> str:
        return TAG.match(self.tag)[1]

    def colab(self, stem: str) -> str:
        return f"{COLAB}{self.slug}/blob/{self.tag}/notebooks/{stem}.ipynb"


def read(root: Path = ROOT) -> Address:
    """The address as pyproject.toml says it."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return Address(**tomllib.loads(text)["tool"]["pali"])


def rules(address: Address) -> dict[str, list[tuple[str, str]]]:
    """For each file, patterns and what must stand in their place."""
    url, tag, slug = address.repository, address.tag, address.slug
    links = [
        (rf"({COLAB}){SLUG}/blob/[^/\s)]+/", rf"\g<1>{slug}/blob/{tag}/"),
        (rf"(git\+)https://[\w.-]+/{SLUG}@[\w.]+", rf"\g<1>{url}@{tag}"),
        (rf"(git clone )https://[\w.-]+/{SLUG}", rf"\g<1>{url}"),
        (rf"(mybinder\.org/v2/gh/){SLUG}/[^/\s?)]+", rf"\g<1>{slug}/{tag}"),
    ]
    return {
        "pyproject.toml": [
            (r'(?m)^(Homepage = )".*"$', rf'\g<1>"{url}"'),
            (r'(?m)^(Issues = )".*"$', rf'\g<1>"{url}/issues"'),
            (r'(?m)^(Changelog = )".*"$', rf'\g<1>"{url}/blob/{tag}/CHANGELOG.md"'),
        ],
        "src/pali/__init__.py": [
            (r'(?m)^(__version__ = )".*"$', rf'\g<1>"{address.version}"'),
        ],
        "_config.yml": [
            (r"(?m)^(repository:\n(?:  .*\n)*?  url: )\S+", rf"\g<1>{url}"),
            (r"(?m)^(repository:\n(?:  .*\n)*?  branch: )\S+", rf"\g<1>{tag}"),
        ],
        "CITATION.cff": [
            (r"(?m)^(repository-code: ).*$", rf'\g<1>"{url}"'),
            (r"(?m)^(version: ).*$", rf"\g<1>{address.version}"),
        ],
        **{page: links for page in PAGES},
    }


def derived(root: Path, address: Address, old: Address | None = None) -> dict:
    """What every derived file should say, for the files that are there."""
    found: dict[Path, str] = {}
    for pattern, pairs in rules(address).items():
        for path in sorted(root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            for before, after in pairs:
                text = re.sub(before, after, text)
            if old:  # any other mention of the address, wherever it stands
                text = re.sub(
                    rf"{re.escape(old.repository)}\b", address.repository, text
                )
            found[path] = text
    for path in chapters(root):
        text = path.read_text(encoding="utf-8")
        if old:
            text = moved(text, old, address)
        notebook = json.loads(text)
        if settle(notebook, path.stem, address):
            text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False)
            text += "\n"
        found[path] = text
    return found


def moved(text: str, old: Address, new: Address) -> str:
    """A text with the old repository's address replaced by the new one."""
    return re.sub(rf"{re.escape(old.repository)}(?![\w-])", new.repository, text)


def settle(notebook: dict, stem: str, address: Address) -> bool:
    """Put the Colab line and the install cell in their places; True if changed."""
    before = json.dumps(notebook)
    if CHAPTER.match(stem):
        settle_link(notebook["cells"], f"[Open in Colab]({address.colab(stem)})")
        settle_install(
            notebook["cells"],
            BOOTSTRAP.format(repository=address.repository, tag=address.tag),
        )
    return json.dumps(notebook) != before


def settle_link(cells: list[dict], line: str) -> None:
    """The line below the title of the first cell that has one."""
    for cell in cells:
        text = source(cell)
        if cell["cell_type"] != "markdown" or not re.search(r"(?m)^# ", text):
            continue
        if COLAB_LINE.search(text):
            text = COLAB_LINE.sub(line, text)
        else:
            text = re.sub(r"(?m)^(# .*)$", rf"\g<1>\n\n{line}", text, count=1)
        if text != source(cell):
            cell["source"] = text.splitlines(keepends=True)
        return


def settle_install(cells: list[dict], code: str) -> None:
    """A cell that installs the package on Colab, before any other code."""
    wanted = INSTALL.search(code)[0]
    for cell in cells:
        if cell["cell_type"] == "code" and 'find_spec("pali")' in source(cell):
            text = INSTALL.sub(wanted, source(cell))
            if wanted not in text:
                text = code
            if text != source(cell):
                cell["source"] = text.splitlines(keepends=True)
            return
    first = [i for i, cell in enumerate(cells) if cell["cell_type"] == "code"]
    at = first[0] if first else len(cells)
    cells.insert(
        at,
        {
            "cell_type": "code",
            "execution_count": None,
            "id": "install",
            "metadata": {"tags": ["remove-cell"]},
            "outputs": [],
            "source": code.splitlines(keepends=True),
        },
    )


def differing(root: Path = ROOT) -> list[Path]:
    """Files that say something else than pyproject.toml."""
    wanted = derived(root, read(root))
    return [p for p, text in wanted.items() if p.read_text(encoding="utf-8") != text]


def change(root: Path, repository: str, tag: str) -> tuple[Address, Address]:
    """Write a new address into pyproject.toml; the old one and the new one."""
    old, new = read(root), Address(repository.removesuffix("/"), tag)
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    head, mark, rest = text.partition("[tool.pali]\n")
    rest = rest.replace(f'"{old.repository}"', f'"{new.repository}"', 1)
    rest = rest.replace(f'"{old.tag}"', f'"{new.tag}"', 1)
    write_atomically(path, head + mark + rest)
    return old, new


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pali._address")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument(
        "--set", nargs=2, metavar=("URL", "TAG"), help="change it first"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    old = None
    try:
        if args.set and not args.check:
            old, address = change(args.root, *args.set)
        else:
            address = read(args.root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    changed = 0
    for path, text in derived(args.root, address, old).items():
        if path.read_text(encoding="utf-8") != text:
            changed += 1
            name = path.relative_to(args.root)
            print(f"differs: {name}" if args.check else f"wrote {name}")
            if not args.check:
                write_atomically(path, text)
    print(f"{address.repository} at {address.tag}")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
