"""The network evaluated at one state: its prediction and, where asked for, the second derivatives of log p there.

Both come from the prediction's Jacobian. With eps = c_x x + c_p p and score = -eps / sigma, the Laplacian of log p is
-(c_x D + c_p div p) / sigma: the part of the identity is added exactly, only the network's own is ever estimated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdensity.conversions import direction_coefficients, to_epsilon
from fastdensity.divergence import directional_derivatives, estimate_divergence
from fastdensity.guidance import Number, Push
from fastdensity.reference.probe import STREAM_MEASURE, STREAM_STEER
from fastdensity.sums import row_dot
from fastdensity.traces.key import ProbeKey
from fastdensity.traces.options import DivergenceMethod

UNGUIDED = Push()


@dataclass(frozen=True, slots=True)
class Problem:
    """What stays the same over a run.

    Attributes:
        flow: has .schedule .prediction(x, lam), and if it knows its second derivatives .laplacian(x, lam) and
            .hessian_form(x, lam, v), as `GaussianMixture` does.
        kind, sigma_data: of its predictions, the kind by its canonical name.
        dimension: numbers in one sample. method: how divergences are found. seed: of noise and probes.
        sample_ids: int64 (B,), the key beside the seed. tracks: is log p wanted?
    """

    flow: Any
    kind: str
    sigma_data: float
    dimension: int
    method: DivergenceMethod
    seed: int
    sample_ids: Tensor
    tracks: bool


class Evaluation:
    """The network at x (B, *) and log-SNR lam, a number or float64 (B,); `push` is what guidance wants there."""

    def __init__(self, problem: Problem, x: Tensor, lam: Number, index: int, measures: bool) -> None:
        """Evaluates the network; `measures`: together with the divergence that is to be reported.

        `index` is the key of probes: the same one gives the same probes.
        """
        schedule = problem.flow.schedule
        self.problem, self.x, self.lam, self.index = problem, x, lam, index
        self.alpha, self.sigma = _plain(schedule.alpha(lam)), _plain(schedule.sigma(lam))
        self.dlog_alpha = _plain(schedule.dlog_alpha(lam))
        self.push = UNGUIDED
        self._measured: tuple[Tensor, Tensor] | None = None
        self._steering: Tensor | None = None
        self._curvature: Tensor | None = None
        if measures:
            self.prediction, laplacian, std_err = self._estimate_laplacian(STREAM_MEASURE)
            self._measured = (laplacian, std_err)
        else:
            self.prediction = problem.flow.prediction(x, lam)

    def epsilon(self) -> Tensor:
        """The unguided predicted noise, (B, *)."""
        problem = self.problem
        return to_epsilon(self.prediction, self.x, self.alpha, self.sigma, problem.kind, problem.sigma_data)

    def laplacian(self) -> Tensor:
        """The Laplacian of log p that may steer, (B,): exact, or from probes that never measure."""
        if self._steering is None:
            if self._measured is not None and self.problem.method.method == "exact":
                self._steering = self._measured[0]
            else:
                self._steering = self._estimate_laplacian(STREAM_STEER)[1]
        return self._steering

    def divergence(self) -> Tensor:
        """The divergence of the drift that may steer, (B,) per unit of lam."""
        return self.dlog_alpha * self.problem.dimension + self.sigma**2 / 2 * self.laplacian()

    def curvature_along_score(self) -> Tensor:
        """s.H s / ||s||^2, exact or by one Jacobian-vector product, (B,); 0 where there is no score."""
        if self._curvature is None:
            eps = self.epsilon()
            sq_norm = row_dot(eps, eps)
            self._curvature = torch.where(sq_norm > 0, self._hessian_form(eps, sq_norm) / sq_norm, 0.0)
        return self._curvature

    def log_density_rate(self, eta_minus_one: Tensor, sq_norm: Tensor) -> tuple[Tensor, Tensor]:
        """d log p/dlam under this point's push and its standard error, (B,) each, in float64.

        -div u + (w - u).s + (phi^2 / 2) (Lap - s.H s / ||s||^2) by the continuity equation and Ito's formula, where
        (w - u).s = (eta - 1) ||eps||^2 / 2, and of the noise's own part, s.P dW, nothing is left. Not measured, that is
        of the reverse diffusion: -f D + ||eps||^2 / 2, and its noise's part comes on top.
        """
        if self._measured is None:
            rate = sq_norm.double() / 2 - self.dlog_alpha * self.problem.dimension
            return rate, torch.zeros_like(rate)
        flow, std_err = self.flow_rate()
        noise: Number = self.push.relative_noise
        push = eta_minus_one.double() * sq_norm.double() / 2
        rate = push - self.dlog_alpha * self.problem.dimension + flow
        if isinstance(noise, Tensor) or noise != 0:
            rate = rate + noise**2 * (self.sigma**2 / 2) * (self._measured[0] - self.curvature_along_score())
        return rate, ((1.0 - noise**2) * std_err).abs()

    def flow_rate(self) -> tuple[Tensor, Tensor]:
        """-div u but for the path's own stretching, and its standard error, (B,) each per unit of lam, in float64.

        With the stretching, d ln alpha/dlam in each dimension, it would be what the flow does to log p.
        """
        assert self._measured is not None
        laplacian, std_err = self._measured
        half_variance = self.sigma**2 / 2
        return -half_variance * laplacian, (half_variance * std_err).abs()

    def _predict(self, x: Tensor) -> Tensor:
        return self.problem.flow.prediction(x, self.lam)

    def _log_snr(self) -> Tensor:
        """lam for each row: as a tensor, since a graph traced for one number would not serve the next step."""
        return torch.as_tensor(self.lam, dtype=torch.float64, device=self.x.device).expand(self.x.shape[0])

    def _coefficients(self) -> tuple[Number, Number]:
        return direction_coefficients(self.problem.kind, self.alpha, self.sigma, self.problem.sigma_data)

    def _hessian_form(self, eps: Tensor, sq_norm: Tensor) -> Tensor:
        flow = self.problem.flow
        if hasattr(flow, "hessian_form"):
            return flow.hessian_form(self.x, self.lam, eps)
        where = (self._log_snr(),)
        forward = self.problem.method.forward
        product = directional_derivatives(flow.prediction, self.x, where, eps[None].to(self.x.dtype), forward)[1][0]
        along_x, along_p = self._coefficients()
        return -(along_x * sq_norm + along_p * row_dot(eps, product)) / self.sigma

    def _estimate_laplacian(self, stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """The prediction, the Laplacian of log p, and its standard error."""
        problem, how = self.problem, self.problem.method
        if how.method == "exact" and hasattr(problem.flow, "laplacian"):
            exact = problem.flow.laplacian(self.x, self.lam)
            return self._predict(self.x), exact, torch.zeros_like(exact)
        seed = problem.seed if how.seed is None else how.seed
        key = ProbeKey(seed, problem.sample_ids, self.index, stream)
        found = estimate_divergence(problem.flow.prediction, self.x, (self._log_snr(),), how, key)
        along_x, along_p = self._coefficients()
        laplacian = -(along_x * problem.dimension + along_p * found.div) / self.sigma
        return found.value, laplacian, (along_p / self.sigma * found.std_err).abs()


def _plain(number: Number) -> Number:
    return number if isinstance(number, Tensor) else float(number)
