"""fd.sample and fd.log_prob: order of every solver, log p against the mixture's own, and independence of rows."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from mixtures import SCHEDULES, lam_grid, largest_error, mixture, normals
from torch import Tensor, nn

import fastdensity as fd
from fastdensity.reference.philox import normals as philox_normals
from fastdensity.rules import FLAG_LIMITED, FLAG_NON_FINITE, FLAG_ZERO_SCORE, PREDICTION_TYPES
from fastdensity.solvers import SOLVERS, STOCHASTIC_SOLVERS
from fastdensity.trajectory import log_normal_density

ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "dpmpp_2m": 2}
FIRST, LAST = -3.0, 4.0
each_solver = pytest.mark.parametrize("solver", SOLVERS)
each_first_order = pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)


def gain_of_log_prob(flow: fd.GaussianMixture, latents: Tensor, result: fd.SampleResult) -> Tensor:
    """What log p gained along the way, as tracked: without the prior it is taken to start at."""
    assert result.log_prob is not None
    return result.log_prob - log_normal_density(latents, float(flow.schedule.sigma(FIRST)))


def true_gain(flow: fd.GaussianMixture, latents: Tensor, x: Tensor) -> Tensor:
    return flow.log_prob(x, LAST) - flow.log_prob(latents, FIRST)


@cache
def fine_solution(name: str) -> tuple[Tensor, Tensor]:
    """Latents, and where the flow takes them, to 1e-5 of it."""
    flow = mixture(SCHEDULES[name])
    latents = flow.sample(8, FIRST, seed=2)
    return latents, fd.sample(flow, latents, lam_grid(FIRST, LAST, 400), solver="heun").x


def test_every_solver_has_an_order() -> None:
    assert ORDERS.keys() == SOLVERS.keys()


@each_solver
@pytest.mark.parametrize("name", SCHEDULES)
def test_order_of_convergence(solver: str, name: str) -> None:
    """Halving the steps divides the errors of x and of tracked log p by 2^order."""
    flow = mixture(SCHEDULES[name])
    latents, exact = fine_solution(name)
    errors = []
    for steps in (40, 80):
        result = fd.sample(flow, latents, lam_grid(FIRST, LAST, steps), solver=solver, log_prob=True)
        slip = gain_of_log_prob(flow, latents, result) - true_gain(flow, latents, result.x)
        errors.append((largest_error(result.x, exact), float(slip.abs().mean())))
    for coarse, fine in zip(*errors, strict=True):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.35)
    assert errors[1][0] < {1: 0.1, 2: 0.01}[ORDERS[solver]]


@each_solver
@pytest.mark.parametrize("rate", [-2.0, 2.0])
def test_log_prob_follows_an_explicit_b(solver: str, rate: float) -> None:
    """log p gains b per unit of lam, up to the solver's own error, which falls with its order."""
    flow = mixture(shape=(40,))
    latents = flow.sample(8, FIRST, seed=2)
    guidance = fd.DensityGuidance(b=lambda x, lam: torch.full((8,), rate), track=False)
    errors = []
    for steps in (60, 120):
        result = fd.sample(flow, latents, lam_grid(FIRST, LAST, steps), solver=solver, guidance=guidance, log_prob=True)
        commanded = torch.full((8,), rate * (LAST - FIRST), dtype=torch.float64)
        torch.testing.assert_close(gain_of_log_prob(flow, latents, result), commanded, rtol=0, atol=1e-9)
        errors.append(float((true_gain(flow, latents, result.x) - commanded).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], abs=0.35)
    assert errors[1] < 1.0


@each_solver
@pytest.mark.parametrize("rate", [-2.0, 2.0])
def test_tracked_log_prob_follows_an_explicit_b_in_few_steps(solver: str, rate: float) -> None:
    """The closed loop holds the whole of log p, divergence included, to b; and tracks it: 40 steps, second order."""
    flow = mixture(shape=(40,))
    latents = flow.sample(8, FIRST, seed=2)
    errors = {}
    for track in (False, True):
        guidance = fd.DensityGuidance(b=lambda x, lam: rate, track=track)
        result = fd.sample(flow, latents, lam_grid(FIRST, LAST, 40), solver=solver, guidance=guidance, log_prob=True)
        gained = true_gain(flow, latents, result.x)
        errors[track] = float((gained - rate * (LAST - FIRST)).abs().mean())
    assert errors[True] < 0.1
    assert errors[True] < errors[False] / (5.0 if solver in STOCHASTIC_SOLVERS else 0.5)
    torch.testing.assert_close(gain_of_log_prob(flow, latents, result), gained, rtol=0, atol=0.15)


