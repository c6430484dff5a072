"""Build it yourself: chapters with empty cells, and checks that say what differs.

    python -m pali.workbook rope norm --out mine    chapters to fill in, in mine/
    python -m pali.workbook                         all of them, in workbook/
    python -m pali.workbook --check mine/07_rope.ipynb

An emptied chapter keeps its text and demonstrations. Every exported cell keeps
signature and docstring and loses its body, solutions are gone, outputs are cleared.
All of it is made from the notebooks, nothing is written twice. What you write is
compared with the shipped module on the very calls that the chapter makes.

The exercises of all chapters use the same comparison: `exercise` makes a check out of
a few lines, `expect` and `agree` say what differs, `prove` tests check and solution.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import linecache
import logging
import os
import random
import re
import sys
import textwrap
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pali._compare import (
    ELSEWHERE,
    Different,
    Incomparable,
    copied,
    described,
    difference,
    ended,
    shown_call,
    stopped,
)
from pali._export import CHAPTER, MARK, ROOT, chapters, source, write_atomically

FOLDER = "workbook"
SOLUTION = re.compile(r"^#\s*@title Solution\b")
CALLS = 40  # of one part are compared, at most 2 that look alike
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# -- exercises -----------------------------------------------------------------


class Verdict(str):
    """What a check says; a notebook shows it without quotes."""

    def __repr__(self) -> str:
        return str(self)


@dataclass
class Check:
    """The check of one exercise: give it an answer, it says what is wrong with it.

    title   how its sentences begin
    slips   sentence -> what somebody who makes this slip would answer
    """

    title: str
    slips: dict[str, object]
    body: Callable

    def __call__(self, answer) -> Verdict:
        if answer is None:
            return Verdict(f"{self.title}: nothing to check yet.")
        global _slips
        outer, _slips = _slips, self.slips
        try:
            self.body(answer)
        except AssertionError as error:
            said = str(error) or "not what was asked for."
        except Exception as error:  # the reader's own code stopped
            said = stopped(error)
        else:
            return Verdict(f"{self.title}: correct.")
        finally:
            _slips = outer
        return Verdict(f"{self.title}: not yet. {said}")


_slips: dict[str, object] = {}


def exercise(title: str, slips: Mapping[str, object] | None = None):
    """Decorator: a function with `expect`, `agree` and `assert` becomes a `Check`.

    slips   sentence -> a wrong answer of the reader's kind; where an answer gives the
            same as a slip, the check says the sentence
    """

    def make(body: Callable) -> Check:
        return functools.wraps(body)(Check(title, dict(slips or {}), body))

    return make


def expect(
    fn: Callable, *args, want, rtol=None, atol=None, says="", via=None, **kwargs
) -> None:
    """Call the reader's function and compare; raises `Different` with what is wrong.

    says   what this case is about, put in front of the sentence
    via    how an answer is used where calling it is not enough: via(answer, *args)
    """
    if not callable(fn):
        raise Different(f"your answer is {described(fn)}, expected a function.")
    name = getattr(fn, "__name__", "<lambda>").replace("<lambda>", "your function")
    call = shown_call(name, args, kwargs)

    def result(answer):
        if via:
            return via(answer, *copied(args), **copied(kwargs))
        return answer(*copied(args), **copied(kwargs))

    got = result(fn)
    found = difference(got, want, rtol, atol, call)
    if found is None:
        return
    for sentence, slip in _slips.items():
        with contextlib.suppress(Exception):
            if difference(got, result(slip), rtol, atol) is None:
                found = f"{ended(found)} {sentence}"
                break
    raise Different(ended(f"{says}: {found}" if says else found))


def agree(got, want, says: str = "your answer", rtol=None, atol=None):
    """Compare a value with what it should be; raises `Different` with what is wrong."""
    found = difference(got, want, rtol, atol, says)
    if found is None:
        return
    for sentence, slip in _slips.items():
        if not callable(slip) and difference(got, slip, rtol, atol) is None:
            found = f"{ended(found)} {sentence}"
            break
    raise Different(ended(found))


def prove(check: Check, solution) -> Verdict:
    """Test check and solution: nothing, every slip and the solution each get their due.

    raises   AssertionError that says which of them did not
    """
    assert check(None).endswith("nothing to check yet."), check(None)
    for sentence, slip in check.slips.items():
        said = check(slip)
        assert said.endswith(ended(sentence)), (
            f"the slip {sentence!r} was met with: {said}"
        )
    said = check(solution)
    assert said.endswith("correct."), said
    return said


# -- your code beside the book's -----------------------------------------------


@dataclass
class Record:
    """What is known of one part: calls compared, what differed."""

    agreed: int = 0
    differs: str = ""
    unwritten: bool = False
    taken: bool = False
    seen: Counter = field(default_factory=Counter)

    def line(self) -> str:
        if self.unwritten:
            return "not written yet"
        if self.differs:
            return f"differs: {self.differs}"
        if self.taken:
            return "taken from the book"
        if self.agreed:
            calls = "one call" if self.agreed == 1 else f"{self.agreed} calls"
            return f"agrees with the book on {calls}"
        return "not compared: no cell that ran has called it"


records: dict[str, Record] = {}
_book_runs = False  # while the book's version runs, nothing is compared
_go_on = False  # --check: note what differs and go on with the book's result


@contextlib.contextmanager
def same_chance():
    """Random numbers go on afterwards as if nothing had been drawn."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class Items(list):
    """What a generator of the book yields, the first ones."""


