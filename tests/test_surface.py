"""The public surface: the names others rely on, and what they promise."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pali
from pali import scenes

SIGNATURES = {
    "load": "folder='mini', *, dtype=torch.float32, device='cpu'",
    "load_model": "folder, *, dtype=torch.float32, device='cpu'",
    "load_processor": "folder",
    "save_model": "model, folder, processor=None",
    "generate": "model, processor, images, prompts, *, max_new_tokens=256, "
    "temperature=0.0, top_k=None, top_p=None, seed=None, stream=None, trace=None",
    "read_boxes": "text, image_size",
    "read_masks": "text, image_size, codec=None",
    "load_mask_codec": "path",
}
METHODS = {
    ("PaliGemma", "forward"): "self, pixels, ids, *, valid=None, suffix=None, "
    "cache=None, features=None, mask=None, positions=None, last_only=False, trace=None",
    ("PaliGemma", "encode"): "self, pixels, trace=None",
    ("Processor", "__call__"): "self, images, prompts, suffixes=None, padding='left'",
    ("Cache", "__init__"): "self, config, batch_size, capacity",
}


def plain_signature(function) -> str:
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare)).strip("()")


@pytest.fixture(scope="module")
def mini():
    return pali.load("mini")


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_keep_their_signature(name):
    assert plain_signature(getattr(pali, name)) == SIGNATURES[name]


@pytest.mark.parametrize(("owner", "method"), METHODS)
def test_methods_keep_their_signature(owner, method):
    function = getattr(getattr(pali, owner), method)
    assert plain_signature(function) == METHODS[owner, method]


def test_importing_the_package_imports_no_torch():
    code = "import sys, pali; assert 'torch' not in sys.modules; print(dir(pali))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "'load'" in out.stdout and "'scenes'" in out.stdout


def test_nothing_in_the_package_imports_the_reference():
    code = (
        "import sys, pali\n"
        "for name in pali.__all__: getattr(pali, name)\n"
        "assert 'transformers' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="paint"):
        pali.paint  # noqa: B018


def test_shapes_and_dtypes_of_a_batch(mini):
    model, processor = mini
    image = scenes.scene(1).image
    batch = processor([image, image], ["caption en", "detect cat ; dog"])
    B, T = batch.ids.shape
    assert batch.pixels.shape == (2, 3, 128, 128)
    assert batch.pixels.dtype == torch.float32
    assert batch.ids.dtype == torch.int64
    assert batch.valid.dtype == batch.suffix.dtype == torch.bool
    assert batch.labels is None
    with torch.no_grad():
        features = model.encode(batch.pixels)
        logits = model(None, batch.ids, valid=batch.valid, features=features)
        last = model(batch.pixels, batch.ids, valid=batch.valid, last_only=True)
    V = model.config.decoder.vocab_size
    assert features.shape == (2, 256, model.config.decoder.width)
    assert logits.shape == (B, T, V) and last.shape == (B, 1, V)
    # float32 products of another shape; the limit is a choice, not a measured worst
    torch.testing.assert_close(logits[:, -1:], last, rtol=0, atol=1e-4)


def test_labels_are_the_answer_and_its_end(mini):
    _, processor = mini
    batch = processor(scenes.scene(1).image, "caption en", "a cat")
    taught = batch.labels[batch.labels != -100].tolist()
    assert taught == [*processor.tokenizer.encode("a cat"), 1]
    assert torch.equal(batch.labels != -100, batch.suffix)


def test_generation_is_equal_alone_and_in_a_batch(mini):
    model, processor = mini
    images = [scenes.scene(seed).image for seed in (1, 2, 3)]
    prompts = ["caption en", "answer en how many cats are there?", "detect cat ; dog"]
    together = pali.generate(model, processor, images, prompts, max_new_tokens=40)
    alone = [
        pali.generate(model, processor, i, p, max_new_tokens=40)[0]
        for i, p in zip(images, prompts, strict=True)
    ]
    assert together == alone


def test_permuting_the_batch_permutes_the_answers(mini):
    """The blindfold test: an answer follows its picture."""
    model, processor = mini
    images = [scenes.scene(seed).image for seed in range(6)]
    prompts = ["caption en"] * 6
    one = pali.generate(model, processor, images, prompts, max_new_tokens=20)
    two = pali.generate(model, processor, images[::-1], prompts, max_new_tokens=20)
    assert one == two[::-1]
    assert len(set(one)) > 1


def test_stream_gives_the_pieces_of_the_answer(mini):
    model, processor = mini
    heard: dict[int, str] = {0: "", 1: ""}

    def listen(row, piece):
        heard[row] += piece

    images = [scenes.scene(seed).image for seed in (1, 2)]
    texts = pali.generate(
        model, processor, images, ["caption en"] * 2, stream=listen, max_new_tokens=30
    )
    assert [heard[0], heard[1]] == texts


def test_trace_has_one_dict_a_step_and_no_graph(mini):
    model, processor = mini
    trace: list = []
    pali.generate(
        model, processor, scenes.scene(1).image, "caption en", trace=trace,
        max_new_tokens=3,
    )  # fmt: skip
    assert 1 <= len(trace) <= 3
    weights = trace[0]["decoder.0.attention"]
    assert not weights.requires_grad
    # 300 float32 weights a row; the limit is a choice, not a measured worst
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5
    )


def test_trace_keeps_the_graph_in_a_plain_call(mini):
    model, processor = mini
    batch = processor(scenes.scene(1).image, "caption en")
    trace: dict = {}
    best = model(batch.pixels, batch.ids, trace=trace)[0, -1].max()
    (gradient,) = torch.autograd.grad(best, trace["decoder.3.attention"])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_every_dtype_answers(dtype):
    model, processor = pali.load("mini", dtype=dtype)
    stored = torch.float16
    assert model.decoder.embedding.dtype == (dtype or stored)
    batch = processor(scenes.scene(1).image, "caption en")
    with torch.no_grad():
        logits = model(batch.pixels, batch.ids)
    assert logits.dtype == (dtype or stored) and logits.isfinite().all()


def test_save_and_load_give_the_same_model(mini, tmp_path):
    model, processor = mini
    pali.save_model(model, tmp_path / "copy", processor)
    again, other = pali.load(tmp_path / "copy")
    image = scenes.scene(1).image
    assert pali.generate(model, processor, image, "caption en") == pali.generate(
        again, other, image, "caption en"
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


PICTURE = Image.new("RGB", (10, 20))
BAD_CALLS = {
    "no folder": lambda m, p: pali.load("no such folder"),
    "a dtype that is none": lambda m, p: pali.load("mini", dtype=torch.int8),
    "more prompts than pictures": lambda m, p: p([PICTURE], ["a", "b"]),
    "no prompts": lambda m, p: p([], []),
    "a prompt that is no text": lambda m, p: p(PICTURE, [3]),
    "an unknown side": lambda m, p: p(PICTURE, "ocr", padding="up"),
    "a picture that is none": lambda m, p: p(3, "ocr"),
    "an array of floats": lambda m, p: p(np.zeros((4, 4)), "ocr"),
    "ids of one dimension": lambda m, p: m(None, torch.tensor([1, 2])),
    "ids that are floats": lambda m, p: m(None, torch.ones(1, 2)),
    "ids out of range": lambda m, p: m(None, torch.tensor([[99_999]])),
    "no ids": lambda m, p: m(None, torch.zeros(1, 0, dtype=torch.long)),
    "a picture without place": lambda m, p: m(
        torch.zeros(1, 3, 128, 128), torch.tensor([[2, 5]])
    ),
    "places without a picture": lambda m, p: m(None, p(PICTURE, "ocr").ids),
    "pixels of another size": lambda m, p: m.encode(torch.zeros(1, 3, 64, 64)),
    "pixels that are bytes": lambda m, p: m.encode(
        torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    ),
    "valid of another shape": lambda m, p: m(
        None, torch.tensor([[2, 5]]), valid=torch.ones(1, 3, dtype=torch.bool)
    ),
    "a mask without any True": lambda m, p: m(
        None, torch.tensor([[2, 5]]), mask=torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    ),
    "a mask of another shape": lambda m, p: m(
        None, torch.tensor([[2, 5]]), mask=torch.ones(1, 1, 3, 2, dtype=torch.bool)
    ),
    "a cache that is too small": lambda m, p: m(
        None, torch.tensor([[2, 5]]), cache=pali.Cache(m.config, 1, 1)
    ),
    "temperature below zero": lambda m, p: pali.generate(
        m, p, PICTURE, "ocr", temperature=-1
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_get_one_clear_sentence(mini, call):
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        call(*mini)
    said = str(caught.value)
    assert 15 < len(said) < 400 and "\n" not in said
