"""RMSNorm against published code, and the laws that it obeys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pali.norm import RMSNorm


def trained(dim, seed=0, std=0.3):
    """A norm with random weights, as training leaves them."""
    layer = RMSNorm(dim)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(layer.weight, std=std, generator=generator)
    return layer


def vectors(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit_size(norm):
    """The check of the chapter: a fresh norm gives every vector size 1."""
    size = norm(vectors(5, 64)).square().mean(dim=-1).sqrt()
    return bool((size - 1).abs().max() < 1e-4)


# -- against others ------------------------------------------------------------


def test_the_result_is_that_of_torch_in_float64():
    layer, x = trained(64), vectors(50, 64)
    weight = 1 + layer.weight.double()
    want = F.rms_norm(x.double(), (64,), weight, eps=1e-6)
    # worst of 300 draws: 1.0e-6; eps of 1e-5: 1.9e-5 at least
    torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-5)


def test_eps_is_added_to_the_mean_square():
    x = 1e-3 * vectors(50, 64)  # mean square about eps, so that its place shows
    want = F.rms_norm(x.double(), (64,), eps=1e-6)
    got = RMSNorm(64)(x).double()
    # worst of 300 draws: 4e-7; eps added to the root: 0.9 at least; eps 1e-5: 1.2
    torch.testing.assert_close(got, want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_published_layer_gives_the_same_bits(dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    ours = trained(64).to(dtype)
    theirs = GemmaRMSNorm(64, eps=1e-6).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = vectors(100, 64).to(dtype)
    # the same steps in the same order; casting before the factor: 1.6e-2 in bfloat16
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_gradients_are_those_of_torch():
    layer, x = trained(16), vectors(7, 16).requires_grad_()
    twin = x.detach().double().requires_grad_()
    weight = (1 + layer.weight.detach().double()).requires_grad_()
    upstream = vectors(7, 16, seed=2)
    layer(x).backward(upstream)
    F.rms_norm(twin, (16,), weight, eps=1e-6).backward(upstream.double())
    # worst of 300 draws: 1.2e-6; no gradient through the size: 0.3 at least
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=0, atol=1e-5)
    got = layer.weight.grad.double()
    torch.testing.assert_close(got, weight.grad, rtol=0, atol=1e-5)


# -- laws ----------------------------------------------------------------------


@given(factor=st.floats(0.1, 1e4), seed=st.integers(0, 2**16))
def test_the_size_of_the_input_does_not_matter(factor, seed):
    layer, x = trained(32, seed), vectors(3, 32, seed=seed)
    # worst of 2,000 draws: 5e-4, from eps at factor 0.1; no norm at all: 0.9 and more
    torch.testing.assert_close(layer(factor * x), layer(x), rtol=0, atol=5e-3)


@given(seed=st.integers(0, 2**16))
def test_a_token_does_not_hear_of_the_others(seed):
    layer, x = trained(8, seed), vectors(2, 3, 8, seed=seed)
    alone = torch.stack([torch.stack([layer(t) for t in row]) for row in x])
    # equal in 2,000 draws, which not every machine need do; one size for all: 0.1
    torch.testing.assert_close(layer(x), alone, rtol=0, atol=5e-6)


def test_a_fresh_norm_twice_is_a_fresh_norm_once():
    layer, x = RMSNorm(64), vectors(50, 64)
    # worst of 300 draws: 1.7e-6 (eps counts twice)
    torch.testing.assert_close(layer(layer(x)), layer(x), rtol=0, atol=2e-5)


def test_turning_the_input_turns_the_output_of_a_fresh_norm():
    """Only the length is used, so a rotation passes through; layer norm fails this."""
    x = vectors(20, 16)
    rotation = torch.linalg.qr(vectors(16, 16, seed=3))[0]
    layer = RMSNorm(16)
    # worst of 300 draws: 1.2e-6; with the mean subtracted: 0.7 at least
    got = layer(x @ rotation)
    torch.testing.assert_close(got, layer(x) @ rotation, rtol=0, atol=1e-5)


def test_a_zero_vector_stays_zero_and_has_a_finite_gradient():
    x = torch.zeros(1, 8, requires_grad=True)
    y = trained(8)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 8))
    assert x.grad.isfinite().all()


# -- precision -----------------------------------------------------------------


def test_large_float16_values_do_not_overflow():
    x = torch.full((1, 8), 6e4, dtype=torch.float16)  # its square is beyond float16
    assert torch.equal(RMSNorm(8)(x), torch.ones(1, 8, dtype=torch.float16))


def rounded_right(norm, x, weight):
    """Share of results that are the exact ones, rounded once."""
    exact = F.rms_norm(x.double(), x.shape[-1:], 1 + weight.double(), eps=1e-6)
    return (norm(x) == exact.to(x.dtype)).double().mean().item()


def test_bfloat16_is_rounded_once_at_the_end():
    layer, x = trained(64, std=4).bfloat16(), vectors(200, 64).bfloat16()
    weight = layer.weight.detach()

    def cast_first(x):
        y = F.rms_norm(x.float(), (64,), eps=1e-6).to(x.dtype)
        return y * (1 + weight.float()).to(x.dtype)

    def sum_in_bfloat16(x):
        return (F.rms_norm(x.float(), (64,), eps=1e-6) * (1 + weight)).to(x.dtype)

    # of 100 draws: 0.9999 at least; cast first 0.73, sum in bfloat16 0.97 at most
    assert rounded_right(layer, x, weight) > 0.995
    assert rounded_right(cast_first, x, weight) < 0.985
    assert rounded_right(sum_in_bfloat16, x, weight) < 0.985


# -- the faults of the chapter -------------------------------------------------


class PlainWeight(RMSNorm):
    def forward(self, x):
        y = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        return y.to(x.dtype)


class TwiceOne(RMSNorm):
    def forward(self, x):
        y = F.rms_norm(x.float(), x.shape[-1:], 2 + self.weight.float(), self.eps)
        return y.to(x.dtype)


@pytest.mark.parametrize("fault", [PlainWeight, TwiceOne])
def test_the_check_of_the_chapter_rejects_a_wrong_one(fault):
    assert unit_size(RMSNorm(64))
    assert not unit_size(fault(64))