@each_first_order
def test_tracked_noise_leaves_log_prob_where_it_was_commanded(solver: str) -> None:
    """What the noise did is measured: 50 steps are closer to b than the plain form's, row by row."""
    flow, latents = mixture(shape=(48,)), mixture(shape=(48,)).sample(64, FIRST, seed=2)
    errors = []
    for track in (False, True):
        guidance = fd.StochasticDensityGuidance(b=lambda x, lam: 0.0, noise=lambda lam: 0.5, track=track)
        result = fd.sample(flow, latents, lam_grid(FIRST, LAST, 50), solver=solver, guidance=guidance, seed=4)
        errors.append(float(true_gain(flow, latents, result.x).abs().mean()))
    assert errors[1] < 0.5
    assert errors[1] < errors[0] / 3


@each_first_order
def test_stochastic_guidance_holds_log_prob(solver: str) -> None:
    """b = 0: log p stays on average if the projection term is there; the published form drifts, by what is tracked."""
    flow, rows, steps = mixture(shape=(48,)), 200, 200
    latents, slip = flow.sample(rows, FIRST, seed=2), {"euler": 0.1, "ddim": 0.3}[solver]  # of the steps themselves
    for projection_term in (True, False):
        guidance = fd.StochasticDensityGuidance(
            b=lambda x, lam: 0.0, noise=lambda lam: 0.6, projection_term=projection_term, track=False
        )
        grid = lam_grid(FIRST, LAST, steps)
        result = fd.sample(flow, latents, grid, solver=solver, guidance=guidance, log_prob=True, seed=4)
        gained, tracked = true_gain(flow, latents, result.x), gain_of_log_prob(flow, latents, result)
        error = float(gained.std()) / rows**0.5
        assert abs(float((gained - tracked).mean())) < 3 * error + slip
        if projection_term:
            assert abs(float(gained.mean())) < 3 * error + slip
        else:
            assert float(gained.mean()) > 5 * error + slip


def test_noise_moves_the_sample_and_spares_log_prob() -> None:
    """In one step the noise is orthogonal to the score, and scaled by phi_rel sigma sqrt(dlam)."""
    flow = mixture(shape=(40,))
    latents, grid = flow.sample(500, 0.0, seed=2), torch.tensor([0.0, 0.1], dtype=torch.float64)
    plain = fd.StochasticDensityGuidance(0.4, noise=lambda lam: 0.0)
    noisy = fd.StochasticDensityGuidance(0.4, noise=lambda lam: 0.8 if lam < 0.05 else 0.0)
    noise = normals(1, 500, 40, seed=3)
    still = fd.sample(flow, latents, grid, guidance=plain).x
    moved = fd.sample(flow, latents, grid, guidance=noisy, noise=noise).x - still
    score = nn.functional.normalize(flow.score(latents, 0.0), dim=1)
    across = noise[0] - (noise[0] * score).sum(1, keepdim=True) * score
    scale = 0.8 * float(flow.schedule.sigma(0.0)) * 0.1**0.5
    torch.testing.assert_close(
        moved - (moved * score).sum(1, keepdim=True) * score, scale * across, rtol=1e-9, atol=1e-12
    )


