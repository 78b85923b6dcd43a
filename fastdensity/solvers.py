"""The samplers of `fastdensity.sample`, one function each, named after its algorithm.

All take a `Trajectory`, whose grid of log-SNR lam may run either way, and the state x (B, *) at its first entry; they
return the state at its last. kappa = sigma / alpha below.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fastdensity.conversions import to_sample
from fastdensity.quadrature import adams_bashforth_weight
from fastdensity.trajectory import Trajectory

Solver = Callable[[Trajectory, Tensor], Tensor]


def euler(run: Trajectory, x: Tensor) -> Tensor:
    """Euler's method in lam for the drift: first order. log p by the left-hand rule."""
    for step in run.steps():
        point = run.evaluate(x, step.lam, step)
        # x + h u = stretch x - h (sigma / 2) eps is the step of a path that goes on to these two
        stretch, (alpha, sigma) = 1.0 + step.size * float(point.dlog_alpha), run.path(step.lam)
        x = run.advance(point, step, stretch * alpha, (stretch - step.size / 2) * sigma)
        run.finish(step, x)
    return x


def ddim(run: Trajectory, x: Tensor) -> Tensor:
    """DDIM (Song et al. 2021), Euler's method in kappa for x / alpha: first order. log p by the left-hand rule.

    The reverse diffusion's steps are those of the same paper with eta = 1, DDPM's.
    """
    for step in run.steps():
        point = run.evaluate(x, step.lam, step)
        whole = not point.push.projected
        x = run.ancestral(point, step) if whole else run.advance(point, step, *run.path(step.lam_next))
        run.finish(step, x)
    return x


def heun(run: Trajectory, x: Tensor) -> Tensor:
    """Heun's method in kappa for x / alpha (Karras et al. 2022, algorithm 1): second order, two evaluations a step.

    log p by the trapezoid rule over the two.
    """
    for step in run.steps():
        first = run.evaluate(x, step.lam, step)
        alpha_next, _ = run.path(step.lam_next)
        ratio = alpha_next / first.alpha
        along_eps = ratio * first.sigma * math.expm1(-step.size / 2)  # alpha' (kappa' - kappa)
        eps = run.guided_epsilon(first, step.size / 2, step, "predictor")
        second = run.evaluate(ratio * x + along_eps * eps, step.lam_next, step)
        eps_next = run.guided_epsilon(second, step.size / 2, step, "corrector")
        x = ratio * x + (along_eps / 2) * (eps + eps_next)
        run.finish(step, x)
    return x


def dpmpp_2m(run: Trajectory, x: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step, the first step DDIM's.

    log p by the two-step Adams-Bashforth rule over the same evaluations.
    """
    problem = run.problem
    before: Tensor | None = None
    for step in run.steps():
        point = run.evaluate(x, step.lam, step)
        carry = 0.0 if before is None else step.size / (step.lam - run.grid[step.index - 1]) / 2
        weight = adams_bashforth_weight(run.grid, step.index)
        guided = run.guided_prediction(point, weight, step, carry=carry)
        data = to_sample(guided, x, point.alpha, point.sigma, problem.kind, problem.sigma_data)
        alpha_next, sigma_next = run.path(step.lam_next)
        extrapolated = data
        if before is not None:
            extrapolated = data + carry * (data - before)
        x = (sigma_next / point.sigma) * x - (alpha_next * math.expm1(-step.size / 2)) * extrapolated
        before = data
        run.finish(step, x)
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}
STOCHASTIC_SOLVERS = ("euler", "ddim")
