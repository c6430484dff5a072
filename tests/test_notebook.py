"""Notebooks are stored in one form, keep their ids, and bad ones are refused."""

import base64
import io
import json

import pytest
from PIL import Image, PngImagePlugin

from pali import _notebook
from toys import code, markdown, notebook, repository

WIDGET = "application/vnd.jupyter.widget-view+json"


def shown(**data):
    kinds = {"png": "image/png", "svg": "image/svg+xml", "html": "text/html"}
    kinds |= {"plain": "text/plain", "widget": WIDGET}
    data = {kinds[key]: value for key, value in data.items()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": [text]}


def png(**texts):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (10, 200, 30)).save(buffer, "png", pnginfo=info)
    return base64.b64encode(buffer.getvalue()).decode()


def saved(tmp_path, content, normalised=True):
    path = repository(tmp_path / "r") / "notebooks" / "01_toy.ipynb"
    if normalised:
        content = _notebook.normalise(content)
    path.write_text(_notebook.as_text(content), encoding="utf-8")
    return path


GOOD = notebook(
    markdown("# Toy"),
    code("print(1)", "a", 1, [printed("1\n")]),
    code(
        "plot()",
        "b",
        2,
        [shown(png=png(), plain=["<Figure size 640x480 with 1 Axes>"])],
        mystnb={"image": {"alt": "A line that rises from left to right"}},
    ),
)


def test_a_clean_notebook_has_no_problems(tmp_path):
    assert _notebook.problems(saved(tmp_path, GOOD)) == []


def fault(cell=1, **changes):
    bad = json.loads(json.dumps(GOOD))
    bad["cells"][cell].update(changes)
    return bad


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (fault(execution_count=2), "do not run 1 to 2 in order: [2, 2]"),
        (fault(execution_count=None), "do not run 1 to 2 in order"),
        (fault(outputs=[printed("w", "stderr")]), "cell a: printed to stderr"),
        (
            fault(
                outputs=[
                    {
                        "output_type": "error",
                        "ename": "KeyError",
                        "evalue": "",
                        "traceback": [],
                    }
                ]
            ),
            "cell a: stopped with KeyError",
        ),
        (fault(outputs=[printed("/home/me/x.png\n")]), "path of one machine"),
        (fault(outputs=[printed("saved /tmp/abc/x\n")]), "path of one machine"),
        (fault(source=["open('/Users/me/x')"]), "in the source"),
        (fault(outputs=[printed("<f at 0x7f00aa11>\n")]), "memory address"),
        (fault(source=[]), "cell a: empty"),
        (fault(2, metadata={}), "cell b: a figure without alt text"),
        (fault(2, metadata={"mystnb": {"image": {"alt": " "}}}), "without alt text"),
        (fault(outputs=[shown(svg=["<svg/>"])]), "a figure without alt text"),
        (fault(outputs=[shown(html=["<img src='x'>"])]), "<img> without alt"),
        (fault(outputs=[shown(html=["<svg width='3'>"])]), "<svg> without aria-label"),
        (fault(0, source=["# T\n![](x.png)"]), "cell m: a picture without alt text"),
        (
            fault(
                2,
                outputs=[shown(svg=["<dc:date>2026</dc:date>"])],
            ),
            "a date inside an SVG",
        ),
    ],
)
def test_a_bad_notebook_is_refused(tmp_path, bad, complaint):
    wrong = _notebook.problems(saved(tmp_path, bad))
    assert any(complaint in sentence for sentence in wrong), wrong


@pytest.mark.parametrize(
    "change",
    [
        lambda nb: nb["metadata"].update(widgets={"state": {}}),
        lambda nb: nb["metadata"].update(kernelspec={"name": "my-env"}),
        lambda nb: nb["cells"][1]["metadata"].update(execution={"started": "now"}),
        lambda nb: nb["cells"][1].update(outputs=[shown(widget={"model_id": "f"})]),
        lambda nb: nb["cells"][1].update(outputs=[printed("1"), printed("\n")]),
        lambda nb: nb["cells"][2].update(id="a"),
        lambda nb: nb["cells"][2].pop("id"),
        lambda nb: nb["cells"][2].update(
            outputs=[shown(png=png(Software="Matplotlib 3"))]
        ),
        lambda nb: nb["cells"][1].update(source=["print(1)  \n"]),
    ],
)
def test_what_is_not_in_the_stored_form_is_found_and_repaired(tmp_path, change):
    noisy = json.loads(json.dumps(GOOD))
    change(noisy)
    path = saved(tmp_path, noisy, normalised=False)
    assert _notebook.problems(path) != []
    _notebook.store(path, noisy)
    assert _notebook.problems(path) == []


