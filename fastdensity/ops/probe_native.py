"""Hands probes, and the products that they are multiplied with, to the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity._backend import DTYPE_NUMBERS, native
from fastdensity.reference.philox import MASK
from fastdensity.reference.probe import DISTRIBUTIONS, resolve

NUMBERS = {name: number for number, name in enumerate(DISTRIBUTIONS)}
_native = native()


def _call(
    seed: int, sample_ids: Tensor, step: int, first: int, shape: torch.Size, distribution: str, stream: int
) -> tuple[int, ...]:
    """The tuple that the extension takes; `sample_ids` are contiguous int64, `shape` is (K, B, n), none of them 0."""
    number = NUMBERS[resolve(distribution, shape[2])]
    return (number, seed, step & MASK, stream, first, *shape, sample_ids.data_ptr())


def make_probes_cpu(
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Write the probes into CPU memory `out`, contiguous and not empty, on torch's number of threads."""
    ids = sample_ids.to(torch.int64).contiguous()
    call = _call(seed, ids, step, first, out.shape, distribution, stream)
    _native.make_probes_cpu(call, out.data_ptr(), DTYPE_NUMBERS[dtype], torch.get_num_threads())


def probe_forms_cpu(
    products: Tensor, seed: int, sample_ids: Tensor, step: int, first: int, distribution: str, stream: int, out: Tensor
) -> None:
    """Write the forms of not empty products in CPU memory into `out` (K, B), contiguous, on torch's threads."""
    ids, products = sample_ids.to(torch.int64).contiguous(), products.contiguous()
    call = _call(seed, ids, step, first, products.shape, distribution, stream)
    number = DTYPE_NUMBERS[products.dtype]
    _native.probe_forms_cpu(call, products.data_ptr(), out.data_ptr(), number, torch.get_num_threads())


def _scratch(call: tuple[int, ...], dtype: int, device: torch.device) -> Tensor | None:
    """From torch's caching allocator: no synchronisation, and a captured graph owns it."""
    size = _native.probe_cuda_scratch(call, dtype)
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


def make_probes_cuda(
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Write the probes into `out` on its device, on the caller's current stream."""
    ids = sample_ids.to(torch.int64).contiguous()
    call, number = _call(seed, ids, step, first, out.shape, distribution, stream), DTYPE_NUMBERS[dtype]
    scratch = _scratch(call, number, out.device)
    with torch.cuda.device(out.device):
        place = 0 if scratch is None else scratch.data_ptr()
        _native.make_probes_cuda(call, out.data_ptr(), number, place, torch.cuda.current_stream().cuda_stream)


def probe_forms_cuda(
    products: Tensor, seed: int, sample_ids: Tensor, step: int, first: int, distribution: str, stream: int, out: Tensor
) -> None:
    """Write the forms into `out` on its device, on the caller's current stream."""
    ids, products = sample_ids.to(torch.int64).contiguous(), products.contiguous()
    call, number = _call(seed, ids, step, first, products.shape, distribution, stream), DTYPE_NUMBERS[products.dtype]
    scratch = _scratch(call, number, out.device)
    with torch.cuda.device(out.device):
        place = 0 if scratch is None else scratch.data_ptr()
        current = torch.cuda.current_stream().cuda_stream
        _native.probe_forms_cuda(call, products.data_ptr(), out.data_ptr(), number, place, current)