def run_book(fn: Callable, args: tuple, kwargs: dict):
    """Result or error of the book's version, while nothing else is compared."""
    global _book_runs
    # inside a checkpoint, what the book's run keeps must not be counted as yours
    uncounted = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with same_chance(), uncounted:
        _book_runs = True
        nowhere = io.StringIO()
        logging.disable(logging.CRITICAL)
        try:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                result = fn(*args, **kwargs)
                if isinstance(result, Iterator):
                    result = Items(itertools.islice(result, CALLS))
                return result, None
        except Exception as error:
            return None, error
        finally:
            _book_runs = False
            logging.disable(logging.NOTSET)


def beside(name: str, yours: Callable, book: Callable, twin: Callable | None = None):
    """`yours`, which from now on compares its calls with the book's.

    twin   for methods: makes the book's object from yours
    """
    record = records[name]

    @functools.wraps(yours)
    def compared(*args, **kwargs):
        call = shown_call(name, args[1:] if twin else args, kwargs)
        worn = record.seen[call] > 1 or record.seen.total() >= CALLS
        if record.differs and _go_on and not twin:  # others build on the book's
            return book(*args, **kwargs)
        if _book_runs or worn or record.differs:
            return yours(*args, **kwargs)
        record.seen[call] += 1
        try:
            copies, options = copied((args, kwargs))
            if twin:
                copies = (twin(args[0], copied), *copies[1:])
        except (Incomparable, RuntimeError):
            return yours(*args, **kwargs)
        want, refused = run_book(book, copies, options)
        try:
            got = yours(*args, **kwargs)
        except Exception as error:
            if refused is not None and isinstance(error, type(refused)):
                record.agreed += 1
                raise
            if _go_on and refused is None:
                record.differs = record.differs or f"{call}: {stopped(error)}"
                return want
            raise
        if isinstance(want, Items) and isinstance(got, Iterator):
            return compared_items(name, got, want, call)
        found = verdict(got, want, refused, call)
        if found == "":
            record.agreed += 1
        settle(name, found)
        return want if record.differs else got

    return compared


def compared_items(name: str, got: Iterator, want: Items, call: str) -> Iterator:
    """Pass on what your generator yields, each item compared with the book's."""
    count = 0
    for count, item in enumerate(got, 1):
        if count <= len(want):
            at = f"item {count - 1} of {call}"
            settle(name, difference(item, want[count - 1], at=at))
        elif len(want) < CALLS:
            settle(name, f"{call} yields more than {len(want)} items")
        yield item
    if count < len(want):
        settle(name, f"{call} yields {count} items, expected {len(want)}")
    elif not records[name].differs:
        records[name].agreed += 1


def settle(name: str, found: str | None) -> None:
    """Note a difference, and stop there unless --check goes on."""
    if found and not records[name].differs:
        records[name].differs = ended(found)
        if not _go_on:
            raise Different(f"{name} differs from the book's. {ended(found)}")