@each_first_order
def test_given_noise_and_noise_from_the_seed_agree(solver: str) -> None:
    flow, latents, steps = mixture(), normals(4, 5), 6
    ids = torch.tensor([3, 1, 7, 1])
    guidance = fd.StochasticDensityGuidance(0.4, noise=lambda lam: 0.5)
    options: dict[str, Any] = {"solver": solver, "guidance": guidance, "log_prob": True}
    drawn = fd.sample(flow, latents, lam_grid(-4, 4, steps), seed=9, sample_ids=ids, **options)
    noise = torch.stack([philox_normals(9, ids, step, 5) for step in range(steps)])
    given = fd.sample(flow, latents, lam_grid(-4, 4, steps), noise=noise, **options)
    torch.testing.assert_close(drawn.x, given.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(drawn.log_prob, given.log_prob, rtol=1e-12, atol=1e-12)


CASES: dict[str, dict[str, Any]] = {
    **{solver: {"solver": solver, "guidance": fd.DensityGuidance(0.4)} for solver in SOLVERS},
    "explicit b": {"guidance": fd.DensityGuidance(b=lambda x, lam: 0.1 * x.flatten(1)[:, 0])},
    "probes": {"divergence": {"method": "hutchinson", "num_matvecs": 3}},
    "noise": {"guidance": fd.StochasticDensityGuidance(0.4, noise=lambda lam: 0.5)},
    "noise and probes": {
        "guidance": fd.StochasticDensityGuidance(0.4, noise=lambda lam: 0.5), "divergence": "hutchinson",
    },
    "high density": {"solver": "heun", "guidance": fd.HighDensity(0.0)},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_row_depends_on_its_batch(case: str, dtype: torch.dtype) -> None:
    """Bit for bit: the first rows of a batch, single rows under their own ids, any order."""
    flow, latents, grid = mixture(shape=(2, 3)), normals(7, 2, 3).to(dtype), lam_grid(-5, 5, 6)
    whole = fd.sample(flow, latents, grid, log_prob=True, seed=5, **CASES[case])
    first = fd.sample(flow, latents[:3], grid, log_prob=True, seed=5, **CASES[case])
    order = torch.tensor([6, 4])
    others = fd.sample(flow, latents[order], grid, log_prob=True, seed=5, sample_ids=order, **CASES[case])
    assert whole.x.dtype == dtype
    for rows, part in ((slice(0, 3), first), (order, others)):
        assert torch.equal(whole.x[rows], part.x)
        assert torch.equal(whole.log_prob[rows], part.log_prob)  # type: ignore[index, arg-type]
        torch.testing.assert_close(whole.std_err[rows], part.std_err, rtol=0, atol=0, equal_nan=True)  # type: ignore[index]


@pytest.mark.parametrize("case", CASES)
def test_a_broken_row_stays_alone(case: str) -> None:
    flow, latents, grid = mixture(), normals(4, 5), lam_grid(-5, 5, 6)
    clean = fd.sample(flow, latents, grid, log_prob=True, **CASES[case])
    latents[1, 3] = math.nan
    broken = fd.sample(flow, latents, grid, log_prob=True, **CASES[case])
    others = torch.tensor([0, 2, 3])
    assert torch.equal(broken.x[others], clean.x[others])
    assert torch.equal(broken.log_prob[others], clean.log_prob[others])  # type: ignore[index]
    assert broken.flags[1] & FLAG_NON_FINITE
    assert not (broken.flags[others] & ~FLAG_LIMITED).any()


@each_solver
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_prediction_types_give_the_same_sample(solver: str, kind: str) -> None:
    latents, grid = normals(3, 5), lam_grid(-8, 8, 12)
    options: dict[str, Any] = {"solver": solver, "guidance": fd.DensityGuidance(0.4), "log_prob": True}
    wanted = fd.sample(mixture(), latents, grid, **options)
    known = mixture(prediction_type=kind)
    found = fd.sample(fd.Flow(known.prediction, known.schedule, kind), latents, grid, divergence="exact", **options)
    assert largest_error(found.x, wanted.x) < 1e-10
    assert largest_error(found.log_prob, wanted.log_prob) < 1e-10  # type: ignore[arg-type]


@each_solver
def test_flows_of_one_s_own(solver: str) -> None:
    """Anything with the four attributes; names of prediction types may be aliases."""
    known = mixture(prediction_type="v_prediction")

    class Own:
        schedule, prediction_type, sigma_data, prediction = known.schedule, "v", 0.5, staticmethod(known.prediction)

    latents, grid = normals(3, 5), lam_grid(-5, 5, 6)
    wanted = fd.sample(known, latents, grid, solver=solver, log_prob=True)
    found = fd.sample(Own(), latents, grid, solver=solver, log_prob=True, divergence="exact")
    assert torch.equal(found.x, wanted.x)
    assert largest_error(found.log_prob, wanted.log_prob) < 1e-12  # type: ignore[arg-type]


@each_solver
def test_encoding_finds_log_prob(solver: str) -> None:
    """From lam = -10 on the prior is the mixture's own law to 1e-3 nats; the rest is the solver's error."""
    flow, grid = mixture(), lam_grid(-10, 4, 150)
    x = flow.sample(6, 4.0, seed=8)
    found = fd.log_prob(flow, x, grid, solver=solver)
    error = float((found.log_prob - flow.log_prob(x, 4.0)).abs().max())
    assert error < {1: 0.8, 2: 0.05}[ORDERS[solver]]
    back = fd.sample(flow, found.latents, grid, solver=solver, log_prob=True)
    assert largest_error(back.x, x) < {1: 0.2, 2: 4e-3}[ORDERS[solver]]
    assert torch.equal(found.std_err, torch.zeros(6, dtype=torch.float64))


class SmallNetwork(nn.Module):
    """Predicts noise; smooth, rows apart."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(columns + 1, 32), nn.SiLU(), nn.Linear(32, columns)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * self.layers(torch.cat([x, t[:, None]], dim=1)) + 0.7 * x


def test_probes_estimate_log_prob_with_their_standard_error() -> None:
    """Against the exact divergence on the same path: unbiased, and as far off as std_err says."""
    flow = fd.Flow(SmallNetwork(6), fd.VP())
    latents, grid = normals(120, 6), lam_grid(-3, 3, 12)
    for solver in ("euler", "heun", "dpmpp_2m"):
        exact = fd.sample(flow, latents, grid, solver=solver, log_prob=True, divergence="exact")
        found = fd.sample(
            flow, latents, grid, solver=solver, log_prob=True, divergence={"method": "hutchinson", "num_matvecs": 5}
        )
        assert torch.equal(found.x, exact.x) or largest_error(found.x, exact.x) < 1e-12
        assert found.std_err is not None
        deviation = (found.log_prob - exact.log_prob) / found.std_err  # type: ignore[operator]
        assert abs(float(deviation.mean())) < 4 / 120**0.5
        assert float(deviation.pow(2).mean()) == pytest.approx(1.0, abs=0.4)


def test_networks_are_measured_by_one_probe() -> None:
    flow, latents, grid = fd.Flow(SmallNetwork(6), fd.VP()), normals(5, 6), lam_grid(-3, 3, 4)
    default = fd.sample(flow, latents, grid, log_prob=True)
    named = fd.sample(flow, latents, grid, log_prob=True, divergence="hutchinson")
    assert torch.equal(default.log_prob, named.log_prob)  # type: ignore[arg-type]
    assert default.std_err.isnan().all()  # type: ignore[union-attr]
    other = fd.sample(flow, latents, grid, log_prob=True, divergence={"seed": 3})
    assert not torch.equal(default.log_prob, other.log_prob)  # type: ignore[arg-type]


def test_steering_probes_do_not_flatter_the_measurement() -> None:
    """With one set of probes for both, log p would seem to follow b to the last digit."""
    flow, latents, grid = fd.Flow(SmallNetwork(6), fd.VP()), normals(200, 6), lam_grid(-2, 2, 10)
    guidance = fd.DensityGuidance(b=lambda x, lam: 0.0, track=False)
    start = log_normal_density(latents, float(flow.schedule.sigma(-2.0)))
    tracked = fd.sample(flow, latents, grid, guidance=guidance, log_prob=True)
    exact = fd.sample(flow, latents, grid, guidance=guidance, log_prob=True, divergence="exact")
    torch.testing.assert_close(exact.log_prob, start, rtol=0, atol=1e-10)
    slip = tracked.log_prob - start
    assert float(slip.std()) > 0.01
    assert abs(float(slip.mean())) < 4 * float(slip.std()) / 200**0.5


@each_solver
def test_half_precision_networks(solver: str) -> None:
    """A bfloat16 prediction costs its rounding, not the guidance: eta - 1 is applied in the state's precision."""
    exact = mixture(shape=(64,))
    rounded = fd.Flow(lambda x, t: exact.prediction(x, t).bfloat16(), exact.schedule)
    latents, grid = normals(4, 64).float(), lam_grid(-4, 4, 20)
    for q in (0.3, 0.5):
        wanted = fd.sample(exact, latents.double(), grid, solver=solver, guidance=fd.DensityGuidance(q)).x
        found = fd.sample(rounded, latents, grid, solver=solver, guidance=fd.DensityGuidance(q)).x
        assert found.dtype == torch.float32
        assert largest_error(found.double(), wanted) < 0.02


@each_solver
def test_guidance_is_not_rounded_to_half_precision(solver: str) -> None:
    """The same predictions, in bfloat16 or widened, give the same bits: only their own rounding was lost."""
    exact = mixture(shape=(64,))
    half = fd.Flow(lambda x, t: exact.prediction(x, t).bfloat16(), exact.schedule)
    wide = fd.Flow(lambda x, t: exact.prediction(x, t).bfloat16().float(), exact.schedule)
    options: dict[str, Any] = {"solver": solver, "guidance": fd.DensityGuidance(0.4)}
    latents, grid = normals(4, 64).float(), lam_grid(-4, 4, 10)
    assert torch.equal(fd.sample(half, latents, grid, **options).x, fd.sample(wide, latents, grid, **options).x)


@each_solver
def test_no_score_is_a_finding_only_where_guidance_was_asked(solver: str) -> None:
    """The second row's predicted noise is 0: it has no direction to be guided along."""
    flow = fd.Flow(lambda x, t: torch.stack([x[0], 0 * x[1]]), fd.VP())
    latents, grid = normals(2, 5), lam_grid(-2, 2, 4)
    plain = fd.sample(flow, latents, grid, solver=solver)
    guided = fd.sample(flow, latents, grid, solver=solver, guidance=fd.DensityGuidance(0.4))
    assert plain.flags.tolist() == [0, 0]
    assert guided.flags.tolist() == [0, FLAG_ZERO_SCORE]
    assert torch.equal(guided.x[1], plain.x[1])
    assert not torch.equal(guided.x[0], plain.x[0])


def test_overflow_after_the_last_evaluation_is_flagged() -> None:
    """eps and its norm are finite, x0 = (x - sigma eps) / alpha is not."""
    flow = fd.Flow(lambda x, t: torch.tensor([[1e19], [1.0]]), fd.RectifiedFlow())
    result = fd.sample(flow, torch.ones(2, 1), [-100.0, 1.0], solver="dpmpp_2m")
    assert result.x.isfinite()[:, 0].tolist() == [False, True]
    assert result.flags.tolist() == [FLAG_NON_FINITE, 0]


def test_float32_is_close_to_float64() -> None:
    flow, latents, grid = mixture(shape=(64,)), normals(4, 64), lam_grid(-8, 8, 50)
    for solver in SOLVERS:
        wanted = fd.sample(flow, latents, grid, solver=solver, guidance=fd.DensityGuidance(0.4), log_prob=True)
        found = fd.sample(flow, latents.float(), grid, solver=solver, guidance=fd.DensityGuidance(0.4), log_prob=True)
        assert largest_error(found.x.double(), wanted.x) < 1e-4
        assert largest_error(found.log_prob, wanted.log_prob) < 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "velocity"])
