"""The exact flow of a mixture of Gaussians: a network's stand-in whose score, divergence and log p are all known.

At log-SNR lam the mixture is again one, p(x) = sum_k w_k N(x; alpha m_k, alpha^2 v_k + sigma^2), so everything
follows in closed form. Computed in float64 whatever x's dtype, from elementwise operations and `pairwise_sum` alone:
no result of a row depends on the rest of the batch, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import check_like, check_state, describe
from fastdensity.conversions import check_prediction_type, compose
from fastdensity.flow import check_lam, check_schedule, check_sigma_data, drift_from_epsilon
from fastdensity.schedules import VP, Number, Schedule
from fastdensity.sums import pairwise_sum

CHUNK_ELEMENTS = 1 << 21  # of the largest array that is made, rows x components x D: 16 MiB
Rows = Callable[..., Tensor]  # (lam, rows (b, D) float64, ...) -> (b, D) or (b,); lam a number or (b,)


class GaussianMixture:
    """sum_k w_k N(m_k, diag(v_k)) at clean data, moved along a Gaussian path; stands wherever a `Flow` can.

    Args:
        weights: (K,), positive; divided by their sum. means: (K, *), any sample shape.
        variances: like means, or (K,) for one per component; positive. Tensors, arrays or nested lists.
        schedule: the path. prediction_type, sigma_data: what `prediction` returns, as in `Flow`.

    In every method x is (B, *) and lam a number or (B,). Vectors come in x's dtype, per-sample numbers (B,) in
    float64, log p in nats. Memory is bounded by working through the rows (then the components) in chunks.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape, non-finite, or not positive.
    """

    def __init__(
        self,
        weights: Any,
        means: Any,
        variances: Any,
        schedule: Schedule | None = None,
        prediction_type: str = "epsilon",
        sigma_data: float | None = None,
    ) -> None:
        means = _finite("means", means)
        if means.dim() < 2 or means.numel() == 0:
            raise ValueError(f"means must be (K, *), K components of samples of shape *, got {describe(means)}")
        components = means.shape[0]
        weights, variances = _finite("weights", weights, means), _finite("variances", variances, means)
        if weights.shape != (components,):
            raise ValueError(f"weights must have shape ({components},), one per row of means, got {describe(weights)}")
        if variances.shape == (components,):
            variances = variances.reshape(-1, *[1] * (means.dim() - 1)).expand_as(means)
        if variances.shape != means.shape:
            wanted = f"{tuple(means.shape)} like means, or ({components},)"
            raise ValueError(f"variances must have shape {wanted}, got {describe(variances)}")
        for name, value in (("weights", weights), ("variances", variances)):
            if not bool((value > 0).all()):
                raise ValueError(f"{name} must be positive, got a smallest value of {float(value.min())}")
        self.weights = weights / weights.sum()
        self.means, self.variances = means, variances.contiguous()
        self.schedule = check_schedule(VP() if schedule is None else schedule)
        self.prediction_type = check_prediction_type(prediction_type)
        self.sigma_data = check_sigma_data(sigma_data, self.schedule)
        self.sample_shape = means.shape[1:]
        self.dimension = means[0].numel()

    def log_prob(self, x: Tensor, lam: Number) -> Tensor:
        """log p_lam(x), (B,) in nats."""
        return self._by_rows(self._log_density, x, lam)

    def score(self, x: Tensor, lam: Number) -> Tensor:
        """grad_x log p_lam(x), (B, *)."""
        return self._by_rows(self._score, x, lam)

    def eps(self, x: Tensor, lam: Number) -> Tensor:
        """-sigma times the score: the noise's mean given x, (B, *)."""
        return self._by_rows(self._eps, x, lam)

    def denoised(self, x: Tensor, lam: Number) -> Tensor:
        """The clean sample's mean given x (B, *); accurate at either end, unlike (x - sigma eps) / alpha."""
        return self._by_rows(self._denoised, x, lam)

    def drift(self, x: Tensor, lam: Number) -> Tensor:
        """dx/dlam of the flow (B, *), per unit of lam."""
        at = check_lam(lam, check_state("x", x))
        wide = x.to(torch.float64)
        return drift_from_epsilon(self.eps(wide, at), wide, at, self.schedule).to(x.dtype)

    def prediction(self, x: Tensor, lam: Number) -> Tensor:
        """What a perfect network of this prediction type returns, (B, *)."""
        return self._by_rows(self._eps if self.prediction_type == "epsilon" else self._predict, x, lam)

    def laplacian(self, x: Tensor, lam: Number) -> Tensor:
        """The Laplacian of log p_lam at x, the trace of its Hessian, (B,)."""
        return self._by_rows(self._laplacian, x, lam)

    def divergence(self, x: Tensor, lam: Number) -> Tensor:
        """The divergence of the drift, (B,) per unit of lam."""
        at = check_lam(lam, check_state("x", x))
        stretch, sigma = self.schedule.dlog_alpha(at), self.schedule.sigma(at)
        return self.dimension * stretch + sigma * sigma / 2 * self.laplacian(x, at)

    def hessian_form(self, x: Tensor, lam: Number, vector: Tensor) -> Tensor:
        """v.H v with H the Hessian of log p_lam at x and v = `vector` (B, *), (B,)."""
        check_like("vector", vector, check_state("x", x), "x")
        return self._by_rows(self._hessian_form, x, lam, vector)

    def sample(
        self, count: int, lam: float | None = None, *, seed: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """`count` exact samples (count, *) in float64, of clean data or of p_lam; from `seed`, or a CPU generator."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"count must be a non-negative int, got {describe(count)}")
        if generator is None:
            generator = torch.Generator().manual_seed(seed)
        weights, means, variances = self.weights.cpu(), self.means.cpu(), self.variances.cpu()
        chosen = torch.multinomial(weights, max(count, 1), replacement=True, generator=generator)[:count]
        noise = torch.randn((count, *self.sample_shape), generator=generator, dtype=torch.float64)
        alpha, variance = 1.0, variances
        if lam is not None:
            alpha = float(self.schedule.alpha(lam))
            variance = alpha**2 * variances + float(self.schedule.sigma(lam)) ** 2
        return (alpha * means[chosen] + variance[chosen].sqrt() * noise).to(self.means.device)

    def _by_rows(self, function: Rows, x: Tensor, lam: Number, *vectors: Tensor) -> Tensor:
        """function(lam, x, *vectors) on float64 rows (b, D), by chunks; vectors go back to x's shape and dtype."""
        check_state("x", x)
        if x.shape[1:] != self.sample_shape or x.device != self.means.device:
            wanted = f"(B, {', '.join(map(str, self.sample_shape))}) on {self.means.device}"
            raise ValueError(f"x must be {wanted} like the mixture, got {describe(x)}")
        at = check_lam(lam, x)
        size = max(1, CHUNK_ELEMENTS // (self._components_at_once() * self.dimension))
        flat = (v.reshape(x.shape[0], self.dimension).to(torch.float64) for v in (x, *vectors))
        rows = [torch.split(v, size) for v in flat]
        lams = torch.split(at.expand(x.shape[0]), size) if isinstance(at, Tensor) else [at] * len(rows[0])
        results = [function(*pieces) for pieces in zip(lams, *rows, strict=True)]
        result = torch.cat(results) if len(results) > 1 else results[0]
        return result.to(x.dtype).reshape(x.shape) if result.dim() == 2 else result

    def _components_at_once(self) -> int:
        """Set by K and D alone, so that the order of summation over components never depends on the batch."""
        return max(1, min(self.means.shape[0], CHUNK_ELEMENTS // (4 * self.dimension)))

    def _components(self, lam: Number) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which components, their means alpha m, their variances alpha^2 v + sigma^2), (1 or b, k, D), in chunks."""
        alpha, sigma = _per_component(self.schedule.alpha(lam)), _per_component(self.schedule.sigma(lam))
        size = self._components_at_once()
        for begin in range(0, self.means.shape[0], size):
            part = slice(begin, begin + size)
            means, variances = self.means[part].flatten(1)[None], self.variances[part].flatten(1)[None]
            yield part, alpha * means, alpha * alpha * variances + sigma * sigma

    def _log_joint(self, lam: Number, rows: Tensor) -> Tensor:
        """log w_k + log N(x; component k), (b, K)."""
        quadratic = []
        for _, means, variances in self._components(lam):
            deviation = rows[:, None] - means
            squares = pairwise_sum(deviation * deviation / variances, 2)
            quadratic.append(squares + pairwise_sum(torch.log(variances), 2))
        log_weights = torch.log(self.weights) - 0.5 * self.dimension * math.log(2.0 * math.pi)
        return log_weights - 0.5 * torch.cat(quadratic, dim=1)

    def _log_density(self, lam: Number, rows: Tensor) -> Tensor:
        joint = self._log_joint(lam, rows)
        highest = joint.detach().amax(dim=1)
        return highest + torch.log(pairwise_sum(torch.exp(joint - highest[:, None]), 1))

    def _posterior(self, lam: Number, rows: Tensor) -> Tensor:
        """p(k | x), (b, K)."""
        joint = self._log_joint(lam, rows)
        unnormalised = torch.exp(joint - joint.detach().amax(dim=1, keepdim=True))
        return unnormalised / pairwise_sum(unnormalised, 1)[:, None]

    def _mean(self, posterior: Tensor, lam: Number, function: Callable[[slice, Tensor, Tensor], Tensor]) -> Tensor:
        """sum_k p(k | x) function_k, where function gives (b, k, D) or (b, k) for a chunk of components."""
        total: Tensor | None = None
        for part, means, variances in self._components(lam):
            values = function(part, means, variances)
            weights = posterior[:, part]
            term = pairwise_sum((weights[..., None] if values.dim() == 3 else weights) * values, 1)
            total = term if total is None else total + term
        assert total is not None
        return total

    def _score(self, lam: Number, rows: Tensor, posterior: Tensor | None = None) -> Tensor:
        posterior = self._posterior(lam, rows) if posterior is None else posterior
        return self._mean(posterior, lam, lambda _, means, variances: (means - rows[:, None]) / variances)

    def _eps(self, lam: Number, rows: Tensor, posterior: Tensor | None = None) -> Tensor:
        sigma = self.schedule.sigma(lam)
        return (-sigma[:, None] if isinstance(sigma, Tensor) else -sigma) * self._score(lam, rows, posterior)

    def _denoised(self, lam: Number, rows: Tensor, posterior: Tensor | None = None) -> Tensor:
        alpha, sigma = _per_component(self.schedule.alpha(lam)), _per_component(self.schedule.sigma(lam))

        def posterior_mean(part: slice, _: Tensor, variances: Tensor) -> Tensor:
            clean, spread = self.means[part].flatten(1), self.variances[part].flatten(1)
            return (sigma * sigma * clean + alpha * spread * rows[:, None]) / variances

        return self._mean(self._posterior(lam, rows) if posterior is None else posterior, lam, posterior_mean)

    def _predict(self, lam: Number, rows: Tensor) -> Tensor:
        posterior = self._posterior(lam, rows)
        sample, eps = self._denoised(lam, rows, posterior), self._eps(lam, rows, posterior)
        alpha, sigma = self.schedule.alpha(lam), self.schedule.sigma(lam)
        return compose(sample, eps, alpha, sigma, self.prediction_type, self.sigma_data)

    def _hessian_form(self, lam: Number, rows: Tensor, vectors: Tensor) -> Tensor:
        posterior = self._posterior(lam, rows)
        score = self._score(lam, rows, posterior)

        def form(_: slice, means: Tensor, variances: Tensor) -> Tensor:
            deviation = (means - rows[:, None]) / variances - score[:, None]
            along = pairwise_sum(deviation * vectors[:, None], 2)
            return along * along - pairwise_sum(vectors[:, None] ** 2 / variances, 2)

        return self._mean(posterior, lam, form)

    def _laplacian(self, lam: Number, rows: Tensor) -> Tensor:
        posterior = self._posterior(lam, rows)
        score = self._score(lam, rows, posterior)

        def trace(_: slice, means: Tensor, variances: Tensor) -> Tensor:
            # the spread of the components' scores about their mean: no difference of two large squares
            deviation = (means - rows[:, None]) / variances - score[:, None]
            return pairwise_sum(deviation * deviation - 1.0 / variances, 2)

        return self._mean(posterior, lam, trace)

    def __repr__(self) -> str:
        shape = tuple(self.sample_shape)
        return f"GaussianMixture({self.means.shape[0]} components, sample shape {shape}, {self.schedule!r})"


def _per_component(number: Number) -> Number:
    """A number per row in a shape that multiplies (b, k, D)."""
    return number.reshape(-1, 1, 1) if isinstance(number, Tensor) else number


def _finite(name: str, values: Any, like: Tensor | None = None) -> Tensor:
    """A float64 copy that nobody else can change, on the device of `like`."""
    try:
        tensor = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor, an array or nested lists, got {describe(values)}") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {describe(tensor)}")
    tensor = tensor.to(torch.float64, copy=True)
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like means, got {describe(tensor)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite")
    return tensor
