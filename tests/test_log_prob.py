"""log p along anything: the reverse diffusion, guided flows and guided noise against the mixture's own density."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import SCHEDULES, lam_grid, mixture, normals
from torch import Tensor

import fastdensity as fd
from fastdensity import evaluation
from fastdensity.reference.philox import normals as philox_normals
from fastdensity.trajectory import log_normal_density

FIRST, LAST = -3.0, 4.0


def slips(flow: fd.GaussianMixture, latents: Tensor, steps: int, last: float = LAST, **options: Any) -> Tensor:
    """What log p gained as tracked, less what it gained: (B,), 0 but for the steps' own error."""
    result = fd.sample(flow, latents, lam_grid(FIRST, last, steps), log_prob=True, **options)
    assert result.log_prob is not None
    tracked = result.log_prob - log_normal_density(latents, float(flow.schedule.sigma(FIRST)))
    return tracked - (flow.log_prob(result.x, last) - flow.log_prob(latents, FIRST))


def assert_mean_is_zero(values: Tensor) -> None:
    assert abs(float(values.mean())) < 3 * float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_reverse_diffusion_tracks_log_prob(name: str) -> None:
    """The mean is right within its error; single samples come nearer with the root of the steps."""
    flow = mixture(SCHEDULES[name])
    latents = flow.sample(400, FIRST, seed=2)
    coarse, fine = (slips(flow, latents, n, guidance=fd.ReverseDiffusion(), seed=3) for n in (100, 400))
    assert_mean_is_zero(fine)
    assert 0.4 < float(fine.square().mean().sqrt() / coarse.square().mean().sqrt()) < 0.6
    assert float(fine.std()) < 0.5


def test_reverse_diffusion_arrives_at_the_data() -> None:
    """It samples the same law as the mixture itself: mean and variance within Monte Carlo error."""
    flow, rows = mixture(), 4000
    latents, grid = flow.sample(rows, FIRST, seed=2), lam_grid(FIRST, LAST, 100)
    for solver in ("euler", "ddim"):
        x = fd.sample(flow, latents, grid, solver=solver, guidance=fd.ReverseDiffusion(), seed=3).x
        exact = flow.sample(rows, LAST, seed=4)
        assert float((x.mean(0) - exact.mean(0)).abs().max()) < 4 * (2 * float(exact.var(0).max()) / rows) ** 0.5
        assert float((x.var(0) / exact.var(0) - 1).abs().max()) < 0.15


@pytest.mark.parametrize("name", SCHEDULES)
def test_ancestral_steps_by_hand(name: str) -> None:
    """ddim takes the steps of DDPM: the mean and the variance of x' given x and the predicted x0."""
    flow, noise = mixture(SCHEDULES[name]), normals(1, 4, 5, seed=1)
    (alpha, sigma), (alpha_next, sigma_next) = (
        (float(flow.schedule.alpha(lam)), float(flow.schedule.sigma(lam))) for lam in (0.5, 0.75)
    )
    x = flow.sample(4, 0.5, seed=2)
    eps = -sigma * flow.score(x, 0.5)
    kept = (sigma_next / alpha_next) ** 2 / (sigma / alpha) ** 2  # of the variance of x / alpha
    mean = alpha_next * (x - sigma * eps) / alpha + sigma_next * kept**0.5 * eps
    wanted = mean + sigma_next * (1 - kept) ** 0.5 * noise[0]
    result = fd.sample(flow, x, [0.5, 0.75], "ddim", fd.ReverseDiffusion(), log_prob=True, noise=noise)
    torch.testing.assert_close(result.x, wanted, rtol=1e-12, atol=1e-12)
    gained = 0.125 * eps.square().sum(1) - 0.25**0.5 * (eps * noise[0]).sum(1) - 5 * math.log(alpha_next / alpha)
    torch.testing.assert_close(result.log_prob, log_normal_density(x, sigma) + gained, rtol=1e-12, atol=1e-12)


def test_ancestral_steps_are_the_same_on_every_path() -> None:
    """Euler's noise beside DDIM's drift was too large where alpha is constant: 0.75 nats of bias on VE, 0.14 on VP."""
    gains = []
    for name in ("VP", "VE", "RectifiedFlow"):
        flow = mixture(SCHEDULES[name], shape=(24,))
        latents = flow.sample(400, FIRST, seed=2)
        gains.append(slips(flow, latents, 400, solver="ddim", guidance=fd.ReverseDiffusion(), seed=3))
        torch.testing.assert_close(gains[-1], gains[0], rtol=0, atol=1e-8)
    assert abs(float(gains[0].mean())) < 0.2


