"""Launches the row kernels with Triton: which kernel, how large a tile, what alignment.

Every choice follows from the row's length D and the dtypes, never from the batch: a row's result is the same bit for
bit whatever its batch-mates. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdensity import rules
from fastdensity.reference.rows import NoiseKey, Operands, Parameter, compute_dtype
from fastdensity.triton_kernels import rows_kernels
from fastdensity.triton_kernels.rows_arguments import pack_numbers

# A row is held in registers up to this size, in the dtype of the arithmetic, or half of it with noise, which is one
# more vector and has to be made: what fits without spilling, see docs/kernels.md.
WHOLE_ROW_BYTES = 64 * 1024
TILE_BYTES = 16 * 1024  # longer ones are cut into tiles of this size
MOST_CHUNKS = 512  # partial sums per row at most: every tile adds them up again
BYTES_PER_THREAD = 128
MOST_THREADS = 256
MOST_PROGRAMS = 2**31 - 1
WARP = 64 if torch.version.hip else 32


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: `kernel[grid,](*arguments, **constants)`."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """One or two launches in order, and the tensor that they write: `out`, or aligned memory in its place."""

    launches: tuple[Launch, ...]
    target: Tensor


@cache
def mixes_state(kind: str) -> bool:
    """Is the direction of this prediction type made of the state too? Read off the rule table.

    A coefficient that is the literal 0.0 stays a float there, a computed one becomes complex.
    """
    number = 1 + 0j
    along_x = rules.direction(kind, number, number, number, number)[0]
    return not (isinstance(along_x, float) and along_x == 0.0)


def _noise(rule: str, operands: Operands, noise_key: NoiseKey | None) -> str:
    if rule != "step":
        return "none"
    if noise_key is not None:
        return "drawn"
    return "none" if operands[3] is None else "given"


def _read(rule: str, kind: str, operands: Operands, noise: str) -> Operands:
    """The operands that the rule reads; the others are not touched."""
    v0, v1, uncond, v2 = operands
    if rule == "radius":
        return v0, None, None, None
    if rule == "drift":
        return v0, v1, None, v2
    needs_state = rule == "step" or mixes_state(kind)
    return (v0 if needs_state else None), v1, uncond, (v2 if noise == "given" else None)


def _group(columns: int, tensors: list[Tensor], noise: str) -> int:
    """How many elements are loaded at once: 16 bytes of the widest dtype, where the row's length allows it."""
    widest = 16 // max(tensor.element_size() for tensor in tensors)
    return math.gcd(columns, min(widest, 4) if noise == "drawn" else widest)


def _is_aligned(tensor: Tensor, group: int) -> bool:
    rows_aligned = tensor.shape[0] == 1 or tensor.stride(0) % group == 0
    return rows_aligned and tensor.data_ptr() % (group * tensor.element_size()) == 0


def _aligned(operand: Tensor | None, group: int) -> Tensor | None:
    """The operand, or a copy if its rows begin off the boundaries that their length would allow.

    A kernel for such rows would load narrower and add a row's squares up in another order: other bits.
    """
    if operand is None or _is_aligned(operand, group):
        return operand
    return operand.clone(memory_format=torch.contiguous_format)


def _stride(tensor: Tensor | None, group: int) -> int:
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0) // group


def _tile_options(tile: int, itemsize: int, warp: int) -> dict[str, int]:
    """Few threads with much work each: every one of them repeats the arithmetic of the row's few numbers."""
    threads = min(max(tile * itemsize // BYTES_PER_THREAD, warp), MOST_THREADS)
    return {"TILE": tile, "num_warps": threads // warp}


def _split(columns: int, tile: int, most_chunks: int) -> tuple[int, int, int]:
    """(tiles, tiles per chunk, chunks) of a row that is cut."""
    tiles = -(-columns // tile)
    chunk_tiles = -(-tiles // most_chunks)
    return tiles, chunk_tiles, -(-tiles // chunk_tiles)


def _vectors(rule: str, kind: str, operands: Operands, out: Tensor, noise: str) -> tuple[Tensor, int, tuple[Any, ...]]:
    """(what to write, elements per load, the operands to read followed by all row strides in groups of these)."""
    read = _read(rule, kind, operands, noise)
    group = _group(out.numel() // out.shape[0], [tensor for tensor in (*read, out) if tensor is not None], noise)
    target = out if _is_aligned(out, group) else torch.empty_like(out)
    vectors = [_aligned(operand, group) for operand in read]
    return target, group, (*vectors, *(_stride(vector, group) for vector in (target, *vectors)))


def plan(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    out: Tensor,
    report: Tensor | None,
    whole_row_bytes: int = WHOLE_ROW_BYTES,
    tile_bytes: int = TILE_BYTES,
    most_chunks: int = MOST_CHUNKS,
    warp: int = WARP,
) -> Plan:
    """What `launch_triton` launches; the sizes are the constants above."""
    rows, columns = out.shape[0], out.numel() // out.shape[0]
    dtype = compute_dtype(operands)
    noise = _noise(rule, operands, noise_key)
    whole = columns * dtype.itemsize <= (whole_row_bytes if noise == "none" else whole_row_bytes // 2)
    tile = max(triton.next_power_of_2(columns), 4 * warp) if whole else tile_bytes // dtype.itemsize
    tiles, chunk_tiles, chunks = _split(columns, tile, most_chunks)
    if rows * tiles > MOST_PROGRAMS:
        raise ValueError(f"{rows} rows of {columns} elements need {rows * tiles} programs, more than {MOST_PROGRAMS}")

    target, group, vectors = _vectors(rule, kind, operands, out, noise)
    numbers, per_row = pack_numbers(rule, parameters, rows, columns)
    seed, sample_ids, step = noise_key if noise_key is not None and noise == "drawn" else (0, None, 0)
    shared = (*vectors, sample_ids, seed, step, columns // group)
    constants = {
        "RULE": rule, "KIND": kind, "MIXED": mixes_state(kind), "NOISE": noise, "PER_ROW": per_row,
        "DTYPE": tl.float64 if dtype is torch.float64 else tl.float32, "VECTOR": group, "enable_fp_fusion": True,
        **_tile_options(tile, dtype.itemsize, warp),
    }  # fmt: skip
    if whole:
        return Plan((Launch(rows_kernels.whole_rows, rows, (target, report, *shared, *numbers), constants),), target)
    constants |= {"CHUNKS": triton.next_power_of_2(chunks), "CHUNK_TILES": chunk_tiles}
    sums = torch.empty((rows, chunks, 2), dtype=torch.float64, device=out.device)
    arguments = (target, report, sums, *shared, chunks, *numbers)
    first = Launch(rows_kernels.partial_sums, rows * chunks, arguments, constants)
    return Plan((first, Launch(rows_kernels.finish_rows, rows * tiles, arguments, constants)), target)


def launch_triton(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    out: Tensor,
    report: Tensor | None,
    **sizes: int,
) -> None:
    """Run on the caller's current stream of the device that holds `out`; the contract of `fastdensity.reference.rows`.

    Operands (B, *) with dense rows, parameters floats or tensors of shape (), (1,) or (B,), `out` (B, *) contiguous,
    `report` (B, 4) or None. `sizes` are those of `plan`.
    """
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        work = plan(rule, kind, operands, parameters, noise_key, out, report, **sizes)
        for launch in work.launches:
            launch.kernel[launch.grid,](*launch.arguments, **launch.constants)
        if work.target is not out:
            out.copy_(work.target)
