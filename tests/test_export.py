"""Exported cells become one readable module, and a cell that breaks a rule is named."""

import ast
import importlib.util
import subprocess
import sys

import pytest

from pali import _export
from toys import code, exporting, markdown, notebook, repository

DOUBLE = "def double(x):\n    return 2 * x"


def exported(tmp_path, *blocks, **options):
    root = repository(tmp_path / "r", c07_toy=exporting(*blocks, **options))
    return _export.module_text(root / "notebooks" / "07_toy.ipynb")


def test_a_module_is_its_cells_in_order_below_the_imports(tmp_path):
    text = exported(tmp_path, DOUBLE, "import math", "LIMIT = math.pi")
    assert text == (
        '"""Toy: a lesson.\n'
        "\n"
        "Generated from notebooks/07_toy.ipynb: edit the notebook, then run "
        "`make export`. Each\n"
        "block names the cell it comes from.\n"
        '"""\n'
        "\n"
        "import math\n"
        "\n"
        '__all__ = ["LIMIT", "double"]\n'
        "\n\n"
        "# cell a\n"
        "def double(x):\n"
        "    return 2 * x\n"
        "\n\n"
        "# cell c\n"
        "LIMIT = math.pi\n"
    )


def test_only_marked_code_cells_are_exported(tmp_path):
    toy = notebook(
        markdown("# T"),
        markdown("#| export\nx = 1", "n"),
        code("y = 2", "a"),
        code("#| export\nz = 3", "b"),
    )
    root = repository(tmp_path / "r", c01_toy=toy)
    tree = ast.parse(_export.module_text(root / "notebooks" / "01_toy.ipynb"))
    names = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    assert names == ["__all__", "z"]


def test_a_notebook_without_marked_cells_writes_no_module(tmp_path):
    root = repository(tmp_path / "r", c00_start=notebook(markdown("# S")))
    assert _export.targets(root) == {}


