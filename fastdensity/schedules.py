"""Gaussian paths x = alpha x0 + sigma eps, with log-SNR lam = ln(alpha^2 / sigma^2) as their time.

lam increases from noise to data. In it every path has the same flow, dx/dlam = (d ln alpha/dlam) x + (sigma^2/2) s
(Kingma and Gao 2023; Song et al. 2021's probability flow with d lam as the time), so a path is nothing but the
two functions alpha(lam) and sigma(lam). Floats in give floats (float64) out, tensors give tensors of the same shape.
Only exp, sqrt and divisions are used, of arguments that cannot overflow: torch computes these to the same bits
wherever in a tensor an element lies, which its own sigmoid does not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import describe

Number = float | Tensor


def _exp(value: Number) -> Number:
    if isinstance(value, Tensor):
        return torch.exp(value)
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _sqrt(value: Number) -> Number:
    return torch.sqrt(value) if isinstance(value, Tensor) else math.sqrt(value)


def _number(lam: Any) -> Number:
    """lam as it may be computed with: a floating tensor, or a Python float."""
    if isinstance(lam, Tensor):
        return lam if lam.is_floating_point() else lam.to(torch.float64)
    if isinstance(lam, bool) or not isinstance(lam, Real):
        raise TypeError(f"lam must be a number or a tensor, got {describe(lam)}")
    return float(lam)


def _by_sign(value: Number, negative: Callable[[Number], Number], positive: Callable[[Number], Number]) -> Number:
    """negative(value) where value < 0, else positive(value); neither ever sees the other's range (NaN gradients)."""
    if isinstance(value, Tensor):
        return torch.where(value < 0, negative(value.clamp(max=0.0)), positive(value.clamp(min=0.0)))
    return negative(value) if value < 0 else positive(value)


def logistic(value: Number) -> Number:
    """1 / (1 + exp(-value)), accurate to a few ulp down to the smallest numbers."""
    return _by_sign(value, lambda v: _exp(v) / (1.0 + _exp(v)), lambda v: 1.0 / (1.0 + _exp(-v)))


def sqrt_logistic(value: Number) -> Number:
    """sqrt(1 / (1 + exp(-value))); the root is taken first, so that it reaches twice as far as `logistic`."""
    return _by_sign(value, lambda v: _exp(v / 2) / _sqrt(1.0 + _exp(v)), lambda v: 1.0 / _sqrt(1.0 + _exp(-v)))


class Schedule(ABC):
    """A path (alpha(lam), sigma(lam)). Subclass it, or wrap two functions with `Schedule.from_functions`.

    Every method takes a number or a tensor of any shape and returns the same; TypeError on anything else.
    """

    @abstractmethod
    def alpha(self, lam: Number) -> Number:
        """Scale of the data at log-SNR lam, > 0."""

    @abstractmethod
    def sigma(self, lam: Number) -> Number:
        """Standard deviation of the noise at log-SNR lam, > 0."""

    @abstractmethod
    def dlog_alpha(self, lam: Number) -> Number:
        """d ln alpha / d lam: the rate at which the flow stretches x."""

    @staticmethod
    def from_functions(alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]) -> Schedule:
        """Any path given by two functions of lam, made of torch operations; dlog_alpha by forward differentiation.

        Raises:
            TypeError: alpha or sigma is not callable. ValueError: lam is not ln(alpha^2 / sigma^2) of the two.
        """
        return _FunctionSchedule(alpha, sigma)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class VP(Schedule):
    """Variance preserving (Ho et al. 2020; Song et al. 2021): alpha^2 = 1 / (1 + e^-lam), alpha^2 + sigma^2 = 1."""

    def alpha(self, lam: Number) -> Number:
        """1 / sqrt(1 + e^-lam)."""
        return sqrt_logistic(_number(lam))

    def sigma(self, lam: Number) -> Number:
        """1 / sqrt(1 + e^lam)."""
        return sqrt_logistic(-_number(lam))

    def dlog_alpha(self, lam: Number) -> Number:
        """sigma^2 / 2."""
        return logistic(-_number(lam)) / 2

    @staticmethod
    def lam_from_time(time: Number, beta_min: float = 0.1, beta_max: float = 20.0) -> Number:
        """lam at time t in (0, 1] of the linear-beta process of Song et al. 2021 (their eq. 33; t = 1 is noise)."""
        noise = beta_min * time + 0.5 * (beta_max - beta_min) * time * time  # ln(1 / alpha^2)
        if isinstance(noise, Tensor):
            return -torch.log(torch.expm1(noise))
        _check_inside("time", time, 0.0, math.inf)
        return -math.log(math.expm1(noise))

    @staticmethod
    def time_from_lam(lam: Number, beta_min: float = 0.1, beta_max: float = 20.0) -> Number:
        """The inverse of `lam_from_time`, for `Flow(time=...)` of a network that was trained on that time."""
        lam = _number(lam)
        if isinstance(lam, Tensor):
            noise: Number = lam.neg().clamp(min=0.0) + torch.log1p(torch.exp(-lam.abs()))
        else:
            noise = max(-lam, 0.0) + math.log1p(math.exp(-abs(lam)))
        # the root of beta_min t + (beta_max - beta_min) t^2 / 2 = noise that does not cancel at small t
        return 2.0 * noise / (beta_min + _sqrt(beta_min**2 + 2.0 * (beta_max - beta_min) * noise))


