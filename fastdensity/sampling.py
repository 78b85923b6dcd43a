"""Samples from a flow with the density under control, and the log density of samples: `sample` and `log_prob`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import describe
from fastdensity.guidance import Guidance
from fastdensity.problem import (
    check_flow_problem,
    check_guidance,
    choose_solver,
    make_problem,
    non_finite,
    takes_divergences,
)
from fastdensity.trajectory import Callback, Trajectory, log_normal_density


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What `sample` made.

    Attributes:
        x: (B, *) at grid[-1], in the latents' dtype.
        log_prob: (B,) nats, float64, of x under the flow's density at grid[-1]; None if it was not asked for.
        std_err: (B,) standard error of log_prob from the probes alone, not from the solver's steps: 0 for an exact
            divergence, NaN for one probe a step, which shows no spread; None with log_prob.
        nfe: states at which the network was evaluated, per sample (of an adaptive solver the most that any sample
            needed); products with its Jacobian there not counted.
        flags: (B,) int64, the bits of `fastdensity.rules.FLAG_*` seen on the way, 0 for a row guided as asked.
        commanded: (B,) float64, nats that guidance was to add to what the flow itself does to log p; None, like the
            next two, where the guidance does not track.
        realised: (B,) nats that its steps added, measured from one network call to the next; of the last step what
            is to be expected. residual: (B,) commanded - realised.
    """

    x: Tensor
    log_prob: Tensor | None
    std_err: Tensor | None
    nfe: int
    flags: Tensor
    commanded: Tensor | None = None
    realised: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LogProbResult:
    """What `log_prob` found; attributes as in `SampleResult`, `latents` (B, *) being x encoded to grid[0]."""

    latents: Tensor
    log_prob: Tensor
    std_err: Tensor
    nfe: int
    flags: Tensor


def sample(
    flow: Any,
    latents: Tensor,
    grid: Tensor | Sequence[float],
    solver: str = "euler",
    guidance: Guidance | None = None,
    log_prob: bool | None = None,
    divergence: str | dict[str, Any] | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
    callback: Callback | None = None,
    sample_ids: Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> SampleResult:
    """Takes latents at log-SNR grid[0] along the flow to grid[-1], guided if asked, log p tracked if asked.

    No gradient is kept. Sample i depends on latents[i], on its noise and, for random numbers made here, on
    sample_ids[i]; not on the rest of the batch, as far as the network keeps its rows apart: a matrix product may round
    differently in a batch of another size, so bits then agree at equal batch sizes only.

    Args:
        flow: a `Flow` or `GaussianMixture`, or like them: .schedule .prediction(x, lam) .prediction_type .sigma_data.
        latents: (B, *) float32 or float64, taken to be drawn from N(0, sigma(grid[0])^2 I): log p starts there.
        grid: (N + 1,) strictly increasing log-SNR from noise to data, a tensor or a sequence of floats.
        solver: "euler" (in lam), "ddim" (Euler in sigma/alpha), "heun", "dpmpp_2m", see `fastdensity.solvers`; or
            "dopri5", which chooses steps of its own for each row between the entries of the grid, see
            `fastdensity.adaptive`: not for noise. rtol, atol: its tolerances, default 1e-6 each.
        guidance: `DensityGuidance`, `HighDensity`; `StochasticDensityGuidance` and `ReverseDiffusion` with euler and
            ddim only.
        log_prob: True computes log p along the trajectory, whatever guidance and noise do to it; for `ReverseDiffusion`
            without a divergence.
        divergence: "exact" (D products with the Jacobian an evaluation), "hutchinson", or a dict of `method`,
            `num_matvecs` (probes) and `seed`. Default: exact for flows that know their own, one probe for networks.
            Probes that steer (b, noise) are never those that measure log p.
        noise: (N, B, *) standard normals for stochastic guidance; by default made in the kernel from `seed`.
        seed: of noise and probes. sample_ids: int64 (B,), their key beside it, default 0 .. B-1; distinct modulo 2^32
            where probes are drawn, while equal ones may share their noise.
        progress: True shows a bar (needs tqdm). callback: called as callback(index, lam, x) after each step, with
            lam = grid[index + 1] and x (B, *) the state there; itself, no copy, not to be written.

    Returns:
        SampleResult with .x .log_prob .std_err .nfe .flags.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; a grid that does not increase;
            an unknown solver; a solver or `noise` that does not go with the guidance.
        ImportError: progress=True without tqdm, solver="dopri5" without torchode.
    """
    levels = check_flow_problem(flow, "latents", latents, grid)
    solve = choose_solver(solver, rtol, atol)
    check_guidance(guidance, solver, noise, latents, levels)
    for name, value in (("log_prob", log_prob), ("progress", progress)):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {describe(value)}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable as callback(index, lam, x), got {describe(callback)}")
    diverges = takes_divergences(guidance, levels, bool(log_prob))
    problem = make_problem(flow, latents, divergence, seed, sample_ids, bool(log_prob), diverges)
    with torch.no_grad(), _progress_bar(len(levels) - 1, callback, bool(progress)) as report:
        run = Trajectory(problem, levels, guidance, noise, report)
        x = solve(run, latents.detach())
        flags = run.flags | non_finite(x)
        density = std_err = None
        state = run.loop.state
        if log_prob:
            density = log_normal_density(latents, run.path(levels[0])[1]) + run.log_change
            std_err = run.log_variance.sqrt()
            if state is not None:
                density = density + state.realised
        books = (None, None, None) if state is None else (state.commanded, state.realised, state.residual)
        return SampleResult(x, density, std_err, run.evaluations, flags, *books)


def log_prob(
    flow: Any,
    x: Tensor,
    grid: Tensor | Sequence[float],
    solver: str = "euler",
    divergence: str | dict[str, Any] | None = None,
    sample_ids: Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> LogProbResult:
    """log p of x under the flow's density at grid[-1]: encodes x to grid[0] by the flow backwards.

    There the density is taken to be N(0, sigma(grid[0])^2 I). Arguments as in `sample`; `grid` increases here too and
    is walked from its end. Probes have seed 0 unless `divergence` is a dict with another. With solver="dopri5" a grid
    of the two ends will do.

    Returns:
        LogProbResult with .latents (B, *), .log_prob (B,) in nats, .std_err (B,), .nfe, .flags.

    Raises:
        TypeError, ValueError, ImportError: as `sample`.
    """
    levels = check_flow_problem(flow, "x", x, grid)
    solve = choose_solver(solver, rtol, atol)
    problem = make_problem(flow, x, divergence, 0, sample_ids, True, True)
    with torch.no_grad():
        run = Trajectory(problem, levels[::-1])
        latents = solve(run, x.detach())
        start = log_normal_density(latents, run.path(levels[0])[1])
        flags = run.flags | non_finite(latents)
        return LogProbResult(latents, start - run.log_change, run.log_variance.sqrt(), run.evaluations, flags)


@contextmanager
def _progress_bar(steps: int, callback: Callback | None, shown: bool) -> Iterator[Callback | None]:
    """The callback, with a bar that moves before it; the bar is closed whatever happens."""
    if not shown:
        yield callback
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm, or 'fastdensity[cli]'") from error
    with tqdm(total=steps, unit="step") as bar:

        def report(index: int, lam: float, x: Tensor) -> None:
            bar.update()
            if callback is not None:
                callback(index, lam, x)

        yield report