def test_normalising_twice_changes_nothing():
    once = _notebook.normalise(GOOD)
    assert _notebook.as_text(_notebook.normalise(once)) == _notebook.as_text(once)


def test_versions_leave_a_picture_and_the_pixels_stay():
    plain = _notebook.plain_png(png(Software="Matplotlib 3", Date="today"))
    assert plain == _notebook.plain_png(png())
    image = Image.open(io.BytesIO(base64.b64decode(plain)))
    assert image.getpixel((2, 1)) == (10, 200, 30)


def test_editing_a_draft_keeps_ids_and_the_outputs_of_unchanged_cells(tmp_path):
    path = saved(tmp_path, GOOD)
    draft = _notebook.to_py(path)
    text = draft.read_text().replace("# # Toy", "# # Toy, edited")
    text = text.replace("plot()", "plot(1)") + "\n# %% [markdown]\n# The end.\n"
    draft.write_text(text)
    _notebook.from_py(draft)
    cells = json.loads(path.read_text())["cells"]
    assert [cell["id"] for cell in cells[:3]] == ["m", "a", "b"]
    assert "".join(cells[0]["source"]) == "# Toy, edited"
    assert cells[1]["outputs"] == [printed("1\n")]
    assert cells[2]["outputs"] == []
    assert cells[2]["metadata"] == GOOD["cells"][2]["metadata"]
    assert cells[3]["id"] not in {"m", "a", "b"}


def test_a_draft_that_is_not_edited_changes_no_byte(tmp_path):
    path = saved(tmp_path, GOOD)
    before = path.read_bytes()
    _notebook.from_py(_notebook.to_py(path))
    assert path.read_bytes() == before


def test_metadata_of_folded_solutions_survives_the_round_trip(tmp_path):
    folded = json.loads(json.dumps(GOOD))
    folded["cells"][1]["metadata"] = {
        "cellView": "form",
        "jupyter": {"source_hidden": True},
        "tags": ["hide-cell"],
    }
    path = saved(tmp_path, folded)
    draft = _notebook.to_py(path)
    path.unlink()
    _notebook.from_py(draft)
    made = json.loads(path.read_text())["cells"][1]
    assert made["metadata"] == folded["cells"][1]["metadata"]


def test_a_newer_draft_is_not_overwritten(tmp_path):
    path = saved(tmp_path, GOOD)
    draft = _notebook.to_py(path)
    draft.write_text(draft.read_text() + "\n# more\n")
    with pytest.raises(_notebook.NotebookError, match="from-py"):
        _notebook.to_py(path)


@pytest.mark.slow
def test_running_twice_gives_the_same_bytes_and_a_failing_cell_stores_nothing(
    tmp_path, capsys
):
    toy = notebook(
        markdown("# Toy"),
        code("import os\n\nx = 41", "a", None),
        code("print(x)\nprint(x + 1)\nx + 1", "b", 7),
    )
    path = saved(tmp_path, toy)
    assert _notebook.main([str(path)]) == 0
    first = path.read_bytes()
    assert _notebook.problems(path) == []
    outputs = json.loads(first)["cells"][2]["outputs"]
    assert outputs[0] == {**printed(""), "text": ["41\n", "42\n"]}
    assert outputs[1]["data"] == {"text/plain": ["42"]}
    assert _notebook.main([str(path)]) == 0
    assert path.read_bytes() == first
    broken = json.loads(first)
    broken["cells"][2]["source"] = ["print(y)"]
    text = _notebook.as_text(broken)
    path.write_text(text)
    assert _notebook.main([str(path)]) == 1
    assert path.read_text() == text
    assert "NameError" in capsys.readouterr().err
