"""The row rules in torch, any float dtype: what every kernel of the family must compute.

One contract for the four implementations (torch, C++, Triton, CUDA), `rows(rule, kind, operands, parameters,
noise_key) -> (out, report)`:

    rule         operands (v0, v1, uncond, v2)             writes
    drift        x or None, drift u, None, score s         [x + dt *] (u + (div + b) / ||s||^2 s)
    prediction   sample x, prediction p, uncond, None      the prediction whose eps is eta * eps
    step         sample x, prediction p, uncond, noise z   alpha' x0 + sigma' eps at eta * eps, plus noise P z
    radius       latents x, None, None, None               x * radius / ||x||

with eta - 1 = gain + (shift + sqrt(2 D) ndtri(q)) / ||eps||^2 (Karczewski et al. 2025, eq. 23), the prediction
p = uncond + cfg_scale (cond - uncond), and P = I - eps eps^T / ||eps||^2. Sums over a row and elementwise work
run in float64 if any operand is float64, else in float32; the few numbers per row always in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity.reference.philox import normals

Parameter = float | Tensor
NoiseKey = tuple[int, Tensor, int]  # seed, sample ids (B,), step
Operands = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def compute_dtype(operands: tuple[Tensor | None, ...]) -> torch.dtype:
    """float64 if any operand is float64, else float32."""
    for operand in operands:
        if operand is not None and operand.dtype is torch.float64:
            return torch.float64
    return torch.float32


def result_like(rule: str, operands: Operands) -> Tensor:
    """The operand whose shape, dtype and device the result has: the prediction, or the first vector there is."""
    like = operands[1] if rule == "prediction" or operands[0] is None else operands[0]
    assert like is not None
    return like


def flatten(operands: tuple[Tensor | None, ...]) -> Any:
    """Each operand (B, *) as rows (B, D); a state of shape (B,) has rows of one element."""
    return tuple(
        None if operand is None else operand.reshape(operand.shape[0], operand.shape[1:].numel())
        for operand in operands
    )


def rows(
    rule: str, kind: str, operands: Operands, parameters: tuple[Parameter, ...], noise_key: NoiseKey | None = None
) -> tuple[Tensor, Tensor]:
    """The contract above. Operands (B, D); parameters floats or (B,); report (B, 4) as `rules.REPORT_COLUMNS`.

    Differentiable in both modes: no operand is written, no control flow depends on data.
    """
    state = next(operand for operand in operands if operand is not None)
    out_like = result_like(rule, operands)
    dtype = compute_dtype(operands)
    numbers = [per_row(parameter, state) for parameter in parameters]
    v0, v1, uncond, v2 = (None if operand is None else operand.to(dtype) for operand in operands)
    if rule == "drift":
        out, report = _drift(v0, v1, v2, *numbers)  # type: ignore[arg-type]
    elif rule == "radius":
        out, report = _radius(v0, *numbers)  # type: ignore[arg-type]
    else:
        if noise_key is not None:
            seed, sample_ids, step = noise_key
            v2 = normals(seed, sample_ids, step, state.shape[1]).to(dtype)
        out, report = _guided(rule, kind, v0, v1, uncond, v2, numbers)  # type: ignore[arg-type]
    broken = ~out.detach().isfinite().all(dim=1)
    flags = report[:, 3].to(torch.int64) | broken.to(torch.int64) * rules.FLAG_NON_FINITE
    report = torch.cat([report[:, :3], flags.to(report.dtype)[:, None]], dim=1)
    return out.to(out_like.dtype), report.to(dtype)


def per_row(parameter: Parameter, state: Tensor) -> Tensor:
    """A (B,) float64 tensor of a float, a 0-d, a (1,) or a (B,) tensor."""
    if isinstance(parameter, Tensor):
        return parameter.to(torch.float64).reshape(-1).expand(state.shape[0])
    return torch.full((state.shape[0],), parameter, dtype=torch.float64, device=state.device)


def combined_prediction(cond: Tensor, uncond: Tensor | None, cfg_scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022)."""
    return cond if uncond is None else uncond + scaled(cfg_scale, cond - uncond)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows, summed in their dtype: (B, D), (B, D) -> (B,) float64."""
    return (left * right).sum(dim=1).double()


def scaled(number: Tensor | float, vector: Tensor) -> Tensor:
    """A number per row times a row vector, the number rounded to the vector's dtype first as kernels do."""
    if isinstance(number, Tensor):
        return number.to(vector.dtype)[:, None] * vector
    return number * vector


def _report(eta_minus_one: Tensor, sq_norm: Tensor, dlogp: Tensor, flags: Tensor) -> Tensor:
    return torch.stack([eta_minus_one, sq_norm, dlogp, flags.to(sq_norm.dtype)], dim=1)


def _norm_flags(sq_norm: Tensor) -> Tensor:
    """Why a row has no direction to be guided along: its squared norm is 0, or not finite."""
    zero = (sq_norm == 0).to(torch.int64) * rules.FLAG_ZERO_SCORE
    return zero | (~sq_norm.isfinite()).to(torch.int64) * rules.FLAG_NON_FINITE


def _divide(numerator: Tensor, denominator: Tensor, allowed: Tensor) -> Tensor:
    """numerator / denominator where allowed, else 0; the division itself never sees a bad row (NaN gradients)."""
    safe = torch.where(allowed, denominator, torch.ones_like(denominator))
    return torch.where(allowed, numerator, torch.zeros_like(numerator)) / safe


