"""Where fd.jvp says that a function draws, and that derivatives end there; and outputs that have none."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastdensity as fd

HERE = r".*test_jvp_cautions\.py:\d+"


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64)


DRAWS = {
    "normal.Tensor_float": lambda x: torch.normal(x, 1.0) + x,
    "normal.float_Tensor": lambda x: torch.normal(0.0, x.exp()) + x,
    "normal.Tensor_Tensor": lambda x: torch.normal(torch.zeros(4, 6), x.exp().float()) + x,
    "bernoulli.default": lambda x: torch.bernoulli(x.sigmoid()) + x,
    "bernoulli.Tensor": lambda x: torch.empty(4, 6).bernoulli_(x.sigmoid()) + x,
    "poisson.default": lambda x: torch.poisson(x.exp()) + x,
    "multinomial.default": lambda x: torch.multinomial(x.exp(), 6) + x,
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_from_what_depends_on_the_input_are_said(name, x):
    with pytest.warns(UserWarning, match=rf"depends on its input \(aten.{name}\), at {HERE}.*Write the draw as"):
        _, tangents = fd.jvp(DRAWS[name], (x,), x[None])
    torch.testing.assert_close(tangents[0], x)  # derivatives end at the draw, as torch's do


def test_other_draws_are_not(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for draw in (
            lambda x: torch.randn_like(x) * 0 + x,
            lambda x: torch.bernoulli(x, 0.5) * 0 + x,
            lambda x: torch.normal(torch.zeros(4, 6), 1.0) * 0 + x,
            lambda x: x.clone().normal_() * 0 + x,
            lambda x: x.clone().uniform_() * 0 + x,
        ):
            torch.testing.assert_close(fd.jvp(draw, (x,), x[None])[1][0], x)


@pytest.mark.parametrize("fn", [lambda x: x.argmax(-1), lambda x: (x > 0).long(), lambda x: x > 0])
def test_outputs_without_tangents(fn, x):
    with pytest.raises(ValueError, match=r"fn must return a floating tensor, got one of torch\.(int64|bool)"):
        fd.jvp(fn, (x,), x[None])


class First(nn.Module):
    """A recurrent network's output, of rows as a sequence."""

    def __init__(self, kind, layers=2):
        super().__init__()
        self.inner = kind(6, 6, num_layers=layers, dropout=0.5 if layers > 1 else 0.0).double()

    def forward(self, x):
        return self.inner(x)[0]


DROPOUTS = {
    "dropout": lambda: nn.Dropout(0.5),
    "alpha": lambda: nn.AlphaDropout(0.5),
    "feature alpha": lambda: nn.FeatureAlphaDropout(0.5),
    "feature": lambda: nn.Dropout1d(0.5),
    "gru": lambda: First(nn.GRU),
    "rnn": lambda: First(nn.RNN),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_said_and_has_one_mask(name, x):
    module, step, vectors = DROPOUTS[name](), 1e-6, torch.randn(2, 4, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match=rf"dropout is active in fn, at {HERE}"):
        fd.jvp(module, (x,), vectors)

    def run(x):
        torch.manual_seed(5)
        return [item.detach() for item in fd.jvp(module, (x,), vectors)]

    for number, tangent in enumerate(run(x)[1]):
        wanted = (run(x + step * vectors[number])[0] - run(x - step * vectors[number])[0]) / (2 * step)
        torch.testing.assert_close(tangent, wanted, rtol=1e-6, atol=1e-7)


def test_dropout_that_does_nothing_is_not_said(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for module in (nn.AlphaDropout(0.5).eval(), First(nn.GRU).eval(), First(nn.GRU, 1), nn.AlphaDropout(0.0)):
            fd.jvp(module, (x,), x[None])
