"""The exact flow: every quantity against automatic differentiation of log p, and bit-identical whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import SCHEDULES, largest_error, mixture, normals
from torch import Tensor

import fastdensity as fd
import fastdensity.mixture as mixture_module

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
each_lam = pytest.mark.parametrize("lam", [-12.0, -2.0, 0.0, 3.0, 12.0])
CLOSE = 1e-9


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B, D, D) of a function of single rows."""
    return torch.func.vmap(torch.func.jacrev(lambda row: function(row[None])[0]))(x)


@each_lam
@each_schedule
def test_derivatives_of_log_prob(name: str, lam: float) -> None:
    flow = mixture(SCHEDULES[name])
    x = flow.sample(4, lam, seed=3)
    score = torch.func.grad(lambda y: flow.log_prob(y, lam).sum())(x)
    assert largest_error(flow.score(x, lam), score) < CLOSE
    assert largest_error(flow.eps(x, lam), -flow.schedule.sigma(lam) * score) < CLOSE
    hessian = jacobian(torch.func.grad(lambda y: flow.log_prob(y, lam).sum()), x)
    assert largest_error(flow.laplacian(x, lam), hessian.diagonal(dim1=1, dim2=2).sum(1)) < CLOSE
    vector = normals(4, 5, seed=7)
    form = torch.einsum("bi,bij,bj->b", vector, hessian, vector)
    assert largest_error(flow.hessian_form(x, lam, vector), form) < CLOSE


def stretching(flow: fd.GaussianMixture, x: Tensor, lam: float) -> float:
    """The size of the two parts of div u; at the noise end of VP they cancel but for 1e-7 of it."""
    parts = (
        flow.dimension * flow.schedule.dlog_alpha(lam)
        + flow.schedule.sigma(lam) ** 2 / 2 * flow.laplacian(x, lam).abs()
    )
    return float(parts.max())


@each_lam
@each_schedule
def test_divergence_is_the_trace_of_the_drift(name: str, lam: float) -> None:
    flow = mixture(SCHEDULES[name])
    x = flow.sample(4, lam, seed=3)
    trace = jacobian(lambda y: flow.drift(y, lam), x).diagonal(dim1=1, dim2=2).sum(1)
    assert float((flow.divergence(x, lam) - trace).abs().max()) < CLOSE * stretching(flow, x, lam)


@each_lam
@each_schedule
def test_drift_transports_the_density(name: str, lam: float) -> None:
    """The continuity equation at a fixed point, d log p/dlam = -div u - u.s: alpha, sigma, dlog_alpha go together."""
    flow = mixture(SCHEDULES[name])
    x = flow.sample(4, lam, seed=3)
    at = torch.full((4,), lam, dtype=torch.float64)
    _, rate = torch.func.jvp(lambda moment: flow.log_prob(x, moment), (at,), (torch.ones_like(at),))
    wanted = -flow.divergence(x, lam) - (flow.drift(x, lam) * flow.score(x, lam)).sum(1)
    assert float((rate - wanted).abs().max()) < CLOSE * stretching(flow, x, lam)


@each_schedule
def test_log_prob_against_torch_distributions(name: str) -> None:
    flow, lam = mixture(SCHEDULES[name]), 0.7
    alpha, sigma = flow.schedule.alpha(lam), flow.schedule.sigma(lam)
    normal = torch.distributions.Normal(alpha * flow.means, (alpha**2 * flow.variances + sigma**2).sqrt())
    wanted = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(flow.weights), torch.distributions.Independent(normal, 1)
    )
    x = 2.0 * normals(9, 5)
    assert largest_error(flow.log_prob(x, lam), wanted.log_prob(x)) < 1e-13


def test_far_away_nothing_overflows() -> None:
    """A hundred standard deviations out every component's density is 0 in float64; their ratios are not."""
    flow = mixture(shape=(400,))
    x = torch.full((2, 400), 50.0, dtype=torch.float64)
    assert flow.log_prob(x, 8.0).isfinite().all()
    assert (flow.log_prob(x, 8.0) < -1e5).all()
    assert flow.score(x, 8.0).isfinite().all()
    assert flow.laplacian(x, 8.0).isfinite().all()


@pytest.mark.parametrize("lam", [-40.0, 40.0])
def test_denoised_is_accurate_at_the_ends(lam: float) -> None:
    """(x - sigma eps) / alpha would have lost every digit at lam = -40; at 40 nothing is left to denoise."""
    flow = mixture()
    x = flow.sample(5, lam, seed=1)
    mean = (flow.weights[:, None] * flow.means).sum(0).expand_as(x)
    assert largest_error(flow.denoised(x, lam), mean if lam < 0 else x) < 1e-7


QUANTITIES = ("log_prob", "score", "eps", "drift", "denoised", "prediction", "laplacian", "divergence")


@pytest.mark.parametrize("quantity", QUANTITIES)
@given(rows=st.integers(1, 9), first=st.integers(0, 20), columns=st.integers(1, 40), components=st.integers(1, 6))
def test_no_result_depends_on_the_batch(quantity: str, rows: int, first: int, columns: int, components: int) -> None:
    flow = mixture(components=components, shape=(columns,), prediction_type="v_prediction")
    x, lam = normals(30, columns), torch.linspace(-9, 9, 30, dtype=torch.float64)
    function, part = getattr(flow, quantity), slice(first, first + rows)
    assert torch.equal(function(x, 0.3)[part], function(x[part], 0.3))
    assert torch.equal(function(x, lam)[part], function(x[part], lam[part]))


