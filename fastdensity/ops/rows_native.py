"""Hands the rows of a step to the compiled kernels: addresses, element types and strides as plain integers.

Arrays are not passed as objects: a converted argument would silently drop a tangent or a negative view, and
costs ten times as much. Everything was checked in `fastdensity.ops.rows` before it comes here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity._backend import native
from fastdensity.reference.rows import NoiseKey, Operands, Parameter

RULE_NUMBERS = {name: number for number, name in enumerate(rules.RULES)}
TYPE_NUMBERS = {name: number for number, name in enumerate(rules.PREDICTION_TYPES)}
DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NO_NOISE = (0, 0, 0)
_native = native()


def _row_numbers(parameter: Parameter) -> Any:
    """A float as it is, or (address, element type, stride in elements) of a tensor."""
    if isinstance(parameter, Tensor):
        stride = parameter.stride(0) if parameter.dim() == 1 and parameter.shape[0] > 1 else 0
        return (parameter.data_ptr(), DTYPE_NUMBERS[parameter.dtype], stride)
    return parameter


def _arguments(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    out: Tensor,
    report: Tensor | None,
) -> tuple[Any, ...]:
    rows = out.shape[0]
    vectors = [
        None if vector is None else (vector.data_ptr(), DTYPE_NUMBERS[vector.dtype], vector.stride(0))
        for vector in operands
    ]
    seed, ids, step = NO_NOISE if noise_key is None else (noise_key[0], noise_key[1].data_ptr(), noise_key[2])
    return (
        RULE_NUMBERS[rule],
        TYPE_NUMBERS[kind],
        rows,
        out.numel() // rows,
        *vectors,
        (out.data_ptr(), DTYPE_NUMBERS[out.dtype], out.stride(0)),
        tuple(_row_numbers(parameter) for parameter in parameters),
        0 if report is None else report.data_ptr(),
        seed,
        ids,
        step,
    )


def launch_cpu(*call: Any) -> None:
    """Run on CPU memory, on torch's number of threads; `call` is the contract of `fastdensity.reference.rows`."""
    _native.rows_cpu(*_arguments(*call), torch.get_num_threads())


def launch_cuda(*call: Any) -> None:
    """Run on the caller's current CUDA stream, on the device that holds `out`."""
    out = call[5]
    with torch.cuda.device(out.device):
        _native.rows_cuda(*_arguments(*call), torch.cuda.current_stream().cuda_stream)
