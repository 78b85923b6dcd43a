"""Layer, root-mean-square and group norms of dual tensors, with what usually follows them in one pass.

x is a dual `(1 + K, *S)`, value first; weight, bias, multiplier and addend are plain: they carry no tangent, and none
is read. Results are new contiguous tensors of x's shape and dtype. Statistics and arithmetic are float32, or float64
for a float64 x, whatever the dtypes of the plain tensors; the formulas are those of `fastdensity.reference.dual_norm`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.boundary import describe
from fastdensity.ops.dual_operator import define
from fastdensity.reference import dual_norm as reference

ACTIVATIONS = ("none", "silu")


def dual_layer_norm(
    x: Tensor,
    size: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    multiplier: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """(layer_norm(x) * weight + bias) * multiplier + addend and its K tangents.

    Args:
        x: dual (1 + K, *S).
        size: the product of the trailing dimensions of S that are normalised.
        weight: `size` elements, or None.
        bias: `size` elements, or None.
        eps: added to the variance.
        multiplier: adaLN's 1 + scale, M * size elements: row r of the R = numel(S) / size rows uses row
            r // (R // M) of it.
        addend: adaLN's shift, likewise.

    Raises:
        ValueError: size is no product of trailing dimensions; a plain tensor does not have that many elements or is
            on another device.
    """
    rows = _check_rows(x, size)
    _check_affine(x, size, weight=weight, bias=bias)
    _check_modulation(x, size, rows, multiplier=multiplier, addend=addend)
    return _layer_norm(x, size, weight, bias, eps, multiplier, addend)


def dual_rms_norm(
    x: Tensor,
    size: int,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    multiplier: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """rms_norm(x) * weight * multiplier + addend and its K tangents; arguments as in `dual_layer_norm`."""
    rows = _check_rows(x, size)
    _check_affine(x, size, weight=weight)
    _check_modulation(x, size, rows, multiplier=multiplier, addend=addend)
    return _rms_norm(x, size, weight, eps, multiplier, addend)


def dual_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """activation(group_norm(x) * weight + bias) and its K tangents.

    Args:
        x: dual (1 + K, B, C, *).
        groups: a divisor of C.
        weight: C elements, or None.
        bias: C elements, or None.
        eps: added to the variance.
        activation: "none" or "silu".

    Raises:
        ValueError: x has too few dimensions, groups does not divide C, a plain tensor does not have C elements or is
            on another device, an unknown activation.
    """
    if x.dim() < 3:
        raise ValueError(f"x must be a dual of shape (1 + K, B, C, *), got {describe(x)}")
    channels = x.shape[2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_affine(x, channels, weight=weight, bias=bias)
    return _group_norm(x, groups, weight, bias, eps, activation)


def _check_rows(x: Tensor, size: int) -> int:
    """The number of rows of `size` elements; these must be whole trailing dimensions."""
    product = 1
    for position in range(x.dim() - 1, 0, -1):
        product *= x.shape[position]
        if product == size:
            return math.prod(x.shape[1:position])
    raise ValueError(f"size must be a product of trailing dimensions of the dual x, {tuple(x.shape)}, got {size}")


def _check_affine(x: Tensor, size: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.numel() != size:
            raise ValueError(f"{name} must have {size} elements, got {describe(tensor)}")
        _check_device(name, tensor, x)


def _check_modulation(x: Tensor, size: int, rows: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        count = tensor.numel() // size if size else 0
        if tensor.numel() != count * size or (size and rows and (count == 0 or rows % count)):
            wanted = f"M rows of {size} elements, M a divisor of the {rows} rows of x"
            raise ValueError(f"{name} must have {wanted}, got {describe(tensor)}")
        _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if not (tensor.is_cpu and x.is_cpu) and tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {describe(tensor)}")


def _empty_result(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_layer_norm = define(
    "dual_layer_norm",
    "Tensor x, SymInt size, Tensor? weight, Tensor? bias, float eps, Tensor? multiplier, Tensor? addend",
    reference.dual_layer_norm,
    _empty_result,
    room="dual_norm",
)
_rms_norm = define(
    "dual_rms_norm",
    "Tensor x, SymInt size, Tensor? weight, float eps, Tensor? multiplier, Tensor? addend",
    reference.dual_rms_norm,
    _empty_result,
    room="dual_norm",
)
_group_norm = define(
    "dual_group_norm",
    "Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, str activation",
    reference.dual_group_norm,
    _empty_result,
    room="dual_norm",
)
