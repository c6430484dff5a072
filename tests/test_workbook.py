"""Emptied chapters, the comparison with the book's code, and what checks say."""

import ast
import json
import subprocess
import sys
import types

import nbformat
import numpy as np
import pytest
import torch
from torch import nn

from pali import _export, viz, workbook
from pali._compare import copied, difference
from pali.workbook import agree, exercise, expect, prove
from toys import code, exporting, markdown, notebook, repository

CHAPTERS = _export.chapters()
EXPORTING = [p for p in CHAPTERS if _export.module_text(p) is not None]
# Those whose parts are all called within a few seconds; `python tests/workbooks.py`
# does the same for every chapter in some minutes.
SHORT = [p for p in CHAPTERS if p.stem[3:] in ("norm", "rope", "cache")]


def cells_of(book):
    return [(c["cell_type"], _export.source(c)) for c in book["cells"]]


def definitions(text):
    """Every function and method of a piece of code, by its full name."""
    found = {}
    for node in ast.parse(text).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for part in inside:
            if isinstance(part, ast.FunctionDef):
                found[owner + part.name] = part
    return found


def exported(book):
    return [t for kind, t in cells_of(book) if kind == "code" and t[:3] == "#| "]


def refilled(path):
    """The emptied chapter with the bodies of the book put back, as a reader would."""
    whole = {c["id"]: c for c in json.loads(path.read_text())["cells"]}
    book = workbook.workbook_of(path)
    for cell in book["cells"]:
        if cell["cell_type"] == "code" and cell["source"].startswith("#| export"):
            cell["source"] = _export.source(whole[cell["id"]])
    return book


def saved(folder, name, book):
    path = folder / name
    path.write_text(json.dumps(book), encoding="utf-8")
    return path


# -- emptied chapters ----------------------------------------------------------


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_an_emptied_chapter_is_a_valid_notebook_without_outputs(path):
    book = workbook.workbook_of(path)
    nbformat.validate(nbformat.from_dict(book))
    assert all(not c["outputs"] for c in book["cells"] if c["cell_type"] == "code")


@pytest.mark.parametrize("path", EXPORTING, ids=lambda p: p.stem)
def test_every_body_is_gone_and_signature_and_docstring_stay(path):
    emptied = exported(workbook.workbook_of(path))
    whole = exported(json.loads(path.read_text()))
    assert len(emptied) == len(whole) > 0
    for before, after in zip(whole, emptied, strict=True):
        old, new = definitions(before), definitions(after)
        assert list(old) == list(new)
        for name in old:
            a, b = old[name], new[name]
            assert ast.dump(a.args) == ast.dump(b.args), name
            assert ast.get_docstring(a) == ast.get_docstring(b), name
            rest = b.body[1:] if ast.get_docstring(b) else b.body
            assert [type(n) for n in rest] == [ast.Raise] or len(a.body) == 1, name


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_no_solution_is_left(path):
    for kind, text in cells_of(workbook.workbook_of(path)):
        assert "{solution" not in text
        assert not (kind == "code" and "_solution(" in text), text


@pytest.mark.parametrize("path", EXPORTING, ids=lambda p: p.stem)
def test_the_original_bodies_put_back_are_the_module(path, tmp_path):
    made = saved(tmp_path, path.name, refilled(path))
    module = _export.ROOT / "src" / "pali" / f"{path.stem[3:]}.py"
    assert _export.module_text(made) == module.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", SHORT, ids=lambda p: p.stem)
def test_the_original_bodies_pass_their_checks(path, tmp_path):
    made = saved(tmp_path, path.name, refilled(path))
    found = workbook.check_file(made, quick=True)
    assert {name: r.line() for name, r in found.items() if not r.agreed} == {}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_new_exercise_has_a_hint_and_is_proved(path):
    cells = cells_of(json.loads(path.read_text()))
    for i, (kind, text) in enumerate(cells):
        if kind != "code" or "\n@exercise(" not in text:
            continue
        check = text.split("\n@exercise(")[1].split("\ndef ")[1].split("(")[0]
        later = [t for k, t in cells[i:] if k == "code" and f"prove({check}," in t]
        assert later and workbook.SOLUTION.match(later[0]), check
        assert '<details class="hint">' in cells[i - 1][1], check
        assert f"{check}(" in cells[i + 1][1] and "= None" in cells[i + 1][1], check