def test_imports_are_merged_and_ordered_as_ruff_wants_them(tmp_path):
    first = (
        "import torch\nfrom torch import nn\nfrom pali.norm import RMSNorm\n"
        "import math, json\nfrom collections.abc import Sequence"
    )
    second = "import numpy as np\nfrom torch import Tensor, nn, cat\nimport math"
    text = exported(
        tmp_path,
        first,
        second,
        "USED = (math, json, np, torch, nn, Tensor, cat, Sequence, RMSNorm)",
    )
    head = text.split('"""\n')[1].split("__all__")[0]
    assert head == (
        "\nimport json\nimport math\nfrom collections.abc import Sequence\n"
        "\nimport numpy as np\nimport torch\nfrom torch import Tensor, cat, nn\n"
        "\nfrom pali.norm import RMSNorm\n\n"
    )
    (tmp_path / "toy.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "I,E,F"]
    ruff += ["--config", 'lint.isort.known-first-party = ["pali"]']
    done = subprocess.run([*ruff, tmp_path / "toy.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_long_imports_and_long_all_get_one_line_each(tmp_path):
    names = [f"a_rather_long_name_{n}" for n in range(6)]
    text = exported(
        tmp_path,
        f"from torch import {', '.join(names)}",
        "\n".join(f"{name}_again = {name}" for name in names),
    )
    assert max(map(len, text.splitlines())) <= 88
    assert "from torch import (\n    a_rather_long_name_0,\n" in text
    assert '__all__ = [\n    "a_rather_long_name_0_again",\n' in text


def test_the_module_that_is_written_can_be_imported(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(exported(tmp_path, DOUBLE, "_hidden = 1"))
    spec = importlib.util.spec_from_file_location("toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.double(21) == 42
    assert module.__all__ == ["double"]


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("import math\nx = math.pi", "imports in an exported cell of their own"),
        ("from math import *", "star import"),
        ("from .norm import RMSNorm", "relative import"),
        ("%matplotlib inline\nx = 1", "No magics"),
        ("files = !ls", "No magics"),
        ("x = get_ipython()", "no magics"),
        ("def f(:\n    pass", "not plain Python"),
        ("print('shown')", "only runs something"),
        ("x = 1\nassert x", "line 3 only runs something"),
        ("Module.forward = None", "inside their class"),
        ("# nothing but a comment", "empty"),
    ],
)
def test_a_cell_that_breaks_a_rule_is_named(tmp_path, block, complaint):
    with pytest.raises(_export.ExportError, match="07_toy.ipynb, cell b: ") as caught:
        exported(tmp_path, DOUBLE, block)
    assert complaint in str(caught.value)


def test_a_name_defined_in_two_cells_is_refused(tmp_path):
    with pytest.raises(_export.ExportError, match="double is already defined"):
        exported(tmp_path, DOUBLE, DOUBLE)


def test_a_mark_below_the_first_line_is_refused(tmp_path):
    toy = notebook(markdown("# T"), code("x = 1\n#| export\ny = 2", "a"))
    root = repository(tmp_path / "r", c01_toy=toy)
    with pytest.raises(_export.ExportError, match="must be the first line"):
        _export.targets(root)


def test_a_notebook_without_a_title_is_refused(tmp_path):
    with pytest.raises(_export.ExportError, match="no title"):
        exported(tmp_path, DOUBLE, title="no heading")


def test_a_module_written_by_hand_is_never_overwritten(tmp_path):
    root = repository(tmp_path / "r", c01_toy=exporting(DOUBLE))
    by_hand = root / "src" / "pali" / "toy.py"
    by_hand.write_text("x = 1\n")
    assert _export.main(["--root", str(root)]) == 1
    assert by_hand.read_text() == "x = 1\n"


def test_check_fails_until_the_module_is_written_and_after_it_was_edited(
    tmp_path, capsys
):
    root = repository(tmp_path / "r", c01_toy=exporting(DOUBLE))
    command = ["--root", str(root)]
    assert _export.main([*command, "--check"]) == 1
    assert not (root / "src" / "pali" / "toy.py").exists()
    assert _export.main(command) == 0
    assert _export.main([*command, "--check"]) == 0
    module = root / "src" / "pali" / "toy.py"
    module.write_text(module.read_text().replace("2 * x", "3 * x"))
    capsys.readouterr()
    assert _export.main([*command, "--check"]) == 1
    assert "stale: src/pali/toy.py" in capsys.readouterr().out


def test_check_reports_a_module_whose_notebook_is_gone(tmp_path, capsys):
    root = repository(tmp_path / "r", c01_toy=exporting(DOUBLE))
    assert _export.main(["--root", str(root)]) == 0
    (root / "notebooks" / "01_toy.ipynb").unlink()
    assert _export.main(["--root", str(root), "--check"]) == 1
    assert "no notebook: src/pali/toy.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("from pali.later import f", "later comes later"),
        ("import pali.later", "later comes later"),
        ("from pali import later", "later comes later"),
        ("from pali.toy import f", "comes later or is itself"),
        ("from pali import load", "pali.load is no chapter"),
        ("from pali.viz import bars", "import viz"),
    ],
)
def test_an_import_against_the_reading_order_is_found(tmp_path, line, complaint):
    root = repository(
        tmp_path / "r",
        c01_early=exporting("E = 1"),
        c02_toy=exporting(line, "from pali.early import E", "F = E"),
        c03_later=exporting("L = 1"),
    )
    (sentence,) = _export.imports_ahead(root)
    assert complaint in sentence
    assert sentence.startswith("02_toy.ipynb, cell a")


def test_an_import_hidden_inside_a_function_is_found_too(tmp_path):
    inside = "def f():\n    from pali.later import L\n\n    return L"
    root = repository(
        tmp_path / "r", c02_toy=exporting(inside), c03_later=exporting("L = 1")
    )
    assert len(_export.imports_ahead(root)) == 1
