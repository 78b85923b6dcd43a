"""Prior guidance: the radius rule of the rows family."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.boundary import check_number, check_state
from fastdensity.ops.rows_operator import run
from fastdensity.reference.rows import Parameter

NEWTON_STEPS = 20


def scale_prior(
    latents: Tensor,
    quantile: float | Tensor | None = None,
    sigma: float | Tensor = 1.0,
    *,
    radius: float | Tensor | None = None,
    out: Tensor | None = None,
    report: Tensor | None = None,
) -> Tensor:
    """Prior guidance: rescale each latent to a radius; a larger radius is a less likely latent, with more detail.

    Karczewski et al. 2025 (arXiv 2502.05807), section 3. With `radius` the row's norm becomes that; otherwise sigma
    times the `quantile` (default 0.5) of the chi distribution with D degrees of freedom, the law of ||latent|| under
    N(0, sigma^2 I).

    Args:
        latents: (B, *). quantile: in (0, 1), a number or (B,). sigma: standard deviation of the prior, >= 0.
        radius: >= 0, a number or (B,), in the units of the latents. out: written if given; may be `latents`.
        report: (B, 4) float32 (float64 for float64 rows), receives (factor - 1, ||latent||^2, 0, flags) per row.

    Returns:
        (B, *) in the latents' dtype. A zero or non-finite row, and one whose quantile, sigma or radius is out of
        range inside a tensor, is returned as it is and flagged in `report`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: `radius` together with `quantile`; a Python number out of range; a wrong shape or device.
    """
    check_state("latents", latents)
    if radius is not None:
        if quantile is not None:
            raise ValueError("give either quantile or radius to scale_prior, not both")
        wanted: Parameter = check_number("radius", radius, latents, 0.0)
    else:
        probability = check_number("quantile", 0.5 if quantile is None else quantile, latents, 0.0, 1.0, True)
        scale = check_number("sigma", sigma, latents, 0.0)
        columns = latents.numel() // max(latents.shape[0], 1)
        wanted = scale * chi_quantile(probability, columns) if columns else 0.0
    return run("radius", "epsilon", (latents, None, None, None), (wanted,), None, out, report, "latents")[0]


def chi_quantile(probability: Parameter, degrees: int) -> Parameter:
    """Quantile of the chi distribution with `degrees` of freedom, in float64; NaN outside (0, 1).

    Newton's method for the logarithm of whichever tail is the smaller, in the logarithm of chi^2 / 2, from Wilson and
    Hilferty's (1931) cube-root normal approximation or, far down, from the leading term of the lower tail.
    """
    p = torch.as_tensor(probability, dtype=torch.float64)
    half = torch.full_like(p, degrees / 2)
    lower = p <= 0.5
    target = torch.where(lower, p.log(), torch.log1p(-p))
    spread = 2.0 / (9.0 * degrees)
    root = 1.0 - spread + torch.special.ndtri(p) * math.sqrt(spread)
    position = torch.where(
        root > 0.3, (half * root.clamp(min=0.3) ** 3).log(), (target + torch.lgamma(half + 1.0)) / half
    )
    for _ in range(NEWTON_STEPS):
        value = position.exp()
        tail = torch.where(lower, torch.special.gammainc(half, value), torch.special.gammaincc(half, value))
        slope = torch.exp(half * position - value - torch.lgamma(half)) / tail
        change = (tail.log() - target) / torch.where(lower, slope, -slope)
        position = position - change.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)
    result = torch.where((p > 0.0) & (p < 1.0), (2.0 * position.exp()).sqrt(), math.nan)
    return result if isinstance(probability, Tensor) else float(result)