ONE_OF_EACH = '''\
SIZE = 3


@staticmethod
def plain(x: int,
          y=1):  # kept
    # a comment of the body
    return x + y


def documented(x):
    """Say "what"
    it does.

    x   a number
    """
    return x


def short(x): return x


class Layer:
    """A layer."""

    size: int = 3

    def __init__(self, n):
        self.n, other = n, 2
        self.m = other

    @property
    def twice(self):
        return 2 * self.n'''
EMPTIED = '''\
SIZE = 3


@staticmethod
def plain(x: int,
          y=1):  # kept
    raise NotImplementedError(
        "plain: write the body"
    )


def documented(x):
    """Say "what"
    it does.

    x   a number
    """
    raise NotImplementedError(
        "documented: Say \\"what\\" it does."
    )


def short(x):
    raise NotImplementedError(
        "short: write the body"
    )


class Layer:
    """A layer."""

    size: int = 3

    def __init__(self, n):
        # sets self.n, self.m
        raise NotImplementedError(
            "Layer.__init__: A layer."
        )

    @property
    def twice(self):
        raise NotImplementedError(
            "Layer.twice: A layer."
        )'''


def test_bodies_go_and_all_else_stays():
    assert workbook.emptied(ONE_OF_EACH) == EMPTIED
    compile(EMPTIED, "emptied", "exec")


@pytest.mark.parametrize(
    ("text", "inside", "want"),
    [
        ("A.\n\n:::{solution-start} x\n:class: y\n:::\n\nB.", False, ("A.", True)),
        ("Because.\n\n````{solution-end}\n````\n\nB.", True, ("B.", False)),
        ("Because.", True, ("", True)),
        (
            "A.\n\n:::{solution} x\n:class: y\n\nC.\n:::\n\nB.",
            False,
            ("A.\n\nB.", False),
        ),
        ("A.\n\n:::{note}\nC.\n:::", False, ("A.\n\n:::{note}\nC.\n:::", False)),
    ],
)
def test_solutions_go_with_their_discussion_and_their_neighbours_stay(
    text, inside, want
):
    assert workbook.without_solutions(text, inside) == want


def test_the_discussion_of_a_solution_is_not_in_the_workbook():
    path = next(p for p in CHAPTERS if p.stem == "06_norm")
    assert "at a right angle to `x`" in path.read_text()
    assert "at a right angle to `x`" not in json.dumps(workbook.workbook_of(path))


# -- your code beside the book's -----------------------------------------------


def book_cells(stem):
    """The exported cells of a chapter."""
    path = next(p for p in CHAPTERS if p.stem == stem)
    return exported(json.loads(path.read_text()))


DEMO = """\
angles = rope_angles(torch.arange(4)[None], head_dim=8)
x = torch.arange(64.0).view(1, 2, 4, 8)
rotate_pairs(x, rope_table(angles))
apply_rope(x, angles)
seen = rope_angles(torch.arange(3)[None], head_dim=4)"""


def filled(tmp_path, stem, demo, *changes):
    """A workbook with text replaced in its exported cells and one cell that calls."""
    texts = book_cells(stem)
    for old, new in changes:
        assert sum(old in text for text in texts) == 1, old
        texts = [text.replace(old, new) for text in texts]
    cells = [code(text, f"c{i}") for i, text in enumerate([*texts, demo])]
    return saved(tmp_path, f"{stem}.ipynb", notebook(markdown("# T"), *cells))


def rope(tmp_path, *changes, demo=DEMO):
    return filled(tmp_path, "07_rope", demo, *changes)


def lines(found):
    return {name: record.line() for name, record in found.items()}


