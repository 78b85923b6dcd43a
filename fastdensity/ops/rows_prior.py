"""Prior guidance: the radius rule of the rows family."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.boundary import check_number, check_state
from fastdensity.ops.rows_operator import run
from fastdensity.reference.rows import Parameter


def scale_prior(
    latents: Tensor,
    quantile: float | Tensor | None = None,
    sigma: float | Tensor = 1.0,
    *,
    radius: float | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Prior guidance: rescale each latent to a radius; a larger radius is a less likely latent, with more detail.

    Karczewski et al. 2025 (arXiv 2502.05807), section 3. With `radius` the row's norm becomes that; otherwise sigma
    times the `quantile` (default 0.5) of the chi distribution with D degrees of freedom, the law of ||latent|| under
    N(0, sigma^2 I).

    Args:
        latents: (B, *). quantile: in (0, 1), a number or (B,). sigma: standard deviation of the prior, >= 0.
        radius: >= 0, a number or (B,), in the units of the latents. out: written if given; may be `latents`.

    Returns:
        (B, *) in the latents' dtype. A zero row stays zero.

    Raises:
        ValueError: both or neither sensible: `radius` together with `quantile`, quantile outside (0, 1), sigma < 0.
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
    return run("radius", "epsilon", (latents, None, None, None), (wanted,), None, out, None, "latents")[0]


def chi_quantile(probability: Parameter, degrees: int) -> Parameter:
    """Quantile of the chi distribution, by Newton's method on the regularised incomplete gamma function.

    Starts at Wilson and Hilferty's (1931) cube-root normal approximation; float64 throughout.
    """
    is_tensor = isinstance(probability, Tensor)
    p = torch.as_tensor(probability, dtype=torch.float64)
    shape = torch.full_like(p, degrees / 2)
    spread = 2.0 / (9.0 * degrees)
    half = (degrees / 2) * (1.0 - spread + torch.special.ndtri(p) * math.sqrt(spread)).clamp(min=1e-2) ** 3
    for _ in range(40):
        log_density = (shape - 1.0) * half.log() - half - torch.lgamma(shape)
        change = (torch.special.gammainc(shape, half) - p) * torch.exp(-log_density)
        half = torch.clamp(half - change, half / 4, half * 4)
    result = (2.0 * half).sqrt()
    return result if is_tensor else float(result)
