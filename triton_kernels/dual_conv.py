"""Launches the dual convolution with Triton: which kernel, which layout, how large a tile.

Channels are made the last dimension for the matrix product, since a window shifted by a pixel is aligned to nothing
else; a 1 x 1 convolution reads plain NCHW. Nothing here waits for the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdensity.triton_kernels import dual_conv_kernels

MOST_TANGENTS = 3  # per program: their accumulators and the value's share the registers
FEW_CHANNELS = 16  # groups with fewer are no work for matrix units
MOST_PROGRAMS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Tile:
    """Pixels, output channels and input channels of a program's tile, and how it runs."""

    pixels: int
    outputs: int
    channels: int
    warps: int
    stages: int


def _tangents_per_program(tangents: int, activation: str) -> int:
    """As even as they go; the value is computed once more for every further program. 0: parts need not meet."""
    if activation == "none":
        return 0
    return triton.cdiv(tangents, triton.cdiv(tangents, MOST_TANGENTS))


def _tile(dtype: torch.dtype, shared: int) -> Tile:
    """`shared` tangents beside the value. Sizes that no target spills with: tests/test_offline_compile.py."""
    if dtype.itemsize == 2:
        return Tile(128, 64, 32, 8, 3) if shared < 2 else Tile(64, 64, 32, 4, 3)
    if dtype.itemsize == 4:
        return Tile(64 if shared < 2 else 32, 32, 16, 4, 2)
    return Tile(32 if shared < 2 else 16, 32, 16, 4, 2)


def _power(size: int, lowest: int, highest: int) -> int:
    return min(max(triton.next_power_of_2(size), lowest), highest)


def launch_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    out: Tensor,
) -> None:
    """Run on the caller's current stream of the device that holds `out`; see `fastdensity.reference.dual_conv`."""
    parts, batch, all_outputs, out_height, out_width = out.shape
    (height, width), (outputs, channels, kernel_h, kernel_w) = x.shape[3:], (all_outputs // groups, *weight.shape[1:])
    shared = _tangents_per_program(parts - 1, activation)
    images = batch if shared else parts * batch
    sets = triton.cdiv(parts - 1, shared) if shared else 1
    pointwise = (kernel_h, kernel_w, *stride, *padding) == (1, 1, 1, 1, 0, 0)
    constants: dict[str, Any] = {
        "KERNEL_H": kernel_h, "KERNEL_W": kernel_w, "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "PADDING_H": padding[0], "PADDING_W": padding[1], "DILATION_H": dilation[0], "DILATION_W": dilation[1],
        "ACTIVATION": activation, "TANGENTS": shared,
        "DTYPE": tl.float64 if x.dtype is torch.float64 else tl.float32, "enable_fp_fusion": True,
    }  # fmt: skip
    if groups > 1 and channels < FEW_CHANNELS:
        kernel: Any = dual_conv_kernels.conv_pixels
        block = _power(images * out_height * out_width, 16, 256)
        columns = all_outputs
        x, weight = x.contiguous(), weight.contiguous()
        constants |= {"BLOCK_P": block, "num_warps": 4}
    else:
        kernel = dual_conv_kernels.conv_tiles
        tile = _tile(x.dtype, shared)
        block = tile.pixels
        block_o, block_c = _power(outputs, 16, tile.outputs), _power(channels, 16, tile.channels)
        columns = groups * triton.cdiv(outputs, block_o)
        x = x.contiguous() if pointwise else x.movedim(2, -1).contiguous()
        weight = weight.permute(2, 3, 0, 1).contiguous()
        constants |= {"POINTWISE": pointwise, "BLOCK_P": block, "BLOCK_O": block_o, "BLOCK_C": block_c}
        constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    grid = triton.cdiv(images * out_height * out_width, block) * sets * columns
    if grid > MOST_PROGRAMS:
        raise ValueError(f"a result of shape {tuple(out.shape)} needs {grid} programs, more than {MOST_PROGRAMS}")
    bias = None if bias is None else bias.contiguous()
    sizes = (images, batch, parts - 1, groups, channels, outputs, height, width, out_height, out_width)
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        kernel[(grid,)](out, x, weight, bias, *sizes, **constants)
