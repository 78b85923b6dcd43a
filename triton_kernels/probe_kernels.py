"""The probe kernels: a chunk of a probe made in registers, and written or multiplied with products.

    choose_rows     for Hadamard: the row of Sylvester's matrix of each pair (probe, sample)
    sum_probes      one program per chunk of a pair: float64 sums of z.products and of z.z
    finish_forms    one program per pair: the sums of its chunks, in one order
    write_probes    one program per chunk of a pair

The twin of `fastdensity.reference.probe`. Rows count groups of VECTOR elements, as in `rows_kernels`; nothing is
specialised on a value, so that a row's sum is added in the same order in every batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.reference.probe import HADAMARD_ROWS
from fastdensity.triton_kernels.philox import normals_of

ROWS_STREAM = tl.constexpr(HADAMARD_ROWS)
COMPILED = ("ORDER", "ROUNDS", "DISTRIBUTION", "DTYPE", "VECTOR", "TILE", "TILES", "CHUNKS", "PAIRS")


def _kernel(function):
    """`triton.jit` that specialises on no runtime value."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name not in COMPILED])


@_kernel
def choose_rows(rows, sample_ids, seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64, pairs: tl.int64,
                samples: tl.int64, ORDER: tl.constexpr, ROUNDS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """A permutation of 0 .. 2^ORDER - 1, by a Feistel network, at first + the pair's probe."""
    LOW: tl.constexpr = (ORDER + 1) // 2
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    probe = first + pair // samples
    sample_id = tl.load(sample_ids + pair % samples, mask=inside, other=0).to(tl.uint32)
    number = (stream + ROWS_STREAM + (probe >> ORDER)).to(tl.uint32)
    turn_step = tl.zeros([PAIRS], tl.uint32) + step.to(tl.uint32)
    low = (probe & ((1 << LOW) - 1)).to(tl.uint32)
    high = ((probe >> LOW) & ((1 << (ORDER - LOW)) - 1)).to(tl.uint32)
    for turn in tl.static_range(0, ROUNDS, 2):
        word, _, _, _ = tl.philox(seed, (turn << 24) | low, number, turn_step, sample_id)
        high = high ^ (word & ((1 << (ORDER - LOW)) - 1))
        word, _, _, _ = tl.philox(seed, ((turn + 1) << 24) | high, number, turn_step, sample_id)
        low = low ^ (word & ((1 << LOW) - 1))
    tl.store(rows + pair, (high.to(tl.int64) << LOW) | low.to(tl.int64), mask=inside)


@triton.jit
def _parity(bits):
    """The lowest bit is set where an odd number of bits is."""
    bits = bits ^ (bits >> 16)
    bits = bits ^ (bits >> 8)
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    return (bits ^ (bits >> 1)) & 1


@triton.jit
def _sign_words(seed, sample_id, step, number, row, first, DISTRIBUTION: tl.constexpr, TILE: tl.constexpr):
    """The signs of elements first .. first + TILE - 1, 32 to a word; `first` and TILE are multiples of 128."""
    block = (tl.arange(0, TILE // 128) + first // 128).to(tl.uint32)
    words = tl.philox(seed, block, number.to(tl.uint32), step.to(tl.uint32), sample_id.to(tl.uint32))
    word = tl.interleave(tl.interleave(words[0], words[2]), tl.interleave(words[1], words[3]))
    if DISTRIBUTION == "hadamard":
        # the lowest five bits of a row give the signs within a word, the others that of the whole word
        five = row.to(tl.uint32)
        pattern = (five & 1) * 0xAAAAAAAA ^ ((five >> 1) & 1) * 0xCCCCCCCC ^ ((five >> 2) & 1) * 0xF0F0F0F0
        pattern = pattern ^ ((five >> 3) & 1) * 0xFF00FF00 ^ ((five >> 4) & 1) * 0xFFFF0000
        index = (tl.arange(0, TILE // 32) + first // 32).to(tl.uint32)
        word = word ^ pattern ^ (0 - _parity((row >> 5).to(tl.uint32) & index))
    return word


@triton.jit
def _probe(seed, sample_id, step, number, row, first, DISTRIBUTION: tl.constexpr, DTYPE: tl.constexpr,
           TILE: tl.constexpr):  # fmt: skip
    """Elements first .. first + TILE - 1 in DTYPE as [TILE // 32, 32]; of the sphere, before they are scaled."""
    if DISTRIBUTION == "normal" or DISTRIBUTION == "sphere":
        return tl.reshape(normals_of(seed, sample_id, step, number, first, TILE, DTYPE), [TILE // 32, 32])
    word = _sign_words(seed, sample_id, step, number, row, first, DISTRIBUTION, TILE)
    bit = (word[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return 1.0 - 2.0 * bit.to(tl.int32).to(DTYPE)


@triton.jit
def _place(columns, first, TILE: tl.constexpr):
    """Where the elements of a tile lie from `first` on, and which of them exist."""
    element = tl.arange(0, TILE // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    return element, element < tl.minimum(columns - first, TILE).to(tl.int32)


@triton.jit
def _pair_number(pair, samples, first, stream, order, DISTRIBUTION: tl.constexpr):
    """A pair's number in Philox's counter: stream + probe, or what stands for the signs of its Hadamard set."""
    probe = first + pair // samples
    if DISTRIBUTION == "hadamard":
        return stream + 0xFFFFFF - (probe >> order)
    return stream + probe


@_kernel
def sum_probes(sums, products, rows, sample_ids, seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64,
               samples: tl.int64, vectors: tl.int64, chunks: tl.int64, order: tl.int64, DISTRIBUTION: tl.constexpr,
               DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """(z.products, z.z) of one chunk of a pair; the sum over a tile in DTYPE. Without products their sum is 0."""
    task = tl.program_id(0).to(tl.int64)
    pair, chunk = task // chunks, task % chunks
    number = _pair_number(pair, samples, first, stream, order, DISTRIBUTION)
    sample_id = tl.load(sample_ids + pair % samples)
    row = tl.load(rows + pair) if DISTRIBUTION == "hadamard" else number
    form = tl.zeros([], tl.float64)
    squares = tl.zeros([], tl.float64)
    for tile in range(TILES):
        begin = (chunk * TILES + tile) * TILE
        element, inside = _place(vectors * VECTOR, begin, TILE)
        z = _probe(seed, sample_id, step, number, row, begin, DISTRIBUTION, DTYPE, TILE)
        if products is not None:
            base = products + (pair * vectors * VECTOR + begin)
            base = tl.multiple_of(base, VECTOR * products.dtype.element_ty.primitive_bitwidth // 8)
            value = tl.load(base + element, mask=inside, other=0.0).to(DTYPE)
            form += tl.sum(tl.sum(z * value, 1), 0).to(tl.float64)
        if DISTRIBUTION == "sphere":
            squares += tl.sum(tl.sum(tl.where(inside, z * z, 0.0), 1), 0).to(tl.float64)
    tl.store(sums + 2 * task, form)
    tl.store(sums + 2 * task + 1, squares)


@triton.jit
def _total(sums, pair, chunks, which, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(sums + 2 * (pair * chunks + chunk) + which, mask=chunk < chunks, other=0.0), 0)


@triton.jit
def _sphere_scale(sums, pair, columns, chunks, CHUNKS: tl.constexpr):
    return tl.sqrt(columns.to(tl.float64)) / tl.sqrt(_total(sums, pair, chunks, 1, CHUNKS))


@_kernel
def finish_forms(out, sums, columns: tl.int64, chunks: tl.int64, DISTRIBUTION: tl.constexpr, CHUNKS: tl.constexpr):
    """z.products of one pair."""
    pair = tl.program_id(0).to(tl.int64)
    form = _total(sums, pair, chunks, 0, CHUNKS)
    if DISTRIBUTION == "sphere":
        form = form * _sphere_scale(sums, pair, columns, chunks, CHUNKS)
    tl.store(out + pair, form)


@_kernel
def write_probes(out, sums, rows, sample_ids, seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64,
                 samples: tl.int64, vectors: tl.int64, chunks: tl.int64, order: tl.int64, DISTRIBUTION: tl.constexpr,
                 DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
                 CHUNKS: tl.constexpr):  # fmt: skip
    """One chunk of a probe; `sums` are those of `sum_probes`, for the sphere."""
    task = tl.program_id(0).to(tl.int64)
    pair, chunk = task // chunks, task % chunks
    number = _pair_number(pair, samples, first, stream, order, DISTRIBUTION)
    sample_id = tl.load(sample_ids + pair % samples)
    row = tl.load(rows + pair) if DISTRIBUTION == "hadamard" else number
    for tile in range(TILES):
        begin = (chunk * TILES + tile) * TILE
        element, inside = _place(vectors * VECTOR, begin, TILE)
        z = _probe(seed, sample_id, step, number, row, begin, DISTRIBUTION, DTYPE, TILE)
        if DISTRIBUTION == "sphere":
            z = z * _sphere_scale(sums, pair, vectors * VECTOR, chunks, CHUNKS).to(DTYPE)
        base = out + (pair * vectors * VECTOR + begin)
        base = tl.multiple_of(base, VECTOR * out.dtype.element_ty.primitive_bitwidth // 8)
        tl.store(base + element, z.to(out.dtype.element_ty), mask=inside)
