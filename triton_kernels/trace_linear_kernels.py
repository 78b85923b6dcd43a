"""The kernels of a trace's ends: linear layers whose operand, or whose result's other factor, are probes made here.

    probe_tiles     the first layer: products of the value with the weight, and of probes that nobody stored
    form_tiles      the last layer: the value, and one number per row, probe and tile of columns: z.(t W^T) there
    add_partials    these numbers of a row, in one order

A tile of a probe is [rows, WIDTH], the rows being samples. Of signs WIDTH / 32 words are one or some of the four that
Philox's counter gives for 128 elements; of normals a counter gives four elements in a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.triton_kernels.chain_functions import pass_tangent, unary
from fastdensity.triton_kernels.dual_linear_kernels import _bias_tile, _weight_tile
from fastdensity.triton_kernels.integers import wide
from fastdensity.triton_kernels.philox import _box_muller
from fastdensity.triton_kernels.probe_kernels import _parity

UNSPECIALISED = ["seed", "step", "stream", "first", "order"]  # numbers on which no kernel is to be compiled again


@triton.jit
def _probe_number(probe, stream, order, DISTRIBUTION: tl.constexpr):
    """What stands for a probe in Philox's counter: as `probe_kernels._pair_number`."""
    if DISTRIBUTION == "hadamard":
        return (stream + 0xFFFFFF - (probe >> order)).to(tl.uint32)
    else:
        return (stream + probe).to(tl.uint32)


