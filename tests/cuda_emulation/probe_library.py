"""csrc/probe_cuda.cu on the CPU, called through ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from cuda_emulation import library as emulation
from cuda_emulation.library import DTYPES, GUARD
from torch import Tensor

from fastdensity.reference.philox import MASK
from fastdensity.reference.probe import DISTRIBUTIONS, resolve

ONE_TILE, ONE_TILE_CHUNKS = 1024, 73_728  # the longest row of one block, of chunks of one tile each, in float32


class ProbeCall(ctypes.Structure):
    """fastdensity::ProbeCall of csrc/ops.h, field by field."""

    _fields_ = [
        ("distribution", ctypes.c_int), ("seed", ctypes.c_uint64), ("step", ctypes.c_uint32),
        ("stream", ctypes.c_uint32), ("first", ctypes.c_int64), ("probes", ctypes.c_int64), ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64), ("sample_ids", ctypes.c_void_p), ("dtype", ctypes.c_int),
        ("products", ctypes.c_void_p), ("out", ctypes.c_void_p),
    ]  # fmt: skip


def build(folder: Path) -> ctypes.CDLL | None:
    return emulation.build(folder, "probe_cuda.cu", "probe_entry.cpp", ProbeCall)


def launch(
    library: ctypes.CDLL,
    out: Tensor,
    products: Tensor | None,
    key: tuple[int, Tensor, int],
    first: int,
    shape: tuple[int, ...],
    distribution: str,
    stream: int,
    order: int = 0,
) -> int:
    """Write probes of `shape` (K, B, n), or their forms with `products`, into `out`; the number of kernels started."""
    seed, ids, step = key
    dtype = (out if products is None else products).dtype
    call = ProbeCall(
        DISTRIBUTIONS.index(resolve(distribution, shape[2])), seed, step & MASK, stream, first, *shape,
        ids.data_ptr(), DTYPES[dtype], None if products is None else products.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    size = library.scratch_bytes(ctypes.byref(call))
    scratch = torch.full((size + GUARD,), 0xA5, dtype=torch.uint8)
    launches = ctypes.c_int64()
    place = ctypes.c_void_p(scratch.data_ptr())
    error = library.run(ctypes.byref(call), place, order, ctypes.byref(launches))
    assert error is None, error
    assert (scratch[size:] == 0xA5).all()
    return launches.value
