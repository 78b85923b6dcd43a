"""Hands the closed loop's rows to the compiled kernel; checked and made dense in `fastdensity.ops.track`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity._backend import DTYPE_NUMBERS, native
from fastdensity.reference.rows import Parameter
from fastdensity.reference.track import SCHEMES, Operands

_native = native()
_native.set_dtypes(tuple(DTYPE_NUMBERS))


def launch_cpu(
    kind: str, scheme: str, operands: Operands, parameters: tuple[Parameter, ...], memory: Tensor,
    eps: Tensor, report: Tensor, memory_out: Tensor,
) -> None:  # fmt: skip
    """Run on torch's number of threads; the contract is that of `fastdensity.reference.track`."""
    rows = eps.shape[0]
    call = (
        SCHEMES.index(scheme),
        rules.PREDICTION_TYPES.index(kind),
        rows,
        eps.numel() // rows,
        eps.dtype is torch.float64,
    )
    _native.track_cpu(call, operands, parameters, memory, eps, report, memory_out, torch.get_num_threads())
