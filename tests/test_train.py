"""Training: the loss, packing, schedule, and a run that is stopped and goes on."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

import pali
from pali import scenes
from pali.paligemma import PaliGemma
from pali.tokens import IGNORE, Box, Processor, Tokenizer
from pali.train import (
    FIRST_TRAINING_SEED,
    WORLDS,
    ByProducts,
    Lessons,
    Settings,
    attend_by_products,
    carry_over,
    lesson_loss,
    mini_config,
    one_step,
    optimisers,
    overlap,
    pack,
    packed_mask,
    pair_boxes,
    parts,
    rate_factor,
    read_log,
    start_model,
    suffix_loss,
    train,
    train_tokenizer,
)

TINY = Settings(
    steps=6, batch_size=2, questions=3, warmup=2, checkpoint_every=2, eval_scenes=1,
    plain=0.34, part=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return start_model(tmp_path_factory.mktemp("run"), TINY)


def test_packed_mask_equals_a_loop_over_pairs():
    lengths, N, T = [[(2, 1), (3, 2)], [(1, 1)]], 4, 13
    group, suffix = torch.full((2, T), -1), torch.zeros(2, T, dtype=torch.bool)
    for row, pairs in enumerate(lengths):
        start = N
        for g, (p, s) in enumerate(pairs):
            group[row, start : start + p + s] = g
            suffix[row, start + p : start + p + s] = True
            start += p + s
    want = torch.zeros(2, 1, T, T, dtype=torch.bool)
    for b in range(2):
        for i in range(T):
            for j in range(T):
                picture = j < N and (i < N or group[b, i] >= 0)
                same = i >= N and j >= N and group[b, i] == group[b, j] >= 0
                earlier = j <= i or not (suffix[b, i] or suffix[b, j])
                want[b, 0, i, j] = picture or (same and earlier) or i == j
    assert torch.equal(packed_mask(lengths, N, T), want)


def test_packed_questions_cost_what_they_cost_alone(start):
    """A pair in a pack has the loss that it has by itself, image rows apart."""
    model, processor = start
    scene = scenes.scene(3)
    pairs = scenes.examples(scene, scenes.Stream(5), 4)
    batch, mask, positions = pack(processor, [scene.image], [pairs])
    with torch.no_grad():
        got = suffix_loss(model, batch, mask, positions)
        total = count = 0
        for pair in pairs:
            one, one_mask, one_positions = pack(processor, [scene.image], [[pair]])
            n = int((one.labels != IGNORE).sum())
            total += n * suffix_loss(model, one, one_mask, one_positions)
            count += n
    # float32 sums in another order; the limit is a choice, not yet a measured worst
    torch.testing.assert_close(got, total / count, rtol=0, atol=2e-5)


def test_loss_is_cross_entropy_of_the_next_answer_token(start):
    model, processor = start
    scene = scenes.scene(4)
    batch = processor(scene.image, "caption en", scenes.caption(scene))
    with torch.no_grad():
        logits = model(batch.pixels, batch.ids, valid=batch.valid, suffix=batch.suffix)
        wanted = batch.labels[:, 1:].flatten()
        want = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted, ignore_index=IGNORE
        )
        got = suffix_loss(model, batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_loss_of_unshifted_labels_is_noticed(start):
    model, processor = start
    scene = scenes.scene(4)
    batch = processor(scene.image, "caption en", scenes.caption(scene))
    with torch.no_grad():
        logits = model(batch.pixels, batch.ids, valid=batch.valid, suffix=batch.suffix)
        wrong = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE
        )
        assert abs(wrong - suffix_loss(model, batch)) > 0.1


def test_parts_add_up_to_the_whole_gradient(start):
    model, processor = start
    lesson = Lessons(Settings(batch_size=4, questions=3), processor)[0]
    taught = (lesson[0].labels[:, 1:] != IGNORE).sum()
    gradients = []
    for size in (4, 1):
        model.zero_grad()
        for part in parts(lesson, size):
            share = (part[0].labels[:, 1:] != IGNORE).sum() / taught
            (suffix_loss(model, *part) * share).backward()
        gradients.append(model.projector.linear.weight.grad.clone())
    model.zero_grad()
    spread = gradients[0].abs().max()
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4 * spread.item())


def test_rate_rises_stays_and_falls_to_nothing():
    settings = Settings(steps=1000, warmup=100, decay=0.4)
    assert rate_factor(0, settings) == 0.01
    assert rate_factor(99, settings) == rate_factor(599, settings) == 1
    assert rate_factor(800, settings) == pytest.approx(0.5)
    assert rate_factor(999, settings) == pytest.approx(1 / 400)


def test_lessons_depend_on_settings_and_step_alone(start):
    _, processor = start
    one, two = (Lessons(TINY, processor)[3] for _ in range(2))
    assert torch.equal(one[0].ids, two[0].ids)
    assert torch.equal(one[0].pixels, two[0].pixels)
    other = Lessons(TINY, processor)[2]
    assert not torch.equal(one[0].pixels, other[0].pixels)


def test_lessons_never_show_a_scene_of_the_test_set(start, monkeypatch):
    _, processor = start
    seen = []
    true = scenes.scene
    monkeypatch.setattr(
        scenes, "scene", lambda seed, **world: seen.append(seed) or true(seed, **world)
    )
    lessons = Lessons(TINY, processor)
    for step in range(len(lessons)):
        lessons[step]
    assert len(set(seen)) == TINY.steps * TINY.batch_size
    assert min(seen) >= FIRST_TRAINING_SEED


def test_the_last_lessons_use_the_mask_of_inference(start):
    _, processor = start
    lessons = Lessons(TINY, processor)
    masks = [lessons[step][1] for step in range(len(lessons))]
    assert [m is None for m in masks] == [False] * 4 + [True] * 2


def test_tokenizer_has_the_ids_of_paligemma(start):
    _, processor = start
    pieces = processor.tokenizer.pieces
    assert [pieces.IdToPiece(i) for i in range(5)] == [
        "<pad>", "<eos>", "<bos>", "<unk>", "<mask>",
    ]  # fmt: skip
    assert processor.image_id == processor.tokenizer.size == pieces.GetPieceSize()
    assert mini_config(processor.tokenizer).decoder.vocab_size % 64 == 0


def test_tokenizer_returns_every_text_of_the_world(start):
    _, processor = start
    for text in [*scenes.all_texts(), "Ünbekannt 日本 42", " two  spaces "]:
        assert processor.decode(processor.tokenizer.encode(text)) == text


def test_every_word_of_the_world_is_one_token(start):
    _, processor = start
    for kind in scenes.FIRST_WORLD.names:
        assert len(processor.tokenizer.encode(f"detect {kind}")) == 2


def losses(out):
    return [(line["step"], line["loss"]) for line in read_log(out / "log.jsonl")]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, train(TINY, out, workers=0)


def test_a_stopped_run_goes_on_to_the_same_curve(whole_run, tmp_path, monkeypatch):
    import pali.train

    calls = []

    def step_until_stopped(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return one_step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pali.train, "one_step", step_until_stopped)
        train(TINY, tmp_path, workers=0)
    assert len(losses(tmp_path)) == 3
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a line that was being written
    model = train(TINY, tmp_path, workers=0)
    out, finished = whole_run
    assert losses(tmp_path) == losses(out)
    one, two = (pali.load_model(folder).state_dict() for folder in (model, finished))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_model_is_a_checkpoint_like_any_other(whole_run):
    model, processor = pali.load(whole_run[1])
    text = pali.generate(
        model, processor, scenes.scene(1).image, "caption en", max_new_tokens=5
    )
    assert isinstance(text[0], str)


def test_a_finished_run_is_not_trained_further(whole_run):
    out, _ = whole_run
    before = losses(out)
    train(TINY, out, workers=0)
    assert losses(out) == before


def test_a_run_can_start_from_trained_weights(whole_run, tmp_path):
    _, finished = whole_run
    settings = Settings(**(vars(TINY) | {"start": str(finished)}))
    model, _ = start_model(tmp_path, settings)
    assert torch.equal(
        model.decoder.embedding, pali.load_model(finished).decoder.embedding
    )
    assert all(weight.requires_grad for weight in model.parameters())


def test_other_settings_are_refused(whole_run):
    out, _ = whole_run
    with pytest.raises(ValueError, match="steps"):
        train(Settings(steps=7), out)


@pytest.mark.slow
def test_a_killed_process_loses_one_interval_at_most(whole_run, tmp_path):
    """SIGKILL at some moment, then the same command again."""
    options = [f"--{k.replace('_', '-')}={v}" for k, v in vars(TINY).items()]
    command = [sys.executable, "-m", "pali", "train", "--workers", "0", *options]
    log = tmp_path / "log.jsonl"
    # one run here, one in the fixture: threads change the last digits of a sum
    threads = ["--threads", str(torch.get_num_threads())]
    with subprocess.Popen(
        [*command, *threads], cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as process:
        while len(read_log(log)) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    done = subprocess.run(
        [*command, *threads], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(whole_run[0])
    assert json.loads((tmp_path / "settings.json").read_text()) == vars(TINY)


@pytest.mark.parametrize("crowded", [0.0, 0.5, 1.0])
def test_so_many_pictures_are_crowded_on_purpose(start, crowded, monkeypatch):
    worlds, draw = [], scenes.scene

    def watched(seed, *, world=scenes.FIRST_WORLD):
        worlds.append(world)
        return draw(seed, world=world)

    monkeypatch.setattr(scenes, "scene", watched)
    Lessons(Settings(batch_size=4, questions=2, crowded=crowded), start[1])[0]
    assert worlds.count(scenes.CROWDED_WORLD) == 4 * crowded
    assert worlds.count(scenes.FIRST_WORLD) == 4 - 4 * crowded


@pytest.mark.parametrize("name", ["plain", "crowded"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_shares_are_shares(name, value):
    with pytest.raises(ValueError, match=f"{name} is from 0 to 1"):
        Settings(**{name: value})


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("plain", [0.0, 1.0], ids=["packed", "plain"])
def test_products_teach_what_the_kernel_teaches(start, plain):
    """Loss and every gradient, with the rows cut in two and without.

    Worst seen of 12 lessons, relative to the largest gradient: 3.3e-7; a mask that
    is left out changes it by 0.04 and more.
    """
    model, processor = start
    settings = Settings(batch_size=2, questions=3, plain=plain)
    lesson = Lessons(settings, processor)[0]
    want = suffix_loss(model, *lesson)
    slopes = gradients(model, want)
    for patches in [0] if plain else [0, processor.num_patches]:
        with ByProducts(patches):
            got = suffix_loss(model, *lesson)
        assert abs(got - want) < 1e-5
        off = (gradients(model, got) - slopes).abs().max() / slopes.abs().max()
        assert off < 4e-6


def test_in_bfloat16_products_are_as_near_to_float32_as_the_kernel(start):
    """Rounding differs, so both gradients are held against that of float32."""
    model, processor = start
    lesson = Lessons(Settings(batch_size=2, questions=3, plain=0.0), processor)[0]
    exact = gradients(model, suffix_loss(model, *lesson))
    with torch.autocast("cpu", torch.bfloat16):
        kernel = gradients(model, suffix_loss(model, *lesson))
    products = gradients(model, lesson_loss(model, lesson, "bfloat16"))

    def distance(x):
        return (x - exact).norm() / exact.norm()

    # seen: both 0.6 to 0.8 % away, within 7 % of each other
    assert distance(products) < 1.2 * distance(kernel) < 0.05


def test_a_bias_hides_and_a_scale_counts():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=g)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    want = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    got = attend_by_products(q, k, v, bias, scale=0.3)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(attend_by_products(q, k, v, scale=0.3), want, atol=0.1)
    assert not torch.allclose(attend_by_products(q, k, v, bias), want, atol=0.01)


def test_overlap_of_boxes_worked_out_by_hand():
    a, b = Box("cat", (0, 0, 4, 4)), Box("cat", (2, 0, 6, 4))
    assert overlap(a, b) == pytest.approx(8 / 24)
    assert overlap(a, a) == 1
    assert overlap(a, Box("cat", (4, 0, 8, 4))) == 0


def test_no_box_is_matched_twice_and_labels_must_agree():
    truth = [Box("cat", (0, 0, 10, 10)), Box("dog", (20, 0, 30, 10))]
    found = [
        Box("cat", (0, 0, 10, 9)),
        Box("cat", (0, 0, 10, 10)),
        Box("cat", (20, 0, 30, 10)),
    ]
    assert pair_boxes(found, truth) == [1.0, 0.0]
    assert pair_boxes(truth, truth) == [1.0, 1.0]
    assert pair_boxes([Box("cat", (0, 0, 10, 4))], truth) == [0.4, 0.0]


def test_one_step_lowers_the_loss_of_its_lesson(tmp_path):
    settings = Settings(batch_size=2, questions=3, warmup=1)
    model, processor = start_model(tmp_path, settings)
    lesson = Lessons(settings, processor)[0]
    optimizers = optimisers(model, settings)
    values = [one_step(model, optimizers, lesson, 1.0, settings) for _ in range(4)]
    assert values[-1] < values[0] - 0.5
    assert math.isfinite(values[-1])


def test_all_parameters_are_trained_once(start):
    model, _ = start
    groups = [g for o in optimisers(model, TINY) for g in o.param_groups]
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """The shipped model carried over to a vocabulary with 600 pieces more."""
    made = map("".join, itertools.product("bdgkmt", "aeiou", "lnrs", "aeio", "x"))
    texts = [*scenes.all_texts(scenes.FULL_WORLD), *[f"a {word}" for word in made] * 3]
    path = tmp_path_factory.mktemp("larger") / "tokenizer.model"
    train_tokenizer(texts, path, WORLDS["full"][2] + 600)
    tokenizer = Tokenizer(path)
    config = mini_config(tokenizer)
    model = PaliGemma(config).eval()
    carry_over(*pali.load("mini"), model, tokenizer)
    return model, Processor(tokenizer, 128, 256, config.image_id)


def test_a_carried_over_model_says_what_it_said(larger):
    old = pali.load("mini")
    images = [scenes.scene(seed).image for seed in range(4)]
    prompts = ["caption en", "detect cat", "caption en", "detect car"]
    want = pali.generate(*old, images, prompts, max_new_tokens=40)
    assert pali.generate(*larger, images, prompts, max_new_tokens=40) == want
    assert any(want) and larger[1].tokenizer.size > old[1].tokenizer.size


def test_a_new_piece_starts_as_the_mean_of_its_old_parts(larger):
    model, new = larger[0], larger[1].tokenizer
    old_model, old = pali.load("mini")
    known = {old.tokenizer.piece(i) for i in range(old.tokenizer.size)}
    fresh = [i for i in range(new.size) if new.piece(i) not in known]
    assert len(fresh) > 500
    for i in fresh[::100]:
        ids = old.tokenizer.encode(new.decode([i]))
        want = torch.stack([old_model.decoder.embedding[j] for j in ids]).mean(dim=0)
        # a sum of a few numbers of size 0.1, in another order
        torch.testing.assert_close(
            model.decoder.embedding[i], want, rtol=1e-5, atol=1e-6
        )
    assert torch.isfinite(model.decoder.embedding).all()


def test_other_layers_cannot_be_carried_over(larger):
    old = pali.load("mini")
    old[0].decoder.blocks[0].mlp.gate = torch.nn.Linear(128, 64, bias=False)
    with pytest.raises(ValueError, match="layers of other shapes"):
        carry_over(*old, larger[0], larger[1].tokenizer)


def test_the_larger_world_is_taught_with_outlines(larger):
    settings = Settings(world="full", batch_size=8, crowded=0.5, questions=6)
    lessons = Lessons(settings, larger[1])
    batch, _, _ = lessons[0]
    taught = batch.labels[batch.labels != IGNORE]
    text = larger[1].tokenizer.decode(taught)
    assert text.count("<seg") >= 16 and text.count("<seg") % 16 == 0
    prompts = larger[1].tokenizer.decode(batch.ids[batch.labels == IGNORE])
    assert "caption zh" in prompts or "caption de" in prompts
    again = Lessons(settings, larger[1])[0][0]
    assert torch.equal(again.ids, batch.ids)


def test_practice_in_the_larger_world_asks_what_is_hard_more_often(larger):
    def asked(crowded):
        settings = Settings(world="full", batch_size=8, crowded=crowded, questions=6)
        batch, _, _ = Lessons(settings, larger[1])[0]
        text = larger[1].tokenizer.decode(batch.ids[batch.labels == IGNORE])
        return [text.count(word) for word in ("segment ", "ocr")]

    (outlines, numbers), (more, most) = asked(0.0), asked(1.0)
    assert more > 1.5 * outlines and most > numbers


def test_a_world_has_a_name():
    with pytest.raises(ValueError, match="world is first or full, not third"):
        Settings(world="third")
