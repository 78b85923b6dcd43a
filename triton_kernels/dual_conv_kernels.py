"""The dual convolution as an implicit matrix product, and a plain kernel for groups of few channels.

Rows of the product are pixels of the result, columns its channels, and the sum runs over the taps of the window and
blocks of the group's channels. A program holds the accumulators of the value and of TANGENTS tangents: one tile of
weights serves all of them, and the activation's slope never leaves registers.

`images` counts the images of one part (the value or a tangent). Without an activation nothing ties the parts together:
the launcher passes all of them as one part of (1 + K) B images, of which the first `biased` get the bias.
Pixels and where a tile begins have 64 bits, offsets within a plane 32. Tuples grow by addition, since Triton's compiler
knows no starred expressions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from fastdensity.triton_kernels.integers import wide

# The interpreter holds bfloat16 as integers, and multiplies those.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def _factor(values):
    if INTERPRETED and values.dtype == tl.bfloat16:
        return values.to(tl.float32)
    return values


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """(f(z), f'(z))"""
    if ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z), tl.where(z <= 0.0, 0.0, 1.0).to(z.dtype)
    else:
        small = tl.exp(-tl.abs(z))
        near_one = 1.0 / (1.0 + small)
        near_zero = small * near_one
        sigmoid = tl.where(z > 0.0, near_one, near_zero)
        value = z * sigmoid
        return value, sigmoid + value * tl.where(z > 0.0, near_zero, near_one)


