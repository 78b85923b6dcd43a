"""What `fastdensity.sample`, `log_prob` and `score_alignment` are given, checked, and the problem made of it."""

from __future__ import annotations

import math
import warnings
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastdensity import adaptive, rules
from fastdensity.boundary import check_distinct, check_integer, check_sample_ids, check_state, describe
from fastdensity.conversions import check_prediction_type
from fastdensity.evaluation import Problem
from fastdensity.flow import check_schedule, check_sigma_data
from fastdensity.guidance import Guidance
from fastdensity.solvers import SOLVERS, STOCHASTIC_SOLVERS, Solver
from fastdensity.traces.options import DivergenceMethod

ADAPTIVE_SOLVERS = ("dopri5",)
DEFAULT_TOLERANCE = 1e-6


def choose_solver(solver: Any, rtol: Any, atol: Any) -> Solver:
    """The solver of that name, with its tolerances if it takes any.

    Raises:
        TypeError, ValueError: an unknown name; a tolerance that is not positive, or for a solver of fixed steps.
        ImportError: an adaptive solver without torchode.
    """
    if not isinstance(solver, str) or solver not in (*SOLVERS, *ADAPTIVE_SOLVERS):
        known = ", ".join((*SOLVERS, *ADAPTIVE_SOLVERS))
        raise ValueError(f"solver must be one of {known}, got {describe(solver)}")
    given = {name: value for name, value in (("rtol", rtol), ("atol", atol)) if value is not None}
    if solver in SOLVERS:
        if given:
            raise ValueError(f"{next(iter(given))} is of adaptive solvers only ({', '.join(ADAPTIVE_SOLVERS)})")
        return SOLVERS[solver]
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {describe(value)}")
        if not 0.0 < float(value) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    adaptive.import_torchode()
    relative, absolute = (float(given.get(name, DEFAULT_TOLERANCE)) for name in ("rtol", "atol"))
    return partial(adaptive.dopri5, rtol=relative, atol=absolute)


def make_problem(
    flow: Any, x: Tensor, divergence: Any, seed: Any, sample_ids: Any, tracks: bool, diverges: bool
) -> Problem:
    """What stays the same over a run; TypeError or ValueError on what the flow or the caller gave for it.

    diverges: divergences are taken. Unless they are exact probes are drawn, and sample_ids must be distinct.
    """
    method = DivergenceMethod.parse(divergence, "exact" if hasattr(flow, "laplacian") else "hutchinson")
    ids = check_sample_ids(sample_ids, x)
    if diverges and method.method != "exact":
        check_distinct(ids)
    return Problem(
        flow,
        kind=check_prediction_type(flow.prediction_type),
        sigma_data=check_sigma_data(flow.sigma_data, flow.schedule),
        dimension=x.shape[1:].numel(),
        method=method,
        seed=check_integer("seed", seed, 0, 2**63 - 1),
        sample_ids=ids,
        tracks=tracks,
    )


def takes_divergences(guidance: Guidance | None, levels: list[float], tracks: bool) -> bool:
    """Does a walk along the grid need a divergence anywhere, to steer or to follow log p?"""
    if guidance is None:
        return tracks
    guided = [guidance.active(lam) for lam in levels[:-1]]
    follows = tracks and not (guidance.divergence_free and all(guided))
    return follows or (guidance.steers_by_divergence and any(guided))


def non_finite(x: Tensor) -> Tensor:
    """The flag of rows that hold NaN or infinity."""
    return (~x.flatten(1).isfinite().all(dim=1)).to(torch.int64) * rules.FLAG_NON_FINITE


def check_flow_problem(flow: Any, name: str, x: Any, grid: Any) -> list[float]:
    """The grid as floats; flow, x and grid checked.

    Raises:
        TypeError, ValueError: something lacks what a walk along a flow needs; the grid does not increase, or reaches
            an end where alpha or sigma is 0.
    """
    for wanted in ("schedule", "prediction", "prediction_type", "sigma_data"):
        if not hasattr(flow, wanted):
            raise TypeError(
                f"flow must be a Flow or a GaussianMixture, or like them; {describe(flow)} has no .{wanted}"
            )
    check_schedule(flow.schedule)
    check_state(name, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {describe(x)}: in half precision the steps of a trajectory are "
            f"lost to rounding (the network may still return half precision)"
        )
    if x.dim() < 2:
        raise ValueError(f"{name} must be batch first, (B, *), got {describe(x)}")
    levels = _check_grid(grid)
    for lam in (levels[0], levels[-1]):
        alpha, sigma = float(flow.schedule.alpha(lam)), float(flow.schedule.sigma(lam))
        if not (0.0 < alpha < math.inf and 0.0 < sigma < math.inf):
            raise ValueError(
                f"grid must stay where alpha and sigma are positive, finite numbers; "
                f"at lam = {lam} {flow.schedule!r} has alpha = {alpha} and sigma = {sigma}"
            )
    return levels


def _check_grid(grid: Any) -> list[float]:
    try:
        levels = torch.as_tensor(grid).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"grid must be a tensor or a sequence of floats, got {describe(grid)}") from error
    if levels.is_complex() or levels.dtype == torch.bool:
        raise TypeError(f"grid must hold real numbers, got {describe(levels)}")
    if levels.dim() != 1 or levels.shape[0] < 2:
        raise ValueError(f"grid must have shape (N + 1,) with N >= 1 steps, got {describe(levels)}")
    levels = levels.to(device="cpu", dtype=torch.float64)
    if not bool(levels.isfinite().all()):
        raise ValueError("grid must be finite log-SNR values; leave the ends where alpha or sigma is 0 out")
    if not bool((levels[1:] > levels[:-1]).all()):
        index = int((levels[1:] <= levels[:-1]).nonzero()[0])
        first, second = levels[index : index + 2].tolist()
        raise ValueError(
            f"grid must increase strictly, from noise (low log-SNR) to data; "
            f"got grid[{index}] = {first} before grid[{index + 1}] = {second}"
        )
    return levels.tolist()


def check_guidance(guidance: Any, solver: str, noise: Any, latents: Tensor, levels: list[float]) -> None:
    """TypeError or ValueError if guidance and solver, or guidance and noise, do not go together.

    Warns of guidance that acts nowhere on the grid.
    """
    if guidance is not None and not isinstance(guidance, Guidance):
        known = "DensityGuidance, StochasticDensityGuidance, ReverseDiffusion, HighDensity or None"
        raise TypeError(f"guidance must be {known}, got {describe(guidance)}")
    stochastic = guidance is not None and guidance.stochastic
    if stochastic and solver not in STOCHASTIC_SOLVERS:
        raise ValueError(f"stochastic guidance needs solver {' or '.join(STOCHASTIC_SOLVERS)}, got {solver!r}")
    if guidance is not None and not any(guidance.active(lam) for lam in levels[:-1]):
        warnings.warn(
            f"guidance acts nowhere: no step of the grid, {levels[0]} to {levels[-1]}, begins in its interval, "
            f"{guidance.ends()}",
            stacklevel=3,
        )
    if noise is None:
        return
    if not stochastic:
        raise ValueError(
            "noise was given, but the guidance is not stochastic: use StochasticDensityGuidance or ReverseDiffusion"
        )
    check_state("noise", noise)
    steps = len(levels) - 1
    if noise.shape != (steps, *latents.shape) or noise.device != latents.device:
        raise ValueError(
            f"noise must have shape (N, B, *) = {(steps, *latents.shape)} on {latents.device}, got {describe(noise)}"
        )
