"""Hands the closed loop's rows to the compiled kernel; checked and made dense in `fastdensity.ops.track`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity._backend import DTYPE_NUMBERS, native
from fastdensity.ops.rows_native import NO_NOISE, RULE_NUMBERS, TYPE_NUMBERS
from fastdensity.reference.rows import Parameter
from fastdensity.reference.track import SCHEMES, Operands, Step

SCHEME_NUMBERS = {name: number for number, name in enumerate(SCHEMES)}
_native = native()
_native.set_dtypes(tuple(DTYPE_NUMBERS))


def launch_cpu(
    kind: str, scheme: str, operands: Operands, parameters: tuple[Parameter, ...], memory: Tensor,
    eps: Tensor, report: Tensor, memory_out: Tensor, step: Step | None = None,
) -> None:  # fmt: skip
    """Run on torch's number of threads; the contract is that of `fastdensity.reference.track`."""
    rows = eps.shape[0]
    rule, noise, key, out, step_report = ("step", None, None, None, None) if step is None else step
    call = (
        SCHEME_NUMBERS[scheme],
        RULE_NUMBERS[rule],
        TYPE_NUMBERS[kind],
        rows,
        eps.numel() // rows,
        eps.dtype is torch.float64,
    )
    seed, ids, index = NO_NOISE if key is None else key
    _native.track_cpu(
        call, (*operands, noise), parameters, memory, (eps, report, memory_out), out, step_report, seed, ids, index,
        torch.get_num_threads(),
    )  # fmt: skip
