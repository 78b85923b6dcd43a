"""Launches the norms of dual tensors with Triton: whole rows in registers, or long rows block by block.

Tiles follow from a row's length and the dtypes, never from the batch: a row's bits are the same whatever its
batch-mates. How many programs share the tangents does depend on the batch, and changes no bits.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdensity.reference.dual_norm import compute_dtype, row_count
from fastdensity.triton_kernels import dual_norm_kernels

WHOLE_ROW_BYTES = 32 * 1024  # rows up to this length, in the dtype of the arithmetic, are held in registers
TILE_BYTES = 4 * 1024  # short rows share a program until they fill this
BLOCK_BYTES = 8 * 1024  # longer rows are cut into blocks of this size
BYTES_PER_THREAD = 64
SPLIT_BYTES_PER_THREAD = 32  # loops over blocks are unrolled
MOST_THREADS = 512
FEW_PROGRAMS = 512  # with fewer rows than this, several programs share a row's tangents
ALIGNMENT = 16
WARP = 64 if torch.version.hip else 32


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, `kernel[grid](*arguments, **constants)`, and the tensor that it writes."""

    kernel: Any
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    target: Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """What is normalised and how. `spatial` 0: a row norm; else `groups` groups, whose channels have that many
    elements."""

    size: int
    eps: float
    centered: bool = True
    groups: int = 1
    spatial: int = 0
    silu: bool = False


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """Dense, beginning on a multiple of 16 bytes: kernels that load narrower would add up in another order."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if _is_aligned(tensor) else tensor.clone()


def _modulation(tensor: Tensor | None, norm: Norm, rows: int, vector: int) -> tuple[Tensor | None, int, int]:
    """(rows of modulation, groups of `vector` elements from one to the next, rows of x that share one)."""
    if tensor is None:
        return None, 0, 1
    tensor = tensor.reshape(-1, norm.size)
    dense = tensor.stride(1) == 1 or norm.size == 1
    if not dense or not _is_aligned(tensor) or tensor.stride(0) % vector:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor, tensor.stride(0) // vector, rows // tensor.shape[0]


def _tile(size: int, itemsize: int, whole_row_bytes: int, block_bytes: int, warp: int) -> tuple[bool, dict[str, int]]:
    """(rows fit in registers, the tile's constants)."""
    whole = size * itemsize <= whole_row_bytes
    block = triton.next_power_of_2(size) if whole else block_bytes // itemsize
    rows = max(TILE_BYTES // (block * itemsize), 1) if whole else 1
    bytes_per_thread = BYTES_PER_THREAD if whole else SPLIT_BYTES_PER_THREAD
    threads = min(max(rows * block * itemsize // bytes_per_thread, warp), MOST_THREADS)
    return whole, {"BLOCK": block, "num_warps": threads // warp} | ({"ROWS": rows} if whole else {})


def plan(
    x: Tensor,
    norm: Norm,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
    whole_row_bytes: int = WHOLE_ROW_BYTES,
    block_bytes: int = BLOCK_BYTES,
    few_programs: int = FEW_PROGRAMS,
    warp: int = WARP,
) -> Launch:
    """What a norm launches; the sizes are the constants above."""
    dtype = compute_dtype(x)
    vectors = [tensor for tensor in (x, multiplier, addend) if tensor is not None]
    vector = math.gcd(norm.size, ALIGNMENT // max(tensor.element_size() for tensor in vectors))
    rows, tangents = row_count(x, norm.size), x.shape[0] - 1
    target = out if _is_aligned(out) else torch.empty_like(out)
    multiplier, multiplier_stride, multiplier_every = _modulation(multiplier, norm, rows, vector)
    addend, addend_stride, addend_every = _modulation(addend, norm, rows, vector)
    whole, tile = _tile(norm.size, dtype.itemsize, whole_row_bytes, block_bytes, warp)
    programs = -(-rows // tile.get("ROWS", 1))
    shares = min(max(few_programs // programs, 1), max(tangents, 1))
    count = max(-(-tangents // shares), 1)
    arguments = (
        target, _aligned(x), _aligned(weight), _aligned(bias), multiplier, addend, multiplier_stride, addend_stride,
        multiplier_every, addend_every, rows, tangents, count,
    )  # fmt: skip
    constants = {
        "EPS": norm.eps, "SIZE": norm.size, "SPATIAL": norm.spatial, "GROUPS": norm.groups, "CENTERED": norm.centered,
        "SILU": norm.silu, "DTYPE": tl.float64 if dtype is torch.float64 else tl.float32, "VECTOR": vector, **tile,
    }  # fmt: skip
    kernel = dual_norm_kernels.whole_rows if whole else dual_norm_kernels.split_rows
    return Launch(kernel, (programs, max(-(-tangents // count), 1)), arguments, constants, target)


def _launch(
    x: Tensor,
    norm: Norm,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
    sizes: dict[str, int],
) -> None:
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        launch = plan(x, norm, weight, bias, multiplier, addend, out, **sizes)
        launch.kernel[launch.grid](*launch.arguments, **launch.constants)
        if launch.target is not out:
            out.copy_(launch.target)


def dual_layer_norm_triton(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
    **sizes: int,
) -> None:
    """The contract of `fastdensity.ops.dual_norm.dual_layer_norm`, on the caller's stream; `sizes` as in `plan`."""
    _launch(x, Norm(size, eps), weight, bias, multiplier, addend, out, sizes)


def dual_rms_norm_triton(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
    **sizes: int,
) -> None:
    """The contract of `fastdensity.ops.dual_norm.dual_rms_norm`, on the caller's stream; `sizes` as in `plan`."""
    _launch(x, Norm(size, eps, centered=False), weight, None, multiplier, addend, out, sizes)


def dual_group_norm_triton(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    out: Tensor,
    **sizes: int,
) -> None:
    """The contract of `fastdensity.ops.dual_norm.dual_group_norm`, on the caller's stream; `sizes` as in `plan`."""
    spatial = x.shape[3:].numel()
    norm = Norm(x.shape[2] // groups * spatial, eps, True, groups, spatial, activation == "silu")
    _launch(x, norm, weight, bias, None, None, out, sizes)
