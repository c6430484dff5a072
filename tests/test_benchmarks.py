"""The benchmarks: every row is there and compares like with like. No time is judged."""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

import pali
from pali import __main__
from pali import speed as pali_speed
from pali.generation import steps
from pali.tokens import Batch
from tiny import IMAGE_ID, PATCHES, tiny_model, tiny_pixels, tiny_rows

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import baseline  # noqa: E402
import checkpoint  # noqa: E402
import sides  # noqa: E402
import speed  # noqa: E402
import targets  # noqa: E402


def options(*argv: str) -> argparse.Namespace:
    return __main__.parser(["bench"]).parse_args(["bench", *argv])


def context(tmp_path, *names: str, column: str | None = None) -> speed.Context:
    column = column or speed.choose_column(None)
    return speed.Context(
        "tiny", 1, column, tmp_path, list(names), "a test",
        speed.environment(column, None), say=lambda text: None,
    )  # fmt: skip


# -- a whole run, tiny ---------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def kept(cache):
    """All rows of one round with a tiny model: what is kept of them."""
    path = cache / "results.json"
    argv = ["--size", "tiny", "--rounds", "1", "--cache", str(cache)]
    assert speed.run(options(*argv, "--out", str(path))) == 0
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_row_of_the_table_is_measured(kept):
    assert list(kept["rows"]) == [row.name for row in targets.ROWS]
    assert [n for n, row in kept["rows"].items() if "error" in row] == []


@pytest.mark.slow
@pytest.mark.parametrize("row", targets.ROWS, ids=lambda row: row.name)
def test_a_row_is_kept_with_all_that_makes_it_readable(kept, row):
    found = kept["rows"][row.name]
    assert found["what"] == row.what and found["unit"] == row.unit
    assert [found["target"], found["stretch"]] == list(row.limits(kept["column"]))
    assert found["rounds"] == len(found["rounds_ours"]) >= 1
    low, high = found["spread"]
    numbers = [found["ours"], found["value"], low, high, *found["rounds_ours"]]
    if found["reference"] is not None:
        numbers += [found["reference"], *found["rounds_reference"]]
        assert found["ratio"] == pytest.approx(found["ours"] / found["reference"])
    assert all(math.isfinite(x) for x in numbers)
    assert found["met"] == targets.met(row, kept["column"], found["value"])
    assert found["size"] == "tiny" and f"--only {row.name}" in found["command"]
    machine = found["machine"]
    assert machine["threads"] >= 1 and machine["torch"] and machine["onednn"]
    assert machine["matmul_peak"].keys() == {"float32", "bfloat16", "int8"}


@pytest.mark.slow
def test_both_sides_said_the_same_before_they_were_timed(kept):
    rows = kept["rows"]
    for check in rows["prefill_float32"]["details"]["checks"].values():
        assert check["tokens_equal"] == check["tokens"] == speed.TOKENS
        assert check["cosine"] > 0.9999
    assert rows["preprocess"]["details"]["bit_exact"]
    assert all(s["same_tokens"] for s in rows["steps"]["details"]["steps"][:-1])
    assert len(rows["mini_answer"]["details"]["answers"]) == 8


@pytest.mark.slow
def test_the_table_shows_every_row(kept):
    lines = speed.table(kept["rows"], kept["column"]).splitlines()
    assert len(lines) == 1 + len(targets.ROWS)
    assert all(line.split()[0] in targets.BY_NAME for line in lines[1:])