def test_the_books_own_code_agrees(tmp_path):
    assert set(lines(workbook.check_file(rope(tmp_path))).values()) == {
        "agrees with the book on one call",
        "agrees with the book on 2 calls",
    }


@pytest.mark.parametrize(
    ("old", "new", "part", "said"),
    [
        ("a * cos - b * sin", "a * cos + b * sin", "rotate_pairs", "numbers differ"),
        (
            "b * cos + a * sin",
            "a * sin + b * cos * 0",
            "rotate_pairs",
            "at 0, 1, 2, 3 only",
        ),
        ("dim=-1).to(", "dim=-1).double().to(", "rotate_pairs", "agrees"),
        ("[:, None], angles.sin()", ", angles.sin()", "rope_table", "has shape"),
        ("[..., None].float()", "[..., None].double()", "rope_angles", "float64"),
        ("** (2 * pair", "** (1 * pair", "rope_angles", "expected 0.3"),
        ("    return rotate_pairs(", "    rotate_pairs(", "apply_rope", "`return`"),
        ("    return rotate_pairs(", "    return rot(", "apply_rope", "NameError"),
        ("    return rotate_pairs(", "    return ) (", "apply_rope", "not Python"),
        ("def apply_rope(", "def apply(", "apply_rope", "no exported cell defines it"),
    ],
)
def test_a_slip_is_told_at_the_part_where_it_is(tmp_path, old, new, part, said):
    found = lines(workbook.check_file(rope(tmp_path, (old, new))))
    assert said in found.pop(part), found
    assert all(line.startswith("agrees") for line in found.values()), found


def test_a_missing_error_is_told(tmp_path):
    odd = "try:\n    rope_angles(torch.tensor([[1]]), 7)\nexcept ValueError:\n    pass"
    path = rope(tmp_path, ("if head_dim % 2:", "if False:"), demo=odd)
    found = workbook.check_file(path)["rope_angles"].line()
    assert "expected a ValueError: head_dim must be even" in found


def test_what_is_not_written_is_said_and_the_rest_is_compared(tmp_path):
    good = book_cells("07_rope")
    emptied = [workbook.emptied(text) for text in good]
    mixed = [*good[:2], *emptied[2:4], *good[4:]]
    cells = [code(text, f"c{i}") for i, text in enumerate([*mixed, DEMO])]
    path = saved(tmp_path, "07_rope.ipynb", notebook(*cells))
    found = lines(workbook.check_file(path))
    assert found["rope_table"] == found["rotate_pairs"] == "not written yet"
    assert found["rope_angles"] == "agrees with the book on 2 calls"
    assert found["apply_rope"] == "agrees with the book on one call"


def test_a_part_taken_from_the_book_is_said_and_helpers_are_welcome(tmp_path):
    own = ("def apply_rope(", "def helper():\n    return 1\n\n\ndef apply_rope(")
    path = rope(tmp_path, own)
    book = json.loads(path.read_text())
    for cell in book["cells"]:
        if "def rope_table" in _export.source(cell):
            cell["source"] = "from pali.rope import rope_table"
    found = lines(workbook.check_file(saved(tmp_path, "07_rope.ipynb", book)))
    assert found.pop("rope_table") == "taken from the book"
    assert all(line.startswith("agrees") for line in found.values()), found


def in_a_notebook(chapter, *things):
    """Watched as in a notebook, where the first difference stops the cell."""
    workbook.records.clear()
    return workbook.watch(chapter, *things)


def test_in_a_notebook_a_difference_stops_with_one_sentence():
    def rope_table(angles):
        return angles.cos(), angles.sin()

    watched = in_a_notebook("rope", rope_table)
    with pytest.raises(workbook.Different) as caught:
        watched(torch.zeros(1, 3, 4))
    assert caught.value._render_traceback_() == [
        "rope_table differs from the book's. item 0 of rope_table(float32[1, 3, 4]) "
        "has shape [1, 3, 4], expected [1, 1, 3, 4]."
    ]


