"""The kernel of a chain: one program per tile, the steps unrolled, derivatives in registers, tangents one by one.

A tile is ROWS x COLUMNS of the result, whose innermost dimension are the columns and all others the rows. An input that
does not vary along one of the two is loaded as a single column or row and broadcast in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.triton_kernels.chain_functions import pass_tangent, unary


@triton.jit
def _run_step(NAME: tl.constexpr, left, right, CONSTANT: tl.constexpr):
    """(value, derivative); the derivatives of binary steps are their operands, in their place stands the value."""
    if NAME == "add":
        value = left + right
        return value, value
    elif NAME == "sub":
        value = left - right
        return value, value
    elif NAME == "mul":
        value = left * right
        return value, value
    elif NAME == "div":
        value = left / right
        return value, value
    else:
        return unary(NAME, left, CONSTANT)


@triton.jit
def _linearised(
    NAME: tl.constexpr, left, right, left_tangent, right_tangent, value, slope, CONSTANT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """The tangent after a step; LEFT and RIGHT say which of its operands have one."""
    if NAME == "add":
        if LEFT and RIGHT:
            return left_tangent + right_tangent
        else:
            return left_tangent if LEFT else right_tangent
    elif NAME == "sub":
        if LEFT and RIGHT:
            return left_tangent - right_tangent
        else:
            return left_tangent if LEFT else -right_tangent
    elif NAME == "mul":
        if LEFT and RIGHT:
            return left_tangent * right + right_tangent * left
        else:
            return left_tangent * right if LEFT else right_tangent * left
    elif NAME == "div":
        if LEFT and RIGHT:
            return (left_tangent - value * right_tangent) / right
        else:
            return left_tangent / right if LEFT else -value * right_tangent / right
    else:
        return pass_tangent(NAME, slope, left_tangent, CONSTANT)


@triton.jit
def _load(
    pointer, row_offset, row_mask, column, column_mask, column_stride, plane_offset,
    ROW_VARIES: tl.constexpr, COLUMN_KIND: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS or 1, COLUMNS or 1) of one plane of an input. Column kinds: 0 constant, 1 dense, 2 strided."""
    address = pointer + plane_offset
    if COLUMN_KIND == 0:
        if ROW_VARIES:
            return tl.load(address + row_offset, mask=row_mask, other=1.0).to(DTYPE)
        else:
            return tl.load(address + tl.zeros([1, 1], tl.int32)).to(DTYPE)
    else:
        offset = column if COLUMN_KIND == 1 else column * column_stride
        if ROW_VARIES:
            return tl.load(address + row_offset + offset, mask=row_mask & column_mask, other=1.0).to(DTYPE)
        else:
            return tl.load(address + offset, mask=column_mask, other=1.0).to(DTYPE)


@triton.jit
def _row_offset(row, INPUT: tl.constexpr, sizes, row_strides, DIMS: tl.constexpr):
    """Where rows of an input begin: their index taken apart, the innermost dimension first."""
    offset = row * 0
    left = row
    for step in tl.static_range(DIMS):
        index = left if step == DIMS - 1 else left % sizes[DIMS - 1 - step]
        offset += index * row_strides[INPUT * DIMS + DIMS - 1 - step]
        left = left // sizes[DIMS - 1 - step]
    return offset


@triton.jit
def _tangent(
    inputs, plane, row, row_mask, column, column_mask, sizes, row_strides, column_strides, plane_strides,
    values, slopes,
    PROGRAM: tl.constexpr, IS_DUAL: tl.constexpr, INPUTS: tl.constexpr, STEPS: tl.constexpr, DIMS: tl.constexpr,
    ROW_VARIES: tl.constexpr, COLUMN_KINDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The tangent of the last step for one plane. Plain values hold their place with themselves."""
    tangents = ()
    for i in tl.static_range(INPUTS):
        if IS_DUAL[i]:
            tangents += (
                _load(
                    inputs[i], _row_offset(row, i, sizes, row_strides, DIMS), row_mask, column, column_mask,
                    column_strides[i], plane * plane_strides[i], ROW_VARIES[i], COLUMN_KINDS[i], DTYPE,
                ),
            )  # fmt: skip
        else:
            tangents += (values[i],)
    for i in tl.static_range(STEPS):
        if IS_DUAL[INPUTS + i]:
            tangents += (
                _linearised(
                    PROGRAM[i][0], values[PROGRAM[i][1]], values[PROGRAM[i][2]], tangents[PROGRAM[i][1]],
                    tangents[PROGRAM[i][2]], values[INPUTS + i], slopes[i], PROGRAM[i][3],
                    IS_DUAL[PROGRAM[i][1]], IS_DUAL[PROGRAM[i][2]],
                ),
            )  # fmt: skip
        else:
            tangents += (values[INPUTS + i],)
    return tangents[INPUTS + STEPS - 1]


@triton.jit
def chain_tiles(
    out, inputs, sizes, row_strides, column_strides, plane_strides, rows, columns, total, tangents,
    PROGRAM: tl.constexpr, IS_DUAL: tl.constexpr, INPUTS: tl.constexpr, STEPS: tl.constexpr, DIMS: tl.constexpr,
    ROW_VARIES: tl.constexpr, COLUMN_KINDS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the value and of every tangent. `total` is the number of elements of a plane of `out`."""
    parts = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0)
    row = ((tile // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((tile % parts).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    row_mask, column_mask = row < rows, column < columns
    values = ()
    slopes = ()
    for i in tl.static_range(INPUTS):
        values += (
            _load(
                inputs[i], _row_offset(row, i, sizes, row_strides, DIMS), row_mask, column, column_mask,
                column_strides[i], 0, ROW_VARIES[i], COLUMN_KINDS[i], DTYPE,
            ),
        )  # fmt: skip
    for i in tl.static_range(STEPS):
        value, slope = _run_step(PROGRAM[i][0], values[PROGRAM[i][1]], values[PROGRAM[i][2]], PROGRAM[i][3])
        values += (value,)
        slopes += (slope,)
    target = out + row * columns + column
    mask = row_mask & column_mask
    result = tl.broadcast_to(values[INPUTS + STEPS - 1], [ROWS, COLUMNS])
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)
    plane = tl.full([], 0, tl.int64)
    for _ in range(tangents):
        plane += 1
        result = _tangent(
            inputs, plane, row, row_mask, column, column_mask, sizes, row_strides, column_strides, plane_strides,
            values, slopes, PROGRAM, IS_DUAL, INPUTS, STEPS, DIMS, ROW_VARIES, COLUMN_KINDS, DTYPE,
        )  # fmt: skip
        result = tl.broadcast_to(result, [ROWS, COLUMNS])
        tl.store(target + plane * total, result.to(out.dtype.element_ty), mask=mask)
