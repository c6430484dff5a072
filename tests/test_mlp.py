"""GeGLU against the formula in double precision, published Gemma, and its laws."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP

from pali.mlp import GeGLU

PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def gelu(x):
    """The tanh form, written out."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + torch.tanh(inner))


class Exact(GeGLU):
    def forward(self, x):
        return self.down(F.gelu(self.gate(x)) * self.up(x))


class Silu(GeGLU):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Swapped(GeGLU):
    """The chapter's fault: the activation on the wrong factor."""

    def forward(self, x):
        return self.down(self.gate(x) * F.gelu(self.up(x), approximate="tanh"))


class Around(GeGLU):
    """Its neighbour: the activation around the product."""

    def forward(self, x):
        return self.down(F.gelu(self.gate(x) * self.up(x), approximate="tanh"))


def draw(kind=GeGLU, width=12, mlp_width=40, seed=0):
    """A layer whose gates spread over shut, half open and open, and an input."""
    rng = torch.Generator().manual_seed(seed)
    layer = kind(width, mlp_width).requires_grad_(False)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=rng) * weight.shape[1] ** -0.5)
    return layer, 2 * torch.randn(3, 5, width, generator=rng)


def check_formula(kind=GeGLU, seed=0):
    """The chapter's check: down(gelu(gate) · up) with float64 matrices."""
    layer, x = draw(kind, seed=seed)
    gate, up, down = (getattr(layer, p).weight.double() for p in PARTS)
    want = (gelu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    # worst of 300 draws: 8e-6; the smallest fault, exact GELU, at least 8e-4
    torch.testing.assert_close(layer(x), want.float(), rtol=0, atol=8e-5)


def test_geglu_is_the_formula():
    check_formula()


@pytest.mark.parametrize("kind", [Exact, Silu, Swapped, Around])
def test_the_check_rejects(kind):
    with pytest.raises(AssertionError):
        check_formula(kind)


@pytest.mark.parametrize("seed", range(3))
def test_geglu_agrees_with_published_gemma(seed):
    layer, x = draw(seed=seed)
    theirs = GemmaMLP(GemmaConfig(hidden_size=12, intermediate_size=40))
    for ours, name in PARTS.items():
        getattr(theirs, name).weight.data = getattr(layer, ours).weight
    with torch.no_grad():
        want = theirs(x)
    # worst of 300 draws here: 0.0, the same products in the same order
    torch.testing.assert_close(layer(x), want, rtol=0, atol=5e-5)


def one_tap(kind, gate, up):
    """Width 1 and one feature: x = 1, so the gate reads `gate`, the flow is `up`."""
    layer = kind(1, 1).requires_grad_(False)
    for matrix, value in ((layer.gate, gate), (layer.up, up), (layer.down, 1.0)):
        matrix.weight.fill_(value)
    return layer(torch.ones(1)).item()


def test_a_shut_tap_lets_next_to_nothing_through():
    # gelu(-3) = -0.0036, by hand: 0.5 · -3 · (1 + tanh(-3.357))
    assert one_tap(GeGLU, -3.0, 3.0) == pytest.approx(-0.0109, abs=1e-4)
    assert one_tap(Swapped, -3.0, 3.0) == pytest.approx(-8.99, abs=0.01)
    assert one_tap(Around, -3.0, 3.0) == pytest.approx(0.0, abs=1e-4)


def test_an_open_tap_lets_both_signs_through():
    assert one_tap(GeGLU, 3.0, 2.0) == pytest.approx(5.993, abs=1e-3)
    assert one_tap(GeGLU, 3.0, -2.0) == pytest.approx(-5.993, abs=1e-3)


def test_the_output_is_linear_in_up_but_not_in_the_gate():
    layer, x = draw()
    base = layer(x)
    layer.up.weight.mul_(-3)
    # worst of 300 draws: 8e-7 of the largest output; through the gate: 25 away at least
    top = 3 * base.abs().max().item()
    torch.testing.assert_close(layer(x), -3 * base, rtol=0, atol=8e-6 * top)
    layer.up.weight.div_(-3)
    layer.gate.weight.mul_(-3)
    assert (layer(x) + 3 * base).abs().max() > 1


def test_two_gated_features_multiply():
    layer = GeGLU(2, 2).requires_grad_(False)
    layer.gate.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    layer.up.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    layer.down.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    grid = torch.cartesian_prod(torch.linspace(-4, 4, 21), torch.linspace(-4, 4, 21))
    # GELU(a) - GELU(-a) = a; worst: 2e-6
    torch.testing.assert_close(layer(grid)[:, 0], grid.prod(dim=1), rtol=0, atol=2e-5)


def test_every_token_is_worked_on_alone():
    layer, x = draw()
    other = x.clone()
    other[:, 1:] = 7.0
    # worst of 300 draws: 0.0; another processor may add in another order
    torch.testing.assert_close(layer(x)[:, 0], layer(other)[:, 0], rtol=0, atol=1e-5)


def test_there_are_three_matrices_and_no_biases():
    shapes = {name: tuple(w.shape) for name, w in GeGLU(12, 40).named_parameters()}
    assert shapes == {
        "gate.weight": (40, 12),
        "up.weight": (40, 12),
        "down.weight": (12, 40),
    }