NORM = """\
import torch
layer = RMSNorm(4)
y = layer(torch.arange(12.0).view(3, 4))"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("1 + self.weight", "self.weight", "All that came is 0."),
        ("1 + self.weight", "2 + self.weight", "Everything is 2 times what it should"),
        ("self.weight = nn", "self.gain = nn", "has no weight but besides gain"),
        ("torch.zeros(dim)", "torch.zeros(1, dim)", "weight of the weights"),
        ("        self.eps = eps\n", "", "has no attribute eps"),
        (".to(x.dtype)", "", "agrees with the book on one call"),
    ],
)
def test_a_layer_is_compared_with_the_books_of_the_same_weights(
    tmp_path, old, new, said
):
    found = workbook.check_file(filled(tmp_path, "06_norm", NORM, (old, new)))
    assert said in found["RMSNorm"].line()


CACHE = """\
import torch
from pali.decoder import DecoderConfig
config = DecoderConfig(architecture="gemma", vocab_size=8, width=4, num_layers=1,
    num_heads=1, num_kv_heads=1, head_dim=4, mlp_width=4, query_scale=1.0)
cache = Cache(config, 1, 8)
for start in (0, 3):
    places = start + torch.arange(3)[None]
    cache.begin(torch.ones(1, 3, dtype=torch.bool), places)
    k, v = cache.layer(0)(*torch.ones(2, 1, 1, 3, 4))
    cache.next_positions()
"""


def test_an_object_that_remembers_is_compared_at_each_call(tmp_path):
    found = lines(workbook.check_file(filled(tmp_path, "11_cache", CACHE)))
    assert all(line.startswith("agrees") for line in found.values()), found
    slip = ("self.valid[:, : self.length].sum(dim=1)", "self.valid.sum(dim=1) + 1")
    found = lines(workbook.check_file(filled(tmp_path, "11_cache", CACHE, slip)))
    assert "Cache.next_positions()" in found["Cache"]
    assert "it is 4, expected 3" in found["Cache"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda texts: texts, "agrees"),
        (lambda texts: texts[:2], "yields 2 items, expected 40"),
        (lambda texts: ["hello", *texts[1:]], "item 0 of all_texts() is 'hello'"),
    ],
)
def test_a_generator_is_compared_item_by_item(change, said):
    from pali import scenes

    texts = list(scenes.all_texts())

    def all_texts():
        yield from change(texts)

    watched = in_a_notebook("scenes", all_texts)
    try:
        list(watched())
    except workbook.Different as different:
        assert said in str(different)
    else:
        assert said in workbook.records["all_texts"].line()


def same_code(fn):
    """Another function that does the same: yours beside the book's."""
    return types.FunctionType(fn.__code__, fn.__globals__, fn.__name__)


def test_random_numbers_are_the_same_for_both_and_go_on_as_if_drawn_once(monkeypatch):
    def draw(size, generator):
        noise = torch.rand(size) + torch.from_numpy(np.random.rand(size)).float()
        return noise + torch.rand(size, generator=generator)

    def three(fn):
        torch.manual_seed(0)
        np.random.seed(0)
        generator = torch.Generator().manual_seed(1)
        return torch.stack([fn(3, generator=generator) for _ in range(3)])

    monkeypatch.setattr("pali.rope.draw", draw, raising=False)
    watched = in_a_notebook("rope", same_code(draw))
    assert torch.equal(three(watched), three(draw))
    assert workbook.records["draw"].line() == "agrees with the book on 2 calls"


def test_arguments_that_a_function_changes_are_copied_for_the_book(monkeypatch):
    def note(trace, x):
        trace["x"] = x.mul_(2)
        return x

    monkeypatch.setattr("pali.rope.note", note, raising=False)
    watched = in_a_notebook("rope", same_code(note))
    trace, x = {}, torch.ones(3)
    assert torch.equal(watched(trace, x), torch.full((3,), 2.0))
    assert workbook.records["note"].line() == "agrees with the book on one call"


# -- what differs --------------------------------------------------------------