def test_euler_steps_that_overshoot(kind: str) -> None:
    """Steps so long that the noise level would turn negative are still Euler's; forwards, backwards, and with noise."""
    flow = mixture(prediction_type=kind)
    latents, grid = normals(4, 5), torch.tensor([-6.0, -3.0, 0.5, 3.0, 6.0], dtype=torch.float64)
    noise = normals(4, 4, 5, seed=6)

    def steps(x: Tensor, lams: list[float], phi: float) -> Tensor:
        for step, (lam, after) in enumerate(pairwise(lams)):
            score = nn.functional.normalize(flow.score(x, lam), dim=1)
            x = x + (after - lam) * flow.drift(x, lam)
            if phi:
                across = noise[step] - (noise[step] * score).sum(1, keepdim=True) * score
                x = x + phi * float(flow.schedule.sigma(lam)) * (after - lam) ** 0.5 * across
        return x

    assert largest_error(fd.sample(flow, latents, grid).x, steps(latents, grid.tolist(), 0.0)) < 1e-12
    backwards = fd.log_prob(flow, latents, grid)
    assert largest_error(backwards.latents, steps(latents, grid.tolist()[::-1], 0.0)) < 1e-12

    class OnlyNoise(fd.StochasticDensityGuidance):
        def push(self, local: Any, lam_step: float) -> Any:
            push = super().push(local, lam_step)
            return type(push)(relative_noise=push.relative_noise)

    guided = fd.sample(flow, latents, grid, guidance=OnlyNoise(0.5, lambda lam: 0.3, track=False), noise=noise)
    assert largest_error(guided.x, steps(latents, grid.tolist(), 0.3)) < 1e-12


