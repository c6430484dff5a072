"""Fast products against plain ones in double precision, counts against real models."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import pali
from pali import scenes, speed
from pali.cache import Cache
from pali.generation import steps
from pali.paligemma import PaliGemmaConfig
from pali.speed import FastLinear, Way, prepare, quantize
from pali.tokens import Batch
from pali.vision import VisionTower
from tiny import PATCHES, tiny_config, tiny_model, tiny_pixels, tiny_rows

KINDS = ["gemma", "gemma2"]
FLOATS = ["plain", "torch", "oneDNN", "float32", "float32, oneDNN", "oneDNN, packed"]
INTEGERS = ["int8, dequantised", "int8, _int_mm", "int8, packed"]


def named(name, dtype=torch.float32):
    """One of the ways by its name."""
    weight = torch.ones(4, 4, dtype=dtype)
    found = speed.ways(weight, int8="int8" in name, pack=True)
    return {way.name: way for way in found}.get(name)


def forced(monkeypatch, model, name, **options):
    """A model prepared as if this way had been the fastest everywhere."""

    def times(calls, rounds, between=None):
        return {way: 1.0 - (way.name == name) for way in calls}

    monkeypatch.setattr(speed, "time_ways", times)
    monkeypatch.setattr(speed, "choose_attention", lambda *_: None)
    report = []
    fast = prepare(model, report=report, **options)
    assert {entry["chosen"] for entry in report} == {name}
    return fast


def products(report):
    """The entries of a report that are not about attention."""
    return [entry for entry in report if entry["shape"][0] != "attention"]


def logits_in_use(model, padding="left"):
    """Two padded rows with a picture each, then two steps with a cache."""
    ids, valid = tiny_rows((3, 6), padding)
    cache = Cache(model.config, 2, ids.shape[1] + 2)
    with torch.inference_mode():
        first = model(tiny_pixels(2), ids, valid=valid, cache=cache)
        found = [first[valid].flatten()]
        for step in ([7, 9], [11, 13]):
            y = model(None, torch.tensor(step)[:, None], cache=cache, last_only=True)
            found.append(y.flatten())
    return torch.cat(found).float()


def off(y, want):
    """The difference, in the size of what is wanted."""
    return ((y.double() - want.double()).norm() / want.double().norm()).item()


# -- products ------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1100, 48), (40, 9000)])  # 2 and 3 tiles
def test_every_way_is_the_product(shape, dtype, name, rows):
    way = named(name, dtype)
    if way is None:
        assert dtype == torch.float32 and name.startswith("float32")
        return
    draw = torch.Generator().manual_seed(rows)
    weight = (torch.randn(shape, generator=draw) / shape[1] ** 0.5).to(dtype)
    bias = torch.randn(shape[0], generator=draw).to(dtype)
    x = torch.randn(1, rows, shape[1], generator=draw).to(dtype)
    y = way.product(x, way.hold(weight), bias)
    want = F.linear(x.double(), weight.double(), bias.double())
    assert y.dtype == dtype and y.shape == (1, rows, shape[0])
    # worst of all: 6.7e-7 in float32, 1.7e-3 in bfloat16 (results have 8 bits);
    # a bias left out: 0.66
    assert off(y, want) < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("name", INTEGERS)
def test_every_int8_way_is_the_product_of_rounded_weights(name, rows):
    way, draw = named(name), torch.Generator().manual_seed(rows)
    weight = torch.randn(96, 256, generator=draw)
    bias = torch.randn(96, generator=draw)
    x = torch.randn(1, rows, 256, generator=draw)
    y = way.product(x, way.hold(weight), bias)
    q, scale = quantize(weight)
    want = F.linear(x.double(), q.double() * scale.double()[:, None], bias.double())
    # worst: 7e-3 where x is rounded to steps of 1/127 of its largest, and 2.1e-7
    # where it is not; a bias left out: 0.06
    assert off(y, want) < (1e-6 if "dequantised" in name else 3e-2)


@pytest.mark.parametrize("name", INTEGERS)
def test_a_small_row_keeps_its_own_scale_beside_a_large_one(name):
    way, draw = named(name), torch.Generator().manual_seed(1)
    weight = torch.randn(96, 256, generator=draw)
    x = torch.randn(2, 256, generator=draw) * torch.tensor([[1.0], [1000.0]])
    y = way.product(x, way.hold(weight), None)
    # worst: 1e-2; with the large row's scale the small row becomes 0, off by 1
    assert off(y[0], weight @ x[0]) < 5e-2


def test_whole_numbers_are_multiplied_exactly_in_int8():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 64), generator=draw).float()
    weight[:, 0] = 127  # so that every scale is 1
    x = torch.randint(-127, 128, (5, 64), generator=draw).float()
    x[:, 1] = 127
    assert torch.equal(speed.by_integers(x, quantize(weight)), x @ weight.T)


def test_onednn_is_switched_on_again(monkeypatch):
    assert torch.backends.mkldnn.enabled

    def fails(*_):
        assert not torch.backends.mkldnn.enabled
        raise RuntimeError("no memory")

    monkeypatch.setattr(F, "linear", fails)
    with pytest.raises(RuntimeError):
        speed.by_torch(torch.ones(1, 2), torch.ones(2, 2))
    assert torch.backends.mkldnn.enabled


# -- int8 ----------------------------------------------------------------------


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 5))
def test_no_weight_moves_by_more_than_half_a_step(seed, rows, columns):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    q, scale = quantize(weight)
    moved = (weight.double() - q.double() * scale.double()[:, None]).abs()
    # a float32 division may land on the wrong side of a half: 127 times 6e-8
    assert (moved <= scale.double()[:, None] * (0.5 + 1e-5)).all()
    assert q.dtype == torch.int8 and (q.abs().amax(dim=1) == 127).all()


@given(st.integers(0, 2**16), st.integers(-8, 8))
def test_each_row_has_a_scale_of_its_own(seed, power):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 5, generator=draw)
    larger = weight * torch.tensor([[1.0], [2.0**power], [1.0]])
    (q, scale), (q2, scale2) = quantize(weight), quantize(larger)
    assert torch.equal(q, q2)
    assert torch.equal(scale2, scale * torch.tensor([1.0, 2.0**power, 1.0]))


def test_a_row_of_zeros_stays_zero():
    q, scale = quantize(torch.zeros(2, 3))
    assert (q == 0).all() and scale.isfinite().all()


def test_a_long_matrix_is_quantised_like_a_short_one():
    weight = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    q, scale = quantize(weight)
    tail_q, tail_scale = quantize(weight[4090:4100])
    assert torch.equal(q[4090:4100], tail_q)
    assert torch.equal(scale[4090:4100], tail_scale)


def test_the_check_rejects_one_scale_for_the_whole_matrix():
    """The chapter's fault: rows of little size lose what they hold."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[0] *= 200
    scale = weight.abs().max() / 127
    moved = (weight - (weight / scale).round() * scale).abs()
    own = quantize(weight)[1]
    assert (moved[1:] > own[1:, None] * 0.51).float().mean() > 0.9


