"""Guidance: what each kind asks for where, that log p follows, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import SCHEDULES, lam_grid, largest_error, mixture, normals
from torch import Tensor

import fastdensity as fd
from fastdensity.divergence import DivergenceMethod
from fastdensity.evaluation import Evaluation, Problem
from fastdensity.guidance import Push
from fastdensity.solvers import SOLVERS

ROWS = 6
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


def evaluation(flow: Any, lam: float, method: str | DivergenceMethod = "exact", x: Tensor | None = None) -> Evaluation:
    x = flow.sample(ROWS, lam, seed=3) if x is None else x
    problem = Problem(
        flow,
        kind=flow.prediction_type,
        sigma_data=flow.sigma_data,
        dimension=x[0].numel(),
        method=DivergenceMethod.parse(method, "exact"),
        seed=0,
        sample_ids=torch.arange(x.shape[0]),
        tracks=True,
    )
    return Evaluation(problem, x, lam, 0, problem.tracks)


def rate_of_log_prob(point: Evaluation) -> Tensor:
    """d log p/dlam that a push makes, from kernel-free formulas: eta, then the account of the trajectory."""
    eps, push = point.epsilon(), point.push
    sq_norm = (eps * eps).sum(1)
    q = torch.as_tensor(push.q, dtype=torch.float64)
    total = push.shift + push.repair + math.sqrt(2 * point.problem.dimension) * torch.special.ndtri(q)
    return point.log_density_rate(push.gain + total / sq_norm, sq_norm)[0]


@each_schedule
@given(lam=st.floats(-8.0, 8.0), rate=st.floats(-20.0, 20.0))
def test_b_is_the_rate_of_log_prob(name: str, lam: float, rate: float) -> None:
    point = evaluation(mixture(SCHEDULES[name]), lam)
    point.push = fd.DensityGuidance(b=lambda x, at: rate).push(point, lam)
    assert float((rate_of_log_prob(point) - rate).abs().max()) < 1e-9


@each_schedule
@given(lam=st.floats(-8.0, 8.0), q=st.floats(0.01, 0.99))
def test_q_shifts_the_rate_by_a_quantile(name: str, lam: float, q: float) -> None:
    """- div u + sqrt(D/2) ndtri(q), per unit of lam."""
    flow = mixture(SCHEDULES[name])
    point = evaluation(flow, lam)
    point.push = fd.DensityGuidance(q).push(point, lam)
    wanted = -flow.divergence(point.x, lam) + math.sqrt(5 / 2) * torch.special.ndtri(
        torch.tensor(q, dtype=torch.float64)
    )
    assert float((rate_of_log_prob(point) - wanted).abs().max()) < 1e-9 * max(1.0, float(wanted.abs().max()))


@each_schedule
@given(lam=st.floats(-6.0, 6.0), noise=st.floats(0.1, 2.0), rate=st.floats(-5.0, 5.0))
def test_noise_is_repaired_exactly(name: str, lam: float, noise: float, rate: float) -> None:
    """With the projection term b is met on average; without it the rate is off by (phi^2/2) s.H s / ||s||^2."""
    flow = mixture(SCHEDULES[name])
    point = evaluation(flow, lam)
    score, hessian = flow.score(point.x, lam), jacobian(lambda y: flow.score(y, lam), point.x)
    curvature = torch.einsum("bi,bij,bj->b", score, hessian, score) / (score * score).sum(1)
    assert largest_error(point.curvature_along_score(), curvature) < 1e-9
    for projection_term in (True, False):
        guidance = fd.StochasticDensityGuidance(
            noise=lambda at: noise, b=lambda x, at: rate, projection_term=projection_term, track=False
        )
        point.push = guidance.push(point, lam)
        bias = 0.0 if projection_term else -((noise * point.sigma) ** 2) / 2 * curvature
        found, size = rate_of_log_prob(point), max(1.0, float(curvature.abs().max()) * (noise * point.sigma) ** 2)
        assert float((found - rate - bias).abs().max()) < 1e-9 * size


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(lambda row: function(row[None])[0]))(x)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "velocity", "score", "edm"])
def test_networks_find_the_same_by_forward_mode(kind: str) -> None:
    """Laplacian, divergence and curvature of a network, of every prediction type, against the mixture's own."""
    known = mixture(fd.RectifiedFlow(), prediction_type=kind)
    network = fd.Flow(known.prediction, known.schedule, kind)
    lam = 1.3
    exact, found = evaluation(known, lam), evaluation(network, lam, x=known.sample(ROWS, lam, seed=3))
    for quantity in ("laplacian", "divergence", "curvature_along_score"):
        assert largest_error(getattr(found, quantity)(), getattr(exact, quantity)()) < 1e-10