def verdict(got, want, refused: Exception | None, call: str) -> str | None:
    """What differs, "" if nothing does, None if it cannot be said."""
    if isinstance(refused, AttributeError):  # the book's code met your object
        return f"{call}: {str(refused).splitlines()[0]}, which the book's has"
    if isinstance(refused, ValueError | TypeError | OSError):
        kind = type(refused).__name__
        return f"{call} gives {described(got)}, expected a {kind}: {refused}"
    if isinstance(want, Items):
        return f"{call} gives {described(got)}, expected a generator"
    if refused is not None:
        return None
    return difference(got, want, at=call) or ""


def watch(chapter: str, *things):
    """Your functions and classes, each comparing its calls with those of the book.

    chapter   the module's name, such as "rope"
    returns   the same number of things, one alone or a tuple; a call that differs
              raises `Different` with one sentence
    """
    module = importlib.import_module(f"pali.{chapter}")
    done = []
    for thing in things:
        name = thing.__name__
        book = getattr(module, name, None)
        if book is None:  # a helper of your own
            done.append(thing)
            continue
        records[name] = Record(unwritten=is_empty(thing), taken=thing is book)
        if thing is book:
            done.append(thing)
        elif records[name].unwritten:
            done.append(book if _go_on else thing)
        elif inspect.isclass(thing):
            done.append(watched_class(name, thing, book))
        else:
            done.append(beside(name, thing, book))
    return done[0] if len(done) == 1 else tuple(done)


def is_empty(thing) -> bool:
    """Whether a function, or a method of a class, is still to be written."""
    if inspect.isclass(thing):
        return any(is_empty(part) for part in methods(thing).values())
    code = getattr(inspect.unwrap(thing), "__code__", None)
    return code is not None and code.co_names[:1] == ("NotImplementedError",)


def methods(kind: type) -> dict[str, Callable]:
    """Functions that a class defines itself, those behind properties included."""
    found = {}
    for name, value in vars(kind).items():
        value = getattr(value, "fget", value)
        value = getattr(value, "__func__", value)
        written = inspect.isfunction(value) and value.__module__ == kind.__module__
        if written and not ELSEWHERE.search(value.__code__.co_filename):
            found[name] = value  # not made by `dataclass`
    return found


def watched_class(name: str, yours: type, book: type) -> type:
    """A class whose instances are compared with the book's, made of the same parts."""
    for method, fn in methods(yours).items():
        partner = vars(book).get(method)
        if not inspect.isfunction(fn) or method == "__init__" or partner is None:
            continue
        if inspect.isfunction(vars(yours)[method]) and inspect.isfunction(partner):
            label = name if method in ("forward", "__call__") else f"{name}.{method}"
            records.setdefault(label, records[name])
            setattr(yours, method, beside(label, fn, partner, partial_twin(book)))
    if "__init__" in vars(yours) and not is_dataclass(yours):
        yours.__init__ = compared_start(name, yours.__init__, book)
    return yours


def partial_twin(book: type) -> Callable:
    """Makes an object of the book's class that holds what yours holds."""

    def twin(yours, copier: Callable):
        new = book.__new__(book)
        shared = isinstance(yours, nn.Module)
        for key, value in vars(yours).items():
            object.__setattr__(new, key, value if shared else copier(value))
        return new

    return twin


def compared_start(name: str, start: Callable, book: type) -> Callable:
    """Your `__init__`; afterwards the attributes are compared with the book's."""

    @functools.wraps(start)
    def compared(self, *args, **kwargs):
        record = records[name]
        sound = type(self).__init__ is compared and not record.differs
        if _book_runs or not sound or record.seen["start"] > 3:
            return start(self, *args, **kwargs)
        record.seen["start"] += 1
        call = shown_call(name, args, kwargs)
        try:
            twin, refused = run_book(book, *copied((args, kwargs)))
        except Incomparable:
            return start(self, *args, **kwargs)
        start(self, *args, **kwargs)
        found = ""
        if isinstance(refused, ValueError | TypeError):
            found = f"{call} is made, expected a {type(refused).__name__}: {refused}"
        elif refused is None:
            found = attributes_difference(self, twin, call)
        settle(name, found)

    return compared


def attributes_difference(yours, book, call: str) -> str:
    """Parts by name, then weights by shape: other chapters rely on both."""
    if isinstance(book, nn.Module):
        got, want = (
            {k: list(v.shape) for k, v in m.state_dict().items()} for m in (yours, book)
        )
        if got != want:
            return difference(got, want, at=f"the weights of {call}") or ""
    missing = [key for key in vars(book) if not hasattr(yours, key)]
    if missing:
        return f"{call} has no attribute {', '.join(missing)}, which the book's has"
    return ""


