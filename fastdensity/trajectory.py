"""One run of a sampler: what every solver does at a state, and the account it keeps of log p, flags and evaluations.

A solver (`fastdensity.solvers`) decides where the network is evaluated and how its predictions are combined; it
weighs the rate of log p at its evaluations by a quadrature of its own order in lam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity.closed_loop import ClosedLoop, Numbers
from fastdensity.conversions import to_epsilon
from fastdensity.evaluation import UNGUIDED, Evaluation, Problem
from fastdensity.flow import drift_from_epsilon
from fastdensity.guidance import Guidance, Number
from fastdensity.ops.rows import guide_prediction, guided_step
from fastdensity.ops.rows_result import flags_of
from fastdensity.quadrature import Step, one_evaluation_weight
from fastdensity.sums import row_dot, row_sum

Callback = Callable[[int, float, Tensor], Any]


class Trajectory:
    """A run's bookkeeping; the state x itself is carried by the solver.

    Attributes:
        log_change: (B,) float64, what log p gained so far, in nats; log_variance: (B,) of its estimate.
        flags: (B,) bits of `fastdensity.rules.FLAG_*` seen. evaluations: of the network.
        loop: of guidance that tracks.
    """

    def __init__(
        self,
        problem: Problem,
        grid: list[float],
        guidance: Guidance | None = None,
        noise: Tensor | None = None,
        callback: Callback | None = None,
    ) -> None:
        """`grid` is walked from its first to its last entry; `noise` (N, B, *), or None to make it in the kernel."""
        ids = problem.sample_ids
        self.problem, self.grid, self.guidance, self.noise, self.callback = problem, grid, guidance, noise, callback
        self.schedule = problem.flow.schedule
        self.flags = torch.zeros_like(ids)
        self.log_change = torch.zeros_like(ids, dtype=torch.float64)
        self.log_variance = torch.zeros_like(self.log_change)
        self.evaluations = 0
        self.loop = ClosedLoop(problem, guidance)

    def steps(self) -> Iterator[Step]:
        """The steps of the grid, in order."""
        for index, (lam, lam_next) in enumerate(pairwise(self.grid)):
            yield Step(index, lam, lam_next)

    def path(self, lam: float) -> tuple[float, float]:
        """(alpha, sigma) at lam."""
        return float(self.schedule.alpha(lam)), float(self.schedule.sigma(lam))

    def evaluate(self, x: Tensor, lam: Number, step: Step, key: int | None = None) -> Evaluation:
        """The network at (x, lam), and the push that the guidance wants there; the step's begin decides if it acts.

        `key` is that of the probes; by default each evaluation has probes of its own.
        """
        guidance = self.guidance if self.guidance is not None and self.guidance.active(step.lam) else None
        measures = self.problem.tracks and not (guidance is not None and guidance.divergence_free)
        point = Evaluation(self.problem, x, lam, self.evaluations if key is None else key, measures)
        self.evaluations += 1
        if guidance is not None:
            point.push = guidance.push(point, step.lam)
        return point

    def advance(self, point: Evaluation, step: Step, alpha_next: float, sigma_next: float) -> Tensor:
        """The guided step to alpha_next x0 + sigma_next eps; log p by the left-hand rule, or by the loop's books.

        One pass, unless noise is added whole: that moves log p too, by sigma s.dW = -eps.z sqrt(dlam).
        """
        scale = self._noise_scale(point, step)
        numbers = self.loop.numbers(point, step, (alpha_next, sigma_next), scale)
        self._stretch(point, step, numbers)
        if point.push.projected:
            return self._move(point, step, alpha_next, sigma_next, scale, numbers)
        return self._add_noise(point, step, self._move(point, step, alpha_next, sigma_next, 0.0, numbers), scale)

    def ancestral(self, point: Evaluation, step: Step) -> Tensor:
        """The step of a diffusion with whole noise if x0 stays as it is predicted: DDIM's at eta = 1, which is DDPM's.

        Song et al. 2021, eq. 12 and 16; here on any path. DDIM's drift is exact in kappa, and Euler's noise,
        sigma sqrt(dlam), does not belong to it: where alpha is constant its standard deviation is too large by a
        quarter of dlam, and log p had six to ten times this step's bias.
        """
        alpha_next, sigma_next = self.path(step.lam_next)
        ratio = math.exp(-step.size / 2)  # kappa' / kappa
        scale = point.push.relative_noise * (sigma_next * math.sqrt(-math.expm1(-step.size)))
        point.push = replace(point.push, gain=point.push.gain * ratio)
        moved = self._move(point, step, alpha_next, sigma_next, 0.0, None)
        if (
            self.problem.tracks
        ):  # the path's stretching, whose rate counts in that of log p, is known for the whole step
            stretch = math.log(alpha_next / float(point.alpha))
            self.log_change += self.problem.dimension * (step.size * float(point.dlog_alpha) - stretch)
        return self._add_noise(point, step, moved, scale)

    def _add_noise(self, point: Evaluation, step: Step, moved: Tensor, scale: float | Tensor) -> Tensor:
        noise = self._draw_noise(point.x, step)
        if self.problem.tracks:
            self.log_change -= math.sqrt(step.size) * row_dot(point.epsilon(), noise)
        return moved + scale * noise

    def _move(
        self,
        point: Evaluation,
        step: Step,
        alpha_next: float,
        sigma_next: float,
        scale: float | Tensor,
        numbers: Numbers | None,
    ) -> Tensor:
        """The guided step, with projected noise of standard deviation `scale`."""
        if not (alpha_next > 0 and sigma_next > 0):
            return self._overshoot(point, step, alpha_next, sigma_next, scale, numbers)
        problem, push = self.problem, point.push
        noisy = isinstance(scale, Tensor) or scale != 0
        noise = self.noise[step.index] if noisy and self.noise is not None else None
        if numbers is not None:
            key = (problem.seed, problem.sample_ids, step.index) if noisy and noise is None else None
            moved, report = self.loop.step(point, numbers, noise, key)
            self._record(point, self._weight(step), report)
            return moved
        result = guided_step(
            point.x,
            point.prediction,
            alpha=point.alpha,
            sigma=point.sigma,
            alpha_next=alpha_next,
            sigma_next=sigma_next,
            q=push.q,
            shift=push.shift + push.repair,
            gain=push.gain,
            prediction_type=problem.kind,
            sigma_data=problem.sigma_data,
            noise=noise,
            noise_scale=scale,
            seed=problem.seed if noisy and noise is None else None,
            sample_ids=problem.sample_ids,
            step=step.index,
        )
        self._record(point, self._weight(step), result.report)
        return result.sample

    def guided_prediction(
        self, point: Evaluation, weight: float, step: Step, scheme: str = "direct", carry: float = 0.0
    ) -> Tensor:
        """The prediction whose noise is eta eps (B, *), in x's dtype; log p gains weight times its rate here.

        In x's dtype because eta - 1 is lost where a half precision prediction would be rounded again. `scheme` and
        `carry` say how the solver goes on from it (`fastdensity.reference.track`).
        """
        numbers = self.loop.numbers(point, step, self.path(step.lam_next), 0.0, carry)
        if scheme != "corrector":
            self._stretch(point, step, numbers)
        return self._guide_and_record(point, weight, numbers, scheme)

    def guided_epsilon(self, point: Evaluation, weight: float, step: Step, scheme: str) -> Tensor:
        """eta eps (B, *); log p gains weight times its rate here."""
        return self._to_epsilon(point, self.guided_prediction(point, weight, step, scheme))

    def _to_epsilon(self, point: Evaluation, prediction: Tensor) -> Tensor:
        problem = self.problem
        return to_epsilon(prediction, point.x, point.alpha, point.sigma, problem.kind, problem.sigma_data)

    def slope(self, point: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
        """The guided drift dx/dlam (B, *) in x's dtype; d log p/dlam and its standard error, (B,) float64, if tracked.

        Flags are kept, but for non-finite numbers: the point may be one that an adaptive solver tries and rejects.
        """
        problem = self.problem
        guided, report = self._guide(point)
        eps = self._to_epsilon(point, guided)
        drift = drift_from_epsilon(eps, point.x, point.lam, self.schedule)
        eta_minus_one, sq_norm, _, _ = report.unbind(dim=1)
        if point.push is not UNGUIDED:
            self.flags |= flags_of(report) & ~rules.FLAG_NON_FINITE
        if not problem.tracks:
            return drift, torch.zeros_like(self.log_change), torch.zeros_like(self.log_change)
        return drift, *point.log_density_rate(eta_minus_one, sq_norm)

    def finish(self, step: Step, x: Tensor) -> None:
        """After each step: tells the callback."""
        if self.callback is not None:
            self.callback(step.index, step.lam_next, x)

    def _stretch(self, point: Evaluation, step: Step, numbers: Numbers | None) -> None:
        """In the loop the flow's stretching over a step is known without a quadrature."""
        if self.problem.tracks and numbers is not None:
            ratio = float(self.schedule.alpha(step.lam_next)) / float(point.alpha)
            self.log_change -= self.problem.dimension * math.log(ratio)

    def _guide(self, point: Evaluation) -> tuple[Tensor, Tensor]:
        """The prediction whose noise is eta eps (B, *) in x's dtype, and the kernel's report (B, 4)."""
        problem, push, x = self.problem, point.push, point.x
        report = torch.empty(x.shape[0], len(rules.REPORT_COLUMNS), dtype=x.dtype, device=x.device)
        guided = guide_prediction(
            point.prediction.to(x.dtype),
            x,
            alpha=point.alpha,
            sigma=point.sigma,
            q=push.q,
            shift=push.shift + push.repair,
            gain=push.gain,
            prediction_type=problem.kind,
            sigma_data=problem.sigma_data,
            report=report,
        )
        return guided, report

    def _guide_and_record(
        self, point: Evaluation, weight: float, numbers: Numbers | None, scheme: str = "direct"
    ) -> Tensor:
        guided, report = self._guide(point) if numbers is None else self.loop.prediction(point, numbers, scheme)
        self._record(point, weight, report)
        return guided

    def _noise_scale(self, point: Evaluation, step: Step) -> float | Tensor:
        """phi sqrt(dlam), the standard deviation of the step's noise."""
        relative = point.push.relative_noise
        if not isinstance(relative, Tensor) and relative == 0:
            return 0.0
        return relative * (point.sigma * math.sqrt(step.size))

    def _draw_noise(self, x: Tensor, step: Step) -> Tensor:
        """The step's standard normals, in x's shape and dtype."""
        if self.noise is not None:
            return self.noise[step.index].to(x.dtype)
        drawn = guided_step(  # where there is no score there is nothing to project: the kernel writes its noise
            torch.zeros_like(x),
            torch.zeros_like(x),
            alpha=1.0,
            sigma=1.0,
            alpha_next=1.0,
            sigma_next=1.0,
            noise_scale=1.0,
            seed=self.problem.seed,
            sample_ids=self.problem.sample_ids,
            step=step.index,
        )
        return drawn.sample

    def _overshoot(
        self,
        point: Evaluation,
        step: Step,
        alpha_next: float,
        sigma_next: float,
        scale: float | Tensor,
        numbers: Numbers | None,
    ) -> Tensor:
        """The same step where Euler's is so long that alpha or sigma would end below 0, which no kernel takes."""
        x, guided = point.x, self._guide_and_record(point, self._weight(step), numbers)
        eps = self._to_epsilon(point, guided)
        along_eps = sigma_next - alpha_next * (point.sigma / point.alpha)
        moved = (alpha_next / point.alpha) * x + along_eps * eps
        if not isinstance(scale, Tensor) and scale == 0:
            return moved
        eps, noise = point.epsilon(), self._draw_noise(x, step)
        sq_norm = row_dot(eps, eps)
        along = torch.where(sq_norm > 0, row_dot(eps, noise) / sq_norm, 0.0)
        along, scale = (torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(x.shape[0]) for v in (along, scale))
        shape = (-1, *[1] * (x.dim() - 1))
        return moved + scale.reshape(shape) * (noise - along.reshape(shape) * eps)

    def _record(self, point: Evaluation, weight: float, report: Tensor) -> None:
        eta_minus_one, sq_norm, _, _ = report.unbind(dim=1)
        # a row without a score is no finding in a step that nobody asked to guide
        seen = flags_of(report)
        self.flags |= seen & rules.FLAG_NON_FINITE if point.push is UNGUIDED else seen
        if self.problem.tracks:
            in_loop = self.loop.holds(point)
            rate, std_err = point.flow_rate() if in_loop else point.log_density_rate(eta_minus_one, sq_norm)
            self.log_change += weight * rate
            self.log_variance += (weight * std_err) ** 2

    def _weight(self, step: Step) -> float:
        return one_evaluation_weight(self.grid, step.index, self.loop.is_closed)


def log_normal_density(x: Tensor, sigma: float) -> Tensor:
    """log N(x; 0, sigma^2 I) of each row, (B,) in nats, float64."""
    columns = x.shape[1:].numel()
    squares = row_sum((x.double() / sigma) ** 2)
    return -0.5 * (squares + columns * math.log(2.0 * math.pi)) - columns * math.log(sigma)
