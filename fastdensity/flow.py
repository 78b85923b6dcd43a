"""A network on a Gaussian path: its prediction, and the score and drift that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import check_number, check_state, describe
from fastdensity.conversions import check_prediction_type, to_epsilon, to_score
from fastdensity.schedules import EDM, Number, Schedule

Model = Callable[[Tensor, Tensor], Tensor]
DEFAULT_SIGMA_DATA = 0.5  # Karras et al. 2022


class Flow:
    """The flow dx/dlam = (d ln alpha/dlam) x + (sigma^2/2) s of a trained network, in log-SNR lam.

    Args:
        model: called as model(x, t) with x (B, *) and t (B,); returns its prediction, (B, *), in any float dtype.
        schedule: the Gaussian path that the network was trained on.
        prediction_type: what it predicts, one of `fastdensity.rules.PREDICTION_TYPES` or an alias.
        time: t = time(lam) elementwise on (B,) float64 tensors, e.g. `RectifiedFlow.time_from_lam`; default t = lam.
            A floating t reaches the model in x's dtype (float32 for half precision x), an integer t as it is.
        sigma_data: of "edm" predictions; default the schedule's if that is `EDM`, else 0.5.

    In every method x is (B, *) and lam a number or (B,); results are (B, *) in x's dtype. After classifier-free
    guidance or distillation the "score" of a network is no gradient of a log density any more, and what is computed
    from it is formal.

    Raises:
        TypeError: model or time not callable, schedule no Schedule.
        ValueError: prediction_type unknown, sigma_data not positive.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        prediction_type: str = "epsilon",
        time: Callable[[Tensor], Number] | None = None,
        sigma_data: float | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), got {describe(model)}")
        if time is not None and not callable(time):
            raise TypeError(f"time must be a function of lam, got {describe(time)}")
        self.model = model
        self.schedule = check_schedule(schedule)
        self.prediction_type = check_prediction_type(prediction_type)
        self.time = time
        self.sigma_data = check_sigma_data(sigma_data, schedule)

    def prediction(self, x: Tensor, lam: Number) -> Tensor:
        """The network's raw output (B, *), in the network's dtype.

        Raises:
            TypeError, ValueError: the model returned no floating tensor of x's shape on x's device.
        """
        check_state("x", x)
        output = self.model(x, self._model_time(x, check_lam(lam, x)))
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model(x, t) must return a torch.Tensor, got {type(output).__name__}; "
                f"wrap the model in a function that takes the tensor out of it"
            )
        if not output.is_floating_point():
            raise TypeError(f"model(x, t) must return a floating tensor, got {describe(output)}")
        if output.shape != x.shape or output.device != x.device:
            raise ValueError(f"model(x, t) must return a tensor like x, {describe(x)}, got {describe(output)}")
        return output

    def eps(self, x: Tensor, lam: Number) -> Tensor:
        """The predicted noise, -sigma times the score."""
        return to_epsilon(self.prediction(x, lam), x, *self._convention(x, lam))

    def score(self, x: Tensor, lam: Number) -> Tensor:
        """grad_x log p_lam(x)."""
        return to_score(self.prediction(x, lam), x, *self._convention(x, lam))

    def drift(self, x: Tensor, lam: Number) -> Tensor:
        """dx/dlam of the flow, per unit of lam."""
        wide = x.float() if check_state("x", x).dtype.itemsize < 4 else x
        eps = to_epsilon(self.prediction(x, lam), wide, *self._convention(x, lam))
        return drift_from_epsilon(eps, wide, check_lam(lam, x), self.schedule).to(x.dtype)

    def _convention(self, x: Tensor, lam: Number) -> tuple[Number, Number, str, float]:
        lam = check_lam(lam, x)
        return self.schedule.alpha(lam), self.schedule.sigma(lam), self.prediction_type, self.sigma_data

    def _model_time(self, x: Tensor, lam: Number) -> Tensor:
        rows = x.shape[0]
        if isinstance(lam, Tensor):
            at = lam.to(torch.float64).expand(rows)
        else:
            at = torch.full((rows,), lam, dtype=torch.float64, device=x.device)
        time = at if self.time is None else self.time(at)
        if not isinstance(time, Tensor) or time.shape not in ((rows,), ()):
            raise ValueError(f"time(lam) must return a tensor of shape ({rows},) like lam, got {describe(time)}")
        if time.is_floating_point():
            time = time.to(torch.float32 if x.dtype.itemsize < 4 else x.dtype)
        return time.expand(rows)

    def __repr__(self) -> str:
        return f"Flow({type(self.model).__name__}, {self.schedule!r}, prediction_type={self.prediction_type!r})"


def drift_from_epsilon(eps: Tensor, x: Tensor, lam: Number, schedule: Schedule) -> Tensor:
    """(d ln alpha/dlam) x - (sigma/2) eps, (B, *) in x's dtype; lam checked already."""
    stretch, sigma = schedule.dlog_alpha(lam), schedule.sigma(lam)
    if isinstance(stretch, Tensor) and isinstance(sigma, Tensor):
        shape = (-1, *[1] * (x.dim() - 1))
        stretch, sigma = stretch.reshape(shape), sigma.reshape(shape)
    return (stretch * x - (sigma / 2) * eps).to(x.dtype)


def check_lam(lam: Any, x: Tensor) -> Number:
    """A finite float, or a float64 tensor (B,), (1,) or () of one log-SNR per row."""
    lam = check_number("lam", lam, x)
    return lam.to(torch.float64) if isinstance(lam, Tensor) else lam


def check_schedule(schedule: Any) -> Schedule:
    """The schedule; TypeError if it is none."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastdensity Schedule such as VP(), got {describe(schedule)}")
    return schedule


def check_sigma_data(sigma_data: Any, schedule: Schedule) -> float:
    """A positive number; None means the schedule's own, or 0.5."""
    if sigma_data is None:
        return schedule.sigma_data if isinstance(schedule, EDM) else DEFAULT_SIGMA_DATA
    if isinstance(sigma_data, bool) or not isinstance(sigma_data, Real):
        raise TypeError(f"sigma_data must be a number, got {describe(sigma_data)}")
    number = float(sigma_data)
    if not 0.0 < number < math.inf:
        raise ValueError(f"sigma_data must be positive and finite, got {number}")
    return number