def report() -> Verdict:
    """One line for each part that is watched."""
    width = max((len(name) for name in parts()), default=0)
    return Verdict("\n".join(f"{n:<{width}}  {records[n].line()}" for n in parts()))


def parts() -> list[str]:
    return [name for name in records if "." not in name]


# -- emptying a chapter --------------------------------------------------------


class Problem(Exception):
    """What is wrong, in one sentence for the reader."""


def emptied(text: str) -> str:
    """The code of an exported cell with every body replaced; constants stay."""
    lines = text.split("\n")
    found = functions(ast.parse(text).body)
    for node, owner in reversed(found):
        summary = (ast.get_docstring(node) or ast.get_docstring(owner) or "").split(
            "\n\n"
        )[0]
        summary = " ".join(summary.split()) or "write the body"
        first = node.body[0]
        documented = ast.get_docstring(node) is not None
        if documented and len(node.body) == 1:
            continue  # a protocol: nothing was there
        head_end = first.end_lineno if documented else first.lineno - 1
        head = lines[:head_end]
        if not documented and first.lineno == header_line(node, lines):  # one-liner
            head = [
                *lines[: first.lineno - 1],
                lines[first.lineno - 1][: first.col_offset].rstrip(),
            ]
        while head[-1].lstrip().startswith("#"):
            head.pop()
        pad = " " * (node.col_offset + 4)
        body = [f"{pad}{line}" for line in wrapped(attributes(node))]
        body += [f"{pad}raise NotImplementedError("]
        body += [
            f'{pad}    "{line}"' for line in quoted(f"{label(node, owner)}: {summary}")
        ]
        lines = [*head, *body, f"{pad})", *lines[node.end_lineno :]]
    return "\n".join(lines)


def functions(body: list[ast.stmt], owner: ast.stmt | None = None) -> list[tuple]:
    """Functions and methods in order, each with the class or function it belongs to."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef):
            found += functions(node.body, node)
        elif isinstance(node, DEFINITIONS):
            found.append((node, owner or node))
    return found


def header_line(node: ast.FunctionDef, lines: list[str]) -> int:
    """The line on which the signature ends."""
    spots = [node.lineno, *(n.end_lineno for n in (node.returns,) if n)]
    spots += [
        arg.end_lineno for arg in ast.walk(node.args) if hasattr(arg, "end_lineno")
    ]
    at = max(spots)
    while not re.search(r":\s*(#.*)?$", lines[at - 1]) and at < node.body[0].lineno:
        at += 1
    return at


def label(node: ast.FunctionDef, owner: ast.stmt) -> str:
    return node.name if owner is node else f"{owner.name}.{node.name}"


def attributes(node: ast.FunctionDef) -> str:
    """What an `__init__` stores, which later chapters and checkpoints call by name."""
    if node.name != "__init__":
        return ""
    stored = [
        (part.lineno, part.col_offset, part.attr)
        for part in ast.walk(ast.Module(node.body, []))
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and getattr(part.value, "id", "") == "self"
    ]
    stored = [name for _, _, name in sorted(stored)]
    return "sets self." + ", self.".join(dict.fromkeys(stored)) if stored else ""


def wrapped(text: str, width: int = 56) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, width)]


def quoted(text: str, width: int = 56) -> list[str]:
    """A long string as the pieces of one literal, without the quotes around them."""
    pieces = textwrap.wrap(text, width, break_long_words=False)
    pieces = [p + " " for p in pieces[:-1]] + pieces[-1:]
    return [p.replace("\\", "\\\\").replace('"', '\\"') for p in pieces]


FENCE = r"^(?P<fence>:{3,}|`{3,})"
CLOSED = r".*?^(?P=fence)[ \t]*$\n?"
START, END, WHOLE = (
    re.compile(FENCE + name + CLOSED, re.MULTILINE | re.DOTALL)
    for name in (r"\{solution-start\}", r"\{solution-end\}", r"\{solution\}")
)


def without_solutions(text: str, inside: bool = False) -> tuple[str, bool]:
    """Markdown without solutions, and whether it ends within one.

    inside   whether it begins within one
    """
    kept, text = [], WHOLE.sub("", text)
    while text:
        found = (END if inside else START).search(text)
        if not inside:
            kept.append(text[: found.start()] if found else text)
        inside = inside if found is None else not inside
        text = text[found.end() :] if found else ""
    return re.sub(r"\n{3,}", "\n\n", "".join(kept)).strip("\n"), inside


WELCOME = """\
:::{{important}}
**Your workbook.** The cells that begin with `#| export` are empty here: write their
bodies from the text. After each, a cell puts your code beside `pali.{name}`: from then
on, calls are compared and the first difference is told. To skip a part, write
`from pali.{name} import NAME` in its place. At any time, with the notebook saved:

    python -m pali.workbook --check {file}