def _drift(x: Tensor | None, drift: Tensor, score: Tensor, div: Tensor, b: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    sq_norm = dot(score, score)
    change = div + b
    flags = _norm_flags(sq_norm) | (~change.isfinite()).to(torch.int64) * rules.FLAG_BAD_PARAMETER
    gain = _divide(change, sq_norm, flags == 0)
    guided = scaled(dt, drift) + scaled(dt * gain, score)
    out = guided if x is None else x + guided
    return out, _report(gain, sq_norm, gain * sq_norm * dt, flags)


def _radius(latents: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    sq_norm = dot(latents, latents)
    bad = ~(radius.isfinite() & (radius >= 0))
    flags = _norm_flags(sq_norm) | bad.to(torch.int64) * rules.FLAG_BAD_PARAMETER
    allowed = flags == 0
    safe = torch.where(allowed, sq_norm, torch.ones_like(sq_norm))
    factor = torch.where(allowed, radius, torch.ones_like(radius)) / safe.sqrt()
    zero = torch.zeros_like(sq_norm)
    return scaled(factor, latents), _report(factor - 1.0, sq_norm, zero, flags)


def _guided(
    rule: str, kind: str, x: Tensor, cond: Tensor, uncond: Tensor | None, noise: Tensor | None, numbers: list[Tensor]
) -> tuple[Tensor, Tensor]:
    alpha, sigma, alpha_next, sigma_next, q, shift, gain, cfg_scale, noise_scale, sigma_data = numbers
    prediction = combined_prediction(cond, uncond, cfg_scale)
    edm_norm = torch.sqrt(sigma * sigma + (alpha * sigma_data) ** 2)
    along_x, along_p, scale = rules.direction(kind, alpha, sigma, sigma_data, edm_norm)
    direction = _combine((along_x, x), (along_p, prediction))
    norm = dot(direction, direction)
    sq_norm = norm * scale * scale

    ends = [alpha, sigma, alpha_next, sigma_next] if rule == "step" else [alpha, sigma]
    total = shift + math.sqrt(2.0 * x.shape[1]) * torch.special.ndtri(q)
    flags = _norm_flags(norm) | _parameter_flags(ends, [q], [total, gain, cfg_scale, noise_scale])
    flags = flags | (noise_scale < 0).to(torch.int64) * rules.FLAG_BAD_PARAMETER
    guided = flags == 0
    eta_minus_one = torch.where(guided, gain, torch.zeros_like(gain)) + _divide(total, sq_norm, guided)

    if rule == "prediction":
        pushed = _divide(eta_minus_one, along_p * torch.ones_like(alpha), guided)
        dlogp = torch.zeros_like(sq_norm)
        return prediction + scaled(pushed, direction), _report(eta_minus_one, sq_norm, dlogp, flags)

    out_x, out_p, out_direction = rules.step_base(kind, alpha, sigma, alpha_next, sigma_next, sigma_data, edm_norm)
    # d x' / d eta along eps, zero on rows left unguided (where alpha or sigma may be 0)
    reach = _divide((sigma_next * alpha - alpha_next * sigma) * scale, alpha, guided)
    weight = out_direction + reach * eta_minus_one
    if noise is None:
        out = _combine((out_x, x), (out_p, prediction), (weight, direction))
    else:
        has_direction = (norm > 0) & norm.isfinite()
        weight = weight - noise_scale * _divide(dot(direction, noise), norm, has_direction)
        out = _combine((out_x, x), (out_p, prediction), (weight, direction), (noise_scale, noise))
    ones = torch.ones_like(alpha)
    log_ratio = torch.log(torch.where(guided, alpha_next * sigma, ones))
    log_ratio = log_ratio - torch.log(torch.where(guided, sigma_next * alpha, ones))
    dlogp = eta_minus_one * torch.where(guided, sq_norm, ones) * log_ratio
    return out, _report(eta_minus_one, sq_norm, dlogp, flags)


def _combine(*terms: tuple[Tensor | float, Tensor]) -> Tensor:
    """Linear combination; a coefficient that is the number 0 or 1 costs nothing and rounds nothing."""
    total: Tensor | None = None
    for coefficient, vector in terms:
        if isinstance(coefficient, float) and coefficient == 0.0:
            continue
        term = vector if isinstance(coefficient, float) and coefficient == 1.0 else scaled(coefficient, vector)
        total = term if total is None else total + term
    assert total is not None
    return total


def _parameter_flags(ends: list[Tensor], quantiles: list[Tensor], finite: list[Tensor]) -> Tensor:
    flags = torch.zeros_like(ends[0], dtype=torch.int64)
    for end in ends:
        flags = flags | (end == 0).to(torch.int64) * rules.FLAG_ENDPOINT
        flags = flags | (~((end >= 0) & end.isfinite())).to(torch.int64) * rules.FLAG_BAD_PARAMETER
    for quantile in quantiles:
        flags = flags | (~((quantile > 0) & (quantile < 1))).to(torch.int64) * rules.FLAG_BAD_PARAMETER
    for number in finite:
        flags = flags | (~number.isfinite()).to(torch.int64) * rules.FLAG_BAD_PARAMETER
    return flags


def launch_torch(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    out: Tensor,
    report: Tensor | None,
) -> None:
    """The reference as a backend: computes and copies into `out` (B, *) and, if given, `report` (B, 4)."""
    result, numbers = rows(rule, kind, flatten(operands), parameters, noise_key)
    out.copy_(result.view_as(out))
    if report is not None:
        report.copy_(numbers)