@triton.jit
def _scaled(tangent, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(slope == 0.0, 0.0, tangent)
    else:
        return tangent * slope


@triton.jit
def _narrow(result, pointer):
    if pointer.dtype.element_ty.primitive_bitwidth < 32:
        result = result.to(tl.float32)
    return result.to(pointer.dtype.element_ty)


@triton.jit
def _pixels(tile, out_height, out_width, images, BLOCK: tl.constexpr):
    """(image, pixel, row, column, valid) of the results of a tile."""
    plane = out_height * out_width
    index = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image = index // plane
    pixel = (index % plane).to(tl.int32)
    return image, pixel, pixel // out_width, pixel % out_width, image < images


@triton.jit
def conv_tiles(
    out, x, weight, bias, images, biased, tangents, groups, channels, outputs, height, width, out_height, out_width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr, ACTIVATION: tl.constexpr, TANGENTS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_P pixels times BLOCK_O channels of the value, and of TANGENTS tangents.

    `channels` and `outputs` are those of a group. `x` is (part, image, row, column, channel), or, where POINTWISE (a
    1 x 1 window on every pixel), (part, image, channel, pixel); `weight` is (tap, output, channel).
    """
    output_tiles = tl.cdiv(outputs, BLOCK_O)
    sets = tl.cdiv(tangents, TANGENTS) if TANGENTS > 0 else 1
    program = tl.program_id(0)
    column = program % (groups * output_tiles)
    first_tangent = (program // (groups * output_tiles)) % sets * TANGENTS
    group = column // output_tiles
    output = (column % output_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    image, pixel, row_out, column_out, valid = _pixels(
        program // (groups * output_tiles * sets), out_height, out_width, images, BLOCK_P
    )
    part_size = wide(images) * groups * channels * height * width
    row = row_out * STRIDE_H - PADDING_H
    col = column_out * STRIDE_W - PADDING_W
    channel_blocks = tl.cdiv(channels, BLOCK_C)

    value = tl.zeros([BLOCK_P, BLOCK_O], DTYPE)
    moved = ()
    for _ in tl.static_range(TANGENTS):
        moved = moved + (tl.zeros([BLOCK_P, BLOCK_O], DTYPE),)  # noqa: RUF005
    for step in range(KERNEL_H * KERNEL_W * channel_blocks):
        tap = step // channel_blocks
        channel = (step % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        if POINTWISE:
            position = (image * (groups * channels) + group * channels) * (height * width) + pixel
            offset = position[:, None] + (channel.to(tl.int64) * (height * width))[None, :]
            inside = valid
        else:
            y = row + (tap // KERNEL_W) * DILATION_H
            z = col + (tap % KERNEL_W) * DILATION_W
            inside = valid & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            position = ((image * height + y) * width + z) * (groups * channels) + group * channels
            offset = position[:, None] + channel[None, :]
        mask = inside[:, None] & (channel < channels)[None, :]
        weight_row = (tap * groups + group).to(tl.int64) * outputs + output
        factor = _factor(
            tl.load(
                weight + (weight_row * channels)[None, :] + channel[:, None],
                mask=(channel < channels)[:, None] & (output < outputs)[None, :],
                other=0.0,
            )
        )
        value = tl.dot(_factor(tl.load(x + offset, mask=mask, other=0.0)), factor, value, "ieee", out_dtype=DTYPE)
        advanced = ()
        for i in tl.static_range(TANGENTS):
            part = tl.minimum(1 + first_tangent + i, tangents).to(tl.int64)
            loaded = _factor(tl.load(x + part * part_size + offset, mask=mask, other=0.0))
            advanced = advanced + (tl.dot(loaded, factor, moved[i], "ieee", out_dtype=DTYPE),)  # noqa: RUF005
        moved = advanced

    whole_output = group * outputs + output
    stored = valid[:, None] & (output < outputs)[None, :]
    if bias is not None:
        added = tl.load(bias + whole_output, mask=output < outputs, other=0.0).to(DTYPE)
        value += tl.where((image < biased)[:, None], added[None, :], 0.0)
    plane = out_height * out_width
    place = (image * (groups * outputs) * plane + pixel)[:, None] + (whole_output.to(tl.int64) * plane)[None, :]
    out_part = wide(images) * groups * outputs * plane
    slope = value
    if ACTIVATION != "none":
        value, slope = _activate(value, ACTIVATION)
    if first_tangent == 0:
        tl.store(out + place, _narrow(value, out), mask=stored)
    for i in tl.static_range(TANGENTS):
        tangent = first_tangent + i
        if tangent < tangents:
            result = _narrow(_scaled(moved[i], slope, ACTIVATION), out)
            tl.store(out + (1 + tangent).to(tl.int64) * out_part + place, result, mask=stored)


@triton.jit
def conv_pixels(
    out, x, weight, bias, images, biased, tangents, groups, channels, outputs, height, width, out_height, out_width,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, TANGENTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of one output channel; for groups too small for a matrix product, depthwise ones above all.

    `x` is (part, image, channel, row, column), `weight` (output, channel, tap).
    """
    program = tl.program_id(0)
    all_outputs = groups * outputs
    sets = tl.cdiv(tangents, TANGENTS) if TANGENTS > 0 else 1
    output = program % all_outputs
    first_tangent = (program // all_outputs) % sets * TANGENTS
    image, pixel, row_out, column_out, valid = _pixels(
        program // (all_outputs * sets), out_height, out_width, images, BLOCK_P
    )
    part_size = wide(images) * groups * channels * height * width
    row = row_out * STRIDE_H - PADDING_H
    col = column_out * STRIDE_W - PADDING_W

    value = tl.zeros([BLOCK_P], DTYPE)
    moved = ()
    for _ in tl.static_range(TANGENTS):
        moved = moved + (tl.zeros([BLOCK_P], DTYPE),)  # noqa: RUF005
    for step in range(channels * KERNEL_H * KERNEL_W):
        channel = step // (KERNEL_H * KERNEL_W)
        tap = step % (KERNEL_H * KERNEL_W)
        y = row + (tap // KERNEL_W) * DILATION_H
        z = col + (tap % KERNEL_W) * DILATION_W
        inside = valid & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        source = image * (groups * channels) + (output // outputs) * channels + channel
        offset = source * (height * width) + (y * width + z)
        factor = tl.load(weight + output.to(tl.int64) * (channels * KERNEL_H * KERNEL_W) + step).to(DTYPE)
        value += factor * tl.load(x + offset, mask=inside, other=0.0).to(DTYPE)
        advanced = ()
        for i in tl.static_range(TANGENTS):
            part = tl.minimum(1 + first_tangent + i, tangents).to(tl.int64)
            loaded = tl.load(x + part * part_size + offset, mask=inside, other=0.0).to(DTYPE)
            advanced = advanced + (moved[i] + factor * loaded,)  # noqa: RUF005
        moved = advanced

    if bias is not None:
        value += tl.where(image < biased, tl.load(bias + output).to(DTYPE), 0.0)
    plane = out_height * out_width
    place = (image * all_outputs + output) * plane + pixel
    out_part = wide(images) * all_outputs * plane
    slope = value
    if ACTIVATION != "none":
        value, slope = _activate(value, ACTIVATION)
    if first_tangent == 0:
        tl.store(out + place, _narrow(value, out), mask=valid)
    for i in tl.static_range(TANGENTS):
        tangent = first_tangent + i
        if tangent < tangents:
            result = _narrow(_scaled(moved[i], slope, ACTIVATION), out)
            tl.store(out + (1 + tangent).to(tl.int64) * out_part + place, result, mask=valid)
