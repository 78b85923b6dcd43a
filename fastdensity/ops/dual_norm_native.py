"""Hands the norms of dual tensors to the compiled kernels: addresses, sizes and strides as integers.

The plain tensors are converted to the type of the arithmetic first; they are small beside x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity._backend import DTYPE_NUMBERS, native
from fastdensity.reference.dual_norm import compute_dtype, row_count

_native = native()


def dual_layer_norm_cpu(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
) -> None:
    """The contract of `fastdensity.ops.dual_norm.dual_layer_norm`, on torch's number of threads."""
    _launch_rows(x, size, weight, bias, eps, multiplier, addend, True, out)


def dual_rms_norm_cpu(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
) -> None:
    """The contract of `fastdensity.ops.dual_norm.dual_rms_norm`, on torch's number of threads."""
    _launch_rows(x, size, weight, None, eps, multiplier, addend, False, out)


def dual_group_norm_cpu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str, out: Tensor
) -> None:
    """The contract of `fastdensity.ops.dual_norm.dual_group_norm`, on torch's number of threads."""
    x, dtype = x.contiguous(), compute_dtype(x)
    weight, bias = _dense(weight, dtype), _dense(bias, dtype)
    _native.dual_group_norm_cpu(
        x.data_ptr(),
        out.data_ptr(),
        DTYPE_NUMBERS[x.dtype],
        x.shape[0],
        x.shape[1],
        x.shape[2],
        groups,
        x.shape[3:].numel(),
        eps,
        _address(weight),
        _address(bias),
        activation == "silu",
        torch.get_num_threads(),
    )


def _launch_rows(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    addend: Tensor | None,
    centered: bool,
    out: Tensor,
) -> None:
    x, dtype, rows = x.contiguous(), compute_dtype(x), row_count(x, size)
    weight, bias = _dense(weight, dtype), _dense(bias, dtype)
    multiplier, addend = _dense_rows(multiplier, size, dtype), _dense_rows(addend, size, dtype)
    _native.dual_row_norm_cpu(
        x.data_ptr(),
        out.data_ptr(),
        DTYPE_NUMBERS[x.dtype],
        x.shape[0],
        rows,
        size,
        eps,
        centered,
        _address(weight),
        _address(bias),
        _modulation(multiplier, rows),
        _modulation(addend, rows),
        torch.get_num_threads(),
    )


def _dense(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _dense_rows(tensor: Tensor | None, size: int, dtype: torch.dtype) -> Tensor | None:
    """(M, size), each row dense; the rows of a chunk of a larger tensor stay where they are."""
    if tensor is None:
        return None
    tensor = tensor.to(dtype).reshape(-1, size)
    return tensor if tensor.stride(1) == 1 or size == 1 else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _modulation(tensor: Tensor | None, rows: int) -> tuple[int, int, int]:
    """(address, elements from one row to the next, rows of x that share one)."""
    return (0, 0, 1) if tensor is None else (tensor.data_ptr(), tensor.stride(0), rows // tensor.shape[0])