@triton.jit
def _sign_tile(seed, sample_ids, step, number, hadamard_row, start, DISTRIBUTION: tl.constexpr, DTYPE: tl.constexpr,
               WIDTH: tl.constexpr):  # fmt: skip
    """Signs of elements start .. start + WIDTH - 1 of each row; `start` is a multiple of WIDTH, which divides 128."""
    start = tl.zeros([], tl.int32) + start  # the interpreter has a Python number
    block = (start // 128).to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, block + sample_ids * 0, number, step.to(tl.uint32), sample_ids)
    if DISTRIBUTION == "hadamard":
        five = hadamard_row.to(tl.uint32)
        pattern = (five & 1) * 0xAAAAAAAA ^ ((five >> 1) & 1) * 0xCCCCCCCC ^ ((five >> 2) & 1) * 0xF0F0F0F0
        pattern = pattern ^ ((five >> 3) & 1) * 0xFF00FF00 ^ ((five >> 4) & 1) * 0xFFFF0000
        rest = (hadamard_row >> 5).to(tl.uint32)
        word_0 = word_0 ^ pattern ^ (0 - _parity(rest & (4 * block)))
        word_1 = word_1 ^ pattern ^ (0 - _parity(rest & (4 * block + 1)))
        word_2 = word_2 ^ pattern ^ (0 - _parity(rest & (4 * block + 2)))
        word_3 = word_3 ^ pattern ^ (0 - _parity(rest & (4 * block + 3)))
    element = start + tl.arange(0, WIDTH)
    if WIDTH <= 32:  # one word holds all
        which = start // 32 % 4
        low = tl.where(which == 0, word_0, word_1)
        high = tl.where(which == 2, word_2, word_3)
        word = tl.where(which < 2, low, high)[:, None]
    elif WIDTH == 64:
        upper = start // 64 % 2 == 1
        low, high = tl.where(upper, word_2, word_0), tl.where(upper, word_3, word_1)
        word = tl.where((element // 32 % 2 == 0)[None, :], low[:, None], high[:, None])
    else:
        which = (element // 32 % 4)[None, :]
        low = tl.where(which == 0, word_0[:, None], word_1[:, None])
        high = tl.where(which == 2, word_2[:, None], word_3[:, None])
        word = tl.where(which < 2, low, high)
    bit = (word >> (element % 32).to(tl.uint32)[None, :]) & 1
    return 1.0 - 2.0 * bit.to(tl.int32).to(DTYPE)


@triton.jit
def _normal_tile(seed, sample_ids, step, number, start, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """Normals of elements start .. start + WIDTH - 1 of each row; both are multiples of 4."""
    block = ((start // 4) + tl.arange(0, WIDTH // 4)).to(tl.uint32)[None, :] + (sample_ids * 0)[:, None]
    word_0, word_1, word_2, word_3 = tl.philox(seed, block, number, step.to(tl.uint32), sample_ids[:, None])
    normal_0, normal_1 = _box_muller(word_0, word_1, DTYPE)
    normal_2, normal_3 = _box_muller(word_2, word_3, DTYPE)
    return tl.interleave(tl.interleave(normal_0, normal_2), tl.interleave(normal_1, normal_3))


@triton.jit
def _probe_tile(seed, sample_ids, step, number, hadamard_row, start, DISTRIBUTION: tl.constexpr, DTYPE: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    if DISTRIBUTION == "normal":
        return _normal_tile(seed, sample_ids, step, number, start, DTYPE, WIDTH)
    else:
        return _sign_tile(seed, sample_ids, step, number, hadamard_row, start, DISTRIBUTION, DTYPE, WIDTH)


@triton.jit
def _hadamard_rows(hadamard_rows, plane, row, row_mask, rows, DISTRIBUTION: tl.constexpr):
    """Each sample's row of Sylvester's matrix for one probe; of other distributions anything."""
    if DISTRIBUTION == "hadamard":
        return tl.load(hadamard_rows + wide(plane) * rows + row, mask=row_mask, other=0)
    else:
        return row


@triton.jit
def _tile_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, STRIP: tl.constexpr):
    """(rows' tile, columns' tile, first tangent) of this program: strips of row tiles, as in `linear_tiles`."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    strip, within = tile // (STRIP * column_tiles), tile % (STRIP * column_tiles)
    height = tl.minimum(row_tiles - strip * STRIP, STRIP)
    return strip * STRIP + within % height, within // height, tl.program_id(0) // (row_tiles * column_tiles) * GROUP


@triton.jit(do_not_specialize=UNSPECIALISED)
def probe_tiles(
    out, x, weight, bias, sample_ids, hadamard_rows, rows, columns, inputs, moved, tangents,
    seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64, order: tl.int64,
    ACTIVATION: tl.constexpr, DISTRIBUTION: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    DEPTH_FITS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_M, BLOCK_N) of the value and of GROUP tangents, those of probes of the first `moved` inputs.

    x (rows, inputs) and out (1 + tangents, rows, columns) are contiguous; weight (columns, inputs), for geglu twice as
    many rows, the gate's last. A program makes the probes of its rows again for every tile of columns.
    """
    GATED: tl.constexpr = ACTIVATION == "geglu"
    row_tile, column_tile, group = _tile_of(rows, columns, BLOCK_M, BLOCK_N, GROUP, STRIP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    ids = tl.load(sample_ids + row, mask=row_mask, other=0).to(tl.uint32)

    sums = (tl.zeros([BLOCK_M, BLOCK_N], DTYPE),)
    chosen = ()
    for g in tl.static_range(GROUP):
        # a group may be larger than what is left: its last tangent again, and not stored
        plane = tl.minimum(group + g, tangents - 1)
        chosen += (_hadamard_rows(hadamard_rows, plane, row, row_mask, rows, DISTRIBUTION),)
        sums += (tl.zeros([BLOCK_M, BLOCK_N], DTYPE),)
    if GATED:
        sums += sums
    x_rows = x + row.to(tl.int64)[:, None] * inputs
    gate = weight + wide(columns) * inputs
    for start in range(0, inputs, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        weight_tile = _weight_tile(weight, column, depth, columns, inputs, DEPTH_FITS)
        gate_tile = weight_tile
        if GATED:
            gate_tile = _weight_tile(gate, column, depth, columns, inputs, DEPTH_FITS)
        mask = row_mask[:, None]
        if not DEPTH_FITS:
            mask = mask & (depth[None, :] < inputs)
        tile = tl.load(x_rows + depth[None, :], mask=mask, other=0.0)
        if WIDEN:
            tile, weight_tile, gate_tile = tile.to(DTYPE), weight_tile.to(DTYPE), gate_tile.to(DTYPE)
        added = (tl.dot(tile, weight_tile, acc=sums[0], input_precision="ieee", out_dtype=DTYPE),)
        gates = ()
        if GATED:
            gates = (tl.dot(tile, gate_tile, acc=sums[GROUP + 1], input_precision="ieee", out_dtype=DTYPE),)
        for g in tl.static_range(GROUP):
            probe = first + tl.minimum(group + g, tangents - 1)
            number = _probe_number(probe, stream, order, DISTRIBUTION)
            z = _probe_tile(seed, ids, step, number, chosen[g], start, DISTRIBUTION, DTYPE, BLOCK_K)
            z = tl.where((depth < moved)[None, :], z, 0.0).to(x.dtype.element_ty)
            if WIDEN:
                z = z.to(DTYPE)
            added += (tl.dot(z, weight_tile, acc=sums[1 + g], input_precision="ieee", out_dtype=DTYPE),)
            if GATED:
                product = tl.dot(z, gate_tile, acc=sums[GROUP + 2 + g], input_precision="ieee", out_dtype=DTYPE)
                gates += (product,)
        sums = added + gates

    total = sums[0]
    if bias is not None:
        total += _bias_tile(bias, column, columns, DTYPE)
    out_plane = wide(rows) * columns
    target = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = row_mask[:, None] & (column[None, :] < columns)
    if GATED:
        gate_total = sums[GROUP + 1]
        if bias is not None:
            gate_total += _bias_tile(bias + columns, column, columns, DTYPE)
        factor, slope = unary("gelu", gate_total, 0.0)
        value = total * factor
        slope = slope * total
    elif ACTIVATION == "none":
        value = total
    else:
        value, slope = unary(ACTIVATION, total, 0.0)
    if group == 0:
        tl.store(target, value.to(out.dtype.element_ty), mask=mask)
    for g in tl.static_range(GROUP):
        tangent = sums[1 + g]
        if GATED:
            tangent = tangent * factor + slope * sums[GROUP + 2 + g]
        elif ACTIVATION != "none":
            tangent = pass_tangent(ACTIVATION, slope, tangent, 0.0)
        if group + g < tangents:
            tl.store(target + out_plane * (1 + group + g), tangent.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def form_tiles(
    value, partials, stacked, weight, bias, sample_ids, hadamard_rows, rows, columns, inputs, tangents,
    seed: tl.int64, step: tl.int64, stream: tl.int64, first: tl.int64, order: tl.int64,
    DISTRIBUTION: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, DEPTH_FITS: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_M, BLOCK_N) of the value, and of GROUP products the sums over its columns, times probes.

    stacked (1 + tangents, rows, inputs), value (rows, columns) and partials (tangents, rows, tiles of columns) are
    contiguous. The first plane of a further group is not the value but a tangent, too: nothing is computed twice.
    """
    row_tile, column_tile, group = _tile_of(rows, columns, BLOCK_M, BLOCK_N, GROUP, STRIP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    plane_size = wide(rows) * inputs
    base = stacked + row.to(tl.int64)[:, None] * inputs
    sums = ()
    for _ in tl.static_range(GROUP):
        sums += (tl.zeros([BLOCK_M, BLOCK_N], DTYPE),)
    for start in range(0, inputs, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        weight_tile = _weight_tile(weight, column, depth, columns, inputs, DEPTH_FITS)
        if WIDEN:
            weight_tile = weight_tile.to(DTYPE)
        mask = row_mask[:, None]
        if not DEPTH_FITS:
            mask = mask & (depth[None, :] < inputs)
        added = ()
        for g in tl.static_range(GROUP):
            plane = tl.minimum(group + g, tangents)  # the last again, where a group is larger than what is left
            tile = tl.load(base + plane_size * plane + depth[None, :], mask=mask, other=0.0)
            if WIDEN:
                tile = tile.to(DTYPE)
            added += (tl.dot(tile, weight_tile, acc=sums[g], input_precision="ieee", out_dtype=DTYPE),)
        sums = added

    ids = tl.load(sample_ids + row, mask=row_mask, other=0).to(tl.uint32)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for g in tl.static_range(GROUP):
        plane = group + g - 1  # of the tangents; -1 is the value
        if plane < 0:
            total = sums[g]
            if bias is not None:
                total += _bias_tile(bias, column, columns, DTYPE)
            target = value + row.to(tl.int64)[:, None] * columns + column[None, :]
            mask = row_mask[:, None] & (column[None, :] < columns)
            tl.store(target, total.to(value.dtype.element_ty), mask=mask)
        elif plane < tangents:
            chosen = _hadamard_rows(hadamard_rows, plane, row, row_mask, rows, DISTRIBUTION)
            number = _probe_number(first + plane, stream, order, DISTRIBUTION)
            begin = column_tile * BLOCK_N
            z = _probe_tile(seed, ids, step, number, chosen, begin, DISTRIBUTION, DTYPE, BLOCK_N)
            # columns that do not exist have a weight, and so a product, of zero
            sum_of_tile = tl.sum(sums[g] * z, 1)
            place = partials + (plane * wide(rows) + row) * column_tiles + column_tile
            tl.store(place, sum_of_tile, mask=row_mask)


@triton.jit
def add_partials(forms, partials, pairs, tiles, PAIRS: tl.constexpr, TILES: tl.constexpr):
    """The float64 sums of `tiles` numbers each, TILES at a time, of PAIRS pairs of a probe and a row."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    total = tl.zeros([PAIRS], tl.float64)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (pair < pairs)[:, None] & (tile < tiles)[None, :]
        part = tl.load(partials + pair[:, None] * tiles + tile[None, :], mask=mask, other=0.0)
        total += tl.sum(part.to(tl.float64), 1)
    tl.store(forms + pair, total, mask=pair < pairs)
