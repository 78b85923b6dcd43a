"""Hands the rows of a step to the compiled kernels.

The extension takes a tensor's address, element type and stride; it would not see a tangent, a negative view or a
wrong shape. Everything was checked in `fastdensity.ops.rows` and made plain in `rows_operator` before it comes here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity._backend import DTYPE_NUMBERS, native
from fastdensity.reference.rows import NoiseKey, Operands, Parameter

RULE_NUMBERS = {name: number for number, name in enumerate(rules.RULES)}
TYPE_NUMBERS = {name: number for number, name in enumerate(rules.PREDICTION_TYPES)}
NO_NOISE: tuple[int, Tensor | None, int] = (0, None, 0)
_native = native()
_native.set_dtypes(tuple(DTYPE_NUMBERS))


def _contiguous(operands: Operands) -> bool:
    """Then the extension need not ask each operand for its strides, which costs as much as a small row."""
    v0, v1, uncond, v2 = operands
    return (
        (v0 is None or v0.is_contiguous())
        and (v1 is None or v1.is_contiguous())
        and (uncond is None or uncond.is_contiguous())
        and (v2 is None or v2.is_contiguous())
    )


def launch_cpu(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    out: Tensor,
    report: Tensor | None,
) -> None:
    """Run on CPU memory, on torch's number of threads; the contract is that of `fastdensity.reference.rows`."""
    rows = out.shape[0]
    seed, ids, step = NO_NOISE if noise_key is None else noise_key
    _native.rows_cpu(
        RULE_NUMBERS[rule],
        TYPE_NUMBERS[kind],
        rows,
        out.numel() // rows,
        _contiguous(operands),
        *operands,
        out,
        parameters,
        report,
        seed,
        ids,
        step,
        torch.get_num_threads(),
    )


def launch_cuda(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    out: Tensor,
    report: Tensor | None,
) -> None:
    """Run on the caller's current CUDA stream, on the device that holds `out`; long rows borrow scratch memory."""
    rows = out.shape[0]
    key = NO_NOISE if noise_key is None else noise_key
    shape = (rows, out.numel() // rows, _contiguous(operands))
    call = (RULE_NUMBERS[rule], TYPE_NUMBERS[kind], *shape, *operands, out, parameters, report, *key)
    size = _native.rows_cuda_scratch(*call)
    # from torch's caching allocator: no synchronisation, and a captured graph owns its scratch
    scratch = torch.empty(size, dtype=torch.uint8, device=out.device) if size else None
    with torch.cuda.device(out.device):
        _native.rows_cuda(*call, 0 if scratch is None else scratch.data_ptr(), torch.cuda.current_stream().cuda_stream)
