"""Softmax of a dual with Triton: one program per row, p = softmax(x), tp_k = p (tx_k - sum(p tx_k)).

A row that fits is held in registers, and every element is read once. A longer one is walked in tiles: once for the
maximum and the sum, once to write p, twice for each tangent; its exponentials are computed again each time.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE_ROW = 16_384  # elements
TILE = 4_096
ELEMENTS_PER_WARP = 1_024
MOST_ROWS = 2**31 - 1


@triton.jit
def _load(pointer, first, columns, other, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    return tl.load(pointer + at, mask=at < columns, other=other).to(DTYPE)


@triton.jit
def _store(pointer, value, first, columns, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=at < columns)


@triton.jit
def whole_rows(x, out, plane, columns, planes, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """A row per program; SIZE is its length rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64) * columns
    value = _load(x + row, 0, columns, float("-inf"), DTYPE, SIZE)
    p = tl.exp(value - tl.max(value, 0))
    p = p / tl.sum(p, 0)
    _store(out + row, p, 0, columns, SIZE)
    for k in range(1, planes):
        at = row + k * plane
        tangent = _load(x + at, 0, columns, 0.0, DTYPE, SIZE)
        inside = tl.arange(0, SIZE) < columns  # a row of NaN has NaN beyond its end, too
        mean = tl.sum(tl.where(inside, p * tangent, 0.0), 0)
        _store(out + at, p * (tangent - mean), 0, columns, SIZE)


@triton.jit
def _tile(x, first, columns, largest, total, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """p of one tile, once the row's maximum and sum are known."""
    return tl.exp(_load(x, first, columns, float("-inf"), DTYPE, SIZE) - largest) / total


@triton.jit
def long_rows(x, out, plane, columns, planes, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """A row per program, in tiles of SIZE."""
    row = tl.program_id(0).to(tl.int64) * columns
    largest = tl.full([SIZE], float("-inf"), DTYPE)
    for first in range(0, columns, SIZE):
        largest = tl.maximum(largest, _load(x + row, first, columns, float("-inf"), DTYPE, SIZE))
    top = tl.max(largest, 0)
    sums = tl.zeros([SIZE], DTYPE)
    for first in range(0, columns, SIZE):
        sums += tl.exp(_load(x + row, first, columns, float("-inf"), DTYPE, SIZE) - top)
    total = tl.sum(sums, 0)
    for first in range(0, columns, SIZE):
        _store(out + row, _tile(x + row, first, columns, top, total, DTYPE, SIZE), first, columns, SIZE)
    for k in range(1, planes):
        at = row + k * plane
        products = tl.zeros([SIZE], DTYPE)
        for first in range(0, columns, SIZE):
            p = _tile(x + row, first, columns, top, total, DTYPE, SIZE)
            products += p * _load(x + at, first, columns, 0.0, DTYPE, SIZE)
        mean = tl.sum(products, 0)
        for first in range(0, columns, SIZE):
            p = _tile(x + row, first, columns, top, total, DTYPE, SIZE)
            tangent = _load(x + at, first, columns, 0.0, DTYPE, SIZE)
            _store(out + at, p * (tangent - mean), first, columns, SIZE)


def launch_triton(x: Tensor, out: Tensor, whole_row: int = WHOLE_ROW, tile: int = TILE) -> None:
    """Run on the caller's current stream; `out` (1 + K, *S) is contiguous and not empty."""
    x = x.contiguous()
    planes, columns = x.shape[0], x.shape[-1]
    rows = x.numel() // (planes * columns)
    if rows > MOST_ROWS:
        raise ValueError(f"x of shape {tuple(x.shape)} has {rows} rows, more than {MOST_ROWS}")
    dtype = tl.float64 if x.dtype == torch.float64 else tl.float32
    is_whole = columns <= (whole_row if dtype is tl.float32 else whole_row // 2)
    kernel, size = (whole_rows, triton.next_power_of_2(columns)) if is_whole else (long_rows, tile)
    per_warp = ELEMENTS_PER_WARP if is_whole else ELEMENTS_PER_WARP // 2  # unrolled loops hold several tiles
    warps = min(max(size // per_warp, 1), 16)
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        kernel[rows,](x, out, rows * columns, columns, planes, DTYPE=dtype, SIZE=size, num_warps=warps)