@pytest.mark.slow
def test_sides_with_other_weights_are_found_out(kept, cache, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(cache / "tiny-float32", other)
    model, processor = pali.load(other)
    with torch.no_grad():
        model.decoder.blocks[0].mlp.down.weight.neg_()
    pali.save_model(model, other, processor)
    here = context(cache)
    with speed.Side("ours", here) as ours, speed.Side("reference", here) as theirs:
        ours.ask("load", folder=str(cache / "tiny-float32"), dtype=None)
        theirs.ask("load", folder=str(other), dtype=None)
        for side in (ours, theirs):
            side.ask("prompt", rows=2)
        with pytest.raises(RuntimeError, match="the sides differ"):
            speed.agree(ours, theirs, "sdpa", exact=True)
        with pytest.raises(RuntimeError, match="reference, load: OSError"):
            theirs.ask("load", folder=str(tmp_path / "none"), dtype=None)
        ours.process.kill()
        with pytest.raises(RuntimeError, match="ours ended in `answer`"):
            ours.ask("answer", count=1)


# -- the run itself ------------------------------------------------------------


def fake(monkeypatch, results: dict, tmp_path) -> list[str]:
    """Replace measuring by given numbers; the names of groups that were run."""
    asked = []

    def runner(group: str):
        def run(context):
            asked.append(group)
            for name, ours in results.items():
                if targets.BY_NAME[name].group == group:
                    if isinstance(ours, Exception):
                        raise ours
                    yield name, speed.record(context, name, [ours], [1.0])

        return run

    monkeypatch.setattr(speed, "RUNNERS", {g: runner(g) for g in targets.GROUPS})
    monkeypatch.setattr(speed, "describe", lambda context: {"cpu": "a test"})
    monkeypatch.setattr(speed, "prepare_folder", lambda context, dtype: None)
    return asked


def test_a_row_that_fails_says_why_and_stops_no_other(monkeypatch, tmp_path, capsys):
    results = {
        "prefill_bf16": 0.5, "decode_bf16": RuntimeError("no memory\nleft"),
        "preprocess": 0.5,
    }  # fmt: skip
    fake(monkeypatch, results, tmp_path)
    out = tmp_path / "r.json"
    argv = ["--only", ",".join(results), "--out", str(out), "--size", "tiny"]
    assert speed.run(options(*argv)) == 1
    rows = json.loads(out.read_text())["rows"]
    assert rows["decode_bf16"]["error"] == "no memory left"
    assert rows["prefill_bf16"]["value"] == rows["preprocess"]["value"] == 0.5
    assert "no memory left" in capsys.readouterr().out


def test_runs_are_merged_row_by_row_and_resumed(monkeypatch, tmp_path):
    out = tmp_path / "r.json"
    common = ["--out", str(out), "--size", "tiny"]
    fake(monkeypatch, {"preprocess": 0.5, "import_load": OSError("x")}, tmp_path)
    speed.run(options(*common, "--only", "preprocess,import"))
    asked = fake(monkeypatch, {"import_load": 0.7, "mini_answer": 0.4}, tmp_path)
    speed.run(options(*common, "--only", "preprocess,import,mini", "--resume"))
    assert asked == ["mini", "import"]  # what was there is not measured again
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["mini_answer", "preprocess", "import_load"]
    assert [rows[n]["value"] for n in rows] == [0.4, 0.5, 0.7]


def test_results_of_another_column_or_kind_are_not_overwritten(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"column": "other", "rows": {}}))
    with pytest.raises(ValueError, match="holds the column 'other'"):
        speed.read_results(path, "unit")
    path.write_text("[]")
    with pytest.raises(ValueError, match="no file of results"):
        speed.read_results(path, "unit")


def test_a_record_holds_the_ratio_of_medians_against_the_target(tmp_path):
    here = context(tmp_path, column="unit")
    found = speed.record(here, "decode_bf16", [1.0, 2.0, 9.0], [4.0, 4.0, 3.0])
    assert found["ratio"] == found["value"] == 0.5
    assert found["spread"] == [0.25, 3.0] and found["met"]
    shares = speed.roofline(here, "roofline_bf16", 100, [2.0], [100.0, 80.0], [4.0])
    assert shares["value"] == 0.5 and shares["met"] is None  # only reported here
    assert shares["ours"] == pytest.approx(50e-9)


@pytest.mark.parametrize(
    ("name", "column", "value", "verdict"),
    [
        ("prefill_bf16", "none", 0.42, True), ("prefill_bf16", "masked", 0.43, False),
        ("prefill_bf16", "unit", 0.97, True), ("roofline_bf16", "none", 0.84, False),
        ("roofline_bf16", "masked", 0.85, True), ("roofline_bf16", "unit", 0.1, None),
        ("first_prefill", "unit", 9.0, None),
    ],
)  # fmt: skip
def test_targets_depend_on_the_column(name, column, value, verdict):
    assert targets.met(targets.BY_NAME[name], column, value) is verdict


