"""CLIP and SigLIP losses against published models, slow loops and their laws."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pali.contrastive import (
    clip_loss,
    cross_entropy,
    pair_logits,
    siglip_loss,
    siglip_loss_chunked,
    summed_loss,
    unit,
)


def leaves(B, D=8, seed=0, scale=10.0, bias=-2.0, dtype=torch.float32):
    """Random pictures and texts, a scale and a bias, all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(2, B, D, generator=generator).to(dtype)
    numbers = torch.tensor([math.log(scale), bias], dtype=dtype)
    return [x.clone().requires_grad_() for x in (*pairs, *numbers)]


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def value_and_gradients(loss, inputs, **options):
    value = loss(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


# -- against others ------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """Tiny published models with their inputs and outputs."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = tower | ids | {"vocab_size": 50, "projection_size": 16}
    vision = tower | {"image_size": 16, "patch_size": 8}
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(2, 50, (8, 6), generator=generator),
        "pixel_values": torch.randn(8, 3, 16, 16, generator=generator),
        "return_loss": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
        torch.nn.init.constant_(siglip.logit_scale, math.log(10))
        torch.nn.init.constant_(siglip.logit_bias, -2.0)
    return {"siglip": siglip.eval(), "clip": clip.eval()}, inputs


def test_siglip_loss_is_that_of_the_published_model(published):
    models, inputs = published
    model = models["siglip"]
    with torch.no_grad():
        out = model(**inputs)
        ours = siglip_loss(
            out.image_embeds, out.text_embeds, model.logit_scale, model.logit_bias
        )
    # measured: 0; divided by all pairs: 8 times too small; bias negated: 3 times larger
    torch.testing.assert_close(ours, out.loss, rtol=1e-5, atol=0)


def test_clip_loss_is_that_of_the_published_model(published):
    models, inputs = published
    with torch.no_grad():
        out = models["clip"](**inputs)
        ours = clip_loss(out.image_embeds, out.text_embeds, models["clip"].logit_scale)
    # measured: 1.2e-7; one direction only: 1.5e-2
    torch.testing.assert_close(ours, out.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("B", [1, 2, 5])
def test_siglip_loss_is_a_sum_over_pairs_in_plain_python(B):
    images, texts, log_scale, bias = leaves(B, dtype=torch.float64)
    total = 0.0
    for i, x in enumerate(images.tolist()):
        for j, y in enumerate(texts.tolist()):
            z = math.exp(log_scale.item()) * cosine(x, y) + bias.item()
            total += math.log1p(math.exp(-z if i == j else z))
    got = siglip_loss(images, texts, log_scale, bias).item()
    # worst of 300 draws: 9e-8, from the 1e-8 that is added to every length
    assert got == pytest.approx(total / B, abs=1e-6)


@pytest.mark.parametrize("B", [1, 2, 5])
def test_clip_loss_is_two_multiple_choices_in_plain_python(B):
    images, texts, log_scale, _ = leaves(B, dtype=torch.float64)
    t, x, y = math.exp(log_scale.item()), images.tolist(), texts.tolist()
    total = 0.0
    for i in range(B):
        row = sum(math.exp(t * cosine(x[i], y[j])) for j in range(B))
        column = sum(math.exp(t * cosine(x[j], y[i])) for j in range(B))
        total += math.log(row) + math.log(column) - 2 * t * cosine(x[i], y[i])
    got = clip_loss(images, texts, log_scale).item()
    assert got == pytest.approx(total / (2 * B), abs=1e-6)


def test_gradients_are_the_slopes():
    inputs = leaves(4, D=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(siglip_loss, inputs)
    assert torch.autograd.gradcheck(clip_loss, inputs[:3])
    assert torch.autograd.gradcheck(lambda *x: siglip_loss_chunked(*x, chunk=3), inputs)


# -- cross-entropy, from which both are made -----------------------------------


@given(seed=st.integers(0, 2**16), C=st.integers(1, 9), spread=st.sampled_from((1, 40)))
def test_cross_entropy_is_that_of_pytorch(seed, C, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(3, 4, C, generator=generator)
    right = torch.randint(C, (3, 4), generator=generator)
    want = F.cross_entropy(logits.flatten(0, 1), right.flatten(), reduction="none")
    got = cross_entropy(logits, right)
    # worst of 2,000 draws: 7.6e-6 (losses up to 238); another choice: 1.3 and more
    torch.testing.assert_close(got, want.view(3, 4), rtol=0, atol=8e-5)


def test_cross_entropy_of_shares_is_the_logarithm_of_the_share():
    shares = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    logits = torch.tensor([math.log(s) for s in shares], dtype=torch.float64)
    for k, share in enumerate(shares):
        got = cross_entropy(logits + 7.0, torch.tensor(k)).item()
        assert got == pytest.approx(-math.log(share), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_far_out_is_the_distance(dtype):
    logits = torch.tensor([[16_384.0, 0.0, -16_384.0]], dtype=dtype).expand(3, 3)
    got = cross_entropy(logits, torch.arange(3))
    assert got.dtype == torch.float32
    assert got.tolist() == [0.0, 16_384.0, 32_768.0]


def test_the_slope_of_cross_entropy_is_said_minus_should():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64) * 3
    logits[0, :2] = 9.0  # two highest ones
    logits.requires_grad_()
    right = torch.tensor([0, 1, 2, 3, 0])
    (slope,) = torch.autograd.grad(cross_entropy(logits, right).sum(), logits)
    want = logits.softmax(dim=-1) - F.one_hot(right, 4)
    torch.testing.assert_close(slope, want, rtol=0, atol=1e-12)


def test_an_impossible_choice_costs_nothing_unless_it_is_right():
    logits = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    assert cross_entropy(logits, torch.tensor([0, 1])).tolist() == [0.0, math.inf]


@given(seed=st.integers(0, 2**16), B=st.integers(1, 8))
def test_the_sigmoid_loss_is_a_cross_entropy_of_two_choices(seed, B):
    inputs = leaves(B, seed=seed, dtype=torch.float64)
    z = pair_logits(*inputs)
    two = torch.stack((torch.zeros_like(z), z), dim=-1)  # "not a pair", "a pair"
    want = cross_entropy(two, torch.eye(B).long()).sum() / B
    torch.testing.assert_close(siglip_loss(*inputs), want, rtol=1e-12, atol=1e-12)


# -- known values --------------------------------------------------------------


def unrelated(B):
    """Pictures and texts that are all at right angles."""
    axes = torch.eye(2 * B)
    return axes[:B], axes[B:]


@pytest.mark.parametrize("B", [2, 8, 64])
def test_a_guessing_clip_loss_is_the_logarithm_of_the_batch(B):
    loss = clip_loss(*unrelated(B), math.log(10))
    assert loss.item() == pytest.approx(math.log(B), abs=1e-5)


def test_siglip_starts_at_the_values_the_chapter_names():
    start = [
        siglip_loss(*unrelated(32), math.log(10), b).item()
        for b in (0.0, -math.log(31), -10.0)
    ]
    want = [32 * math.log(2), 4.4497, 10.0014]
    assert start == pytest.approx(want, abs=1e-3)


def lowest(B, scale):
    """The chapter's floor of the CLIP loss."""
    return math.log1p((B - 1) * math.exp(-scale * B / (B - 1)))


@pytest.mark.parametrize("scale", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("B", [2, 5, 24])
def test_corners_of_a_simplex_reach_the_lowest_clip_loss(B, scale):
    corners = torch.eye(B, dtype=torch.float64) - 1 / B
    got = clip_loss(corners, corners, math.log(scale)).item()
    assert got == pytest.approx(lowest(B, scale), abs=1e-6)  # 1e-8 on each length


@given(seed=st.integers(0, 2**16), B=st.integers(2, 8), scale=st.floats(0.1, 30))
def test_no_embeddings_come_below_the_lowest_clip_loss(seed, B, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, B, generator=generator, dtype=torch.float64)
    noise = torch.randn(B, B, generator=generator, dtype=torch.float64)
    for y in (x, x + 0.1 * noise, noise, -x):
        got = clip_loss(x - x.mean(0), y - y.mean(0), math.log(scale)).item()
        assert got > lowest(B, scale) - 1e-6


@given(B=st.integers(2, 60))
def test_the_best_bias_is_minus_the_logarithm_of_the_wrong_pairs_of_one(B):
    bias = torch.tensor(-math.log(B - 1), requires_grad=True)
    siglip_loss(*unrelated(B), math.log(10), bias).backward()
    # worst of all 59: 4e-7; bias -ln(B) instead: 0.33 at B = 2, 1.6e-2 at B = 60
    assert abs(bias.grad.item()) < 4e-6


# -- laws ----------------------------------------------------------------------

LOSSES = {
    "clip": lambda x, y, t, b: clip_loss(x, y, t),
    "siglip": siglip_loss,
    "chunked": lambda x, y, t, b: siglip_loss_chunked(x, y, t, b, chunk=3),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@given(seed=st.integers(0, 2**16), B=st.integers(1, 8))
def test_the_order_of_the_pairs_does_not_matter(loss, seed, B):
    images, texts, *numbers = leaves(B, seed=seed)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    # worst of 700 draws: 2e-6; texts in another order than pictures: 0.1 and more
    torch.testing.assert_close(
        loss(images[order], texts[order], *numbers),
        loss(images, texts, *numbers),
        rtol=0,
        atol=2e-5,
    )


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_length_of_the_vectors_does_not_matter(loss):
    images, texts, *numbers = leaves(6)
    lengths = torch.linspace(0.01, 100, 6)[:, None]
    # measured: 5e-7; without normalising: 100 and more
    torch.testing.assert_close(
        loss(images * lengths, texts * lengths.flip(0), *numbers),
        loss(images, texts, *numbers),
        rtol=0,
        atol=2e-5,
    )


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_pictures_and_texts_may_change_places(loss):
    images, texts, *numbers = leaves(7)
    torch.testing.assert_close(
        loss(texts, images, *numbers), loss(images, texts, *numbers), rtol=0, atol=2e-5
    )


def test_a_zero_vector_gives_finite_gradients():
    images, texts, log_scale, bias = leaves(3)
    with torch.no_grad():
        images[1] = 0
    siglip_loss(images, texts, log_scale, bias).backward()
    assert torch.equal(unit(images)[1], torch.zeros(8))
    assert images.grad.isfinite().all()


def test_sixteen_bit_embeddings_are_compared_in_float32():
    images, texts, log_scale, bias = (x.detach() for x in leaves(6))
    low = [x.bfloat16() for x in (images, texts)]
    got = siglip_loss(*low, log_scale, bias)
    want = siglip_loss(*(x.float() for x in low), log_scale, bias)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


# -- in chunks -----------------------------------------------------------------


@given(seed=st.integers(0, 2**16), B=st.integers(1, 12), chunk=st.integers(1, 14))
def test_chunks_give_the_same_loss_and_gradients(seed, B, chunk):
    inputs = leaves(B, seed=seed)
    whole = value_and_gradients(siglip_loss, inputs)
    parts = value_and_gradients(siglip_loss_chunked, inputs, chunk=chunk)
    for a, b in zip(whole, parts, strict=True):
        # worst of 2,000 draws: 4e-6; a chunk that starts one row early: 2e-2 at least
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        found = [x for x in _pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.size = max(self.size, *(x.numel() for x in found), 0)
        return out


def kept(loss, inputs):
    """Numbers that autograd holds between the forward and the backward pass."""
    storages = {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x  # held, so no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss(*inputs)
    return sum(x.untyped_storage().nbytes() // 4 for x in storages.values())


def chunks_without_recomputing(images, texts, log_scale, bias, chunk=16):
    starts = range(0, len(images), chunk)
    parts = [images[i : i + chunk] for i in starts]
    sums = [
        summed_loss(part, texts, log_scale, bias, i)
        for part, i in zip(parts, starts, strict=True)
    ]
    return sum(sums) / len(images)


def test_no_tensor_of_a_chunked_step_has_the_size_of_the_matrix():
    inputs = leaves(256)
    with LargestTensor() as record:
        value_and_gradients(siglip_loss_chunked, inputs, chunk=16)
    assert record.size <= 16 * 256
    with LargestTensor() as record:
        value_and_gradients(siglip_loss, inputs)
    assert record.size == 256 * 256


def test_a_chunked_step_keeps_memory_in_proportion_to_the_batch():
    def ratio(loss):
        return kept(loss, leaves(512)) / kept(loss, leaves(128))

    assert ratio(lambda *x: siglip_loss_chunked(*x, chunk=16)) <= 4
    assert ratio(siglip_loss) > 12  # the check can see the difference …
    assert ratio(chunks_without_recomputing) > 12  # … and is not fooled by chunks


# -- far out, and what is refused ----------------------------------------------


def test_very_wrong_pairs_have_a_large_finite_loss():
    images = torch.eye(2).requires_grad_()
    texts = torch.eye(2).flip(0)
    loss = siglip_loss(images, texts, math.log(120), -1.0)
    loss.backward()
    # wrong pairs: z = 119; right ones: z = -1
    assert loss.item() == pytest.approx(119 + math.log1p(math.e), abs=1e-3)
    assert images.grad.isfinite().all()


def log_of_sigmoid(images, texts, log_scale, bias):
    p = pair_logits(images, texts, log_scale, bias).sigmoid()
    own = torch.eye(len(p), dtype=torch.bool)
    return -torch.where(own, p, 1 - p).log().sum() / len(p)


def mean_over_pairs(images, texts, log_scale, bias):
    return siglip_loss(images, texts, log_scale, bias) / len(images)


def scale_without_exponential(images, texts, log_scale, bias):
    return siglip_loss(images, texts, torch.as_tensor(log_scale).log(), bias)


def starts_right(loss):
    """Random pairs at the paper's start (10, -10): about one softplus(10) each."""
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(2, 64, 256, generator=generator)
    return abs(loss(images, texts, math.log(10), -10.0).item() - 10.0) < 0.3


def ends_right(loss):
    """Wrong about everything at scale 120: one wrong pair each, 119 far."""
    value = loss(torch.eye(2), torch.eye(2).flip(0), math.log(120), -1.0)
    return abs(value.item() - 119 - math.log1p(math.e)) < 1e-2


def test_the_two_checks_together_reject_the_faults():
    def passes(loss):
        return starts_right(loss) and ends_right(loss)

    assert passes(siglip_loss)
    assert starts_right(log_of_sigmoid)  # asleep at the start
    assert not passes(log_of_sigmoid)
    assert not passes(mean_over_pairs)
    assert not passes(scale_without_exponential)


@pytest.mark.parametrize(
    ("images", "texts"),
    [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,)), ((0, 4),) * 2],
)
def test_what_is_not_pairs_is_refused(images, texts):
    x, y = torch.ones(images), torch.ones(texts)
    for loss in (
        lambda: clip_loss(x, y, 0.0),
        lambda: siglip_loss(x, y, 0.0, 0.0),
        lambda: siglip_loss_chunked(x, y, 0.0, 0.0),
    ):
        with pytest.raises(ValueError, match=r"must both be \[B, D\]"):
            loss()


def test_a_chunk_of_no_pictures_is_refused():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        siglip_loss_chunked(*leaves(2), chunk=0)