@each_solver
def test_accounts(solver: str) -> None:
    """Evaluations, callback, shapes, and what is None when it was not asked for."""
    flow, latents, grid = mixture(shape=(2, 3)), normals(3, 2, 3), lam_grid(-2, 2, 5)
    seen: list[tuple[int, float]] = []
    states: list[Tensor] = []

    def callback(index: int, lam: float, x: Tensor) -> None:
        seen.append((index, lam))
        states.append(x)

    result = fd.sample(flow, latents, grid, solver=solver, callback=callback)
    assert result.nfe == (10 if solver == "heun" else 5)
    assert result.log_prob is None
    assert result.std_err is None
    assert seen == list(enumerate(grid[1:].tolist()))
    assert torch.equal(states[-1], result.x)
    assert result.x.shape == latents.shape
    tracked = fd.sample(flow, latents, grid, solver=solver, log_prob=True)
    assert torch.equal(tracked.x, result.x)
    assert tracked.nfe == result.nfe
    assert tracked.log_prob is not None
    assert (tracked.log_prob.shape, tracked.log_prob.dtype) == ((3,), torch.float64)


@each_solver
def test_empty_batches_and_strange_layouts(solver: str) -> None:
    flow, grid = mixture(shape=(2, 3)), lam_grid(-2, 2, 3)
    empty = fd.sample(flow, torch.zeros(0, 2, 3), grid, solver=solver, log_prob=True)
    assert (empty.x.shape, empty.log_prob.shape) == ((0, 2, 3), (0,))  # type: ignore[union-attr]
    latents = normals(3, 4, 2)[:, :3].permute(1, 2, 0)
    assert not latents.is_contiguous()
    guidance = fd.DensityGuidance(0.4)
    found = fd.sample(flow, latents, grid, solver=solver, guidance=guidance).x
    assert torch.equal(found, fd.sample(flow, latents.contiguous(), grid, solver=solver, guidance=guidance).x)