class VE(Schedule):
    """Variance exploding (Song et al. 2021): alpha = 1, sigma = e^(-lam/2)."""

    def alpha(self, lam: Number) -> Number:
        """1."""
        lam = _number(lam)
        return torch.ones_like(lam) if isinstance(lam, Tensor) else 1.0

    def sigma(self, lam: Number) -> Number:
        """e^(-lam/2)."""
        return _exp(-_number(lam) / 2)

    def dlog_alpha(self, lam: Number) -> Number:
        """0: the flow does not stretch x."""
        lam = _number(lam)
        return torch.zeros_like(lam) if isinstance(lam, Tensor) else 0.0


class EDM(VE):
    """The path of Karras et al. 2022: VE, together with the sigma_data that their preconditioning needs.

    `Flow(model, EDM(sigma_data), prediction_type="edm")` takes the raw network F, of which
    x0 = c_skip x + c_out F; their input scaling c_in x and their noise label c_noise = ln(sigma)/4 = -lam/8 belong
    into the model that is passed.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = _check_inside("sigma_data", sigma_data, 0.0, math.inf)

    def __repr__(self) -> str:
        return f"EDM(sigma_data={self.sigma_data})"


class RectifiedFlow(Schedule):
    """Straight paths x = (1 - t) x0 + t eps (Liu et al. 2023; Lipman et al. 2023), sigma = t in (0, 1)."""

    def alpha(self, lam: Number) -> Number:
        """1 / (1 + e^(-lam/2)) = 1 - t."""
        return logistic(_number(lam) / 2)

    def sigma(self, lam: Number) -> Number:
        """1 / (1 + e^(lam/2)) = t."""
        return logistic(-_number(lam) / 2)

    def dlog_alpha(self, lam: Number) -> Number:
        """sigma / 2."""
        return logistic(-_number(lam) / 2) / 2

    @staticmethod
    def lam_from_time(time: Number) -> Number:
        """lam = 2 ln((1 - t) / t) at time t = sigma in (0, 1), t = 1 being noise."""
        if isinstance(time, Tensor):
            return 2.0 * (torch.log1p(-time) - torch.log(time))
        _check_inside("time", time, 0.0, 1.0)
        return 2.0 * (math.log1p(-time) - math.log(time))

    @staticmethod
    def time_from_lam(lam: Number) -> Number:
        """t = sigma, the inverse of `lam_from_time`: what `Flow(time=...)` of a rectified flow wants."""
        return logistic(-_number(lam) / 2)


class _FunctionSchedule(Schedule):
    def __init__(self, alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]) -> None:
        for name, function in (("alpha", alpha), ("sigma", sigma)):
            if not callable(function):
                raise TypeError(f"{name} must be a function of lam, got {describe(function)}")
        self._alpha, self._sigma = alpha, sigma
        for lam in (-1.0, 0.0, 1.0):
            found = float(lam_from_alpha_sigma(self.alpha(lam), self.sigma(lam)))
            if not abs(found - lam) < 1e-6:
                raise ValueError(
                    f"alpha and sigma must be functions of lam = ln(alpha^2 / sigma^2), "
                    f"but at lam = {lam} they give ln(alpha^2 / sigma^2) = {found}"
                )

    def alpha(self, lam: Number) -> Number:
        return _apply(self._alpha, _number(lam))

    def sigma(self, lam: Number) -> Number:
        return _apply(self._sigma, _number(lam))

    def dlog_alpha(self, lam: Number) -> Number:
        def log_alpha(at: Tensor) -> Tensor:
            return torch.log(torch.as_tensor(self._alpha(at), dtype=at.dtype, device=at.device).expand_as(at))

        return _apply(lambda at: torch.func.jvp(log_alpha, (at,), (torch.ones_like(at),))[1], _number(lam))


def _apply(function: Callable[[Tensor], Any], lam: Number) -> Number:
    """A torch function at a tensor, or at a float in float64."""
    if isinstance(lam, Tensor):
        return torch.as_tensor(function(lam), dtype=lam.dtype, device=lam.device).expand_as(lam)
    return float(function(torch.tensor(lam, dtype=torch.float64)))


def _check_inside(name: str, value: Any, lowest: float, highest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    number = float(value)
    if not lowest < number < highest:
        raise ValueError(f"{name} must be in ({lowest}, {highest}), got {number}")
    return number


def lam_from_alpha_sigma(alpha: Number, sigma: Number) -> Number:
    """lam = ln(alpha^2 / sigma^2), for tables of alpha and sigma such as a trained network's noise levels.

    Numbers or tensors, > 0; a number out of range raises ValueError, a tensor element gives inf or NaN.
    """
    if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
        return 2.0 * (_log_tensor(alpha) - _log_tensor(sigma))
    _check_inside("alpha", alpha, 0.0, math.inf)
    _check_inside("sigma", sigma, 0.0, math.inf)
    return 2.0 * (math.log(alpha) - math.log(sigma))


def _log_tensor(value: Number) -> Number:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def karras_sigmas(count: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """`count` noise levels from sigma_max down to sigma_min, dense near the data: Karras et al. 2022, eq. 5.

    (count,) float64. `lam_from_alpha_sigma(1.0, karras_sigmas(41))` is a grid of 40 steps for `VE` and `EDM`.

    Raises:
        ValueError: count < 2, or not 0 < sigma_min < sigma_max, or rho <= 0.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"count must be an int of at least 2, got {describe(count)}")
    _check_inside("sigma_max", sigma_max, 0.0, math.inf)
    _check_inside("sigma_min", sigma_min, 0.0, sigma_max)
    _check_inside("rho", rho, 0.0, math.inf)
    ramp = torch.linspace(0.0, 1.0, count, dtype=torch.float64)
    first, last = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    return (first + ramp * (last - first)) ** rho
