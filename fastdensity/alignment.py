"""Score alignment: does moving a latent up its density move the sample up its own? (Karczewski et al. 2025.)

The flow carries a small change v of the latent along by dv/dlam = (du/dx) v. Started at v = s, the latent's score, it
ends as the change of the sample, and v.s there tells whether log p of the sample rises with log p of the latent
(arXiv 2502.05807, section 3). Where scores are not to be trusted the same number follows without the one at the end,
d(v.s)/dlam = -div((du/dx) v), which needs the divergence of a Jacobian-vector product: nested forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import describe
from fastdensity.conversions import direction_coefficients, to_epsilon
from fastdensity.divergence import directional_derivatives, estimate_divergence
from fastdensity.evaluation import Problem
from fastdensity.flow import drift_from_epsilon
from fastdensity.problem import check_flow_problem, make_problem
from fastdensity.sums import row_dot
from fastdensity.traces.key import ProbeKey


def score_alignment(
    flow: Any,
    latents: Tensor,
    grid: Tensor | Sequence[float],
    use_score: bool = True,
    divergence: str | dict[str, Any] | None = None,
    sample_ids: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """v.s of each sample at grid[-1], where v is what the flow makes of the latent's score: positive means aligned.

    Euler's method in lam, for x and v together. Latents with a positive result can be rescaled towards the origin to
    raise the density of their samples, and away from it to lower it (prior guidance).

    Args:
        flow, latents, grid, sample_ids, seed: as in `fastdensity.sample`.
        use_score: True takes the score at the end, at one Jacobian-vector product a step. False integrates
            -div((du/dx) v) from ||s||^2 of the latent, with a divergence a step.
        divergence: of use_score=False, as in `fastdensity.sample`; by default exact for flows that know their own, one
            probe a step for networks, which leaves the sign right on average only.

    Returns:
        (B,) float64. A row does not depend on the others.

    Raises:
        TypeError, ValueError: as `fastdensity.sample`; divergence given where use_score needs none.
    """
    return align(flow, latents, grid, use_score, divergence, sample_ids, seed).value


@dataclass(frozen=True, slots=True)
class Alignment:
    """value (B,), v.s; cosine (B,) in [-1, 1], v.s / (||v|| ||s||), None without the score; x (B, *) at the end."""

    value: Tensor
    cosine: Tensor | None
    x: Tensor


def align(
    flow: Any,
    latents: Tensor,
    grid: Tensor | Sequence[float],
    use_score: bool,
    divergence: str | dict[str, Any] | None,
    sample_ids: Tensor | None,
    seed: int,
) -> Alignment:
    """`score_alignment`, with what else is known at the end."""
    levels = check_flow_problem(flow, "latents", latents, grid)
    if not isinstance(use_score, bool):
        raise TypeError(f"use_score must be True or False, got {describe(use_score)}")
    if use_score and divergence is not None:
        raise ValueError("divergence is for use_score=False: with the score none is needed")
    problem = make_problem(flow, latents, divergence, seed, sample_ids, False, not use_score)
    with torch.no_grad():
        x = latents.detach()
        change = _score(problem, x, levels[0])
        value = row_dot(change, change)
        for index, (lam, lam_next) in enumerate(pairwise(levels)):
            local = _Local(problem, x, change, lam)
            if not use_score:
                value = value - (lam_next - lam) * local.divergence_of_push(index)
            x, change = x + (lam_next - lam) * local.drift(), change + (lam_next - lam) * local.push()
        if not use_score:
            return Alignment(value, None, x)
        score = _score(problem, x, levels[-1])
        value = row_dot(change, score)
        norms = torch.sqrt(row_dot(change, change) * row_dot(score, score))
        return Alignment(value, torch.where(norms > 0, value / norms, 0.0), x)


class _Local:
    """The flow at x (B, *), and what it does to the change v (B, *) there."""

    def __init__(self, problem: Problem, x: Tensor, change: Tensor, lam: float) -> None:
        schedule = problem.flow.schedule
        self.problem, self.x, self.change, self.lam = problem, x, change, lam
        self.alpha, self.sigma = float(schedule.alpha(lam)), float(schedule.sigma(lam))
        self.dlog_alpha = float(schedule.dlog_alpha(lam))
        self.where = torch.full((x.shape[0],), lam, dtype=torch.float64, device=x.device)
        self.forward = problem.method.forward
        self.prediction, products = directional_derivatives(
            problem.flow.prediction, x, (self.where,), change[None], self.forward
        )
        self.pushed = products[0].to(x.dtype)
        along_x, along_p = direction_coefficients(problem.kind, self.alpha, self.sigma, problem.sigma_data)
        # du/dx = of_identity I + of_network (d prediction / dx)
        self.of_identity = self.dlog_alpha - self.sigma / 2 * along_x
        self.of_network = -self.sigma / 2 * along_p

    def drift(self) -> Tensor:
        """u, (B, *)."""
        problem = self.problem
        eps = to_epsilon(self.prediction, self.x, self.alpha, self.sigma, problem.kind, problem.sigma_data)
        return drift_from_epsilon(eps, self.x, self.lam, problem.flow.schedule)

    def push(self) -> Tensor:
        """(du/dx) v, (B, *)."""
        return self.of_identity * self.change + self.of_network * self.pushed

    def divergence_of_push(self, index: int) -> Tensor:
        """div((du/dx) v) with v held, which is the derivative of div u along v; (B,). The identity's part is 0."""
        problem, how = self.problem, self.problem.method
        if how.method == "exact" and hasattr(problem.flow, "laplacian"):
            slope = torch.func.jvp(lambda at: problem.flow.laplacian(at, self.lam), (self.x,), (self.change,))[1]
            return self.sigma**2 / 2 * slope
        seed = problem.seed if how.seed is None else how.seed
        key = ProbeKey(seed, problem.sample_ids, index)
        pushed = _push_of(problem.flow, self.forward)
        found = estimate_divergence(pushed, self.x, (self.change, self.where), how, key)
        return self.of_network * found.div


def _push_of(flow: Any, forward: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, v, lam (B,)) to (d prediction / dx) v; it closes over nothing that changes, so one trace serves all steps."""

    def pushed(x: Tensor, change: Tensor, where: Tensor) -> Tensor:
        return directional_derivatives(flow.prediction, x, (where,), change[None], forward)[1][0]

    return pushed


def _score(problem: Problem, x: Tensor, lam: float) -> Tensor:
    """grad log p, (B, *), as the flow's own network has it."""
    schedule = problem.flow.schedule
    alpha, sigma = float(schedule.alpha(lam)), float(schedule.sigma(lam))
    prediction = problem.flow.prediction(x, lam)
    return -to_epsilon(prediction, x, alpha, sigma, problem.kind, problem.sigma_data) / sigma