def test_estimates_scatter_about_the_exact_laplacian() -> None:
    known = mixture()
    network, lam, x = fd.Flow(known.prediction, known.schedule), 1.3, mixture().sample(1, 1.3, seed=3).expand(2000, -1)
    point = evaluation(network, lam, "hutchinson", x)
    exact = float(known.laplacian(x[:1], lam))
    for estimates in (point.laplacian(), point._measured[0]):  # type: ignore[index]
        assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / 2000**0.5
    # what steers and what measures never are the same probes
    together = torch.stack([point.laplacian(), point._measured[0]])  # type: ignore[index]
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.1


@pytest.mark.parametrize("relative_noise", [0.0, 0.6, 1.5])
def test_the_standard_error_of_the_rate(relative_noise: float) -> None:
    """With noise the Laplacian enters twice, against each other: its error counts |1 - phi_rel^2| times."""
    known = mixture()
    network, lam, x = fd.Flow(known.prediction, known.schedule), 1.3, known.sample(1, 1.3, seed=3).expand(2000, -1)
    point = evaluation(network, lam, DivergenceMethod("hutchinson", 5), x)
    point.push = Push(relative_noise=relative_noise)
    rate, std_err = point.log_density_rate(torch.zeros(2000), torch.ones(2000))
    assert float(std_err.pow(2).mean().sqrt()) == pytest.approx(float(rate.std()), rel=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_without_effect_changes_no_bit(solver: str) -> None:
    flow, grid = mixture(), lam_grid(-6, 6, 10)
    latents = normals(ROWS, 5)
    plain = fd.sample(flow, latents, grid, solver=solver, log_prob=True)
    plainly = fd.DensityGuidance(0.5, track=False)
    for guidance in (plainly, fd.HighDensity(6.0), fd.DensityGuidance(0.1, interval=(7.0, 9.0))):
        told = nullcontext() if guidance is plainly else pytest.warns(UserWarning, match="guidance acts nowhere")
        with told:
            guided = fd.sample(flow, latents, grid, solver=solver, log_prob=True, guidance=guidance)
        assert torch.equal(guided.x, plain.x)
        assert torch.equal(guided.log_prob, plain.log_prob)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["euler", "ddim", "heun"])
def test_intervals_split_the_trajectory(solver: str) -> None:
    """A step is guided if it begins at lam_lo <= lam < lam_hi, whole: the same as three runs, one after another.

    dpmpp_2m remembers the step before, so that it is not.
    """
    flow, guidance = mixture(), fd.DensityGuidance(0.3, track=False)
    grids = lam_grid(-6, -2, 6), lam_grid(-2, 2, 6), lam_grid(2, 6, 6)
    whole = torch.cat([grids[0], grids[1][1:], grids[2][1:]])
    latents = normals(ROWS, 5)
    x = fd.sample(flow, latents, grids[0], solver=solver).x
    x = fd.sample(flow, x, grids[1], solver=solver, guidance=guidance).x
    x = fd.sample(flow, x, grids[2], solver=solver).x
    limited = fd.DensityGuidance(0.3, interval=(-2.0, 2.0), track=False)
    found = fd.sample(flow, latents, whole, solver=solver, guidance=limited)
    torch.testing.assert_close(found.x, x, rtol=1e-13, atol=1e-13)


def test_high_density_doubles_the_score_term() -> None:
    flow, grid = mixture(), lam_grid(-4, 4, 16)
    x = latents = normals(ROWS, 5)
    for lam, after in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        factor = 1.0 if lam >= 1.0 else 0.5
        slope = flow.schedule.dlog_alpha(lam) * x + factor * flow.schedule.sigma(lam) ** 2 * flow.score(x, lam)
        x = x + (after - lam) * slope
    assert largest_error(fd.sample(flow, latents, grid, guidance=fd.HighDensity(1.0)).x, x) < 1e-13


@pytest.mark.parametrize("solver", SOLVERS)
def test_q_per_row(solver: str) -> None:
    flow, latents, grid = mixture(), normals(3, 5), lam_grid(-5, 5, 12)
    q = torch.tensor([0.2, 0.5, 0.6], dtype=torch.float64)
    together = fd.sample(flow, latents, grid, solver=solver, guidance=fd.DensityGuidance(q))
    for row, quantile in enumerate(q.tolist()):
        alone = fd.sample(flow, latents[row : row + 1], grid, solver=solver, guidance=fd.DensityGuidance(quantile))
        torch.testing.assert_close(together.x[row : row + 1], alone.x, rtol=1e-13, atol=1e-13)


