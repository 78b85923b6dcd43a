"""Conversions between prediction types: against their definitions, at the ends of the path, and back again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import SCHEDULES, largest_error, mixture, normals
from torch import Tensor

from fastdensity.conversions import compose, from_epsilon, to_epsilon, to_sample, to_score
from fastdensity.rules import PREDICTION_TYPE_ALIASES, PREDICTION_TYPES

SIGMA_DATA = 0.7
each_type = pytest.mark.parametrize("kind", PREDICTION_TYPES)


def karras_network(x0: Tensor, eps: Tensor, alpha: float, sigma: float) -> Tensor:
    """F of Karras et al. 2022, table 1, for x / alpha = x0 + kappa eps."""
    kappa, variance = sigma / alpha, SIGMA_DATA**2
    c_skip, c_out = variance / (kappa**2 + variance), kappa * SIGMA_DATA / (kappa**2 + variance) ** 0.5
    return (x0 - c_skip * (x0 + kappa * eps)) / c_out


# what a perfect network returns, straight from the definitions
DEFINITIONS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda x0, eps, alpha, sigma: eps,
    "sample": lambda x0, eps, alpha, sigma: x0,
    "v_prediction": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "velocity": lambda x0, eps, alpha, sigma: eps - x0,
    "velocity_to_data": lambda x0, eps, alpha, sigma: x0 - eps,
    "score": lambda x0, eps, alpha, sigma: -eps / sigma,
    "edm": karras_network,
}


@each_type
@given(alpha=st.floats(0.02, 3.0), sigma=st.floats(0.02, 80.0))
def test_every_type_against_its_definition(kind: str, alpha: float, sigma: float) -> None:
    x0, eps = normals(3, 2, 4, seed=1), normals(3, 2, 4, seed=2)
    x = alpha * x0 + sigma * eps
    prediction = DEFINITIONS[kind](x0, eps, alpha, sigma)
    convention = (alpha, sigma, kind, SIGMA_DATA)
    # what is asked for may be the small part of x: then its digits are lost in x already
    close = 1e-11 * max(1.0, alpha / sigma, sigma / alpha)
    assert largest_error(to_epsilon(prediction, x, *convention), eps) < close
    assert largest_error(to_score(prediction, x, *convention), -eps / sigma) < close
    assert largest_error(to_sample(prediction, x, *convention), x0) < close
    assert largest_error(from_epsilon(eps, x, *convention), prediction) < close
    assert largest_error(compose(x0, eps, alpha, sigma, kind, SIGMA_DATA), prediction) < 1e-12


@each_type
@given(lam=st.floats(-12.0, 12.0))
def test_back_and_forth(kind: str, lam: float) -> None:
    alpha, sigma = float(SCHEDULES["VP"].alpha(lam)), float(SCHEDULES["VP"].sigma(lam))
    prediction, x = normals(4, 6, seed=3), normals(4, 6, seed=4)
    eps = to_epsilon(prediction, x, alpha, sigma, kind)
    close = 1e-13 * (1 / alpha + 1 / sigma) ** 2
    assert largest_error(from_epsilon(eps, x, alpha, sigma, kind), prediction) < close


@each_type
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("lam", [-9.0, -1.0, 0.0, 2.5, 9.0])
def test_mixtures_predict_their_score(kind: str, name: str, lam: float) -> None:
    """The score from a perfect network of every type is the gradient of log p, on every path."""
    flow = mixture(SCHEDULES[name], prediction_type=kind, sigma_data=SIGMA_DATA)
    x = flow.sample(6, lam, seed=2)
    score = torch.func.grad(lambda y: flow.log_prob(y, lam).sum())(x)
    alpha, sigma = float(flow.schedule.alpha(lam)), float(flow.schedule.sigma(lam))
    found = to_score(flow.prediction(x, lam), x, alpha, sigma, kind, SIGMA_DATA)
    assert largest_error(found, score) < 1e-9


@pytest.mark.parametrize("kind", ["v_prediction", "velocity", "velocity_to_data", "edm"])
@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 0.0)])
def test_bounded_types_work_at_both_ends(kind: str, alpha: float, sigma: float) -> None:
    """x is pure noise, or clean data: nothing is divided by the alpha or sigma that is 0."""
    x0, eps = normals(2, 5, seed=1), normals(2, 5, seed=2)
    x = alpha * x0 + sigma * eps
    prediction = compose(x0, eps, alpha, sigma, kind, SIGMA_DATA)
    assert largest_error(to_epsilon(prediction, x, alpha, sigma, kind, SIGMA_DATA), eps) < 1e-14
    assert largest_error(to_sample(prediction, x, alpha, sigma, kind, SIGMA_DATA), x0) < 1e-14


@each_type
def test_numbers_per_row(kind: str) -> None:
    prediction, x = normals(3, 2, 4, seed=3), normals(3, 2, 4, seed=4)
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1]).double(), torch.tensor([0.3, 0.6, 0.95]).double()
    for convert in (to_epsilon, to_score, to_sample, from_epsilon):
        together = convert(prediction, x, alpha, sigma, kind)
        rows = zip(prediction.split(1), x.split(1), alpha.tolist(), sigma.tolist(), strict=True)
        torch.testing.assert_close(together, torch.cat([convert(*row, kind) for row in rows]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_computed_in_float32(dtype: torch.dtype) -> None:
    prediction, x = normals(3, 4, seed=3).to(dtype), normals(3, 4, seed=4).float()
    found = to_epsilon(prediction, x, 0.6, 0.8, "v_prediction")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 0.6 * prediction.float() + 0.8 * x, rtol=1e-6, atol=1e-6)


def test_aliases_mean_the_same() -> None:
    prediction, x = normals(3, 4, seed=3), normals(3, 4, seed=4)
    for alias, name in PREDICTION_TYPE_ALIASES.items():
        assert torch.equal(to_score(prediction, x, 0.6, 0.8, alias), to_score(prediction, x, 0.6, 0.8, name))


ROW = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: to_epsilon(ROW, ROW, 0.5, 0.5, "noize"), ValueError, "prediction_type must be one of epsilon, sample"),
        (lambda: to_epsilon(ROW, ROW, 0.5, 0.5, None), ValueError, "prediction_type must be one of"),
        (lambda: to_epsilon([1.0], ROW, 0.5, 0.5), TypeError, "prediction must be a torch.Tensor, got list"),
        (lambda: to_score(ROW[:1], ROW, 0.5, 0.5), ValueError, r"prediction must have the shape of x, \(2, 3\)"),
        (lambda: to_sample(ROW, ROW.long(), 0.5, 0.5), TypeError, "x must be float32"),
        (lambda: to_sample(ROW, ROW, torch.ones(3), 0.5), ValueError, r"alpha must be a number or .* shape \(2,\)"),
        (lambda: to_sample(ROW, ROW, -0.5, 0.5), ValueError, r"alpha must be finite and in \[0.0, inf\], got -0.5"),
        (lambda: to_epsilon(ROW, ROW, 0.0, 0.0, "v"), ValueError, "alpha and sigma cannot both be 0"),
        (lambda: to_epsilon(ROW, ROW, 1.0, 0.0, "x0"), ValueError, "sigma must be positive here"),
        (lambda: to_score(ROW, ROW, 1.0, 0.0), ValueError, "does not determine the score"),
        (lambda: to_sample(ROW, ROW, 0.0, 1.0), ValueError, "does not determine the clean sample"),
        (lambda: from_epsilon(ROW, ROW, 0.0, 1.0, "velocity"), ValueError, "does not determine the prediction"),
        (lambda: to_epsilon(ROW, ROW, 0.5, 0.5, "edm", sigma_data=0.0), ValueError, "sigma_data must be"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