# -- choosing ------------------------------------------------------------------


def test_calls_take_turns_and_the_best_time_counts(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call(name, times):
        def run():
            order.append(name)
            clock[0] += next(times)

        return run

    calls = {"a": call("a", iter([3, 1, 2])), "b": call("b", iter([5, 9, 6]))}
    best = speed.fastest(calls, 3, seconds=0.5, between=lambda: order.append("-"))
    assert order == ["-", "a", "-", "b"] * 3
    assert best == {"a": 1, "b": 5}


def test_a_turn_goes_on_until_its_time_is_over(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += 0.25

    count = []
    speed.fastest({"a": lambda: (call(), count.append(1))}, 2, seconds=1.0)
    assert len(count) == 8


def doubled(x, weight, bias=None):
    return 2 * F.linear(x, weight, bias)


def missing(x, weight, bias=None):
    return torch.a_function_that_no_torch_has(x, weight)


def capped(x, weight, bias=None):
    """Right on numbers that vary, wrong where sums grow: as 16 bits overflow."""
    return F.linear(x, weight, bias).clamp(max=60)


@pytest.mark.parametrize("fault", [doubled, missing, capped])
def test_a_wrong_way_is_never_taken(monkeypatch, fault):
    def times(calls, rounds, between=None):
        return {way: 1.0 + (way.product is speed.plain) for way in calls}

    monkeypatch.setattr(speed, "time_ways", times)
    tried = [Way("plain", speed.plain), Way("fault", fault)]
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    report = []
    chosen = speed.choose(tried, weight, (1, 8), report=report)
    assert {way.name for way in chosen.values()} == {"plain"}
    assert [e["milliseconds"]["fault"] for e in report] == [None, None]
    tried[1] = Way("fault", F.linear)  # the same, without its fault
    assert speed.choose(tried, weight, (1,))[1] is tried[1]


def test_hopeless_ways_are_timed_once_and_reported(monkeypatch):
    seen = []

    def fastest(calls, rounds, between=None):
        seen.append((set(calls), rounds))
        return {way: {"a": 1.0, "b": 2.9, "c": 3.1}[way] for way in calls}

    monkeypatch.setattr(speed, "fastest", fastest)
    best = speed.time_ways(dict.fromkeys("abc"), 5)
    assert seen == [({"a", "b", "c"}, 1), ({"a", "b"}, 5)]
    assert best == {"a": 1.0, "b": 2.9, "c": 3.1}


def test_a_layer_takes_the_way_of_the_next_larger_number_of_rows():
    def answer(number):
        return lambda x, held, bias: x.new_full((*x.shape[:-1], 1), number)

    chosen = {n: Way(str(n), answer(n)) for n in (266, 1, 4)}
    layer = FastLinear(nn.Parameter(torch.ones(1, 2)), None, chosen)
    counts = (1, 2, 4, 5, 266, 999)
    taken = {n: int(layer(torch.ones(1, n, 2))[0, 0, 0]) for n in counts}
    assert taken == {1: 1, 2: 4, 4: 4, 5: 266, 266: 266, 999: 266}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_written_out_gives_the_same(monkeypatch, kind):
    """Whichever form is taken, in every layer and with a cache."""
    for faster in ("fused", "written out"):

        def times(calls, rounds, faster=faster):
            return {name: 2.0 - (name == faster) for name in calls}

        model, report = tiny_model(kind), []
        want = logits_in_use(model)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(speed, "fastest", times)
            speed.choose_attention(model, 22, report=report)
        layers = [*model.vision.blocks, *model.decoder.blocks]
        changed = {isinstance(b.attention, speed.WrittenOut) for b in layers}
        assert changed == {faster == "written out"}
        assert {entry["chosen"] for entry in report} == {faster}
        # worst: 4e-7, other orders of summing; a mask left out: 0.3
        assert off(logits_in_use(model), want) < 4e-6


def test_few_tokens_keep_the_fused_kernel():
    seen = []

    def inner(x, table, mask, cache, trace, name):
        seen.append((x.shape[1], trace))
        return x

    layer = speed.WrittenOut(nn.Identity(), 5)
    layer.inner.forward = inner
    given = {}
    for tokens, trace in ((1, None), (4, None), (5, None), (1, given)):
        layer(torch.ones(1, tokens, 2), (), trace=trace)
    assert seen[:3] == [(1, None), (4, None), (5, {})]
    assert seen[3][1] is given


def test_the_report_names_every_shape_once_for_each_number_of_rows():
    model, report = tiny_model(), []
    prepare(model, rows=(24, 1), rounds=1, report=report)
    shapes = {tuple(model.decoder.embedding.shape)}
    shapes |= {
        tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)
    }
    got = [(entry["shape"], entry["rows"]) for entry in products(report)]
    assert len(got) == len(set(got)) == 2 * len(shapes)
    assert set(got) == {(shape, n) for shape in shapes for n in (1, 24)}
    for entry in products(report):
        times = {k: t for k, t in entry["milliseconds"].items() if t is not None}
        assert entry["chosen"] == min(times, key=times.get)
    json.dumps(report)


# -- prepare -------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "torch", "oneDNN", "oneDNN, packed"])
def test_float32_logits_are_those_of_the_plain_model(monkeypatch, name, kind, padding):
    model = tiny_model(kind)
    fast = forced(monkeypatch, model, name, pack=True, rows=(1, 2, 24))
    want = logits_in_use(model, padding)
    # worst: 4.3e-7, other orders of summing; a soft cap left out: 2.2e-5
    assert off(logits_in_use(fast, padding), want) < 4e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FLOATS)
