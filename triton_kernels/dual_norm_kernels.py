"""The norms of dual tensors: rows of a dense (planes, rows, SIZE) dual, the value first, then its tangents.

    whole_rows      ROWS rows per program, each in registers: everything is read once and written once
    split_rows      one longer row per program, block after block: sums first, then the results

Both loop over `count` tangents beginning at tangent `program_id(1) * count`; the value is written by the first of these
programs. Lanes hold float32, or float64 for float64. Every sum is taken of numbers from which their mean, or one near
it, was subtracted, so that a large mean costs no digits. The affine numbers of an element come from four optional
tensors: of a row norm, weight and bias by column, multiplier and addend by row // every and column; of a group norm,
weight and bias by channel, a channel having SPATIAL elements of a row. SPATIAL 0 is a row norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUMBERS = (
    *("multiplier_stride", "addend_stride", "multiplier_every", "addend_every"),
    *("rows", "tangents", "count"),
)


def _kernel(function):
    """`triton.jit` that specialises on no number: one kernel for every batch and number of tangents.

    Tensors begin on multiples of 16 bytes. eps is a constant: a network has one or two of them, and a runtime number
    would be rounded to float32.
    """
    return triton.jit(function, do_not_specialize=NUMBERS)


@triton.jit
def _load(pointer, plane, row, rows, column, mask, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(pointer + (plane * rows + row) * SIZE + column, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _store(pointer, plane, row, rows, column, mask, value, SIZE: tl.constexpr):
    tl.store(pointer + (plane * rows + row) * SIZE + column, value, mask=mask)


@triton.jit
def _modulation(pointer, stride, every, row, column, mask, VECTOR: tl.constexpr, DTYPE: tl.constexpr):
    """Strides count groups of VECTOR elements, so that the compiler knows what they are divisible by."""
    return tl.load(pointer + row // every * stride * VECTOR + column, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _affine(
    weight, bias, multiplier, addend, multiplier_stride, addend_stride, multiplier_every, addend_every,
    row, column, mask, SIZE: tl.constexpr, SPATIAL: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(scale, shift) with y = n * scale + shift."""
    scale = tl.where(mask, 1.0, 0.0).to(DTYPE)
    shift = tl.zeros_like(scale)
    where = column
    if SPATIAL:
        where = (row % GROUPS) * (SIZE // SPATIAL) + column // SPATIAL
    if weight is not None:
        scale = tl.load(weight + where, mask=mask, other=0.0).to(DTYPE)
    if bias is not None:
        shift = tl.load(bias + where, mask=mask, other=0.0).to(DTYPE)
    if multiplier is not None:
        factor = _modulation(multiplier, multiplier_stride, multiplier_every, row, column, mask, VECTOR, DTYPE)
        scale *= factor
        shift *= factor
    if addend is not None:
        shift += _modulation(addend, addend_stride, addend_every, row, column, mask, VECTOR, DTYPE)
    return scale, shift


@triton.jit
def _activated(value, gain, SILU: tl.constexpr):
    """(activation of the value, gain times its slope)."""
    if SILU:
        gate = 1.0 / (1.0 + tl.exp(-value))
        rest = 1.0 / (1.0 + tl.exp(value))  # 1 - gate without a difference
        gain = gain * (gate * (1.0 + value * rest))
        value = value * gate
    return value, gain


@_kernel
def whole_rows(
    out, x, weight, bias, multiplier, addend, multiplier_stride, addend_stride, multiplier_every, addend_every,
    rows, tangents, count,
    EPS: tl.constexpr, SIZE: tl.constexpr, SPATIAL: tl.constexpr, GROUPS: tl.constexpr, CENTERED: tl.constexpr,
    SILU: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK is SIZE rounded up to a power of 2."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < SIZE)
    d = _load(x, 0, row, rows, column, mask, SIZE, DTYPE)
    if CENTERED:
        # twice: the first mean is rounded to its own size, the second to that of what is left
        d = tl.where(mask, d - tl.sum(d, 1)[:, None] / SIZE, 0.0)
        d = tl.where(mask, d - tl.sum(d, 1)[:, None] / SIZE, 0.0)
    inverse = tl.rsqrt(tl.sum(d * d, 1)[:, None] / SIZE + EPS)
    n = d * inverse
    scale, shift = _affine(
        weight, bias, multiplier, addend, multiplier_stride, addend_stride, multiplier_every, addend_every,
        row, column, mask, SIZE, SPATIAL, GROUPS, VECTOR, DTYPE,
    )  # fmt: skip
    value, gain = _activated(n * scale + shift, scale, SILU)
    first = tl.program_id(1).to(tl.int64) * count + 1
    if first == 1:
        _store(out, 0, row, rows, column, mask, value, SIZE)
    gain = gain * inverse
    for plane in range(first, tl.minimum(first + count, tangents + 1)):
        t = _load(x, plane, row, rows, column, mask, SIZE, DTYPE)
        if CENTERED:
            t = tl.where(mask, t - tl.sum(t, 1)[:, None] / SIZE, 0.0)
            t = tl.where(mask, t - tl.sum(t, 1)[:, None] / SIZE, 0.0)
        along = tl.sum(n * t, 1)[:, None] / SIZE
        _store(out, plane, row, rows, column, mask, (t - n * along) * gain, SIZE)


@triton.jit
def _split_mean(x, plane, row, rows, SIZE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The mean of the first block: near enough to the row's to be taken off before anything is summed."""
    column = tl.arange(0, BLOCK)
    return tl.sum(_load(x, plane, row, rows, column, column < SIZE, SIZE, DTYPE)) / min(SIZE, BLOCK)


@triton.jit
def _split_normal(
    x, row, rows, EPS: tl.constexpr, SIZE: tl.constexpr, CENTERED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(mean, correction, r) with n = ((x - mean) - correction) * r."""
    column = tl.arange(0, BLOCK)
    mean = tl.sum(tl.zeros([BLOCK], DTYPE))
    if CENTERED:
        sums = tl.zeros([BLOCK], DTYPE)
        for begin in range(0, SIZE, BLOCK):
            sums += _load(x, 0, row, rows, begin + column, begin + column < SIZE, SIZE, DTYPE)
        mean = tl.sum(sums) / SIZE
    sums = tl.zeros([BLOCK], DTYPE)
    squares = tl.zeros([BLOCK], DTYPE)
    for begin in range(0, SIZE, BLOCK):
        mask = begin + column < SIZE
        d = _load(x, 0, row, rows, begin + column, mask, SIZE, DTYPE)
        d = tl.where(mask, d - mean, 0.0)
        sums += d
        squares += d * d
    correction = tl.sum(tl.zeros([BLOCK], DTYPE))
    if CENTERED:
        correction = tl.sum(sums) / SIZE
    variance = tl.maximum(tl.sum(squares) / SIZE - correction * correction, 0.0)
    return mean, correction, tl.rsqrt(variance + EPS)


@_kernel
def split_rows(
    out, x, weight, bias, multiplier, addend, multiplier_stride, addend_stride, multiplier_every, addend_every,
    rows, tangents, count,
    EPS: tl.constexpr, SIZE: tl.constexpr, SPATIAL: tl.constexpr, GROUPS: tl.constexpr, CENTERED: tl.constexpr,
    SILU: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row is read from memory once or twice and from the cache after that."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mean, correction, inverse = _split_normal(x, row, rows, EPS, SIZE, CENTERED, DTYPE, BLOCK)
    first = tl.program_id(1).to(tl.int64) * count + 1
    if first == 1:
        for begin in range(0, SIZE, BLOCK):
            mask = begin + column < SIZE
            n = ((_load(x, 0, row, rows, begin + column, mask, SIZE, DTYPE) - mean) - correction) * inverse
            scale, shift = _affine(
                weight, bias, multiplier, addend, multiplier_stride, addend_stride, multiplier_every, addend_every,
                row, begin + column, mask, SIZE, SPATIAL, GROUPS, VECTOR, DTYPE,
            )  # fmt: skip
            value, _ = _activated(n * scale + shift, scale, SILU)
            _store(out, 0, row, rows, begin + column, mask, value, SIZE)
    for plane in range(first, tl.minimum(first + count, tangents + 1)):
        pivot = tl.sum(tl.zeros([BLOCK], DTYPE))
        if CENTERED:
            pivot = _split_mean(x, plane, row, rows, SIZE, DTYPE, BLOCK)
        sums = tl.zeros([BLOCK], DTYPE)
        products = tl.zeros([BLOCK], DTYPE)
        for begin in range(0, SIZE, BLOCK):
            mask = begin + column < SIZE
            n = ((_load(x, 0, row, rows, begin + column, mask, SIZE, DTYPE) - mean) - correction) * inverse
            d = _load(x, plane, row, rows, begin + column, mask, SIZE, DTYPE)
            d = tl.where(mask, d - pivot, 0.0)
            sums += d
            products += n * d
        along = tl.sum(products) / SIZE
        off = tl.sum(tl.zeros([BLOCK], DTYPE))
        if CENTERED:
            off = tl.sum(sums) / SIZE
        for begin in range(0, SIZE, BLOCK):
            mask = begin + column < SIZE
            n = ((_load(x, 0, row, rows, begin + column, mask, SIZE, DTYPE) - mean) - correction) * inverse
            scale, shift = _affine(
                weight, bias, multiplier, addend, multiplier_stride, addend_stride, multiplier_every, addend_every,
                row, begin + column, mask, SIZE, SPATIAL, GROUPS, VECTOR, DTYPE,
            )  # fmt: skip
            _, gain = _activated(n * scale + shift, scale, SILU)
            t = _load(x, plane, row, rows, begin + column, mask, SIZE, DTYPE)
            result = (((t - pivot) - off) - n * along) * (gain * inverse)
            _store(out, plane, row, rows, begin + column, mask, result, SIZE)