T = torch.arange(12.0).view(3, 4) + 1
SQUARE = torch.arange(9.0).view(3, 3)


@pytest.mark.parametrize(
    ("got", "want", "said"),
    [
        (None, 3, "x is None (is a `return` missing?), expected the number 3"),
        (None, T, "expected a tensor float32[3, 4]"),
        (3.5, T, "x is a float, expected a tensor float32[3, 4]"),
        (T[:2], T, "x has shape [2, 4], expected [3, 4]."),
        (T.T, T, "Are two axes swapped?"),
        (T.double(), T, "x has dtype float64, expected float32"),
        (-T, T, "Every sign is the opposite."),
        (2.5 * T, T, "Everything is 2.5 times what it should be."),
        (T + 3, T, "Everything is +3 away from what it should be."),
        (SQUARE.T, SQUARE, "Axes 0 and 1 are swapped."),
        (T.flip(1), T, "Axis 1 is turned round."),
        (T.roll(1), T, "They are the right numbers in another order."),
        (T * torch.nan, T, "There is nan"),
        (T / 0, T, "There is infinity"),
        (T * 0, T, "All that came is 0."),
        (T + (T > 4) * T.cos(), T, "Along axis 0 it is right at 0 only."),
        (T > 3, T <= 3, "Every truth value is the opposite."),
        (T.int(), T.int() + (T > 11).int(), "1 of 12 numbers differ; at [2, 3]"),
        (2, 3, "x is 2, expected 3"),
        (0.5, 0.25, "x is 0.5, expected 0.25"),
        (torch.tensor(2), 3, "x is 2, expected 3"),
        (True, 1.0, "x is a bool, expected the number 1"),
        ("a cat", "a dog", "x is 'a cat', expected 'a dog'"),
        ([1, 2], [1, 2, 3], "x is [1, 2], expected [1, 2, 3]"),
        (["a"], ["a", "b"], "x has 1 items, expected 2"),
        ([1, 2], [1, 3], "x is [1, 2], expected [1, 3]"),
        (["a", T], ["a", T + 1], "item 1 of x has the right shape"),
        ({"a": 1}, {"a": 1, "b": 2}, "x has no b; expected a, b"),
        ({"a": 1}, {"a": 2}, "a of x is 1, expected 2"),
        (np.ones(3), np.zeros(3), "3 of 3 numbers differ; at [0] it is 1, expected 0."),
        (np.ones(3), T, "x is a ndarray, expected a tensor"),
        (T, np.ones(3), "x is a tensor float32[3, 4], expected an array"),
        (
            nn.Linear(2, 3),
            nn.Linear(3, 2),
            "weight of the weights of x is (3, 2), expected",
        ),
    ],
)
def test_the_first_clear_difference_is_told(got, want, said):
    assert said in difference(got, want, at="x")


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 0.1, "cat", T, T.bfloat16(), T > 3, T / 0, [1, (T, None)], {"a": T},
     np.arange(3), nn.Linear(2, 2), torch.zeros(0, 3), torch.ones(2, device="meta")],
    ids=str,
)  # fmt: skip
def test_a_value_agrees_with_its_copy(value):
    assert difference(copied(value), value) is None


def test_rounding_is_no_difference_and_a_slip_of_a_thousandth_is():
    assert difference(T * (1 + 1e-6), T) is None
    assert difference(T * (1 + 1e-3), T) is not None
    assert difference(T.bfloat16() * 1.004, T.bfloat16()) is None
    assert difference(0.1 + 0.2, 0.3) is None


# -- exercises -----------------------------------------------------------------


@exercise("Half", {"That is a quarter.": lambda x: x / 4})
def check_half(fn):
    expect(fn, 8.0, want=4.0)
    expect(fn, T, want=T / 2, says="a table")


@exercise("Count", {"Those are the rows.": 3})
def check_count(answer):
    agree(answer, 12, says="your count")
    assert answer != 13, "never"


def wrong_type(x):
    return [x / 2]


