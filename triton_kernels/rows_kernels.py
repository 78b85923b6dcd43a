"""The row kernels: sums over a row, a few numbers, a linear combination, in one launch or in two.

    whole_rows      one program per row that fits in registers: every operand is read once, the result written once
    partial_sums    longer rows, first launch: one program per chunk of a row, float64 sums into `sums`
    finish_rows     second launch: one program per tile; each adds the row's partial sums up in the same order

Vectors are those of the contract in `fastdensity.reference.rows`. Row strides and `vectors`, the row's length, count
groups of VECTOR elements, so that the compiler knows what they are divisible by and loads VECTOR elements at once.
Offsets within a tile have 32 bits, where a tile begins has 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.triton_kernels.philox import normals
from fastdensity.triton_kernels.rows_scalars import NON_FINITE, coefficients, direction, row_number

NUMBERS = tuple(f"number_{index}" for index in range(10))
# Nothing a kernel takes is specialised on its value: alignment is stated by VECTOR, and a batch of one row must
# not become another kernel than a batch of many, whose sums are added in another order.
RUNTIME = (
    *("out", "report", "sums", "v0", "v1", "uncond", "v2", "out_stride", "stride_0", "stride_1", "stride_uncond"),
    *("stride_2", "sample_ids", "seed", "step", "vectors", "chunks", *NUMBERS),
)


def _kernel(function):
    """`triton.jit` that specialises on no runtime value."""
    names = [name for name in function.__code__.co_varnames[: function.__code__.co_argcount] if name in RUNTIME]
    return triton.jit(function, do_not_specialize=names)


@triton.jit
def _address(pointer, row, stride, first, VECTOR: tl.constexpr):
    """Address of element `first` of a row, known to be aligned to VECTOR elements."""
    offset = row * stride * VECTOR + first
    return tl.multiple_of(pointer + offset, VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def _load(pointer, row, stride, first, mask, VECTOR: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr):
    address = _address(pointer, row, stride, first, VECTOR) + tl.arange(0, TILE)
    return tl.load(address, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _mask(vectors, first, VECTOR: tl.constexpr, TILE: tl.constexpr):
    left = tl.minimum(vectors - first // VECTOR, TILE // VECTOR).to(tl.int32)
    return tl.arange(0, TILE) < left * VECTOR


@triton.jit
def _scale(number, vector):
    """A number per row times a vector, rounded to the vector's dtype first as the reference does."""
    return number.to(vector.dtype) * vector


