"""Tasks: prompts and boxes, scores against closed forms, stored numbers."""

import hashlib
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import Rectangle
from PIL import Image

import pali
from pali import scenes, tasks
from pali.outlines import MaskCodec, mask_tokens
from pali.tasks import pair_boxes, ratio, share, summary
from pali.tokens import Box, read_boxes
from pali.train import overlap

MINI = Path(tasks.__file__).parent / "mini"


def oracle(**wrong):
    """Stands in for the model: looks the answer up; `wrong` maps prompt to answer."""
    known = {}
    for seed in range(40):
        scene = scenes.scene(seed)
        for task in ("caption", "count", "detect"):
            prompt, truth = scenes.question(scene, scenes.question_stream(scene), task)
            known[scene.image.tobytes(), prompt] = truth

    def generate(model, processor, images, prompts, **options):
        pairs = zip(images, prompts, strict=True)
        return [wrong.get(p, known[image.tobytes(), p]) for image, p in pairs]

    return generate


@pytest.fixture
def said(monkeypatch):
    """Let the model say a text; the prompts and pictures that it was given."""
    asked = []

    def say(text):
        def generate(model, processor, image, prompt, **options):
            asked.append((image, prompt))
            return [text]

        monkeypatch.setattr(tasks, "generate", generate)
        return asked

    return say


# -- one call a task ---------------------------------------------------------


def test_tasks_ask_in_the_words_of_the_published_models(said):
    asked, picture = said(""), Image.new("RGB", (8, 8))
    tasks.caption(None, None, picture)
    tasks.answer(None, None, picture, "how many cats are there?", "de")
    tasks.detect(None, None, picture, "cat", "fire engine")
    tasks.segment(None, None, picture, "cat")
    assert [prompt for _, prompt in asked] == [
        "caption en",
        "answer de how many cats are there?",
        "detect cat ; fire engine",
        "segment cat",
    ]


def test_boxes_come_in_pixels_of_the_picture_that_was_given(said):
    cat = "<loc0000><loc0000><loc1023><loc1023> cat"
    said(f"{cat} ; <loc0341><loc0682><loc1023><loc1023> dog")
    found = tasks.detect(None, None, Image.new("RGB", (300, 60)), "cat", "dog")
    assert found == [
        Box("cat", (0.0, 0.0, 300.0, 60.0)), Box("dog", (200.0, 20.0, 300.0, 60.0))
    ]  # fmt: skip


def test_an_empty_answer_is_no_box(said):
    said("")
    assert tasks.detect(None, None, Image.new("RGB", (8, 8)), "cat") == []
    assert tasks.segment(None, None, Image.new("RGB", (8, 8)), "cat") == []


def test_segment_pastes_the_decoded_outline_into_its_box(said):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        codec = MaskCodec(width=8, code_width=4).eval()
    codes = list(range(16))
    said(f"<loc0256><loc0512><loc0767><loc1023>{mask_tokens(codes)} cat")
    picture = Image.new("RGB", (128, 256))
    ((box, mask),) = tasks.segment(None, None, picture, "cat", codec=codec)
    assert box.label == "cat" and mask.shape == (256, 128)
    assert not mask[:63].any() and not mask[:, :63].any()
    with torch.no_grad():
        part = codec.decode(torch.tensor([codes]))[0].numpy()
    # the box is 64 px wide and 128 px high: each column once, each row twice
    x0, y0, x1, y1 = (int(v) for v in box.xyxy)
    part = Image.fromarray(part).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
    assert (mask[y0:y1, x0:x1] == (np.asarray(part) > 0)).all()


def test_the_drawing_holds_every_box_where_it_is():
    scene = scenes.scene(2)
    kinds = list(scene.counts())
    text = scenes.detect_answer(scene, kinds)
    figure = tasks.draw_answer(scene.image, scenes.detect_prompt(kinds), text)
    drawn = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    corners = {(round(p.get_x() + 0.5), round(p.get_y() + 0.5)) for p in drawn}
    assert corners == {box[:2] for box in scene.boxes}
    assert f"{len(scene.things)} found" in " ".join(
        figure.axes[0].get_title(loc="left").split()
    )
    plt.close(figure)


def test_the_drawing_says_so_if_nothing_was_found():
    figure = tasks.draw_answer(Image.new("RGB", (90, 30)), "detect cat", "")
    title = figure.axes[0].get_title(loc="left")
    assert "nothing found" in " ".join(title.split())
    assert not figure.axes[0].patches
    plt.close(figure)


# -- questions and verdicts --------------------------------------------------


