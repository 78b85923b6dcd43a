"""The closed loop of guidance over one run of a sampler: what its kernel wants to know of each step, and its state.

docs/few-steps.md derives the loop; `fastdensity.reference.track` is the contract of the kernel that closes it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdensity.boundary import check_number
from fastdensity.evaluation import UNGUIDED, Evaluation, Problem
from fastdensity.guidance import Guidance
from fastdensity.ops.state import GuidanceState
from fastdensity.ops.track import track
from fastdensity.quadrature import Step
from fastdensity.reference.rows import NoiseKey

Numbers = dict[str, Any]  # those of `fastdensity.reference.track.PARAMETERS`


class ClosedLoop:
    """The books that guidance with track=True keeps; of any other guidance, nothing.

    Attributes:
        state: None before the first step in the loop.
    """

    def __init__(self, problem: Problem, guidance: Guidance | None) -> None:
        self.problem, self.guidance = problem, guidance
        self.state: GuidanceState | None = None

    def is_closed(self, lam: float) -> bool:
        """In the step that begins at lam?"""
        return self.guidance is not None and self.guidance.track and self.guidance.active(lam)

    def holds(self, point: Evaluation) -> bool:
        """Is what happens here decided, and kept account of, by the loop?"""
        return point.push is not UNGUIDED and self.guidance is not None and self.guidance.track

    def numbers(
        self,
        point: Evaluation,
        step: Step,
        ends: tuple[float, float],
        noise_scale: float | Tensor = 0.0,
        carry: float = 0.0,
    ) -> Numbers | None:
        """What the kernel is told of a step to `ends`, (alpha, sigma); None where the loop is open."""
        guidance, push, problem, schedule = self.guidance, point.push, self.problem, self.problem.flow.schedule
        if guidance is None or not self.holds(point):
            return None
        return {
            "alpha": point.alpha,
            "sigma": point.sigma,
            "alpha_next": ends[0],
            "sigma_next": ends[1],
            "alpha_end": float(schedule.alpha(step.lam_next)),
            "sigma_end": float(schedule.sigma(step.lam_next)),
            "q": check_number("q", push.q, point.x, 0.0, 1.0, True),
            "shift": check_number("shift", push.shift, point.x),
            "noise_scale": check_number("noise_scale", noise_scale, point.x, 0.0),
            "sigma_data": problem.sigma_data,
            "carry": carry,
        }

    def step(
        self, point: Evaluation, numbers: Numbers, noise: Tensor | None, noise_key: NoiseKey | None
    ) -> tuple[Tensor, Tensor]:
        """(state, report) after the step with the eta that the loop decides on; noise as `ops.rows.guided_step`'s."""
        operands = (point.x, point.prediction, None, noise)
        return self._run("step", "direct", point, operands, numbers, noise_key)

    def prediction(self, point: Evaluation, numbers: Numbers, scheme: str) -> tuple[Tensor, Tensor]:
        """(prediction, report), its noise eta times the network's, in the state's dtype."""
        operands = (point.x, point.prediction.to(point.x.dtype), None, None)
        return self._run("prediction", scheme, point, operands, numbers, None)

    def _run(
        self, rule: str, scheme: str, point: Evaluation, operands: Any, numbers: Numbers, key: NoiseKey | None
    ) -> tuple[Tensor, Tensor]:
        if self.state is None:
            self.state = GuidanceState.fresh(point.x)
        result, report = track(rule, self.problem.kind, scheme, self.state, operands, numbers, key)
        assert report is not None
        return result, report