@pytest.mark.parametrize("elements", [1, 40, 10_000])
def test_chunks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks over rows leave every bit alone; chunks over components, only taken for huge ones, the last."""
    x, lam = normals(7, 2, 3), torch.linspace(-3, 3, 7, dtype=torch.float64)
    flow = mixture(components=5, shape=(2, 3))
    whole = [getattr(flow, quantity)(x, lam) for quantity in QUANTITIES]
    monkeypatch.setattr(mixture_module, "CHUNK_ELEMENTS", elements)
    for quantity, wanted in zip(QUANTITIES, whole, strict=True):
        torch.testing.assert_close(getattr(flow, quantity)(x, lam), wanted, rtol=1e-13, atol=1e-13)


def test_float32_states_are_computed_in_float64() -> None:
    flow, x = mixture(), normals(6, 5)
    single = x.float()
    assert flow.score(single, 2.0).dtype == torch.float32
    assert torch.equal(flow.score(single, 2.0), flow.score(single.double(), 2.0).float())
    assert torch.equal(flow.log_prob(single, 2.0), flow.log_prob(single.double(), 2.0))


def test_a_row_that_is_not_finite_stays_alone() -> None:
    flow, x = mixture(), normals(4, 5)
    clean = flow.score(x, 1.0)
    x[1, 2] = math.nan
    x[2] = math.inf
    assert torch.equal(flow.score(x, 1.0)[[0, 3]], clean[[0, 3]])
    assert flow.log_prob(x, 1.0)[[0, 3]].isfinite().all()


def test_weights_are_relative_and_variances_may_be_one_per_component() -> None:
    means = normals(3, 2, 4)
    flow = fd.GaussianMixture([1, 2, 1], means, [0.5, 1.0, 2.0])
    full = fd.GaussianMixture([0.25, 0.5, 0.25], means, torch.tensor([0.5, 1.0, 2.0])[:, None, None].expand(3, 2, 4))
    x = normals(5, 2, 4, seed=4)
    assert torch.equal(flow.log_prob(x, 0.0), full.log_prob(x, 0.0))


def test_means_are_copied() -> None:
    means = normals(2, 3)
    flow = fd.GaussianMixture([0.5, 0.5], means, [1.0, 1.0])
    before = flow.log_prob(torch.zeros(1, 3), 0.0)
    means.zero_()
    assert torch.equal(flow.log_prob(torch.zeros(1, 3), 0.0), before)


@pytest.mark.parametrize("lam", [None, -1.0])
def test_samples_have_the_right_moments(lam: float | None) -> None:
    flow, count = mixture(shape=(2, 2)), 20_000
    x = flow.sample(count, lam, seed=5)
    assert x.shape == (count, 2, 2)
    alpha, sigma = (1.0, 0.0) if lam is None else (flow.schedule.alpha(lam), flow.schedule.sigma(lam))
    weights = flow.weights[:, None, None]
    mean = alpha * (weights * flow.means).sum(0)
    second = (weights * (alpha**2 * (flow.variances + flow.means**2) + sigma**2)).sum(0)
    deviation = (second - mean**2).sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * deviation / count**0.5).all()
    torch.testing.assert_close((x**2).mean(0), second, rtol=0.1, atol=0.0)


def test_samples_repeat() -> None:
    flow = mixture()
    assert torch.equal(flow.sample(3, seed=1), flow.sample(3, seed=1))
    assert not torch.equal(flow.sample(3, seed=1), flow.sample(3, seed=2))
    assert torch.equal(flow.sample(3, seed=1), flow.sample(3, generator=torch.Generator().manual_seed(1)))
    assert flow.sample(0).shape == (0, 5)


TWO = {"weights": [0.5, 0.5], "means": [[0.0, 1.0], [2.0, 3.0]], "variances": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": [0.5, 0.0]}, ValueError, "weights must be positive, got a smallest value of 0.0"),
        ({"weights": [0.5]}, ValueError, r"weights must have shape \(2,\)"),
        ({"weights": [0.5, math.nan]}, ValueError, "weights must be finite"),
        ({"weights": "half"}, TypeError, "weights must be a tensor, an array or nested lists"),
        ({"means": [0.0, 1.0]}, ValueError, r"means must be \(K, \*\)"),
        ({"means": [[1j], [1j]]}, TypeError, "means must hold real numbers"),
        ({"variances": [1.0, -1.0]}, ValueError, "variances must be positive, got a smallest value of -1.0"),
        ({"variances": [[1.0], [1.0]]}, ValueError, r"variances must have shape \(2, 2\) like means, or \(2,\)"),
        ({"schedule": "VP"}, TypeError, "schedule must be a fastdensity Schedule"),
        ({"prediction_type": "noize"}, ValueError, "prediction_type must be one of"),
        ({"sigma_data": -1.0}, ValueError, "sigma_data must be positive"),
    ],
)
def test_bad_mixtures(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fd.GaussianMixture(**{**TWO, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda flow: flow.score(torch.zeros(3, 4), 0.0), ValueError, r"x must be \(B, 5\) on cpu like the mixture"),
        (lambda flow: flow.log_prob([0.0], 0.0), TypeError, "x must be a torch.Tensor"),
        (lambda flow: flow.drift(torch.zeros(3, 5), torch.zeros(2)), ValueError, "lam must be a number or"),
        (lambda flow: flow.score(torch.zeros(3, 5), math.nan), ValueError, "lam must be finite"),
        (lambda flow: flow.score(torch.zeros(3, 5), "0"), TypeError, "lam must be a number"),
        (lambda flow: flow.sample(-1), ValueError, "count must be a non-negative int"),
        (
            lambda flow: flow.hessian_form(torch.zeros(3, 5), 0.0, torch.zeros(3)),
            ValueError,
            "vector must have the shape",
        ),
    ],
)
def test_bad_calls(call: Callable[[fd.GaussianMixture], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(mixture())