def test_bfloat16_is_as_close_to_float32_as_the_plain_model(monkeypatch, name, kind):
    narrow = tiny_model(kind).bfloat16()
    exact = tiny_model(kind).bfloat16().float()  # the same weights
    fast = forced(monkeypatch, narrow, name, pack=True, rows=(1, 2, 24))
    want = logits_in_use(exact)
    allowed = off(logits_in_use(narrow), want)  # what bfloat16 itself costs
    # worst ratio: 1.0; weights rounded to int8 would show as 2 or more
    assert 0 < off(logits_in_use(fast), want) < 1.5 * allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INTEGERS)
def test_int8_logits_are_near(monkeypatch, name, kind):
    model = tiny_model(kind)
    fast = forced(monkeypatch, model, name, precision="int8", rows=(1, 2, 24))
    # the errors of eight layers of random weights add up: worst 0.09;
    # 6 bits instead of 8: 0.158 or more
    assert 1e-4 < off(logits_in_use(fast), logits_in_use(model)) < 0.13


@pytest.mark.parametrize("precision", [None, "float32", "bfloat16", "int8"])
def test_the_model_given_stays_as_it_is(precision):
    model = tiny_model().requires_grad_(True)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    fast = prepare(model, precision, rows=(1, 24), rounds=1)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fast.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == torch.float32