@triton.jit
def _tile(
    v0, v1, uncond, v2, stride_0, stride_1, stride_uncond, stride_2, sample_ids, seed, step, numbers, row, first, mask,
    NOISE: tl.constexpr, PER_ROW: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(v0, prediction, v2) of one tile in DTYPE; zeros stand in for what the rule does not read."""
    state = tl.zeros([TILE], DTYPE)
    prediction = tl.zeros([TILE], DTYPE)
    other = tl.zeros([TILE], DTYPE)
    if v1 is not None:
        prediction = _load(v1, row, stride_1, first, mask, VECTOR, DTYPE, TILE)
    if uncond is not None:
        base = _load(uncond, row, stride_uncond, first, mask, VECTOR, DTYPE, TILE)
        prediction = base + _scale(row_number(numbers[7], row, 7, PER_ROW), prediction - base)
    if v0 is not None:
        state = _load(v0, row, stride_0, first, mask, VECTOR, DTYPE, TILE)
    if NOISE == "drawn":
        other = normals(seed, tl.load(sample_ids + row), step, first, TILE, DTYPE)
    elif v2 is not None:
        other = _load(v2, row, stride_2, first, mask, VECTOR, DTYPE, TILE)
    return state, prediction, other


@triton.jit
def _direction(
    state, prediction, other, numbers, row,
    RULE: tl.constexpr, KIND: tl.constexpr, MIXED: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """The unscaled direction d along which a row is guided."""
    if RULE == "radius":
        return state
    elif RULE == "drift":
        return other
    else:
        along_x, along_p, _ = direction(numbers, row, KIND, PER_ROW)
        if MIXED:
            return _scale(along_x, state) + _scale(along_p, prediction)
        else:
            return _scale(along_p, prediction)


@triton.jit
def _combine(
    base_0, base_1, c_0, c_1, c_2, v0, state, prediction, other,
    RULE: tl.constexpr, MIXED: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """The linear combination of a tile's vectors; what guidance adds is summed up first, being small."""
    if RULE == "radius":
        return _scale(c_0, state)
    elif RULE == "drift":
        total = _scale(base_1, prediction) + _scale(c_2, other)
        if v0 is not None:
            total = state + total
        return total
    else:
        total = _scale(c_1, prediction)
        if MIXED:
            total = _scale(c_0, state) + total
        if RULE == "prediction":
            return prediction + total
        total = _scale(base_0, state) + total
        if MIXED:
            total = _scale(base_1, prediction) + total
        if NOISE != "none":
            total += _scale(c_2, other)
        return total


@triton.jit
def _store(pointer, row, stride, first, result, mask, VECTOR: tl.constexpr, TILE: tl.constexpr):
    if pointer.dtype.element_ty.primitive_bitwidth < 32:
        result = result.to(tl.float32)  # float64 goes to 16 bits by way of float32, as in torch
    tl.store(_address(pointer, row, stride, first, VECTOR) + tl.arange(0, TILE), result, mask=mask)


@triton.jit
def _non_finite(value):
    """1 if any element is NaN or infinite, else 0: zero times it is NaN exactly there."""
    return tl.where(tl.sum(value * 0.0) == 0.0, 0, NON_FINITE).to(tl.int32)


@triton.jit
def _store_numbers(report, row, eta_minus_one, sq_norm, dlogp):
    address = report + row * 4
    tl.store(address, eta_minus_one)
    tl.store(address + 1, sq_norm)
    tl.store(address + 2, dlogp)


@_kernel
def whole_rows(
    out, report, v0, v1, uncond, v2, out_stride, stride_0, stride_1, stride_uncond, stride_2,
    sample_ids, seed: tl.int64, step: tl.int64, vectors,
    number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7, number_8, number_9,
    RULE: tl.constexpr, KIND: tl.constexpr, MIXED: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr,
    DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row per program; TILE is the row's length rounded up to a power of 2."""
    numbers = (
        number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7, number_8, number_9,
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mask = _mask(vectors, 0, VECTOR, TILE)
    state, prediction, other = _tile(
        v0, v1, uncond, v2, stride_0, stride_1, stride_uncond, stride_2, sample_ids, seed, step, numbers, row, 0, mask,
        NOISE, PER_ROW, DTYPE, VECTOR, TILE,
    )  # fmt: skip
    towards = _direction(state, prediction, other, numbers, row, RULE, KIND, MIXED, PER_ROW)
    norm = tl.sum(towards * towards).to(tl.float64)
    overlap = norm
    if NOISE != "none":
        overlap = tl.sum(towards * other).to(tl.float64)
    base_0, base_1, c_0, c_1, c_2, eta_minus_one, sq_norm, dlogp, flags = coefficients(
        numbers, row, norm, overlap, vectors * VECTOR, RULE, KIND, PER_ROW
    )
    result = _combine(base_0, base_1, c_0, c_1, c_2, v0, state, prediction, other, RULE, MIXED, NOISE)
    _store(out, row, out_stride, 0, result, mask, VECTOR, TILE)
    if report is not None:
        _store_numbers(report, row, eta_minus_one, sq_norm, dlogp)
        tl.store(report + row * 4 + 3, (flags | _non_finite(result)).to(DTYPE))


@_kernel
def partial_sums(
    out, report, sums, v0, v1, uncond, v2, out_stride, stride_0, stride_1, stride_uncond, stride_2,
    sample_ids, seed: tl.int64, step: tl.int64, vectors, chunks,
    number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7, number_8, number_9,
    RULE: tl.constexpr, KIND: tl.constexpr, MIXED: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr,
    DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, CHUNK_TILES: tl.constexpr,
):  # fmt: skip
    """||d||^2 and d.z of one chunk of CHUNK_TILES tiles, into sums (rows, chunks, 2) in float64."""
    numbers = (
        number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7, number_8, number_9,
    )  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    norm = tl.full((), 0.0, tl.float64)
    overlap = tl.full((), 0.0, tl.float64)
    for tile in range(CHUNK_TILES):
        first = (chunk * CHUNK_TILES + tile).to(tl.int64) * TILE
        mask = _mask(vectors, first, VECTOR, TILE)
        state, prediction, other = _tile(
            v0, v1, uncond, v2, stride_0, stride_1, stride_uncond, stride_2, sample_ids, seed, step, numbers, row,
            first, mask, NOISE, PER_ROW, DTYPE, VECTOR, TILE,
        )  # fmt: skip
        towards = _direction(state, prediction, other, numbers, row, RULE, KIND, MIXED, PER_ROW)
        norm += tl.sum(towards * towards).to(tl.float64)
        if NOISE != "none":
            overlap += tl.sum(towards * other).to(tl.float64)
    address = sums + (row * chunks + chunk) * 2
    tl.store(address, norm)
    if NOISE != "none":
        tl.store(address + 1, overlap)
    if report is not None:
        # where the tiles of the second launch gather their flags
        tl.store(report + row * 4 + 3, 0.0, mask=chunk == 0)


@_kernel
def finish_rows(
    out, report, sums, v0, v1, uncond, v2, out_stride, stride_0, stride_1, stride_uncond, stride_2,
    sample_ids, seed: tl.int64, step: tl.int64, vectors, chunks,
    number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7, number_8, number_9,
    RULE: tl.constexpr, KIND: tl.constexpr, MIXED: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr,
    DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, CHUNK_TILES: tl.constexpr,
):  # fmt: skip
    """One tile of the result; CHUNKS is `chunks` rounded up to a power of 2."""
    numbers = (
        number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7, number_8, number_9,
    )  # fmt: skip
    tiles = tl.cdiv(vectors, TILE // VECTOR).to(tl.int32)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    chunk = tl.arange(0, CHUNKS)
    address = sums + (row * chunks + chunk) * 2
    norm = tl.sum(tl.load(address, mask=chunk < chunks, other=0.0))
    overlap = norm
    if NOISE != "none":
        overlap = tl.sum(tl.load(address + 1, mask=chunk < chunks, other=0.0))
    base_0, base_1, c_0, c_1, c_2, eta_minus_one, sq_norm, dlogp, flags = coefficients(
        numbers, row, norm, overlap, vectors * VECTOR, RULE, KIND, PER_ROW
    )
    first = tile.to(tl.int64) * TILE
    mask = _mask(vectors, first, VECTOR, TILE)
    state, prediction, other = _tile(
        v0, v1, uncond, v2, stride_0, stride_1, stride_uncond, stride_2, sample_ids, seed, step, numbers, row,
        first, mask, NOISE, PER_ROW, DTYPE, VECTOR, TILE,
    )  # fmt: skip
    result = _combine(base_0, base_1, c_0, c_1, c_2, v0, state, prediction, other, RULE, MIXED, NOISE)
    _store(out, row, out_stride, first, result, mask, VECTOR, TILE)
    if report is not None:
        if tile == 0:
            _store_numbers(report, row, eta_minus_one, sq_norm, dlogp)
        # The largest of what the tiles say: the same whatever their order, since only the lowest bit differs.
        broken = _non_finite(result)
        tl.atomic_max(report + row * 4 + 3, (flags | broken).to(DTYPE), mask=(tile == 0) | (broken != 0))
