"""Links and pictures lead somewhere, in the sources and in the built book."""

import json
import re
from pathlib import Path

import pytest

import links

ROOT = links.ROOT
BUILT = ROOT / "_build" / "html"
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("book/**/*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
FIGURE = re.compile(r"\{(?:figure|image)\}\s+(\S+)")
HTML = re.compile(r"""<(?:img|a)\b[^>]*\b(?:src|href)=["']([^"']+)["']""")
CODE = re.compile(r"(?ms)^(```+|~~~+)(?!\{)[^\n]*\n.*?^\1[ ]*$|`[^`\n]+`")


def targets(text: str) -> list[str]:
    """What a Markdown text points to inside the repository, code left out."""
    text = CODE.sub("", text)
    found = [target for kind in (LINK, FIGURE, HTML) for target in kind.findall(text)]
    return [t for t in found if not links.is_outside(t) and not t.startswith("#")]


def dead(text: str, folder: Path) -> list[str]:
    """The targets for which there is no file, or no page source of that name."""
    wrong = []
    for target in targets(text):
        path = target.partition("#")[0]
        base = ROOT if path.startswith("/") else folder
        there = base / path.lstrip("/")
        as_source = [there.with_suffix(s) for s in (".md", ".ipynb")]
        if not there.exists() and not any(p.is_file() for p in as_source):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_of_a_page_lead_somewhere(path):
    assert dead(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_and_pictures_of_a_notebook_lead_somewhere(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join(
        "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
    )
    assert dead(text, path.parent) == []


def test_a_dead_link_in_a_source_is_found(tmp_path):
    (tmp_path / "there.md").write_text("x")
    text = (
        "[a](there.md) [b](there) [c](gone.md) ![d](gone.png) `[e](code.md)`\n"
        ":::{figure} lost.svg\n:::\n<img src='away.png' alt=''>\n[f](https://x.org/y)\n"
        "```python\n[g](in_code.md)\n```\n"
    )
    assert dead(text, tmp_path) == ["gone.md", "gone.png", "lost.svg", "away.png"]


@pytest.mark.skipif(not BUILT.is_dir(), reason="the book is not built: make html")
def test_the_built_book_has_every_page_and_no_dead_link():
    assert links.missing_pages(BUILT) + links.page_problems(BUILT) == []


def test_a_dead_link_a_dead_anchor_and_a_silent_picture_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        "<h1 id='top'>A</h1><a href='b.html#here'>1</a><a href='b.html#gone'>2</a>"
        "<a href='c.html'>3</a><a href='#top'>4</a><a href='https://x.org'>5</a>"
        "<img src='d.png'>"
    )
    (tmp_path / "b.html").write_text("<p id='here'>B</p>")
    assert links.page_problems(tmp_path) == [
        "a.html: a picture without alt: d.png",
        "a.html: b.html#gone has no such anchor",
        "a.html: c.html leads nowhere",
        "a.html: d.png leads nowhere",
    ]


def test_a_page_of_the_contents_that_was_not_built_is_found(tmp_path):
    (tmp_path / "_toc.yml").write_text(
        "root: book/intro\nparts:\n- chapters:\n  - file: notebooks/01_a\n"
    )
    built = tmp_path / "html"
    (built / "book").mkdir(parents=True)
    (built / "book" / "intro.html").write_text("x")
    (built / "index.html").write_text("x")
    assert links.missing_pages(built, tmp_path) == ["notebooks/01_a.html was not built"]