def test_weights_that_do_not_change_are_shared():
    model = tiny_model()
    ours = {p.data_ptr() for p in model.parameters()}
    for precision in (None, "float32"):
        fast = prepare(model, precision, rows=(1,), rounds=1)
        assert {p.data_ptr() for p in fast.parameters()} == ours
    narrow = prepare(model, "bfloat16", rows=(1,), rounds=1)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert ours.isdisjoint(p.data_ptr() for p in narrow.parameters())


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_place_alone_is_that_of_all_places(kind, padding):
    model = tiny_model(kind)
    fast = prepare(model, rows=(1, 24), rounds=1)
    ids, valid = tiny_rows((3, 9), padding)
    caches = [Cache(model.config, 2, ids.shape[1] + 1) for _ in range(2)]
    with torch.inference_mode():
        every = model(tiny_pixels(2), ids, valid=valid, cache=caches[0])
        last = fast(tiny_pixels(2), ids, valid=valid, cache=caches[1], last_only=True)
        for row in range(2):
            at = valid[row].nonzero().max()
            # worst: 5e-7, other orders of summing; the place before it: 0.4
            assert off(last[row, 0], every[row, at]) < 4e-6
        # what later tokens read is there for all places
        for a, b in zip(*(c.keys + c.values for c in caches), strict=True):
            assert off(b[:, :, : ids.shape[1]], a[:, :, : ids.shape[1]]) < 4e-6


def test_int8_holds_no_floats_of_the_matrices():
    model = tiny_model()
    fast = prepare(model, "int8", rows=(1, 24), rounds=1)
    large = [n for n, p in fast.named_parameters() if p.dim() == 2]
    # looked up, not multiplied: the table of tokens and that of places
    assert sorted(large) == ["decoder.embedding", "vision.position"]


def test_a_prepared_model_is_one_of_its_kind():
    model = tiny_model()
    fast = prepare(model, rows=(1, 24), rounds=1)
    assert isinstance(fast, type(model)) and not fast.training
    assert fast.config == model.config
    ids, _ = tiny_rows((4,))
    ours, theirs = {}, {}
    fast(tiny_pixels(1), ids, trace=ours)
    model(tiny_pixels(1), ids, trace=theirs)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        # float32 in another order, as above
        assert off(ours[name], value) < 4e-6, name


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_shipped_model_says_the_same(precision):
    model, processor = pali.load("mini")
    fast = prepare(model, precision, rows=(1, 2, 260), rounds=1)
    pictures = [scenes.scene(seed).image for seed in (8, 9)]
    prompts = ["caption en", "answer en how many things are there?"]
    want = pali.generate(model, processor, pictures, prompts, max_new_tokens=16)
    got = pali.generate(fast, processor, pictures, prompts, max_new_tokens=16)
    assert got == want and all(got)