def stops(x):
    return x / nothing  # noqa: F821


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "Half: nothing to check yet."),
        (lambda x: x / 2, "Half: correct."),
        (lambda x: x / 4, "your function(8) is 2, expected 4. That is a quarter."),
        (lambda x: 4.0, "a table: your function(float32[3, 4]) is a float, expected"),
        (lambda x: x, "Half: not yet. your function(8) is 8, expected 4."),
        (lambda: 1, "it stopped"),
        (wrong_type, "wrong_type(8) is a list, expected the number 4."),
        (stops, "`return x / nothing  # noqa: F821` with NameError: name 'nothing'"),
        (3, "your answer is an int, expected a function."),
    ],
)
def test_a_check_says_what_is_wrong(answer, said):
    assert said in check_half(answer)
    assert repr(check_half(answer)) == str(check_half(answer))  # without quotes


def test_a_check_of_a_value_says_what_is_wrong():
    assert check_count(12) == "Count: correct."
    said = "Count: not yet. your count is 3, expected 12. Those are the rows."
    assert check_count(3) == said


def test_prove_passes_a_sound_exercise():
    assert prove(check_half, lambda x: x / 2) == "Half: correct."
    assert prove(check_count, 12) == "Count: correct."


def test_prove_rejects_a_wrong_solution_and_a_check_that_accepts_a_slip():
    with pytest.raises(AssertionError, match="not yet"):
        prove(check_half, lambda x: x)

    @exercise("Lax", {"That is a quarter.": lambda x: x / 4})
    def lax(fn):
        expect(fn, 0.0, want=0.0)

    with pytest.raises(AssertionError, match="'That is a quarter.' was met with: Lax"):
        prove(lax, lambda x: x / 2)


def test_an_answer_can_be_a_class():
    def ask(kind, x):
        return kind()(x)

    class Twice:
        def __call__(self, x):
            return 2 * x

    class Thrice(Twice):
        def __call__(self, x):
            return 3 * x

    @exercise("Twice", {"Three times.": Thrice})
    def check_twice(kind):
        expect(kind, 4, want=8, via=ask)

    assert prove(check_twice, Twice) == "Twice: correct."


# -- the command ---------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A repository with two chapters, and the working folder inside it."""
    toy = exporting("import math", "def double(x):\n    return 2 * x")
    start = notebook(markdown("# S"), code("print(1)", "a"))
    return repository(tmp_path / "r", c01_toy=toy, c00_start=start)


def run(root, *args):
    return workbook.main([*map(str, args), "--root", str(root)])


def test_chapters_are_written_by_name_number_or_all(root, tmp_path, capsys):
    assert run(root, "toy", "--out", tmp_path / "a") == 0
    assert run(root, "01", "--out", tmp_path / "b") == 0
    assert run(root, "--out", tmp_path / "c") == 0
    for folder, count in (("a", 1), ("b", 1), ("c", 2)):
        made = sorted(p.name for p in (tmp_path / folder).iterdir())
        assert made == ["00_start.ipynb", "01_toy.ipynb"][2 - count :]
    text = (tmp_path / "a" / "01_toy.ipynb").read_text()
    assert "return 2 * x" not in text
    assert "raise NotImplementedError(" in text
    assert capsys.readouterr().out.count("wrote") == 4


def test_a_readers_file_is_never_overwritten_without_force(root, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "01_toy.ipynb").write_text("my work")
    assert run(root, "--out", mine) == 2
    assert (mine / "01_toy.ipynb").read_text() == "my work"
    assert not (mine / "00_start.ipynb").exists()  # none or all
    assert "may hold your work" in capsys.readouterr().err
    assert run(root, "--out", mine, "--force") == 0
    assert "my work" not in (mine / "01_toy.ipynb").read_text()


def test_the_books_own_notebooks_are_never_the_target(root, capsys):
    before = (root / "notebooks" / "01_toy.ipynb").read_text()
    assert run(root, "--out", root / "notebooks", "--force") == 2
    assert (root / "notebooks" / "01_toy.ipynb").read_text() == before
    assert "own notebook" in capsys.readouterr().err


