"""Normalisations of dual tensors in torch, written out: the value and, in closed form, its tangents.

x is `(1 + K, *S)`: [0] the value, [1 + k] the k-th tangent. With rows of `size` elements, mean() over a row:

    layer, group   n = r (x - mean(x)),  r = 1 / sqrt(var(x) + eps),     tn = r (tx - mean(tx) - n mean(n tx))
    rms            n = r x,              r = 1 / sqrt(mean(x^2) + eps),  tn = r (tx - n mean(n tx))
    then           y = (n * weight + bias) * multiplier + addend,        ty = tn * weight * multiplier
    and with SiLU  z = y s(y),                                           tz = ty s(y) (1 + y s(-y))

The derivative of a norm: Ba, Kiros and Hinton 2016 (arXiv 1607.06450); Wu and He 2018 (arXiv 1803.08494).
16-bit inputs are computed in float32 and rounded once. Everything here is differentiable in both modes, any number of
times; torch's own layer_norm is not (torch 2.13: nested forward mode forgets that its statistics depend on x).
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def row_count(x: Tensor, size: int) -> int:
    """How many rows of `size` elements the value of a dual has."""
    return x.shape[1:].numel() // size if size else 0


def dual_layer_norm(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    addend: Tensor | None,
) -> Tensor:
    """Layer norm over rows of `size` elements, modulated; the contract of `fastdensity.ops.dual_norm`."""
    value, tangents = _normalized(_rows(x, size), eps, centered=True)
    return _modulated(x, value, tangents, weight, bias, multiplier, addend)


def dual_rms_norm(
    x: Tensor, size: int, weight: Tensor | None, eps: float, multiplier: Tensor | None, addend: Tensor | None
) -> Tensor:
    """Root-mean-square norm over rows of `size` elements, modulated; the contract of `fastdensity.ops.dual_norm`."""
    value, tangents = _normalized(_rows(x, size), eps, centered=False)
    return _modulated(x, value, tangents, weight, None, multiplier, addend)


def dual_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> Tensor:
    """Group norm of (1 + K, B, C, *), then `activation`; the contract of `fastdensity.ops.dual_norm`."""
    planes, samples, channels = x.shape[:3]
    size = channels // groups * x.shape[3:].numel()
    value, tangents = _normalized(_rows(x, size), eps, centered=True)
    value = value.reshape(samples, channels, -1 if x.numel() else 0)
    tangents = tangents.reshape(planes - 1, *value.shape)
    if weight is not None:
        scale = weight.to(value.dtype)[:, None]
        value, tangents = value * scale, tangents * scale
    if bias is not None:
        value = value + bias.to(value.dtype)[:, None]
    if activation == "silu":
        gate = torch.sigmoid(value)
        tangents = tangents * (gate * (1 + value * torch.sigmoid(-value)))
        value = value * gate
    return _dual(x, value, tangents)


def _rows(x: Tensor, size: int) -> Tensor:
    return x.to(compute_dtype(x)).reshape(x.shape[0], row_count(x, size), size)


def _normalized(rows: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """(n, tn) of rows (1 + K, R, size)."""
    x, tangents = rows[0], rows[1:]
    if centered:
        x = x - x.mean(-1, keepdim=True)
        tangents = tangents - tangents.mean(-1, keepdim=True)
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    value = x * inverse
    along = (value * tangents).mean(-1, keepdim=True)
    return value, (tangents - value * along) * inverse


def _modulated(
    x: Tensor,
    value: Tensor,
    tangents: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
    addend: Tensor | None,
) -> Tensor:
    if weight is not None:
        scale = weight.to(value.dtype).reshape(-1)
        value, tangents = value * scale, tangents * scale
    if bias is not None:
        value = value + bias.to(value.dtype).reshape(-1)
    if multiplier is not None:
        scale = _repeated(multiplier, value)
        value, tangents = value * scale, tangents * scale
    if addend is not None:
        value = value + _repeated(addend, value)
    return _dual(x, value, tangents)


def _repeated(modulation: Tensor, value: Tensor) -> Tensor:
    """M rows, each for R / M consecutive rows of the value (R, size)."""
    rows, size = value.shape
    each = modulation.to(value.dtype).reshape(-1 if size else 0, 1, size)
    every = rows // each.shape[0] if each.shape[0] else 0
    return each.expand(-1, every, -1).reshape(rows, size)


def _dual(x: Tensor, value: Tensor, tangents: Tensor) -> Tensor:
    return torch.cat([value[None], tangents]).reshape(x.shape).to(x.dtype)


def dual_layer_norm_torch(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
) -> None:
    """`dual_layer_norm` written to `out`."""
    out.copy_(dual_layer_norm(x, size, weight, bias, eps, multiplier, addend))


def dual_rms_norm_torch(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
) -> None:
    """`dual_rms_norm` written to `out`."""
    out.copy_(dual_rms_norm(x, size, weight, eps, multiplier, addend))


def dual_group_norm_torch(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str, out: Tensor
) -> None:
    """`dual_group_norm` written to `out`."""
    out.copy_(dual_group_norm(x, groups, weight, bias, eps, activation))
