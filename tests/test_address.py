"""The web address and the release tag stand in one place; the rest follows."""

import json
import shutil

import pytest
import yaml

from pali import _address
from toys import code, exporting, markdown, notebook, repository

PLACES = ("pyproject.toml", "_config.yml", "CITATION.cff", "README.md")
NEW = ("https://github.com/someone/else", "v2.0.1")


@pytest.fixture
def copy(tmp_path):
    """The real files in another folder, with one finished toy notebook."""
    toy = exporting("x = 1")
    root = repository(tmp_path / "copy", c01_patches=toy)
    for name in (*PLACES, "src/pali/__init__.py"):
        if (_address.ROOT / name).exists():
            shutil.copy(_address.ROOT / name, root / name)
    assert _address.main(["--root", str(root)]) == 0
    return root


def test_everything_derived_agrees_with_pyproject():
    assert _address.differing() == []


def test_what_the_book_reads_agrees_with_pyproject():
    address = _address.read()
    config = yaml.safe_load((_address.ROOT / "_config.yml").read_text())["repository"]
    citation = yaml.safe_load((_address.ROOT / "CITATION.cff").read_text())
    assert (config["url"], config["branch"]) == (address.repository, address.tag)
    assert citation["repository-code"] == address.repository
    assert f"v{citation['version']}" == address.tag


def test_setting_a_new_address_leaves_no_trace_of_the_old_one(copy):
    old = _address.read(copy)
    assert _address.main(["--root", str(copy), "--set", *NEW]) == 0
    assert _address.read(copy) == _address.Address(*NEW)
    assert _address.differing(copy) == []
    for path in copy.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert old.slug not in text, path
            assert old.tag not in text, path
    assert '__version__ = "2.0.1"' in (copy / "src/pali/__init__.py").read_text()


def test_setting_it_back_restores_every_byte(copy):
    old = _address.read(copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    _address.main(["--root", str(copy), "--set", *NEW])
    _address.main(["--root", str(copy), "--set", old.repository, old.tag])
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("README.md", "/blob/v", "/blob/v9"),
        (
            "README.md",
            "git clone https://github.com/",
            "git clone https://github.com/x",
        ),
        ("_config.yml", "https://github.com/", "https://github.com/x"),
        ("CITATION.cff", "https://github.com/", "https://github.com/x"),
        ("CITATION.cff", "\nversion: ", "\nversion: 9"),
        ("pyproject.toml", 'Issues = "https://github.com/', 'Issues = "https://x.org/'),
        ("src/pali/__init__.py", '__version__ = "', '__version__ = "9'),
        ("notebooks/01_patches.ipynb", "/blob/v", "/blob/v9"),
        ("notebooks/01_patches.ipynb", "git+https://github.com/", "git+https://a.b/"),
        ("notebooks/01_patches.ipynb", "Open in Colab", "Open it"),
    ],
)
def test_one_place_that_disagrees_is_found(copy, name, before, after):
    path = copy / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert _address.differing(copy) == [path]
    assert _address.main(["--root", str(copy), "--check"]) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ("github.com/a/b", "v1.0.0"),
        ("https://github.com/a", "v1.0.0"),
        (NEW[0], "main"),
    ],
)
def test_an_address_that_cannot_be_right_changes_nothing(copy, wrong, capsys):
    before = (copy / "pyproject.toml").read_text()
    assert _address.main(["--root", str(copy), "--set", *wrong]) == 2
    assert (copy / "pyproject.toml").read_text() == before
    assert "is not a" in capsys.readouterr().err


def test_link_and_install_cell_are_put_in_once_and_then_stay():
    address = _address.read()
    toy = notebook(markdown("# Toy\n\nWords."), code("x = 1", "a"))
    assert _address.settle(toy, "07_toy", address)
    first = json.dumps(toy)
    link = f"[Open in Colab]({address.colab('07_toy')})"
    assert "".join(toy["cells"][0]["source"]) == f"# Toy\n\n{link}\n\nWords."
    install = "".join(toy["cells"][1]["source"])
    assert f"git+{address.repository}@{address.tag}" in install
    assert toy["cells"][2]["id"] == "a"
    assert not _address.settle(toy, "07_toy", address)
    assert json.dumps(toy) == first


def test_a_set_up_cell_that_does_more_keeps_the_rest():
    text = 'import torch\nfind_spec("pali")\nbook = "git+https://x.org/a/b@v0.0.1"'
    toy = notebook(markdown("# Toy"), code(text, "a"))
    _address.settle(toy, "07_toy", _address.Address(*NEW))
    assert len(toy["cells"]) == 2
    assert "".join(toy["cells"][1]["source"]) == text.replace(
        "https://x.org/a/b@v0.0.1", "https://github.com/someone/else@v2.0.1"
    )


def test_the_install_cell_does_nothing_where_the_package_is(monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *_: pytest.fail("installed"))
    address = _address.read()
    names: dict = {}
    exec(
        _address.BOOTSTRAP.format(repository=address.repository, tag=address.tag), names
    )
    assert "book" not in names
