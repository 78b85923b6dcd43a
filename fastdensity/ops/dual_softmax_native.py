"""Hands a dual softmax to the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity._backend import DTYPE_NUMBERS, native

_native = native()


def launch_cpu(x: Tensor, out: Tensor) -> None:
    """Run on CPU memory, on torch's number of threads; `out` (1 + K, *S) is contiguous and not empty."""
    x = x.contiguous()
    planes, columns = x.shape[0], x.shape[-1]
    rows = x.numel() // (planes * columns)
    threads = torch.get_num_threads()
    _native.dual_softmax_cpu(x.data_ptr(), out.data_ptr(), DTYPE_NUMBERS[x.dtype], planes - 1, rows, columns, threads)
