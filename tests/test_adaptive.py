"""solver="dopri5": accuracy, steps of a row's own, what it does to probes and guidance, and rows that fail."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from mixtures import SCHEDULES, lam_grid, mixture
from torch import Tensor, nn

import fastdensity as fd
from fastdensity.rules import FLAG_NON_FINITE
from fastdensity.trajectory import log_normal_density

pytest.importorskip("torchode")
FIRST, LAST = -3.0, 4.0
ENDS = [FIRST, LAST]


def network(flow: fd.GaussianMixture) -> fd.Flow:
    """The same flow as a network: it knows no derivative of its own."""
    return fd.Flow(lambda x, lam: flow.prediction(x, lam), flow.schedule)


class Pointwise(nn.Module):
    """A nonlinear network of elementwise operations: bits of a row do not depend on the batch."""

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        return torch.tanh(x * (1.5 + 0.1 * lam[:, None])) + 0.3 * x.sin()


def corrected(flow: fd.GaussianMixture, found: fd.LogProbResult) -> Tensor:
    """log p with the mixture's own density of the latents in the place of the normal prior's."""
    prior = log_normal_density(found.latents, float(flow.schedule.sigma(FIRST)))
    return found.log_prob - prior + flow.log_prob(found.latents, FIRST)


@pytest.mark.parametrize("name", SCHEDULES)
def test_encoding_gives_the_mixtures_log_prob(name: str) -> None:
    flow = mixture(SCHEDULES[name], shape=(12,))
    x = flow.sample(6, LAST, seed=2)
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        found = fd.log_prob(flow, x, ENDS, solver="dopri5", rtol=tolerance, atol=tolerance)
        errors.append(float((corrected(flow, found) - flow.log_prob(x, LAST)).abs().max()))
        assert torch.equal(found.std_err, torch.zeros(6, dtype=torch.float64))
        assert not found.flags.any()
    assert errors[0] < 5e-2
    assert errors[1] < 3e-4
    assert errors[2] < 3e-6


def test_there_and_back() -> None:
    flow = mixture()
    latents = flow.sample(5, FIRST, seed=2)
    there = fd.sample(flow, latents, ENDS, solver="dopri5", rtol=1e-9, atol=1e-9, log_prob=True)
    back = fd.log_prob(flow, there.x, ENDS, solver="dopri5", rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.latents, latents, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back.log_prob, there.log_prob, rtol=1e-7, atol=1e-7)
    fine = fd.sample(flow, latents, lam_grid(FIRST, LAST, 400), solver="heun").x
    torch.testing.assert_close(there.x, fine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fd.sample(flow, latents, ENDS, solver="dopri5", rtol=1e-9, atol=1e-9).x, there.x)


def test_float32_states_are_as_good_as_float32() -> None:
    flow = mixture(shape=(12,))
    x = flow.sample(6, LAST, seed=2).float()
    found = fd.log_prob(flow, x, ENDS, solver="dopri5")
    assert found.latents.dtype == torch.float32
    wanted = fd.log_prob(flow, x.double(), ENDS, solver="dopri5")
    torch.testing.assert_close(found.log_prob, wanted.log_prob, rtol=0, atol=1e-4)
    assert found.nfe < 2 * wanted.nfe


@pytest.mark.parametrize(
    "divergence", ["exact", {"method": "hutchinson", "num_matvecs": 3}], ids=["exact", "hutchinson"]
)
@pytest.mark.parametrize("flow", [mixture(), fd.Flow(Pointwise(), fd.VP())], ids=["mixture", "network"])
def test_a_row_does_not_know_the_others(flow: Any, divergence: Any) -> None:
    """Bit for bit, though rows of different difficulty need different numbers of steps."""
    x = mixture().sample(7, LAST, seed=2)
    x[3] *= 4.0
    ids, grid = torch.arange(20, 27), [FIRST, 0.0, LAST]
    tolerance = 1e-5 if divergence == "exact" else 1e-3
    options: dict[str, Any] = {"solver": "dopri5", "divergence": divergence, "rtol": tolerance, "atol": tolerance}
    together = fd.log_prob(flow, x, grid, sample_ids=ids, **options)
    evaluations = []
    for row in range(7):
        one = slice(row, row + 1)
        alone = fd.log_prob(flow, x[one], grid, sample_ids=ids[one], **options)
        assert torch.equal(alone.latents, together.latents[one])
        assert torch.equal(alone.log_prob, together.log_prob[one])
        assert torch.equal(alone.std_err, together.std_err[one])
        evaluations.append(alone.nfe)
    if divergence == "exact":
        assert len(set(evaluations)) > 1
    assert max(evaluations) <= together.nfe <= 2 * max(evaluations)


def test_probes_are_fresh_between_entries_of_the_grid_and_constant_within() -> None:
    """Within a stretch the field is smooth, or steps would shrink without end; more stretches average the error."""
    flow = mixture(shape=(24,))
    x = flow.sample(64, LAST, seed=2)
    exact = fd.log_prob(flow, x, ENDS, solver="dopri5").log_prob
    errors, bars = [], []
    for stretches in (1, 16):
        found = fd.log_prob(
            network(flow), x, lam_grid(FIRST, LAST, stretches), solver="dopri5",
            divergence={"method": "hutchinson", "num_matvecs": 4}, rtol=1e-3, atol=1e-3,
        )  # fmt: skip
        assert found.nfe < 100 + 25 * stretches
        errors.append(float((found.log_prob - exact).square().mean().sqrt()))
        bars.append(float(found.std_err.square().mean().sqrt()))
    assert 0.6 < errors[0] / bars[0] < 1.1  # a bound from above
    assert 0.6 < errors[1] / bars[1] < 1.1
    assert errors[1] < 0.6 * errors[0]


def test_one_probe_has_no_standard_error() -> None:
    flow = mixture()
    found = fd.log_prob(network(flow), flow.sample(3, LAST, seed=2), [0.0, LAST], solver="dopri5")
    assert found.std_err.isnan().all()
    assert found.log_prob.isfinite().all()


@pytest.mark.parametrize(
    "guidance",
    [
        fd.DensityGuidance(0.4, interval=(-1.0, 2.0)),
        fd.DensityGuidance(b=lambda x, lam: 0.2 * lam),
        fd.HighDensity(1.0),
    ],
    ids=["interval", "rate", "start"],
)
def test_guidance(guidance: Any) -> None:
    """Guidance that begins or ends between entries of the grid begins or ends a step there: log p is still exact."""
    flow = mixture(shape=(12,))
    latents = flow.sample(6, FIRST, seed=2)
    options: dict[str, Any] = {"solver": "dopri5", "guidance": guidance, "log_prob": True, "rtol": 1e-8, "atol": 1e-8}
    found = fd.sample(flow, latents, ENDS, **options)
    tracked = found.log_prob - log_normal_density(latents, float(flow.schedule.sigma(FIRST)))
    gained = flow.log_prob(found.x, LAST) - flow.log_prob(latents, FIRST)
    torch.testing.assert_close(tracked, gained, rtol=0, atol=1e-6)
    assert not found.flags.any()
    split = fd.sample(flow, latents, [FIRST, -1.0, 1.0, 2.0, LAST], **options)
    torch.testing.assert_close(split.x, found.x, rtol=1e-6, atol=1e-6)
    assert float((found.x - fd.sample(flow, latents, ENDS, solver="dopri5").x).abs().max()) > 1e-2
    alone = fd.sample(flow, latents[2:3], ENDS, **options)
    assert torch.equal(alone.x, found.x[2:3])


def test_the_callback_sees_the_grid() -> None:
    flow = mixture()
    seen: list[tuple[int, float, Tensor]] = []
    guidance = fd.DensityGuidance(0.4, interval=(-1.0, 1.0))
    result = fd.sample(
        flow, flow.sample(3, FIRST, seed=2).float(), [FIRST, 0.5, LAST], solver="dopri5", guidance=guidance,
        callback=lambda *step: seen.append(step),
    )  # fmt: skip
    assert [(index, lam) for index, lam, _ in seen] == [(0, 0.5), (1, LAST)]
    assert torch.equal(seen[1][2], result.x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_fails_ends_alone(value: float) -> None:
    def model(x: Tensor, lam: Tensor) -> Tensor:
        return torch.tanh(x) + torch.where((x[:, :1] > 50.0) & (lam[:, None] < 0.0), value, 0.0)

    flow = fd.Flow(model, fd.VP())
    x = mixture().sample(4, LAST, seed=2)
    x[1] = 100.0
    found = fd.log_prob(flow, x, ENDS, solver="dopri5", divergence="exact")
    assert found.log_prob[1].isnan()
    assert found.flags.tolist() == [0, FLAG_NON_FINITE, 0, 0]
    rest = torch.tensor([0, 2, 3])
    without = fd.log_prob(flow, x[rest], ENDS, solver="dopri5", divergence="exact")
    assert torch.equal(found.log_prob[rest], without.log_prob)
    assert torch.equal(found.latents[rest], without.latents)


def test_a_row_that_needs_too_many_steps_ends_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = mixture()
    monkeypatch.setattr(fd.adaptive, "MOST_STEPS", 4)
    found = fd.log_prob(flow, flow.sample(3, LAST, seed=2), ENDS, solver="dopri5")
    assert found.log_prob.isnan().all()
    assert found.flags.tolist() == [FLAG_NON_FINITE] * 3


def test_no_rows() -> None:
    flow = mixture()
    found = fd.log_prob(flow, torch.zeros(0, 5), ENDS, solver="dopri5")
    assert found.latents.shape == (0, 5)
    assert found.log_prob.shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "heun", "rtol": 1e-3}, ValueError, "rtol is of adaptive solvers only"),
        ({"solver": "dopri5", "atol": 0.0}, ValueError, "atol must be positive and finite, got 0.0"),
        ({"solver": "dopri5", "rtol": float("nan")}, ValueError, "rtol must be positive and finite"),
        ({"solver": "dopri5", "rtol": "1"}, TypeError, "rtol must be a number"),
        ({"solver": "rk45"}, ValueError, "solver must be one of euler, ddim, heun, dpmpp_2m, dopri5"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fd.log_prob(mixture(), torch.zeros(2, 5), ENDS, **options)


def test_refuses_noise() -> None:
    for guidance in (fd.ReverseDiffusion(), fd.StochasticDensityGuidance(0.4, noise=lambda lam: 0.3)):
        with pytest.raises(ValueError, match="stochastic guidance needs solver euler or ddim, got 'dopri5'"):
            fd.sample(mixture(), torch.zeros(2, 5), ENDS, solver="dopri5", guidance=guidance)


def test_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchode", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdensity\[adaptive\]'"):
        fd.log_prob(mixture(), torch.zeros(2, 5), ENDS, solver="dopri5")