def test_rows_are_asked_for_by_name_or_by_group():
    assert targets.wanted("mini, decode_int8") == ["decode_int8", "mini_answer"]
    assert targets.wanted(None) == [row.name for row in targets.ROWS]
    for wrong in ("decode", "", ","):
        with pytest.raises(ValueError, match="row"):
            targets.wanted(wrong)


def test_a_mask_that_takes_no_effect_is_refused(monkeypatch, tmp_path):
    class Nobody:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def ask(self, do, **arguments):
            return {}

    monkeypatch.setattr(speed, "Side", Nobody)
    with_unit = "Intel AVX-512 with Intel DL Boost and bfloat16 support"
    monkeypatch.setattr(speed, "instructions", lambda env: with_unit)
    assert speed.describe(context(tmp_path, column="unit"))["onednn"] == with_unit
    with pytest.raises(ValueError, match="the mask did not take effect"):
        speed.describe(context(tmp_path, column="masked"))


def test_the_mask_is_set_for_the_sides_alone(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert speed.environment("masked", None)["ONEDNN_MAX_CPU_ISA"] == speed.MASK
    own = speed.environment("unit", 3)
    assert "ONEDNN_MAX_CPU_ISA" not in own and own["OMP_NUM_THREADS"] == "3"


def test_a_column_that_this_machine_cannot_measure_is_refused(monkeypatch):
    monkeypatch.setattr(speed, "bf16_unit", lambda: False)
    assert speed.choose_column(None) == speed.choose_column("none") == "none"
    for column in ("unit", "masked"):
        with pytest.raises(ValueError, match="has no unit for bfloat16"):
            speed.choose_column(column)
    monkeypatch.setattr(speed, "bf16_unit", lambda: True)
    assert speed.choose_column(None) == "unit"
    assert speed.choose_column("masked") == "masked"


# -- the baseline and its ideas ------------------------------------------------


def questions(rows: int = 2):
    ids, _ = tiny_rows([6] * rows)
    return tiny_pixels(rows), ids


def our_tokens(model, pixels, ids, count: int) -> list[list[int]]:
    valid = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(pixels, ids, valid, ~valid)
    made = steps(model, batch, count, lambda x: x.argmax(-1), stop=None)
    with torch.inference_mode():
        return torch.stack(list(made), dim=1).tolist()


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("switched", range(len(baseline.IDEAS) + 1))
def test_the_baseline_answers_as_ours_with_every_idea(switched, kv_heads):
    model = tiny_model(num_kv_heads=kv_heads)
    ideas = frozenset(list(baseline.IDEAS)[:switched])
    pixels, ids = questions()
    want = our_tokens(model, pixels, ids, 6)
    assert len(set(want[0])) > 2  # an answer that could be wrong
    assert baseline.answer(model, pixels, ids, 6, ideas) == want


def counted(monkeypatch, owner, name: str) -> list:
    """The arguments of every call of a function."""
    calls, real = [], getattr(owner, name)

    def count(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_each_idea_does_what_it_says(monkeypatch):
    model, (pixels, ids) = tiny_model(), questions(1)
    calls = {
        "encode once": counted(monkeypatch, baseline, "encode"),
        "last logits": counted(monkeypatch, type(model.decoder), "logits"),
        "in place": counted(monkeypatch, baseline.Joined, "__call__"),
        "folded": counted(monkeypatch, baseline, "repeat_heads"),
        "fused": counted(monkeypatch, baseline, "attend_written_out"),
        "one table": counted(monkeypatch, baseline, "rope_table"),
    }
    # the last place's logits are as many calls, of fewer places
    places = [args[1].shape[1] for args in calls["last logits"]]
    layers, count = model.config.decoder.num_layers, 3

    def run(*ideas) -> dict[str, int]:
        for found in calls.values():
            found.clear()
        baseline.answer(model, pixels, ids, count, frozenset(ideas))
        places[:] = [args[1].shape[1] for args in calls["last logits"]]
        return {name: len(found) for name, found in calls.items()}

    usual = run()
    assert usual["encode once"] == count and places[0] == ids.shape[1]
    assert run("encode once")["encode once"] == 1
    run("last logits")
    assert places == [1] * count
    assert usual["in place"] == layers * count and run("in place")["in place"] == 0
    assert usual["folded"] == 2 * layers * count and run("folded")["folded"] == 0
    assert usual["fused"] == layers * count and run("fused")["fused"] == 0
    assert usual["one table"] == layers * count
    assert run("one table")["one table"] == count


# -- what the sides do ---------------------------------------------------------


def test_random_checkpoints_are_complete_or_written_again(tmp_path):
    place = tmp_path / "model"
    checkpoint.main([str(place), "tiny", "bfloat16"])
    assert checkpoint.is_complete(place, "tiny", "bfloat16")
    assert not checkpoint.is_complete(place, "tiny", "float32")
    model, processor = pali.load(place, dtype=None)
    assert model.config == checkpoint.shape("tiny")
    text = pali.generate(
        model, processor, torch.zeros(9, 9, 3).byte().numpy(), "ocr", max_new_tokens=4
    )
    assert isinstance(text[0], str)  # logits are finite, or generate complains
    (place / "model.safetensors").unlink()
    assert not checkpoint.is_complete(place, "tiny", "bfloat16")


def test_full_and_slice_have_the_published_widths():
    full, part = checkpoint.shape("full"), checkpoint.shape("slice")
    assert full == pali.PaliGemmaConfig()
    for name in ("width", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
        assert getattr(part.decoder, name) == getattr(full.decoder, name)
    assert part.vision.width == full.vision.width


def our_side(model) -> sides.Ours:
    side = sides.Ours()
    side.model = model
    side.pixels, side.ids = tiny_pixels(1), tiny_rows([6])[0]
    return side


def test_a_step_late_in_an_answer_reads_a_cache_as_long_as_that():
    side = our_side(tiny_model())
    cache = pali.Cache(side.model.config, 1, 64)
    with torch.inference_mode():
        side.model(side.pixels, side.ids, cache=cache, last_only=True)
        T = side.ids.shape[1]
        side.fill_up(cache, 50)
        logits = side.model(None, side.ids[:, -1:], cache=cache, last_only=True)
    assert cache.length == 51 and cache.next_positions().tolist() == [51]
    assert cache.keys[0][:, :, T:50].abs().sum() > 0 and logits.isfinite().all()
    seen = side.at_lengths([1, 20], 2)["seconds"]
    assert {n: len(s) for n, s in seen.items()} == {1: 2, 20: 2}


def test_a_shortened_model_shares_the_weights_of_the_whole():
    whole = tiny_model()
    model = sides.shortened(whole, 24, 1, 2)
    assert len(model.vision.blocks) == 1 and len(model.decoder.blocks) == 2
    assert model.config.vision.num_patches == 36
    mine, theirs = model.state_dict(), whole.state_dict()
    for name in mine.keys() - {"vision.position"}:
        assert mine[name].data_ptr() == theirs[name].data_ptr()
    assert mine["vision.position"][20].equal(theirs["vision.position"][20 - PATCHES])
    ids = torch.full((1, 40), IMAGE_ID)
    ids[:, 36:] = 7
    logits = model(torch.zeros(1, 3, 24, 24), ids, last_only=True)
    assert logits.isfinite().all()


def test_an_answer_is_stamped_when_its_logits_are_there(tmp_path):
    side = our_side(tiny_model())
    path = tmp_path / "logits.npy"
    run = side.answer(4, path=str(path))
    assert run["tokens"] == our_tokens(side.model, side.pixels, side.ids, 4)
    assert len(run["steps"]) == 3 and run["prefill"] > 0
    import numpy as np

    first = np.load(path)  # prefill and first step, rows, vocabulary
    assert first.argmax(-1)[:, 0].tolist() == run["tokens"][0][:2]


def test_the_bytes_of_a_step_are_those_of_decoder_and_cache():
    side = our_side(tiny_model())
    d = side.model.config.decoder
    weights = sum(p.nbytes for p in side.model.decoder.parameters())
    cache = 2 * d.num_layers * d.num_kv_heads * d.head_dim * 30 * 4
    assert side.step_bytes(30, "float32")["bytes"] == weights + cache
    assert pali_speed.step_bytes(d, torch.float32, 30) == weights + cache