:::"""
BESIDE = """\
# Your code beside the book's: a call that differs says so.
from pali import workbook

{names} = workbook.watch("{chapter}", {names})"""


def workbook_of(path: Path) -> dict:
    """The notebook of a chapter, emptied: parsed JSON, ready to be written."""
    book = json.loads(path.read_text(encoding="utf-8"))
    name, cells, solved = CHAPTER.match(path.stem)[2], [], False
    for cell in book["cells"]:
        text = source(cell)
        code = cell["cell_type"] == "code"
        if code and (solved or SOLUTION.match(text)):
            continue
        if not code:
            text, solved = without_solutions(text, solved)
        exported = code and MARK.match(text.split("\n")[0])
        names = []
        if exported:
            names = [n.name for n in ast.parse(text).body if isinstance(n, DEFINITIONS)]
            text = emptied(text)
        if text.strip():
            cells.append(
                new_cell(cell["cell_type"], text, cell["id"], cell["metadata"])
            )
        if names:
            more = BESIDE.format(names=", ".join(names), chapter=name)
            cells.append(new_cell("code", more, f"{cell['id']}-beside"))
    if any("-beside" in cell["id"] for cell in cells):
        words = WELCOME.format(name=name, file=path.name)
        cells.insert(1, new_cell("markdown", words, "workbook"))
        cells.append(new_cell("code", "workbook.report()", "workbook-report"))
    metadata = {**book["metadata"], "pali": {"chapter": path.stem}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def new_cell(kind: str, text: str, id: str, metadata: dict | None = None) -> dict:
    cell = {"cell_type": kind, "id": id, "metadata": metadata or {}, "source": text}
    return cell | ({"outputs": [], "execution_count": None} if kind == "code" else {})


# -- the command ---------------------------------------------------------------


def find(names: list[str], root: Path) -> list[Path]:
    """Notebooks by number, name or both, all of them without names."""
    known = chapters(root)
    if not known:
        raise Problem(
            "the notebooks are not part of the installed package: clone "
            f"{repository()} and run this command there"
        )
    found = []
    for name in names:
        fits = [p for p in known if name in (p.stem, p.stem[:2], p.stem[3:], p.name)]
        if not fits:
            raise Problem(
                f"no chapter {name!r}; there are {known[0].stem} to {known[-1].stem}"
            )
        found += fits
    return list(dict.fromkeys(found)) or known


def repository() -> str:
    """The address of the repository, as the installed package states it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.metadata("pali").get_all("Project-URL") or []:
            label, _, url = line.partition(", ")
            if label == "Homepage":
                return url
    return "the repository"


def write(paths: list[Path], out: Path, force: bool) -> list[Path]:
    """Write the emptied chapters, or none when one would replace a reader's file."""
    targets = {out / path.name: workbook_of(path) for path in paths}
    if out.exists() and not out.is_dir():
        raise Problem(f"{out} is a file; name a folder with --out")
    sources = {path.resolve() for path in paths}
    for target in targets:
        if target.resolve() in sources:
            raise Problem(
                f"{target} is the book's own notebook; name another --out folder"
            )
        if target.exists() and not force:
            raise Problem(
                f"{target} exists and may hold your work: name another folder with "
                "--out, or replace it with --force"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for target, book in targets.items():
            text = json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False)
            write_atomically(target, text + "\n")
    except OSError as error:
        raise Problem(f"cannot write to {out}: {error.strerror or error}") from error
    return list(targets)