def bad_inputs(folder):
    (folder / "file").write_text("x")
    (folder / "07_rope.ipynb").write_text("{}")
    empty = notebook(markdown("# T"), code("1", "a"))
    saved(folder, "00_start.ipynb", empty)
    saved(folder, "mine.ipynb", empty)
    return {
        "no chapter 'nothing'": ["nothing"],
        "is a file; name a folder": ["--out", folder / "file"],
        "cannot write to": ["--out", folder / "file" / "deeper"],
        "cannot read": ["--check", folder / "no.ipynb"],
        "cannot read ": ["--check", folder],
        "is not a notebook": ["--check", folder / "07_rope.ipynb"],
        "does not say its chapter": ["--check", folder / "mine.ipynb"],
        "exports nothing": ["--check", folder / "00_start.ipynb"],
        "--check takes one FILE": ["toy", "--check", folder / "file"],
        "--quick belongs to --check": ["--quick"],
        "unrecognized arguments": ["--nothing"],
    }


def test_bad_input_ends_in_one_sentence(root, tmp_path, capsys):
    for said, args in bad_inputs(tmp_path).items():
        assert run(root, *args) == 2, args
        text = capsys.readouterr().err
        assert said in text and text.count("\n") == 1, text


def test_without_notebooks_the_repository_is_named(tmp_path, capsys):
    assert run(tmp_path) == 2
    said = capsys.readouterr().err
    assert "not part of the installed package: clone https://" in said


@pytest.mark.slow
def test_the_command_checks_a_file_and_its_exit_code_tells(tmp_path):
    def check(path):
        return subprocess.run(
            [sys.executable, "-m", "pali.workbook", "--check", path],
            capture_output=True, text=True,
        )  # fmt: skip

    done = check(rope(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[0] == "rope_angles   agrees with the book on 2 calls"
    )
    done = check(rope(tmp_path, ("a * cos - b", "a * cos + b")))
    assert done.returncode == 1
    assert "rotate_pairs  differs: rotate_pairs(float32[1, 2, 4, 8]" in done.stdout


# -- what stands at the end of a chapter ----------------------------------------


def test_a_cost_table_writes_numbers_as_people_say_them():
    rows = {"parameters": (0, 1_811_939_328), "bytes": (34_816, 278_528)}
    table = viz.cost_table(rows | {"share": ("0.1%", 2.5), "M": (1e6, 999_600)})
    assert repr(table) == (
        "<cost, shipped model / PaliGemma 3B: parameters: 0 / 1.81 billion; "
        "bytes: 34,816 / 279 thousand; share: 0.1% / 2.5; M: 1 million / 1 million>"
    )
    assert table.markup.count("<th scope=") == 2 + 4
    with pytest.raises(ValueError, match="row 'a' has 1 values, but there are 2"):
        viz.cost_table({"a": (1,)})


def test_the_map_grows_with_the_chapters():
    def tinted(chapter):
        return viz.model_map(chapter, built=True).markup.count('fill-opacity="0.22"')

    assert [tinted(name) for name in ("norm", "rope", "gqa")] == [5, 6, 7]
    assert "0.22" not in viz.model_map("rope").markup
    label = repr(viz.model_map("norm", built=True))
    assert "Built so far: patches, attention, vision tower, contrastive" in label
    assert "rope" not in label


def test_the_books_run_leaves_nothing_in_a_checkpoint():
    """What is kept for gradients is counted when a checkpoint computes again."""
    from torch.utils.checkpoint import checkpoint

    workbook.records.clear()
    workbook.records["square"] = workbook.Record()
    square = workbook.beside("square", lambda x: (x * x).sum(), lambda x: (x * x).sum())
    x = torch.ones(3, requires_grad=True)
    square(x)  # the same call is compared twice: here, and once in the checkpoint
    checkpoint(square, x, use_reentrant=False).backward()
    assert torch.equal(x.grad, 2 * torch.ones(3))
    assert workbook.records["square"].agreed == 2
    workbook.records.clear()