def test_questions_do_not_repeat_the_draws_of_the_scene(monkeypatch):
    """A stream started at the scene's own seed ties the question to the scene."""
    monkeypatch.setattr(tasks, "generate", lambda m, p, images, asked, **_: asked)
    drawn = [scenes.scene(seed) for seed in range(120)]
    alone = [s for s in drawn if len(s.things) == 1]

    def absent(pairs):
        """How many questions are about something that is not there."""
        return sum(not truth for _, _, truth in pairs)

    # a quarter of the scenes holds one thing; a fifth of the questions is about none
    found = absent(tasks.ask_scenes(None, None, alone, "detect"))
    assert 0.05 * len(alone) < found < 0.5 * len(alone)
    monkeypatch.setattr(scenes, "question_stream", lambda s: scenes.Stream(s.seed))
    tied = absent(tasks.ask_scenes(None, None, alone, "detect"))
    assert tied > 0.6 * len(alone)  # the fault: the same draw decides both


def test_all_right_scores_one(monkeypatch):
    monkeypatch.setattr(tasks, "generate", oracle())
    results = tasks.evaluate(None, None, range(40))
    scores = summary(results)
    assert all(r.caption and r.count for r in results)
    assert scores["boxes, F1"].value == 1.0
    # tokens are 1/1023 of a side: an edge moves by at most 1/16 px of 128
    assert 0.98 < scores["mean IoU"].value <= 1.0


def test_one_wrong_answer_changes_one_verdict(monkeypatch):
    scene = scenes.scene(3)
    prompt, _ = scenes.question(scene, scenes.question_stream(scene), "count")
    monkeypatch.setattr(tasks, "generate", oracle(**{prompt: "11"}))
    results = tasks.evaluate(None, None, [3])
    assert results[0].caption and not results[0].count


def test_silence_finds_nothing(monkeypatch):
    monkeypatch.setattr(
        tasks, "generate", lambda m, p, images, _, **o: [""] * len(images)
    )
    results = tasks.evaluate(None, None, range(20))
    scores = summary(results)
    assert scores["caption"].value == 0 and scores["boxes, F1"].value == 0
    assert scores["mean IoU"].value == 0  # and no division by nothing


def test_batches_give_what_one_by_one_gives():
    model, processor = pali.load("mini")
    drawn = [scenes.scene(seed) for seed in range(5)]
    rows = [tasks.ask_scenes(model, processor, drawn, "count", batch=b) for b in (1, 3)]
    assert rows[0] == rows[1]


def test_what_may_be_asked_is_what_the_world_knows(monkeypatch):
    monkeypatch.setattr(tasks, "generate", lambda m, p, images, asked, **_: asked)
    full = scenes.FULL_WORLD
    drawn = [scenes.scene(seed, world=full) for seed in range(40)]
    rows = tasks.ask_scenes(None, None, drawn, "detect", world=full)
    later = set(full.names) - set(scenes.FIRST_WORLD.names)
    gone = [
        kind
        for scene, (prompt, _, truth) in zip(drawn, rows, strict=True)
        for kind in prompt.removeprefix("detect ").split(" ; ")
        if kind not in scene.counts()
    ]
    assert later & set(gone)  # absent kinds come from the whole larger world
    # the first world, the default, knows no later kind that is not there
    rows = tasks.ask_scenes(None, None, drawn, "detect")
    for scene, (prompt, _, _) in zip(drawn, rows, strict=True):
        asked = set(prompt.removeprefix("detect ").split(" ; "))
        assert not (asked - set(scene.counts())) & later


boxes = st.builds(
    lambda label, x, y, w, h: Box(label, (x, y, x + w, y + h)),
    st.sampled_from("ab"), *[st.integers(0, 9)] * 2, *[st.integers(1, 9)] * 2,
)  # fmt: skip


@given(st.lists(boxes, max_size=5), st.lists(boxes, max_size=5))
def test_pairs_are_those_of_striking_out_the_best(found, truth):
    """Reference: a table of overlaps; take the largest, strike its row and column."""
    table = np.array(_overlaps(found, truth)).reshape(len(found), len(truth))
    positive = table[table > 0]
    left = []
    while table.size and table.max() > 0:
        i, j = np.unravel_index(table.argmax(), table.shape)
        left.append(table[i, j])
        table = np.delete(np.delete(table, i, 0), j, 1)
    got = pair_boxes(found, truth)
    assert len(got) == len(truth)
    # equal overlaps may be taken in another order, which can change what remains
    if len(set(positive)) == len(positive):
        assert sorted(v for v in got if v) == sorted(left)


def _overlaps(found, truth):
    return [[overlap(a, b) if a.label == b.label else 0 for b in truth] for a in found]


def test_no_box_serves_twice_and_names_must_agree():
    cat = Box("cat", (0, 0, 10, 10))
    assert sorted(pair_boxes([cat], [cat, cat])) == [0.0, 1.0]
    assert pair_boxes([cat, cat], [cat]) == [1.0]
    assert pair_boxes([Box("dog", cat.xyxy)], [cat]) == [0.0]