def test_reverse_diffusion_by_hand() -> None:
    """One step of Euler's, drift, noise from the kernel's stream, and log p, against the formulas."""
    flow = mixture(shape=(2, 3))
    latents, ids, step = flow.sample(4, 0.0, seed=2), torch.tensor([7, 3, 9, 11]), 0.25
    noise = philox_normals(5, ids, 0, 6).reshape(4, 2, 3)
    sigma, stretch = float(flow.schedule.sigma(0.0)), float(flow.schedule.dlog_alpha(0.0))
    score = flow.score(latents, 0.0)
    drift = stretch * latents + sigma**2 * score
    options: dict[str, Any] = {"guidance": fd.ReverseDiffusion(), "log_prob": True}
    result = fd.sample(flow, latents, [0.0, step], seed=5, sample_ids=ids, **options)
    torch.testing.assert_close(result.x, latents + step * drift + sigma * step**0.5 * noise, rtol=1e-6, atol=1e-6)
    gained = (sigma**2 / 2 * score.square().sum((1, 2)) - 6 * stretch) * step
    gained = gained + sigma * step**0.5 * (score * noise).sum((1, 2))
    wanted = gained + log_normal_density(latents, sigma)
    torch.testing.assert_close(result.log_prob, wanted, rtol=1e-6, atol=1e-6)
    replayed = fd.sample(flow, latents, [0.0, step], noise=noise[None], **options)
    torch.testing.assert_close(replayed.x, latents + step * drift + sigma * step**0.5 * noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(replayed.log_prob, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_reverse_diffusion_needs_no_divergence(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a divergence was computed")

    monkeypatch.setattr(evaluation, "estimate_divergence", refuse)
    monkeypatch.setattr(evaluation, "directional_derivatives", refuse)
    flow = mixture()
    network = fd.Flow(lambda x, lam: flow.prediction(x, lam), flow.schedule)
    latents = flow.sample(5, FIRST, seed=2)
    options: dict[str, Any] = {"guidance": fd.ReverseDiffusion(), "log_prob": True, "solver": solver}
    result = fd.sample(network, latents, lam_grid(FIRST, LAST, 20), **options)
    assert result.nfe == 20
    assert torch.equal(result.std_err, torch.zeros(5, dtype=torch.float64))
    assert result.log_prob is not None
    assert result.log_prob.isfinite().all()
    assert not result.flags.any()


def test_reverse_diffusion_in_an_interval_is_the_flow_outside() -> None:
    flow = mixture()
    latents, grid = flow.sample(5, FIRST, seed=2), lam_grid(FIRST, LAST, 70)
    plain = fd.sample(flow, latents, grid, log_prob=True)
    never = fd.sample(flow, latents, grid, guidance=fd.ReverseDiffusion((10.0, 11.0)), log_prob=True)
    assert torch.equal(never.x, plain.x)
    assert torch.equal(never.log_prob, plain.log_prob)
    partly = slips(flow, flow.sample(400, FIRST, seed=2), 400, guidance=fd.ReverseDiffusion((-1.0, 2.0)), seed=3)
    assert_mean_is_zero(partly)


def test_steps_too_long_for_the_kernel_keep_their_noise() -> None:
    flow = mixture()
    latents = flow.sample(3, -1.0, seed=2)
    noise = normals(1, 3, 5, seed=1)
    result = fd.sample(flow, latents, [-1.0, 2.0], guidance=fd.ReverseDiffusion(), noise=noise)
    sigma, stretch = float(flow.schedule.sigma(-1.0)), float(flow.schedule.dlog_alpha(-1.0))
    drift = stretch * latents + sigma**2 * flow.score(latents, -1.0)
    torch.testing.assert_close(result.x, latents + 3.0 * drift + sigma * 3.0**0.5 * noise[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_the_reverse_diffusion_does_not_know_the_others(dtype: torch.dtype) -> None:
    flow = mixture()
    latents, ids = flow.sample(7, FIRST, seed=2).to(dtype), torch.arange(10, 17)
    options: dict[str, Any] = {"guidance": fd.ReverseDiffusion(), "log_prob": True, "seed": 4}
    together = fd.sample(flow, latents, lam_grid(FIRST, LAST, 30), sample_ids=ids, **options)
    assert together.log_prob is not None
    for row in (0, 5):
        one = slice(row, row + 1)
        alone = fd.sample(flow, latents[one], lam_grid(FIRST, LAST, 30), sample_ids=ids[one], **options)
        assert torch.equal(alone.x, together.x[one])
        assert torch.equal(alone.log_prob, together.log_prob[one])


def test_log_prob_of_a_guided_flow() -> None:
    """An explicit b, tracked and true: Heun's error falls as the square of the step."""
    flow = mixture(shape=(24,))
    latents = flow.sample(8, FIRST, seed=2)
    guidance = fd.DensityGuidance(b=lambda x, lam: torch.sin(x.flatten(1).sum(1)) - 0.2 * lam, track=False)
    coarse, fine = (slips(flow, latents, n, solver="heun", guidance=guidance).abs().max() for n in (50, 200))
    assert float(fine) < 3e-3
    assert 12.0 < float(coarse / fine) < 20.0


def test_log_prob_of_guided_noise() -> None:
    """Density guidance with noise and an explicit b; the exact projection term repairs what Ito's formula adds."""
    flow = mixture(shape=(24,))
    latents = flow.sample(200, FIRST, seed=2)
    guidance = fd.StochasticDensityGuidance(b=lambda x, lam: -1.0, noise=lambda lam: 0.5, track=False)
    assert_mean_is_zero(slips(flow, latents, 400, guidance=guidance, seed=3))


def test_probes_that_steer_never_measure() -> None:
    """With its own probes the estimate's error would cancel, and b be tracked to rounding however wrong the drift."""
    flow = mixture(shape=(24,))
    network = fd.Flow(lambda x, lam: flow.prediction(x, lam), flow.schedule)
    latents, grid = flow.sample(16, FIRST, seed=2), lam_grid(FIRST, LAST, 40)
    guidance = fd.DensityGuidance(b=lambda x, lam: 0.0, track=False)
    gained = []
    for method in ("exact", {"method": "hutchinson", "num_matvecs": 4}):
        result = fd.sample(network, latents, grid, guidance=guidance, divergence=method, log_prob=True, seed=1)
        assert result.log_prob is not None
        gained.append(result.log_prob - log_normal_density(latents, float(flow.schedule.sigma(FIRST))))
        assert result.std_err is not None
    assert float(gained[0].abs().max()) < 1e-9
    ratio = (gained[1] / result.std_err).square().mean().sqrt()
    assert float(gained[1].abs().min()) > 1e-6
    assert 1.0 < float(ratio) < 2.0  # root 2: steering and measuring err alike, and independently


# -- ids of probes ----------------------------------------------------------------------------------------------------
REPEATED = torch.tensor([0, 0, 1])
DRAWS: dict[str, Callable[[Any, Tensor, Tensor], object]] = {
    "sample": lambda flow, x, ids: fd.sample(flow, x, [-1.0, 1.0], log_prob=True, sample_ids=ids),
    "log_prob": lambda flow, x, ids: fd.log_prob(flow, x, [-1.0, 1.0], sample_ids=ids),
    "score_alignment": lambda flow, x, ids: fd.score_alignment(flow, x, [-1.0, 1.0], use_score=False, sample_ids=ids),
    "b": lambda flow, x, ids: fd.sample(
        flow, x, [-1.0, 1.0], guidance=fd.DensityGuidance(b=lambda x, lam: -1.0), sample_ids=ids
    ),
    "noise": lambda flow, x, ids: fd.sample(
        flow, x, [-1.0, 1.0], guidance=fd.StochasticDensityGuidance(0.5, lambda lam: 0.3, track=False), sample_ids=ids
    ),
    "flow after diffusion": lambda flow, x, ids: fd.sample(
        flow, x, [-1.0, 0.0, 1.0], guidance=fd.ReverseDiffusion((-1.0, 0.0)), log_prob=True, sample_ids=ids
    ),
}
DRAWS_NONE: dict[str, Callable[[Any, Tensor, Tensor], object]] = {
    "plain": lambda flow, x, ids: fd.sample(flow, x, [-1.0, 1.0], sample_ids=ids),
    "exact": lambda flow, x, ids: fd.log_prob(flow, x, [-1.0, 1.0], divergence="exact", sample_ids=ids),
    "q": lambda flow, x, ids: fd.sample(flow, x, [-1.0, 1.0], guidance=fd.DensityGuidance(0.4), sample_ids=ids),
    "diffusion": lambda flow, x, ids: fd.sample(
        flow, x, [-1.0, 1.0], guidance=fd.ReverseDiffusion(), log_prob=True, sample_ids=ids
    ),
    "high density": lambda flow, x, ids: fd.sample(flow, x, [-1.0, 1.0], guidance=fd.HighDensity(0.0), sample_ids=ids),
    "with the score": lambda flow, x, ids: fd.score_alignment(flow, x, [-1.0, 1.0], sample_ids=ids),
}


@pytest.mark.parametrize("case", DRAWS)
def test_repeated_ids_are_refused_where_probes_are_drawn(case: str) -> None:
    """Equal ids once gave equal probes, and errors that did not average out over the samples."""
    exact = mixture()
    flow = fd.Flow(lambda x, lam: exact.prediction(x, lam), exact.schedule)
    with pytest.raises(ValueError, match=r"sample_ids must be distinct, got 1 repeated \(they count modulo 2\^32\)"):
        DRAWS[case](flow, normals(3, 5), REPEATED)
    DRAWS[case](flow, normals(3, 5), torch.tensor([0, 2, 1]))
    DRAWS[case](exact, normals(3, 5), REPEATED)  # which knows its second derivatives


@pytest.mark.parametrize("case", DRAWS_NONE)
def test_repeated_ids_are_taken_where_no_probe_is_drawn(case: str) -> None:
    """For the same noise in several rows, say."""
    exact = mixture()
    flow = fd.Flow(lambda x, lam: exact.prediction(x, lam), exact.schedule)
    DRAWS_NONE[case](flow, normals(3, 5), REPEATED)
