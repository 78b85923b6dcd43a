"""Values computed with the published JAX code of Karczewski et al. on a Gaussian mixture, in float64, Euler in lam."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mixtures import lam_grid, largest_error
from torch import Tensor

import fastdensity as fd
from fastdensity.rules import FLAG_LIMITED
from fastdensity.trajectory import log_normal_density

PATH = Path(__file__).parent / "data" / "golden_c.npz"
FIRST, LAST = -10.0, 10.0
TOLERANCE = 1e-9


@cache
def golden() -> dict[str, Tensor]:
    with np.load(PATH) as stored:
        return {name.removeprefix("c_"): torch.from_numpy(stored[name]) for name in stored}


@cache
def flow() -> fd.GaussianMixture:
    values = golden()
    return fd.GaussianMixture(values["weights"], values["means"], values["variances"], schedule=fd.VP())


def prior_sigma() -> float:
    return float(fd.VP().sigma(FIRST))


def median_latents() -> Tensor:
    return fd.scale_prior(golden()["latents"], quantile=0.5, sigma=prior_sigma())


def stochastic(q: float) -> Tensor:
    guidance = fd.StochasticDensityGuidance(
        q, noise=lambda lam: 0.3 if -3 < lam < 9 else 0.0, projection_term=False, track=False
    )
    noise = golden()["noise"].transpose(0, 1)
    return fd.sample(flow(), median_latents(), lam_grid(FIRST, LAST, 127), guidance=guidance, noise=noise).x


def test_probability_flow() -> None:
    result = fd.sample(flow(), golden()["latents"], lam_grid(FIRST, LAST, 63))
    assert largest_error(result.x, golden()["pf_ode_64"]) < TOLERANCE


def test_tracked_log_prob() -> None:
    result = fd.sample(flow(), golden()["latents"], lam_grid(FIRST, LAST, 1023), log_prob=True)
    assert largest_error(result.x, golden()["pf_ode_logp_x"]) < TOLERANCE
    assert largest_error(result.log_prob, golden()["pf_ode_logp"]) < TOLERANCE
    assert torch.equal(result.std_err, torch.zeros(8, dtype=torch.float64))


def test_encoded_log_prob() -> None:
    result = fd.log_prob(flow(), golden()["pf_ode_logp_x"], lam_grid(FIRST, LAST, 1023))
    assert largest_error(result.latents, golden()["encode_x"]) < TOLERANCE
    assert largest_error(result.log_prob, golden()["encode_logp"]) < TOLERANCE


def test_encoded_log_prob_in_adaptive_steps() -> None:
    """The flow's own density of Euler's samples: Euler's encoding has errors of its own, this has the prior's alone."""
    pytest.importorskip("torchode")
    result = fd.log_prob(flow(), golden()["pf_ode_logp_x"], [FIRST, LAST], solver="dopri5", rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.log_prob, golden()["encode_logp"], rtol=0, atol=0.1)
    torch.testing.assert_close(result.log_prob, golden()["true_logp_at_pf"], rtol=0, atol=0.06)
    prior = log_normal_density(result.latents, prior_sigma())
    corrected = result.log_prob - prior + flow().log_prob(result.latents, FIRST)
    torch.testing.assert_close(corrected, golden()["true_logp_at_pf"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("use_score", "name"), [(True, "sa_score"), (False, "sa_noscore")])
def test_score_alignment(use_score: bool, name: str) -> None:
    found = fd.score_alignment(flow(), golden()["latents"], lam_grid(FIRST, 1.0, 1023), use_score=use_score)
    assert largest_error(found, golden()[name]) < TOLERANCE


def test_log_prob_of_the_mixture() -> None:
    assert largest_error(flow().log_prob(golden()["pf_ode_logp_x"], LAST), golden()["true_logp_at_pf"]) < TOLERANCE


@pytest.mark.parametrize("q", [0.3, 0.5])
def test_density_guidance(q: float) -> None:
    guided = fd.sample(flow(), median_latents(), lam_grid(FIRST, LAST, 63), guidance=fd.DensityGuidance(q, track=False))
    assert largest_error(guided.x, golden()[f"dg_q{q}"]) < TOLERANCE
    assert not guided.flags.any()


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_prior_guidance(factor: float) -> None:
    latents = fd.scale_prior(golden()["latents"], radius=factor * 24**0.5 * prior_sigma())
    result = fd.sample(flow(), latents, lam_grid(FIRST, LAST, 63))
    assert largest_error(result.x, golden()[f"prior_{factor}"]) < TOLERANCE


def test_high_density() -> None:
    grid = torch.cat([lam_grid(FIRST, 2.0, 47), lam_grid(2.0, LAST, 31)[1:]])
    result = fd.sample(flow(), golden()["latents"], grid, guidance=fd.HighDensity(2.0))
    assert largest_error(result.x, golden()["hd_2"]) < TOLERANCE


def test_stochastic_density_guidance() -> None:
    assert largest_error(stochastic(0.4), golden()["sdg_q0.4"]) < TOLERANCE


def test_overshooting_the_mode_stays_finite() -> None:
    """At q > 1/2 in 24 dimensions ||eps|| goes to 0 and eta blows up: no values to match, but numbers to survive."""
    guided = fd.sample(
        flow(), median_latents(), lam_grid(FIRST, LAST, 63), guidance=fd.DensityGuidance(0.7, track=False)
    )
    assert guided.x.isfinite().all()
    assert largest_error(guided.x, golden()["dg_q0.7"]) < 0.1
    assert stochastic(0.6).isfinite().all()
    assert largest_error(stochastic(0.6), golden()["sdg_q0.6"]) < 0.1


@pytest.mark.parametrize("solver", ["euler", "ddim", "heun", "dpmpp_2m"])
def test_the_closed_loop_ends_in_a_sensible_place(solver: str) -> None:
    """Where the paper's form overshoots the mode rows end near one, say that they were limited, and owe the rest."""
    mixture = flow()
    guidance = fd.DensityGuidance(0.7)
    guided = fd.sample(mixture, median_latents(), lam_grid(FIRST, LAST, 63), solver, guidance)
    plain = fd.sample(mixture, median_latents(), lam_grid(FIRST, LAST, 63), solver)
    density = mixture.log_prob(guided.x, LAST)
    assert (density > mixture.log_prob(plain.x, LAST)).all()
    assert (guided.x.abs() < 2 * plain.x.abs().max()).all()
    assert (guided.flags & FLAG_LIMITED != 0).all()
    assert guided.residual is not None
    assert (guided.residual > 1.0).all()
