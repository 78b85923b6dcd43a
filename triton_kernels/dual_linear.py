"""Launches linear layers on duals with Triton: how many tangents a program takes, and how large its tiles are."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fastdensity.triton_kernels import dual_linear_kernels
from fastdensity.triton_kernels.rows import Launch

# Of a program, geglu's and others': with the value four or six products, what fits in registers beside operands.
MOST_TANGENTS = {True: 2, False: 3}
STRIP = 8
MOST_STAGES = 2 if torch.version.hip else 3  # 64 KiB of shared memory there

# (dtype's size, products in registers) -> (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); see docs/kernels.md
TILES: dict[tuple[int, int], tuple[int, int, int, int, int]] = {
    (2, 2): (64, 128, 64, 8, 3),
    (2, 3): (64, 64, 64, 8, 3),
    (2, 4): (64, 64, 32, 8, 3),
    (2, 6): (64, 32, 64, 8, 3),
    (4, 2): (64, 32, 16, 4, 2),
    (4, 3): (64, 32, 16, 4, 2),
    (4, 4): (64, 32, 16, 4, 2),
    (4, 6): (32, 32, 16, 4, 2),
    (8, 2): (32, 32, 16, 4, 2),
    (8, 3): (32, 32, 16, 4, 2),
    (8, 4): (32, 32, 16, 4, 2),
    (8, 6): (32, 16, 16, 4, 2),
}


def tangents_per_program(tangents: int, activation: str) -> int:
    """Groups as large as possible, and then as even as possible."""
    groups = -(-tangents // MOST_TANGENTS[activation == "geglu"])
    return -(-tangents // groups)


def plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor, most_stages: int = MOST_STAGES
) -> Launch:
    """What `launch_triton` launches for contiguous operands.

    Tiles do not depend on the number of rows: nor does a row's result.
    """
    tangents, inputs, columns = x.shape[0] - 1, x.shape[-1], out.shape[-1]
    rows = out.numel() // out.shape[0] // columns
    group = tangents_per_program(tangents, activation)
    products = (1 + group) * (2 if activation == "geglu" else 1)
    block_m, block_n, block_k, warps, stages = TILES[x.element_size(), products]
    arguments: tuple[Any, ...] = (out, x, weight, bias, rows, columns, inputs, tangents)
    constants = {
        "ACTIVATION": activation,
        "GROUP": group,
        "DTYPE": tl.float64 if x.dtype is torch.float64 else tl.float32,
        # the interpreter multiplies bfloat16 wrongly, the bits being those of integers there
        "WIDEN": knobs.runtime.interpret and x.dtype is torch.bfloat16,
        "DEPTH_FITS": inputs % block_k == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "STRIP": STRIP,
        "num_warps": warps,
        "num_stages": min(stages, most_stages),
        "enable_fp_fusion": True,
    }
    grid = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) * triton.cdiv(tangents, group)
    return Launch(dual_linear_kernels.linear_tiles, grid, arguments, constants)


def launch_triton(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    """Run on the caller's current stream of the device that holds `out`, which is contiguous.

    The contract is that of `fastdensity.reference.dual_linear`; nothing is rounded before the activation.
    """
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        bias = None if bias is None else bias.contiguous()
        launch = plan(x.contiguous(), weight.contiguous(), bias, activation, out)
        launch.kernel[launch.grid,](*launch.arguments, **launch.constants)
