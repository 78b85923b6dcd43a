"""What a sampler is to do to the density: the guidance objects that `fastdensity.sample` takes.

Each says, where the network is evaluated, how much the predicted noise is to be scaled,
eta - 1 = gain + (sqrt(2 D) ndtri(q) + shift) / ||eps||^2, and how much noise orthogonal to the score is added.
[DG] is Karczewski et al. 2025 (arXiv 2502.05807), [HD] Karczewski et al. 2025 (arXiv 2411.01293).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from torch import Tensor

from fastdensity.boundary import check_number, describe

Number = float | Tensor
Rate = Callable[[Tensor, Any], Number]  # b(x, lam): nats per unit of lam, (B,)


@dataclass(frozen=True, slots=True)
class Push:
    """The parameters of a guided step; numbers or (B,). The default is the unguided step.

    repair is added to shift, but is not commanded: it makes up for what the noise does to log p. relative_noise is the
    noise of the step over that of the reverse diffusion, phi / sigma, per sqrt of lam; projected says that only its
    part orthogonal to the score is added.
    """

    q: Number = 0.5
    shift: Number = 0.0
    repair: Number = 0.0
    gain: Number = 0.0
    relative_noise: Number = 0.0
    projected: bool = True


class LocalFlow(Protocol):
    """The flow at one state, as guidance sees it; each quantity is computed when asked for, and once."""

    x: Tensor
    lam: Number
    sigma: Number

    def laplacian(self) -> Tensor:
        """Trace of the Hessian of log p, (B,)."""

    def divergence(self) -> Tensor:
        """Divergence of the drift, (B,) per unit of lam."""

    def curvature_along_score(self) -> Tensor:
        """s.H s / ||s||^2, (B,)."""


class Guidance(ABC):
    """Base of all guidance. `active` decides for a whole step, by where it begins.

    `stochastic`: it adds noise. `divergence_free`: where it acts, log p follows without any divergence. `track`: what
    its steps do to log p is measured and fed back. `steers_by_divergence`: its push asks for second derivatives.
    """

    stochastic = False
    divergence_free = False
    track = False
    steers_by_divergence = True

    @abstractmethod
    def active(self, lam: float) -> bool:
        """Is the step that begins at lam guided?"""

    @abstractmethod
    def push(self, local: LocalFlow, lam_step: float) -> Push:
        """How to guide at `local`, in the step that begins at lam_step."""

    def ends(self) -> tuple[float, ...]:
        """Where `active` changes with lam: a solver that chooses its steps begins a new one there."""
        return ()


class DensityGuidance(Guidance):
    """Density guidance: the smallest change of the drift that makes log p change at a chosen rate ([DG]).

    Args:
        q: quantile in (0, 1), a number or (B,): log p changes at the rate -div u + sqrt(D/2) ndtri(q) per unit of
            lam ([DG] eq. 23); above 1/2 the density rises and samples get smoother, below they gain detail. Needs no
            divergence. It does not rescale the latents; `fastdensity.scale_prior` does.
        b: b(x, lam) -> (B,) or a number, the wanted d log p / d lam in nats per unit of lam. Needs the
            divergence at every evaluation. With an adaptive solver lam is (B,), one number for each row.
        interval: (lam_lo, lam_hi); a step is guided if it begins at lam_lo <= lam < lam_hi.
        track: True closes the loop: what a step really did to log p is measured at the next network call, at no
            further cost, and fed back, so that few steps are as exact as many (docs/few-steps.md). With q = 0.5 that
            is a corrector of the plain solver. Steps too large to follow are bounded and flagged
            (`fastdensity.rules.FLAG_LIMITED`). With b the whole of log p is tracked, its divergence included.
            False is the paper's form, exact for short steps. Solvers that choose their steps (dopri5) need no loop.

    A tensor's values are not checked: rows with q outside (0, 1) or non-finite b go unguided, and are flagged.

    Raises:
        TypeError, ValueError: not exactly one of q and b, a number out of range, an interval that is no (low, high).
    """

    def __init__(
        self,
        q: Number | None = None,
        *,
        b: Rate | None = None,
        interval: tuple[float, float] | None = None,
        track: bool = True,
    ) -> None:
        if not isinstance(track, bool):
            raise TypeError(f"track must be True or False, got {describe(track)}")
        self.track = track
        self.q, self.b = _check_target(q, b)
        self.steers_by_divergence = self.stochastic or b is not None
        self.interval = _check_interval(interval)

    def active(self, lam: float) -> bool:
        """Inside the interval."""
        return self.interval[0] <= lam < self.interval[1]

    def ends(self) -> tuple[float, ...]:
        """Of the interval."""
        return self.interval

    def push(self, local: LocalFlow, lam_step: float) -> Push:
        """The quantile, or shift = 2 (div u + b), which makes d log p/dlam = -div u + (eta - 1) ||eps||^2 / 2 = b."""
        if self.b is None:
            assert self.q is not None
            return Push(q=self.q)
        rate = check_number("b(x, lam)", self.b(local.x, local.lam), local.x)
        return Push(shift=2.0 * (local.divergence() + rate))


class StochasticDensityGuidance(DensityGuidance):
    """Density guidance with noise that leaves log p alone: the noise is orthogonal to the score ([DG] eq. 25).

    dx = w dlam + phi P dW with P = I - s s^T / ||s||^2 and phi = phi_rel sigma, where w repairs what Ito's formula
    adds, -(phi^2/2) (Lap - s.H s / ||s||^2) s / ||s||^2. Early noise (low lam) varies structure, late noise texture.

    Args:
        q, b, interval, track: as in `DensityGuidance`.
        noise: phi_rel = noise(lam) >= 0 for the step that begins at lam, a number or (B,); 1 is the noise of the
            reverse diffusion, 0 the deterministic step, which then costs no divergence.
        projection_term: True repairs exactly, at one more Jacobian-vector product; False leaves out s.H s / ||s||^2
            as [DG] does, which biases log p.

    Raises:
        TypeError, ValueError: as in `DensityGuidance`; noise not callable, projection_term no bool.
    """

    stochastic = True

    def __init__(
        self,
        q: Number | None = None,
        noise: Callable[[float], Number] | None = None,
        projection_term: bool = True,
        *,
        b: Rate | None = None,
        interval: tuple[float, float] | None = None,
        track: bool = True,
    ) -> None:
        super().__init__(q, b=b, interval=interval, track=track)
        if not callable(noise):
            raise TypeError(f"noise must be a function of lam that returns phi_rel, got {describe(noise)}")
        if not isinstance(projection_term, bool):
            raise TypeError(f"projection_term must be True or False, got {describe(projection_term)}")
        self.noise = noise
        self.projection_term = projection_term

    def push(self, local: LocalFlow, lam_step: float) -> Push:
        """As without noise, less what the noise adds to d log p/dlam, (phi^2/2) (Lap - s.H s / ||s||^2)."""
        plain = super().push(local, lam_step)
        relative_noise = check_number("noise(lam)", self.noise(lam_step), local.x, 0.0)
        if not isinstance(relative_noise, Tensor) and relative_noise == 0.0:
            return plain
        spread = local.laplacian()
        if self.projection_term:
            spread = spread - local.curvature_along_score()
        repair = (relative_noise * local.sigma) ** 2 * spread
        return Push(q=plain.q, shift=plain.shift, repair=-repair, relative_noise=relative_noise)


class HighDensity(Guidance):
    """High-density sampling: twice the score term in every step that begins at lam >= start ([HD] algorithm 1).

    Raises:
        TypeError, ValueError: start is no number, or NaN.
    """

    steers_by_divergence = False

    def __init__(self, start: float) -> None:
        self.start = _check_real("start", start)

    def active(self, lam: float) -> bool:
        """From start on."""
        return lam >= self.start

    def ends(self) -> tuple[float, ...]:
        """The start."""
        return (self.start,)

    def push(self, local: LocalFlow, lam_step: float) -> Push:
        """eta = 2."""
        return Push(gain=1.0)


class ReverseDiffusion(Guidance):
    """The original reverse diffusion, dx = (f x + sigma^2 s) dlam + sigma dW with f = d ln alpha/dlam.

    Its log p needs no divergence: d log p = (-f D + (sigma^2/2) ||s||^2) dlam + sigma s.dW ([HD] theorem 1), as the
    Laplacian that Ito's formula adds is the one that the divergence of the flow takes away. solver="euler" takes
    Euler's steps in lam, solver="ddim" those of DDPM, whose log p is the less biased (docs/log-density.md).

    Args:
        interval: (lam_lo, lam_hi); a step is the diffusion's if it begins at lam_lo <= lam < lam_hi, else the flow's,
            whose log p then takes divergences.

    Raises:
        TypeError, ValueError: an interval that is no (low, high).
    """

    stochastic = True
    divergence_free = True
    steers_by_divergence = False

    def __init__(self, interval: tuple[float, float] | None = None) -> None:
        self.interval = _check_interval(interval)

    def active(self, lam: float) -> bool:
        """Inside the interval."""
        return self.interval[0] <= lam < self.interval[1]

    def ends(self) -> tuple[float, ...]:
        """Of the interval."""
        return self.interval

    def push(self, local: LocalFlow, lam_step: float) -> Push:
        """eta = 2, and the whole noise."""
        return Push(gain=1.0, relative_noise=1.0, projected=False)


def _check_target(q: Any, b: Any) -> tuple[Number | None, Rate | None]:
    if (q is None) == (b is None):
        raise ValueError(f"give either q or b, and not both; got q={q!r:.40}, b={b!r:.40}")
    if b is not None:
        if not callable(b):
            raise TypeError(f"b must be a function of (x, lam) that returns (B,), got {describe(b)}")
        return None, b
    if isinstance(q, Tensor):
        if not q.is_floating_point() or q.dim() > 1:
            raise ValueError(f"q must be a number or a floating tensor of shape (B,), got {describe(q)}")
        return q, None
    number = _check_real("q", q)
    if not 0.0 < number < 1.0:
        raise ValueError(f"q must be in (0, 1), got {number}")
    return number, None


def _check_interval(interval: Any) -> tuple[float, float]:
    if interval is None:
        return -math.inf, math.inf
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise TypeError(f"interval must be a pair (lam_lo, lam_hi), got {describe(interval)}")
    low, high = _check_real("interval[0]", interval[0]), _check_real("interval[1]", interval[1])
    if not low < high:
        raise ValueError(f"interval must be (lam_lo, lam_hi) with lam_lo < lam_hi, got ({low}, {high})")
    return low, high


def _check_real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got nan")
    return float(value)