def test_no_gradient_is_kept_and_inputs_are_left_alone() -> None:
    flow = fd.Flow(SmallNetwork(6), fd.VP())
    latents = normals(3, 6).requires_grad_()
    before = latents.detach().clone()
    result = fd.sample(flow, latents, lam_grid(-2, 2, 3), log_prob=True)
    assert not result.x.requires_grad
    assert not result.log_prob.requires_grad  # type: ignore[union-attr]
    assert torch.equal(latents.detach(), before)


def test_grids_may_be_lists_and_any_dtype() -> None:
    flow, latents = mixture(), normals(3, 5)
    wanted = fd.sample(flow, latents, torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)).x
    for grid in ([-2, 0, 2], torch.tensor([-2, 0, 2]), torch.tensor([-2.0, 0.0, 2.0])):
        assert torch.equal(fd.sample(flow, latents, grid).x, wanted)  # type: ignore[arg-type]


def test_interrupts_pass_through() -> None:
    def interrupt(index: int, lam: float, x: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.sample(mixture(), normals(2, 5), lam_grid(-2, 2, 3), callback=interrupt)


def test_progress_moves_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Bar:
        def __init__(self, total: int, unit: str) -> None:
            events.append(total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            events.append("closed")

        def update(self) -> None:
            events.append("step")

    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    module = types.ModuleType("tqdm.auto")
    module.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    fd.sample(mixture(), normals(2, 5), lam_grid(-2, 2, 2), progress=True, callback=lambda *_: events.append("called"))
    assert events == [2, "step", "called", "step", "called", "closed"]


def test_progress_without_tqdm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        fd.sample(mixture(), normals(2, 5), lam_grid(-2, 2, 2), progress=True)


GRID, LATENTS = lam_grid(-2, 2, 3), torch.zeros(2, 5)
NOISY = fd.StochasticDensityGuidance(0.4, noise=lambda lam: 0.3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"flow": "model"},
            TypeError,
            "flow must be a Flow or a GaussianMixture, or like them; str 'model' has no .sch",
        ),
        ({"flow": fd.VP()}, TypeError, "flow must be a Flow"),
        ({"latents": [0.0]}, TypeError, "latents must be a torch.Tensor"),
        ({"latents": LATENTS.long()}, TypeError, "latents must be float32"),
        ({"latents": LATENTS.half()}, TypeError, "latents must be float32 or float64, got a float16 tensor"),
        ({"latents": LATENTS[0]}, ValueError, r"latents must be batch first, \(B, \*\)"),
        ({"latents": LATENTS[:, :4]}, ValueError, r"x must be \(B, 5\) on cpu like the mixture"),
        ({"grid": GRID[None]}, ValueError, r"grid must have shape \(N \+ 1,\) with N >= 1 steps, got .*\(1, 4\)"),
        ({"grid": GRID[:1]}, ValueError, r"grid must have shape \(N \+ 1,\)"),
        ({"grid": 3.0}, ValueError, r"grid must have shape \(N \+ 1,\)"),
        ({"grid": "fine"}, TypeError, "grid must be a tensor or a sequence of floats, got str"),
        ({"grid": GRID.flip(0)}, ValueError, r"grid must increase strictly.*got grid\[0\] = 2.0 before grid\[1\]"),
        ({"grid": [0.0, 1.0, 1.0]}, ValueError, r"grid\[1\] = 1.0 before grid\[2\] = 1.0"),
        ({"grid": [-math.inf, 0.0]}, ValueError, "grid must be finite log-SNR values"),
        ({"grid": [math.nan, 0.0]}, ValueError, "grid must be finite log-SNR values"),
        ({"grid": [-2e3, 0.0]}, ValueError, r"at lam = -2000.0 VP\(\) has alpha = 0.0 and sigma = 1.0"),
        ({"grid": [True, False]}, TypeError, "grid must hold real numbers"),
        ({"solver": "rk4"}, ValueError, "solver must be one of euler, ddim, heun, dpmpp_2m, dopri5, got str 'rk4'"),
        ({"solver": None}, ValueError, "solver must be one of"),
        ({"guidance": 0.4}, TypeError, "guidance must be DensityGuidance, .* got float 0.4"),
        (
            {"guidance": NOISY, "solver": "heun"},
            ValueError,
            "stochastic guidance needs solver euler or ddim, got 'heun'",
        ),
        ({"guidance": NOISY, "noise": torch.zeros(2, 2, 5)}, ValueError, r"noise must have shape .* \(3, 2, 5\)"),
        ({"guidance": NOISY, "noise": 1.0}, TypeError, "noise must be a torch.Tensor"),
        ({"noise": torch.zeros(3, 2, 5)}, ValueError, "noise was given, but the guidance is not stochastic"),
        ({"log_prob": torch.zeros(2)}, TypeError, "log_prob must be True or False"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
        ({"callback": 1}, TypeError, "callback must be callable"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"sample_ids": torch.zeros(3).long()}, ValueError, r"sample_ids must have shape \(2,\)"),
        ({"divergence": "hutch++"}, ValueError, "method of divergence must be one of exact, hutchinson"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fd.sample(**{"flow": mixture(), "latents": LATENTS, "grid": GRID, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fd.log_prob(mixture(), LATENTS.long(), GRID), TypeError, "x must be float32"),
        (lambda: fd.log_prob(mixture(), LATENTS, GRID.flip(0)), ValueError, "grid must increase strictly"),
        (lambda: fd.log_prob(mixture(), LATENTS, GRID, solver="rk4"), ValueError, "solver must be one of"),
        (lambda: fd.log_prob(mixture(), LATENTS, GRID, divergence=1), TypeError, "divergence must be None"),
    ],
)
def test_bad_input_of_log_prob(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
