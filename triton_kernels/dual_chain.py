"""Launches chains of elementwise dual operations with Triton; strided and broadcast inputs are not copied."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdensity.chain_program import parse
from fastdensity.triton_kernels import dual_chain_kernels
from fastdensity.triton_kernels.rows import Launch

TILE_BYTES = 4096  # of a program, in the dtype of the arithmetic
WARPS = 2 if torch.version.hip else 4  # 128 threads, 16 bytes of a tile in half precision for each


def _strides(tensor: Tensor, dual: bool, rank: int) -> tuple[int, ...]:
    """Over the result's dimensions, 0 where the input is broadcast."""
    shape, strides = tensor.shape[int(dual) :], tensor.stride()[int(dual) :]
    own = tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
    return (0,) * (rank - len(own)) + own


def collapse(sizes: Sequence[int], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Without dimensions of one, and with neighbours merged that every input walks as one; at least one dimension."""
    merged: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        if merged and all(walk[-1] == stride[dim] * size for walk, stride in zip(walks, strides, strict=True)):
            merged[-1] *= size
            for walk, stride in zip(walks, strides, strict=True):
                walk[-1] = stride[dim]
        else:
            merged.append(size)
            for walk, stride in zip(walks, strides, strict=True):
                walk.append(stride[dim])
    if not merged:
        return [1], [[1] for _ in strides]
    return merged, walks


def plan(
    inputs: Sequence[Tensor], is_dual: Sequence[bool], program: str, out: Tensor, tile_bytes: int = TILE_BYTES
) -> Launch:
    """What `launch_triton` launches; which tile an element falls in changes nothing about its arithmetic."""
    parsed = parse(program, tuple(is_dual))
    shape = out.shape[1:]
    strides = [_strides(tensor, dual, len(shape)) for tensor, dual in zip(inputs, is_dual, strict=True)]
    sizes, walks = collapse(shape, strides)
    columns = sizes[-1]
    dtype = torch.float64 if out.dtype is torch.float64 else torch.float32
    tile = tile_bytes // dtype.itemsize
    total = out.numel() // out.shape[0]
    rows = total // columns
    width = min(triton.next_power_of_2(columns), tile)
    height = min(triton.next_power_of_2(rows), tile // width)
    arguments: tuple[Any, ...] = (
        out,
        tuple(inputs),
        tuple(sizes[:-1]),
        tuple(stride for walk in walks for stride in walk[:-1]),
        tuple(walk[-1] for walk in walks),
        tuple(tensor.stride(0) if dual else 0 for tensor, dual in zip(inputs, is_dual, strict=True)),
        rows,
        columns,
        total,
        out.shape[0] - 1,
    )
    constants = {
        "PROGRAM": tuple((step.name, step.left, step.right, step.constant) for step in parsed.steps),
        "IS_DUAL": parsed.is_dual,
        "INPUTS": len(inputs),
        "STEPS": len(parsed.steps),
        "DIMS": len(sizes) - 1,
        "ROW_VARIES": tuple(any(walk[:-1]) for walk in walks),
        "COLUMN_KINDS": tuple(min(walk[-1], 2) for walk in walks),
        "DTYPE": tl.float64 if dtype is torch.float64 else tl.float32,
        "ROWS": height,
        "COLUMNS": width,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }
    return Launch(dual_chain_kernels.chain_tiles, -(-rows // height) * -(-columns // width), arguments, constants)


def launch_triton(
    inputs: Sequence[Tensor], is_dual: Sequence[bool], program: str, out: Tensor, tile_bytes: int = TILE_BYTES
) -> None:
    """Run on the caller's current stream of the device that holds `out`; see `fastdensity.reference.dual_chain`.

    `out`, contiguous (1 + K, *S), overlaps no input, unless it is the very memory of `inputs[0]`.
    """
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        launch = plan(inputs, is_dual, program, out, tile_bytes)
        launch.kernel[launch.grid,](*launch.arguments, **launch.constants)