# -- when something is missing -------------------------------------------------


def test_int8_without_private_functions_multiplies_in_floats(monkeypatch):
    monkeypatch.delattr(torch, "_int_mm")
    monkeypatch.delattr(torch, "_make_per_channel_quantized_tensor")
    model, report = tiny_model(), []
    fast = prepare(model, "int8", rows=(1, 24), rounds=1, report=report)
    report = products(report)
    assert {entry["chosen"] for entry in report} == {"int8, dequantised"}
    missing = [t is None for e in report for t in e["milliseconds"].values()]
    assert sum(missing) == 2 * len(report)
    assert off(logits_in_use(fast), logits_in_use(model)) < 0.13  # as above


def test_without_onednn_plain_products_are_left(monkeypatch):
    def gone(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(speed, "by_onednn", gone)
    model, report = tiny_model(), []
    fast = prepare(model, rows=(1, 24), rounds=1, report=report)
    assert {entry["chosen"] for entry in products(report)} <= {"plain", "torch"}
    assert off(logits_in_use(fast), logits_in_use(model)) < 1e-5
    assert speed.read_bandwidth(0.001, 0.01) > 0
    assert speed.matmul_peak(torch.float32, 16, 0.01) > 0


def test_another_device_keeps_plain_products():
    assert [
        w.name for w in speed.ways(torch.ones(2, 2, device="meta"), False, True)
    ] == ["plain"]


# -- wrong arguments -----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int4"}, "precision must be None, 'float32', .* not 'int4'"),
        ({"precision": torch.bfloat16}, "precision must be .* not torch.bfloat16"),
        ({"rows": ()}, "rows must be a tuple of whole numbers from 1"),
        ({"rows": (0,)}, r"not \(0,\) and 3"),
        ({"rows": 1}, "rows must be a tuple"),
        ({"rows": (1, 2.5)}, "rows must be a tuple of whole numbers"),
        ({"rounds": 0}, "rounds one such number"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(tiny_model(), **arguments)


def test_only_an_unprepared_model_is_prepared():
    with pytest.raises(TypeError, match="not a PaliGemma but Linear"):
        prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot be prepared again"):
        prepare(prepare(tiny_model(), rows=(1,), rounds=1))


def test_int8_of_a_model_elsewhere_is_refused():
    with pytest.raises(ValueError, match="int8 products run on the CPU, not on meta"):
        prepare(tiny_model().to("meta"), "int8")


# -- counting ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_all_weights_and_the_cache(kind, dtype):
    model = tiny_model(kind).to(dtype)
    ids, valid = tiny_rows((4, 4))
    cache = Cache(model.config, 2, ids.shape[1])
    model(tiny_pixels(2), ids, valid=valid, cache=cache)
    weights = sum(p.nbytes for p in model.decoder.parameters())
    got = speed.step_bytes(model.config, dtype, ids.shape[1], batch=2)
    assert got == weights + cache.nbytes()
    assert got == speed.step_bytes(model.config.decoder, dtype, ids.shape[1], batch=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_int8_reads_a_byte_a_weight_and_a_scale_a_row(kind):
    model, want = tiny_model(kind), 0
    for weight in model.decoder.parameters():
        if weight.dim() == 2:
            q, scale = quantize(weight)
            want += q.nbytes + scale.nbytes
        else:
            want += 2 * weight.numel()  # norms, in bfloat16
    assert speed.step_bytes(model.config, torch.int8, 0) == want


def test_a_step_of_paligemma_3b_reads_five_gigabytes():
    # Gemma 2B has 2,506,172,416 parameters without PaliGemma's 1,216 more tokens
    # (Gemma Team 2024, table 2: 524,550,144 of 256,128 tokens, 1,981,884,416 others)
    others, tokens = 1_981_884_416, 257_216
    want = 2 * (others + tokens * 2048) + 18 * 2 * 2 * 256 * 300
    assert speed.step_bytes(PaliGemmaConfig(), torch.bfloat16, 300) == want


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_is_counted_as_torch_counts_it(kind):
    model = tiny_model(kind)
    ids, _ = tiny_rows((5,))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        # a trace: torch does not count its fused attention on the CPU
        model(tiny_pixels(1), ids, last_only=True, trace={})
    got = speed.prefill_flops(model.config, ids.shape[1] - PATCHES)
    assert got == counter.get_total_flops()


def test_the_vision_tower_is_counted_as_torch_counts_it():
    tower = VisionTower(tiny_config().vision)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        tower(tiny_pixels(1), trace={})
    assert speed.vision_flops(tower.config) == counter.get_total_flops()


def test_a_roofline_has_two_sides():
    assert speed.roofline(100, 8, peak=50, bandwidth=8) == 2  # arithmetic limits
    assert speed.roofline(100, 80, peak=50, bandwidth=8) == 10  # memory limits


# -- the machine ---------------------------------------------------------------


def test_bandwidth_is_that_of_the_best_way(monkeypatch):
    def fastest(calls, seconds):
        return {name: 2.0 - (name == "largest") for name in calls}

    monkeypatch.setattr(speed, "fastest", fastest)
    assert speed.read_bandwidth(0.01) == round(0.01e9 / 16_384) * 16_384


def test_all_of_the_memory_is_read(monkeypatch):
    """A way that reads a part alone would look faster than memory is."""
    seen = {}
    monkeypatch.setattr(speed, "fastest", lambda c, seconds: seen.update(c) or {0: 1.0})
    speed.read_bandwidth(0.001)
    count = round(0.001e9 / 16_384) * 4096
    assert seen["sum"]() == count
    assert seen["oneDNN"]().sum() == count
    # two halves of a one, read as bfloat16, are 1.0 and 0.0
    assert seen["bfloat16"]().float().sum() == pytest.approx(count, rel=1e-2)


def test_a_dtype_that_cannot_be_multiplied_is_named(monkeypatch):
    monkeypatch.delattr(torch, "_int_mm")
    with pytest.raises(ValueError, match="cannot multiply torch.int8"):
        speed.matmul_peak(torch.int8, 16)


def test_the_machine_is_described_in_plain_values(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    found = speed.machine()
    assert json.loads(json.dumps(found)) == found
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert found["ATEN_CPU_CAPABILITY"] is None
    assert found["threads"] == torch.get_num_threads()


# -- steps of one shape --------------------------------------------------------


def best_word(logits):
    return logits[:, :108].argmax(dim=-1)  # words, not <image>


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_one_shape_say_the_same(kind, padding):
    # a window of 8 so that sliding layers forget while we look
    extra = {"sliding_window": 8} if kind == "gemma2" else {}
    model = tiny_model(kind, **extra)
    ids, valid = tiny_rows((3, 6), padding)
    batch = Batch(tiny_pixels(2), ids, valid, torch.zeros_like(valid), None)
    with torch.inference_mode():
        want = list(steps(model, batch, 12, best_word, stop=None))
        got = list(speed.graphed_steps(model, batch, 12, best_word))
    assert len(got) == 12 and torch.equal(torch.stack(got), torch.stack(want))
    assert len(set(torch.stack(got).flatten().tolist())) > 4  # not one word for all


def test_garbage_in_unwritten_places_is_not_seen():
    model = tiny_model()
    ids, valid = tiny_rows((3,))
    found = []
    for rubbish in (0.0, math.nan):
        cache = Cache(model.config, 1, ids.shape[1] + 5)
        with torch.inference_mode():
            model(tiny_pixels(1), ids, cache=cache)
            for buffer in (*cache.keys, *cache.values):
                buffer[:, :, cache.length :] = rubbish
            fixed = speed.FixedCache(cache)
            found.append(speed.fixed_step(model, torch.tensor([[7]]), fixed))
    assert torch.equal(*found) and found[0].isfinite().all()