def test_rows_that_cannot_be_guided_are_flagged_and_left_alone() -> None:
    flow, latents, grid = mixture(), normals(4, 5), lam_grid(-4, 4, 8)
    plain = fd.sample(flow, latents, grid)
    good = fd.sample(flow, latents, grid, guidance=fd.DensityGuidance(0.4))
    q = torch.tensor([0.4, 1.5, math.nan, 0.4], dtype=torch.float64)
    mixed = fd.sample(flow, latents, grid, guidance=fd.DensityGuidance(q))
    assert mixed.flags.tolist() == [0, 8, 8, 0]
    assert torch.equal(mixed.x[[1, 2]], plain.x[[1, 2]])
    assert torch.equal(mixed.x[[0, 3]], good.x[[0, 3]])
    rate = torch.tensor([0.0, math.nan, 0.0, 0.0])
    broken = fd.sample(flow, latents, grid, guidance=fd.DensityGuidance(b=lambda x, lam: rate))
    assert broken.flags.tolist() == [0, 8, 0, 0]
    assert torch.equal(broken.x[1], plain.x[1])
    assert not good.flags.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fd.DensityGuidance(), ValueError, "give either q or b, and not both"),
        (lambda: fd.DensityGuidance(0.4, b=lambda x, lam: 0.0), ValueError, "give either q or b, and not both"),
        (lambda: fd.DensityGuidance(0.0), ValueError, r"q must be in \(0, 1\), got 0.0"),
        (lambda: fd.DensityGuidance(1), ValueError, r"q must be in \(0, 1\), got 1.0"),
        (lambda: fd.DensityGuidance(math.nan), ValueError, "q must be a number, got nan"),
        (lambda: fd.DensityGuidance("high"), TypeError, "q must be a number, got str 'high'"),
        (lambda: fd.DensityGuidance(torch.zeros(2, 2)), ValueError, r"floating tensor of shape \(B,\), got a float32"),
        (lambda: fd.DensityGuidance(torch.tensor([1])), ValueError, r"floating tensor of shape \(B,\), got a int64"),
        (lambda: fd.DensityGuidance(b=2.0), TypeError, r"b must be a function of \(x, lam\)"),
        (lambda: fd.DensityGuidance(0.4, interval=3.0), TypeError, r"interval must be a pair \(lam_lo, lam_hi\)"),
        (lambda: fd.DensityGuidance(0.4, interval=(2.0, 1.0)), ValueError, r"lam_lo < lam_hi, got \(2.0, 1.0\)"),
        (lambda: fd.DensityGuidance(0.4, interval=(0.0, "1")), TypeError, r"interval\[1\] must be a number"),
        (lambda: fd.StochasticDensityGuidance(0.4), TypeError, "noise must be a function of lam"),
        (lambda: fd.StochasticDensityGuidance(0.4, 0.3), TypeError, "noise must be a function of lam"),
        (lambda: fd.StochasticDensityGuidance(0.4, abs, 1), TypeError, "projection_term must be True or False"),
        (lambda: fd.HighDensity("late"), TypeError, "start must be a number"),
        (lambda: fd.HighDensity(math.nan), ValueError, "start must be a number, got nan"),
    ],
)
def test_bad_guidance(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("guidance", "error", "message"),
    [
        (
            fd.DensityGuidance(b=lambda x, lam: x),
            ValueError,
            r"b\(x, lam\) must be a number or have one number per row",
        ),
        (fd.DensityGuidance(b=lambda x, lam: None), TypeError, r"b\(x, lam\) must be a number or a tensor"),
        (fd.DensityGuidance(b=lambda x, lam: math.inf), ValueError, r"b\(x, lam\) must be finite"),
        (
            fd.DensityGuidance(torch.full((7,), 0.4)),
            ValueError,
            r"q must .*shape \(6,\), got a float32 tensor of shape \(7,\)",
        ),
        (fd.StochasticDensityGuidance(0.4, lambda lam: -1.0), ValueError, r"noise\(lam\) must be finite and in \[0.0"),
    ],
)
def test_bad_values_while_sampling(guidance: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fd.sample(mixture(), normals(ROWS, 5), lam_grid(-2, 2, 3), guidance=guidance)
