"""Every link, anchor and picture of the built book leads somewhere.

python tests/links.py _build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """The ids of a page, what it points to, and pictures without alt text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.silent: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        self.targets += [values[key] for key in ("href", "src") if values.get(key)]
        if tag == "img" and "alt" not in values:
            self.silent.append(values.get("src", "")[:60])


def is_outside(target: str) -> bool:
    return bool(urlsplit(target).scheme or target.startswith("//"))


def page_problems(built: Path) -> list[str]:
    """Sentences about links that lead nowhere, over all pages below a folder."""
    pages = {
        path.resolve(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(built.rglob("*.html"))
        if "_static" not in path.relative_to(built).parts
    }
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(built.resolve())
        wrong += [f"{name}: a picture without alt: {src}" for src in page.silent]
        for target in page.targets:
            if is_outside(target):
                continue
            parts = urlsplit(target)
            there = path
            if parts.path:
                there = (path.parent / unquote(parts.path)).resolve()
            anchor = unquote(parts.fragment)
            if not there.is_file():
                wrong.append(f"{name}: {target} leads nowhere")
            elif anchor and there in pages and anchor not in pages[there].ids:
                wrong.append(f"{name}: {target} has no such anchor")
    return sorted(set(wrong))


def toc_files(root: Path = ROOT) -> list[str]:
    """Every file that `_toc.yml` names, in order, without suffix."""

    def walk(node):
        if isinstance(node, dict):
            if "file" in node:
                yield node["file"]
            if "root" in node:
                yield node["root"]
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    return list(walk(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))


def missing_pages(built: Path, root: Path = ROOT) -> list[str]:
    """Files of the table of contents that have no page, and a missing front page."""
    wanted = ["index.html", *(f"{name}.html" for name in toc_files(root))]
    return [f"{name} was not built" for name in wanted if not (built / name).is_file()]


def main(argv: list[str]) -> int:
    built = Path(argv[0] if argv else ROOT / "_build" / "html")
    wrong = missing_pages(built) + page_problems(built)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    print(f"{len(toc_files())} pages, {len(wrong)} problems in links and pictures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
