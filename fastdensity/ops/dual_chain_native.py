"""Hands chains of elementwise dual operations to the compiled kernel; strided and broadcast inputs are not copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdensity._backend import DTYPE_NUMBERS, native
from fastdensity.chain_program import parse

_native = native()


def launch_cpu(inputs: Sequence[Tensor], is_dual: Sequence[bool], program: str, out: Tensor) -> None:
    """Write the chain's result to `out`, contiguous (1 + K, *S), on torch's number of threads.

    `out` overlaps no input, unless it is the very memory of `inputs[0]`: every kernel reads an element before it
    writes the same one.
    """
    _native.dual_chain_cpu(
        parse(program, tuple(is_dual)).code,
        DTYPE_NUMBERS[out.dtype],
        tuple(
            (tensor.data_ptr(), dual, tuple(tensor.shape), tensor.stride())
            for tensor, dual in zip(inputs, is_dual, strict=True)
        ),
        out.data_ptr(),
        tuple(out.shape),
        torch.get_num_threads(),
    )
