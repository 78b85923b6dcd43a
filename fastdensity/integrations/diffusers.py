"""Density guidance for diffusers: `fd.guide(pipe.scheduler, q=0.4)` hooks `step` of this one scheduler.

Every pipeline hands its prediction, classifier-free guidance included, to `scheduler.step(model_output, t, sample)`.
The hook makes the predicted noise eta times larger there and goes on to diffusers' own step, so that solvers,
thresholds, clipping and noise stay what they are. The loop that keeps few steps exact (docs/few-steps.md) measures
where the samples really went.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import check_like, check_number, check_state, describe
from fastdensity.integrations.diffusers_places import PLACES, Level, Place
from fastdensity.integrations.tables import Tables
from fastdensity.ops.rows import guide_prediction
from fastdensity.ops.rows_result import flags_of
from fastdensity.ops.state import GuidanceState
from fastdensity.ops.track import track
from fastdensity.reference.rows import Parameter, compute_dtype

_JUMPS = "its steps jump to the data and noise it again: that is no ODE, and its prediction no score"
REFUSED = dict.fromkeys(("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"), _JUMPS)


def guide_scheduler(scheduler: Any, q: Parameter, interval: tuple[float, float], closed: bool) -> Any:
    """The scheduler itself, its `step` guided; see `fastdensity.guide`."""
    name = _family(scheduler)
    index = getattr(scheduler, "_step_index", None)
    if index is not None and 0 < index < len(scheduler.timesteps):
        raise ValueError(
            f"scheduler is in the middle of a run (step {index} of {len(scheduler.timesteps)}): "
            "guide it before, or call its set_timesteps first"
        )
    unguide_scheduler(scheduler)
    clips = [option for option in ("clip_sample", "thresholding") if scheduler.config.get(option, False)]
    if closed and clips:
        closed = False
        warnings.warn(
            f"{name} has {clips[0]}: a clipped pixel moves against its guidance, so the loop stays open (track=False)",
            stacklevel=3,
        )
    scheduler.step = GuidedStep(scheduler, name, q, interval, closed)
    return scheduler


def unguide_scheduler(scheduler: Any) -> Any:
    """The scheduler as it was."""
    if isinstance(scheduler.__dict__.get("step"), GuidedStep):
        del scheduler.step
    return scheduler


def _family(scheduler: Any) -> str:
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    for name in names:
        if name in REFUSED:
            raise ValueError(f"{names[0]} cannot be guided: {REFUSED[name]}")
    for name in names:
        if name in PLACES:
            return name
    raise ValueError(f"scheduler must be one of {', '.join(sorted(PLACES))}, got {names[0]}")


class GuidedStep:
    """`step` of one scheduler, guided; `__wrapped__` is diffusers' own, whose signature this has.

    Copied along with its scheduler (`copy.deepcopy`). Not part of the config: whoever makes a new scheduler from the
    config has to guide that one.

    Attributes:
        q: in (0, 1), a number or (B,). interval: of lam = 2 ln(alpha / sigma), where guidance acts. closed: is the
        loop? state: its books, `fastdensity.GuidanceState`, of the run under way or the last one; None without it.
        flags: (B,) bits of `fastdensity.rules.FLAG_*` seen in that run, None before it.
    """

    def __init__(self, scheduler: Any, family: str, q: Parameter, interval: tuple[float, float], closed: bool) -> None:
        functools.update_wrapper(self, scheduler.step)
        self.__wrapped__: Any = scheduler.step
        self.scheduler, self.family, self.q, self.interval, self.closed = scheduler, family, q, interval, closed
        self.__signature__ = inspect.signature(scheduler.step)
        self.prediction_type = getattr(scheduler.config, "prediction_type", None)
        self.tables = Tables()
        self.state: GuidanceState | None = None
        self.flags: Tensor | None = None
        self._timesteps: Any = None
        self._last: Level | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's own step of the guided prediction."""
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        output, sample = given["model_output"], given["sample"]
        if self._is_plain() or not isinstance(output, Tensor) or not isinstance(sample, Tensor):
            return self.__wrapped__(*args, **kwargs)
        self._check(output, sample)
        place = PLACES[self.family](self.scheduler, given["timestep"], given, self.tables)
        self._begin_or_go_on(place, sample)
        if not self._acts(place):
            return self.__wrapped__(*args, **kwargs)
        given["model_output"] = self._guided(place, output, sample)
        return _in_dtype_of(output, sample, self.__wrapped__(*bound.args, **bound.kwargs))

    def _is_plain(self) -> bool:
        return not self.closed and not isinstance(self.q, Tensor) and self.q == 0.5

    def _check(self, output: Tensor, sample: Tensor) -> None:
        now = getattr(self.scheduler.config, "prediction_type", None)
        if now != self.prediction_type:
            raise ValueError(
                f"prediction_type was {self.prediction_type!r} when the scheduler was guided and is {now!r} now: "
                "guide it again"
            )
        check_state("sample", sample)
        check_number("q", self.q, sample, 0.0, 1.0, True)
        if output.shape[:1] != sample.shape[:1] or output.device != sample.device:
            raise ValueError(f"model_output must be like sample, {describe(sample)}, got {describe(output)}")

    def _begin_or_go_on(self, place: Place, sample: Tensor) -> None:
        """A new run has new timesteps, or begins where the last call was not to lead; its books begin anew."""
        same = self.scheduler.timesteps is self._timesteps and self._last is not None
        if same and self._last is not None:
            same = abs(self._last[1] * place.here[0] - self._last[0] * place.here[1]) <= 1e-4 * abs(
                self._last[0] * place.here[1]
            )
        same = same and self.flags is not None and self.flags.shape == sample.shape[:1]
        same = same and self.flags is not None and self.flags.device == sample.device
        if self.state is not None and self.state.sample is not None:
            same = same and self.state.sample.shape == sample.shape
        if not same:
            self.state = GuidanceState.fresh(sample) if self.closed else None
            self.flags = torch.zeros(sample.shape[0], dtype=torch.int64, device=sample.device)
        self._timesteps, self._last = self.scheduler.timesteps, place.end

    def _acts(self, place: Place) -> bool:
        """In a step that leads on and does not touch an end of the path, within the interval where it begins."""
        here, end = place.here, place.end
        leads_on = end[1] * here[0] < here[1] * end[0] or place.scheme == "corrector"
        return leads_on and _is_inside(here) and _is_inside(end) and self._wanted(here)

    def _wanted(self, level: Level) -> bool:
        lam = 2.0 * math.log(level[0] / level[1])
        return self.interval[0] <= lam < self.interval[1]

    def _guided(self, place: Place, output: Tensor, sample: Tensor) -> Tensor:
        """The prediction in the network's parameterisation, in float32 at least: eta - 1 is lost in half precision."""
        channels = sample.shape[1] if sample.dim() > 1 else None
        learned = channels is not None and output.dim() == sample.dim() and output.shape[1] == 2 * channels
        prediction = output[:, :channels] if learned else output  # the rest is the variance that the network learned
        check_like("model_output", prediction, sample, "sample")
        wide = prediction if prediction.dtype.itemsize >= 4 else prediction.float()
        state = sample if place.rescale == 1.0 else place.rescale * sample.to(wide.dtype)
        guided = self._guide(place, -wide if place.negated else wide, state)
        guided = -guided if place.negated else guided
        return torch.cat([guided, output[:, channels:].to(guided.dtype)], dim=1) if learned else guided

    def _guide(self, place: Place, prediction: Tensor, sample: Tensor) -> Tensor:
        if place.scheme == "open" or not self.closed:
            report = torch.empty(sample.shape[0], 4, dtype=compute_dtype((prediction, sample)), device=sample.device)
            guided = guide_prediction(
                prediction,
                sample,
                alpha=place.here[0],
                sigma=place.here[1],
                q=self.q,
                prediction_type=place.kind,
                sigma_data=place.sigma_data,
                report=report,
            )
        else:
            assert self.state is not None
            operands = (sample, prediction, None, None)
            guided, made = track(
                "prediction", place.kind, place.scheme, self.state, operands, self._numbers(place), None, None, True
            )
            assert made is not None
            report = made
        assert self.flags is not None
        self.flags |= flags_of(report)
        return guided

    def _numbers(self, place: Place) -> dict[str, Parameter]:
        step_to = place.step_to or place.end
        return {
            "alpha": place.here[0],
            "sigma": place.here[1],
            "alpha_next": step_to[0],
            "sigma_next": step_to[1],
            "alpha_end": place.end[0],
            "sigma_end": place.end[1],
            "q": self.q,
            "noise_scale": place.noise,
            "sigma_data": place.sigma_data,
            "carry": place.carry,
        }


def _is_inside(level: Level) -> bool:
    return level[0] > 0 and level[1] > 0


def _in_dtype_of(output: Tensor, sample: Tensor, result: Any) -> Any:
    """The step's result in the dtype that it has without guidance, though the guided prediction was wider."""
    if output.dtype.itemsize >= 4:
        return result
    wanted = torch.promote_types(output.dtype, sample.dtype)
    if isinstance(result, tuple):
        return tuple(part.to(wanted) if isinstance(part, Tensor) else part for part in result)
    for name, part in list(result.items()):
        if isinstance(part, Tensor):
            result[name] = part.to(wanted)
    return result