def read_workbook(path: Path) -> tuple[str, list[str]]:
    """The chapter that a reader's notebook belongs to, and its code cells."""
    try:
        book = json.loads(path.read_text(encoding="utf-8"))
        texts = [source(c) for c in book["cells"] if c["cell_type"] == "code"]
        stem = book["metadata"].get("pali", {}).get("chapter", path.stem)
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{path} is not a notebook (.ipynb)") from error
    if not CHAPTER.match(stem):
        raise Problem(
            f"{path} does not say its chapter; keep a name such as 07_rope.ipynb"
        )
    return CHAPTER.match(stem)[2], texts


def check_file(path: Path, quick: bool = False) -> dict[str, Record]:
    """Run a reader's notebook with each part beside the book's.

    quick     stop as soon as every part was compared once
    returns   name -> Record, in the order of the chapter
    """
    chapter, texts = read_workbook(path)
    wanted = parts_of(chapter)
    if not wanted:
        raise Problem(f"chapter {chapter} exports nothing; there is nothing to compare")
    global _go_on
    records.clear()
    page = types.ModuleType("workbook_page")
    sys.modules["workbook_page"] = page
    _go_on, errors = True, {}
    try:
        with quiet_figures():
            for text in texts:
                run_cell(text, page, chapter, errors)
                if quick and all(n in records and done(records[n]) for n in wanted):
                    break
    finally:
        _go_on = False
        sys.modules.pop("workbook_page", None)
    for name in wanted:
        if name not in records:
            taken = vars(page).get(name) is wanted[name]
            why = errors.get(name, "" if taken else "no exported cell defines it")
            records[name] = Record(differs=ended(why) if why else "", taken=taken)
    return {name: records[name] for name in wanted}


def parts_of(chapter: str) -> dict[str, Callable]:
    """Functions and classes that a chapter's module defines, in its order."""
    try:
        module = importlib.import_module(f"pali.{chapter}")
    except ModuleNotFoundError:
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


def done(record: Record) -> bool:
    return bool(record.agreed or record.differs or record.unwritten or record.taken)


def names_in(text: str) -> list[str]:
    """What an exported cell defines, read from its text even if it does not run."""
    if not MARK.match(text.split("\n")[0]):
        return []
    return re.findall(r"^(?:async )?(?:def|class) (\w+)", text, re.MULTILINE)


def run_cell(text: str, page: types.ModuleType, chapter: str, errors: dict) -> None:
    """One cell of the page; an exported one is put beside the book's."""
    names = names_in(text)
    if "workbook.watch(" in text or "workbook.report()" in text:
        return
    place = f"<cell {len(page.__dict__)}>"
    linecache.cache[place] = (len(text), None, text.splitlines(True), place)
    try:
        exec(compile(text, place, "exec"), page.__dict__)
    except SyntaxError as error:
        why = f"line {error.lineno} is not Python: {(error.text or '').strip()!r}"
        errors.update(dict.fromkeys(names, why))
    except Exception as error:
        errors.update(dict.fromkeys(names, stopped(error)))
    book = parts_of(chapter)
    for name in names:
        if name in vars(page) and name not in errors:
            vars(page)[name] = watch(chapter, vars(page)[name])
        elif name in book:  # later cells go on with the book's
            vars(page)[name] = book[name]


@contextlib.contextmanager
def quiet_figures():
    """No windows, no printing, no warnings; figures are closed at the end."""
    os.environ.setdefault("MPLBACKEND", "agg")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if "matplotlib.pyplot" in sys.modules:
                sys.modules["matplotlib.pyplot"].close("all")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str):
        raise Problem(f"{message}; see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m pali.workbook",
        description="Chapters with empty cells to fill in, and a check of them.",
    )
    parser.add_argument(
        "chapters", nargs="*", metavar="CHAPTER", help="such as rope or 07"
    )
    parser.add_argument("--out", metavar="FOLDER", help=f"where to write [{FOLDER}]")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare a workbook")
    parser.add_argument(
        "--quick", action="store_true", help="stop once all is compared"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
        if args.check and (args.chapters or args.out or args.force):
            raise Problem("--check takes one FILE and no chapters, --out or --force")
        if args.quick and not args.check:
            raise Problem("--quick belongs to --check FILE")
        if args.check:
            found = check_file(args.check, args.quick)
            print(report())
            return 1 if any(r.differs or r.unwritten for r in found.values()) else 0
        paths = find(args.chapters, args.root)
        for target in write(paths, Path(args.out or FOLDER), args.force):
            print("wrote", target)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # One module under one name: notebooks import pali.workbook too.
    from pali.workbook import main as command

    sys.exit(command())