def test_reading_x_before_y_is_noticed():
    """The chapter's fault: right answers must come back as hits, all of them."""
    hits, swapped, total = 0, 0, 0
    for seed in range(60):
        scene = scenes.scene(seed)
        true = tasks.true_boxes(scene, scene.counts())
        text = scenes.detect_answer(scene, list(scene.counts()))
        found = read_boxes(text, (128, 128))
        mirrored = [Box(b.label, tuple(b.xyxy[i] for i in (1, 0, 3, 2))) for b in found]
        hits += sum(v >= 0.5 for v in pair_boxes(found, true))
        swapped += sum(v >= 0.5 for v in pair_boxes(mirrored, true))
        total += len(true)
    assert hits == total
    assert swapped < 0.5 * total  # measured: 0.2


# -- scores ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
     (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_shares_have_the_published_interval_of_wilson(right, trials, low, high):
    score = share([True] * right + [False] * (trials - right))
    assert score.value == right / trials and score.trials == trials
    assert score.low == pytest.approx(low, abs=6e-5)  # four digits are published
    assert score.high == pytest.approx(high, abs=6e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_an_interval_holds_its_share_and_mirrors(right):
    score, other = share(right), share([not r for r in right])
    assert score.low <= score.value <= score.high  # no rounding at 0 and 1
    assert score.low >= -1e-12 and score.high <= 1 + 1e-12
    assert math.isclose(score.low, 1 - other.high, abs_tol=1e-12)


def test_nothing_measured_says_nothing():
    assert share([]) == tasks.Score(0.0, 0.0, 1.0, 0)
    assert ratio([0, 0], [0, 0]) == tasks.Score(0.0, 0.0, 1.0, 2)


def test_drawing_scenes_anew_agrees_with_the_formula_for_a_mean():
    rng = np.random.default_rng(1)
    x = rng.normal(0.5, 0.1, 400)
    score = ratio(x, np.ones(400))
    half = 1.96 * x.std(ddof=1) / 20
    assert score.value == pytest.approx(x.mean())
    # 2,000 draws leave about 3 % noise in a half-width; worst of 20 seeds: 6 %
    assert score.high - score.value == pytest.approx(half, rel=0.2)
    assert score.value - score.low == pytest.approx(half, rel=0.2)


def test_scenes_that_stand_or_fall_together_widen_the_interval():
    """Ten boxes in each of 40 scenes, all right or all wrong: 40 trials, not 400."""
    rng = np.random.default_rng(2)
    good = rng.random(40) < 0.5
    together = ratio(10 * good, np.full(40, 10))
    apart = share(np.repeat(good, 10))
    assert together.high - together.low > 2.5 * (apart.high - apart.low)


def test_f1_of_a_case_worked_by_hand():
    """Two scenes: 3 boxes found, 4 things there, 2 hits: 2 * 2 / (3 + 4)."""
    one = tasks.Result(1, "plain", 2, True, True, 2, [30, 40], [0.9, 0.4])
    two = tasks.Result(2, "plain", 2, True, False, 1, [30, 40], [0.0, 0.5])
    scores = summary([one, two])
    assert scores["boxes, F1"].value == pytest.approx(4 / 7)
    assert scores["mean IoU"].value == pytest.approx(0.7)
    assert scores["caption"].value == 1.0 and scores["count"].value == 0.5


# -- the stored evaluation ---------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return json.loads((MINI / "evaluation.json").read_text(encoding="utf-8"))


def test_the_stored_evaluation_is_of_the_shipped_weights(stored):
    found = hashlib.sha256((MINI / "model.safetensors").read_bytes()).hexdigest()
    assert stored["weights"] == found[:16], (
        "the weights have changed: run python benchmarks/evaluate_mini.py"
    )


def test_the_stored_scores_follow_from_the_stored_rows(stored):
    results = tasks.stored_results()
    assert [r.seed for r in results] == list(range(500))
    for name, score in summary(results).items():
        kept = stored["scores"]["all"][name]
        assert kept["trials"] == 500
        for part in ("value", "low", "high"):
            assert kept[part] == pytest.approx(getattr(score, part), abs=1e-4)


def test_stored_rows_describe_the_scenes_of_their_seeds():
    for result in tasks.stored_results()[:50]:
        scene = scenes.scene(result.seed)
        assert result.things == len(scene.things)
        assert result.ground == scene.ground.pattern
        assert len(result.sizes) == len(result.overlaps) <= len(scene.things)


def test_a_part_measured_again_agrees_with_what_is_stored():
    model, processor = pali.load("mini")
    again = tasks.evaluate(model, processor, range(60))
    kept = tasks.stored_results()
    # the same rows but for near-ties: on this machine 60 of 60
    same = sum(
        (a.caption, a.count, a.found) == (b.caption, b.count, b.found)
        for a, b in zip(again, kept, strict=False)
    )
    assert same >= 54
    whole = summary(kept)
    for name, part in summary(again).items():  # the two intervals meet
        assert part.low <= whole[name].high and whole[name].low <= part.high
