"""The kernel of a linear layer on a dual: products of the value and of a group of tangents, and what follows them.

Each tile of the weight is loaded once and multiplied with 1 + GROUP tiles of rows, the value's and the tangents'.
Programs of further groups compute the value's product again: its activation's derivative is needed in their registers.
For geglu a program holds two tiles of columns, of h and of the gate, of the same result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.triton_kernels.chain_functions import pass_tangent, unary
from fastdensity.triton_kernels.integers import wide


@triton.jit
def _weight_tile(weight, column, depth, columns, inputs, DEPTH_FITS: tl.constexpr):
    """(BLOCK_K, BLOCK_N) of the transposed weight."""
    address = weight + column.to(tl.int64)[None, :] * inputs + depth[:, None]
    mask = column[None, :] < columns
    if not DEPTH_FITS:
        mask = mask & (depth[:, None] < inputs)
    return tl.load(address, mask=mask, other=0.0)


@triton.jit
def _multiply_all(
    sums, x_rows, planes, row_mask, depth, inputs, weight_tile, gate_tile,
    GROUP: tl.constexpr, GATED: tl.constexpr, DEPTH_FITS: tl.constexpr, WIDEN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Every product's sum with one more slice of the inputs; those of the gate follow those of h."""
    added = ()
    gates = ()
    for plane in tl.static_range(GROUP + 1):
        mask = row_mask[:, None]
        if not DEPTH_FITS:
            mask = mask & (depth[None, :] < inputs)
        tile = tl.load(x_rows + planes[plane] + depth[None, :], mask=mask, other=0.0)
        if WIDEN:
            tile = tile.to(DTYPE)
        product = tl.dot(tile, weight_tile, acc=sums[plane], input_precision="ieee", out_dtype=DTYPE)
        added += (product,)
        if GATED:
            product = tl.dot(tile, gate_tile, acc=sums[GROUP + 1 + plane], input_precision="ieee", out_dtype=DTYPE)
            gates += (product,)
    return added + gates


@triton.jit
def _bias_tile(bias, column, columns, DTYPE: tl.constexpr):
    return tl.load(bias + column, mask=column < columns, other=0.0).to(DTYPE)[None, :]


@triton.jit
def linear_tiles(
    out, x, weight, bias, rows, columns, inputs, tangents,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, DEPTH_FITS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_M, BLOCK_N) of the value and of GROUP tangents.

    x (1 + K, rows, inputs) and out (1 + K, rows, columns) are contiguous; weight (columns, inputs), for geglu twice as
    many rows, the gate's last. Tiles run in strips of STRIP row tiles, whose weights then come from the cache.
    """
    GATED: tl.constexpr = ACTIVATION == "geglu"
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    first = tl.program_id(0) // (row_tiles * column_tiles) * GROUP
    strip, within = tile // (STRIP * column_tiles), tile % (STRIP * column_tiles)
    height = tl.minimum(row_tiles - strip * STRIP, STRIP)
    row = (strip * STRIP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows

    x_plane = wide(rows) * inputs
    planes = (x_plane * 0,)
    sums = (tl.zeros([BLOCK_M, BLOCK_N], DTYPE),)
    for g in tl.static_range(GROUP):
        # a group may be larger than what is left: its last tangent again, and not stored
        planes += (x_plane * (1 + tl.minimum(first + g, tangents - 1)),)
        sums += (tl.zeros([BLOCK_M, BLOCK_N], DTYPE),)
    if GATED:
        sums += sums
    x_rows = x + row.to(tl.int64)[:, None] * inputs
    gate = weight + wide(columns) * inputs
    for start in range(0, inputs, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        weight_tile = _weight_tile(weight, column, depth, columns, inputs, DEPTH_FITS)
        if WIDEN:
            weight_tile = weight_tile.to(DTYPE)
        gate_tile = weight_tile
        if GATED:
            gate_tile = _weight_tile(gate, column, depth, columns, inputs, DEPTH_FITS)
            if WIDEN:
                gate_tile = gate_tile.to(DTYPE)
        sums = _multiply_all(
            sums, x_rows, planes, row_mask, depth, inputs, weight_tile, gate_tile,
            GROUP, GATED, DEPTH_FITS, WIDEN, DTYPE,
        )  # fmt: skip

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
    if first == 0:
        tl.store(target, value.to(out.dtype.element_ty), mask=mask)
    for g in tl.static_range(GROUP):
        tangent = sums[1 + g]
        if GATED:
            tangent = tangent * factor + slope * sums[GROUP + 2 + g]
        elif ACTIVATION != "none":
            tangent = pass_tangent(ACTIVATION, slope, tangent, 0.0)
        if first + g < tangents:
            tl.store(target + out_plane * (1 + first + g), tangent.to(out.dtype.element_ty), mask=mask)
