"""Small repairs of the pages that Sphinx and the theme write.

Every repair fails loudly: when a text that should be replaced is on no page any more,
the build stops and names it. Then look whether the theme has cured the fault (drop the
pair) or only spells it differently (change the pair), and run `make browser`.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.errors import ExtensionError

# (why, before, after). Each `after` is a text that nothing else writes, so that a page
# repaired by an earlier build is recognised.
REPAIRS = [
    (
        "the visible words name the search button, not 'Search' alone",
        ' title="Search" aria-label="Search" data-bs-placement="bottom" data-bs-toggle',
        ' title="Search"  data-bs-placement="bottom" data-bs-toggle',
    ),
    (
        "the visible words name a folded cell",
        '<summary aria-label="Toggle hidden content">',
        '<summary class="named">',
    ),
    (
        "the visible words name the colour switch (light)",
        ' data-mode="light" title="Light"',
        ' data-mode="light" ',
    ),
    (
        "the visible words name the colour switch (dark)",
        ' data-mode="dark"  title="Dark"',
        ' data-mode="dark"  ',
    ),
    (
        "the visible words name the colour switch (system)",
        ' data-mode="auto"  title="System Settings"',
        ' data-mode="auto"  ',
    ),
    (
        "everything on a page belongs to a landmark",
        '<div id="pst-primary-sidebar" class',
        '<div id="pst-primary-sidebar" role="navigation" aria-label="Book" class',
    ),
    (
        "docutils writes a role that ARIA 1.2 has deprecated",
        ' role="doc-biblioentry"',
        ' role="listitem"',
    ),
]

CHAPTER = re.compile(r"notebooks/(\d\d)_\w+$")


def chapter_number(docname: str) -> int | None:
    """The number in the file name, which is the number of the chapter."""
    found = CHAPTER.match(docname)
    return int(found[1]) if found else None


def number_by_file(env) -> None:
    """Number chapters by their file names; pages that are no chapters get no number."""
    for docname in list(env.toc_secnumbers):
        chapter = chapter_number(docname)

        def change(number, chapter=chapter):
            return (chapter, *number[1:]) if number and chapter is not None else None

        numbers = env.toc_secnumbers[docname]
        for anchor, number in numbers.items():
            numbers[anchor] = change(number) or ()
        if chapter is None:
            del env.toc_secnumbers[docname]
        title = env.titles[docname]
        title["secnumber"] = change(title.get("secnumber"))
        for link in env.tocs[docname].findall(nodes.reference):
            if link.get("refuri") == docname:
                link["secnumber"] = change(link.get("secnumber"))


def take_over_numbering(app) -> None:
    """Step in after sections are numbered, before figures take those numbers over."""
    original = TocTreeCollector.assign_figure_numbers
    if getattr(original, "by_file", False):
        return

    def assign_figure_numbers(self, env):
        number_by_file(env)
        return original(self, env)

    assign_figure_numbers.by_file = True
    TocTreeCollector.assign_figure_numbers = assign_figure_numbers


def drop_thebe(app, pagename, templatename, context, doctree) -> None:
    """No live cells: sphinx-thebe's inline script is added twice and then fails."""

    def wanted(script) -> bool:
        attributes = getattr(script, "attributes", {})
        text = f"{getattr(script, 'filename', '')}{attributes.get('body', '')}"
        return "thebe" not in text.lower()

    context["script_files"] = [s for s in context["script_files"] if wanted(s)]


def repair_pages(app, exception) -> None:
    if exception is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    lost = [d for d in app.env.found_docs if not (folder / f"{d}.html").exists()]
    if lost:
        raise ExtensionError(f"pages were not written: {', '.join(sorted(lost))}")
    needed = {why for why, _, _ in REPAIRS}
    for page in sorted(folder.rglob("*.html")):
        text = old = page.read_text(encoding="utf-8")
        for why, before, after in REPAIRS:
            if before in text or after in text:
                needed.discard(why)
            text = text.replace(before, after)
        if text != old:
            page.write_text(text, encoding="utf-8")
    if needed:
        raise ExtensionError(
            "book/_ext/book_fixes.py: nothing left to repair for: "
            + "; ".join(sorted(needed))
        )


def setup(app) -> dict:
    app.connect("builder-inited", take_over_numbering, priority=900)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", repair_pages, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
