"""The same work as a user of plain torch would write it: the rivals of every benchmark."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def guided_drift_eager(x: Tensor, u: Tensor, score: Tensor, div: Tensor, b: float, dt: float) -> Tensor:
    """Straight from the paper's formula."""
    return x + dt * (u + ((div + b) / (score * score).sum(dim=1))[:, None] * score)


def guided_drift_tuned(
    x: Tensor, u: Tensor, score: Tensor, div: Tensor, b: float, dt: float, out: Tensor | None = None
) -> Tensor:
    """As few passes as torch's own fused operations allow: vector_norm, addcmul, add with alpha."""
    gain = ((div + b) / torch.linalg.vector_norm(score, dim=1).square_()).mul_(dt)
    target = torch.addcmul(x, score, gain[:, None], out=out)
    return target.add_(u, alpha=dt)


def guided_drift_into(x: Tensor, u: Tensor, score: Tensor, div: Tensor, b: float, dt: float, out: Tensor) -> Tensor:
    """For torch.compile with a given output: inductor fuses the copy into its second kernel."""
    return out.copy_(guided_drift_eager(x, u, score, div, b, dt))


def guided_step_eager(
    x: Tensor, eps: Tensor, alpha: float, sigma: float, alpha_next: float, sigma_next: float, quantile_shift: float
) -> Tensor:
    """Density guidance in quantile form and the DDIM step; quantile_shift is sqrt(2 D) ndtri(q)."""
    eta = 1.0 + quantile_shift / (eps * eps).sum(dim=1, keepdim=True)
    guided = eta * eps
    return alpha_next * ((x - sigma * guided) / alpha) + sigma_next * guided


def guided_step_tuned(
    x: Tensor,
    eps: Tensor,
    alpha: float,
    sigma: float,
    alpha_next: float,
    sigma_next: float,
    quantile_shift: float,
    out: Tensor | None = None,
) -> Tensor:
    """As few passes as torch allows; the norm of a half precision prediction is taken in the state's dtype."""
    eta = torch.linalg.vector_norm(eps, dim=1, keepdim=True, dtype=x.dtype).square_().reciprocal_()
    eta.mul_(quantile_shift).add_(1.0).mul_(sigma_next - alpha_next * sigma / alpha)
    return torch.mul(x, alpha_next / alpha, out=out).addcmul_(eps, eta)


def guided_step_into(
    x: Tensor,
    eps: Tensor,
    alpha: float,
    sigma: float,
    alpha_next: float,
    sigma_next: float,
    quantile_shift: float,
    out: Tensor,
) -> Tensor:
    return out.copy_(guided_step_eager(x, eps, alpha, sigma, alpha_next, sigma_next, quantile_shift))


def quantile_shift(q: float, columns: int) -> float:
    return math.sqrt(2.0 * columns) * float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
