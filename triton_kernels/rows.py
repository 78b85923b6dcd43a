"""Launches the row kernels with Triton: which kernel, how large a tile, what alignment.

Every choice follows from the row's length D and the dtypes alone, never from the batch: a row's result is the same
bit for bit whatever its batch-mates. Nothing here waits for the device.
"""

from __future__ import annotations

import math
import struct
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdensity import rules
from fastdensity.reference.rows import NoiseKey, Operands, Parameter, compute_dtype
from fastdensity.triton_kernels import rows_kernels
from fastdensity.triton_kernels.rows_scalars import BIT_PATTERN_KEY

# A row is held in registers up to this size, in the dtype of the arithmetic, or half of it with noise, which is one
# more vector and has to be made: what fits without spilling, see docs/kernels.md.
WHOLE_ROW_BYTES = 64 * 1024
TILE_BYTES = 16 * 1024  # longer ones are cut into tiles of this size
MOST_CHUNKS = 512  # partial sums per row at most: every tile adds them up again
BYTES_PER_THREAD = 128
MOST_THREADS = 256
WARP = 64 if torch.version.hip else 32
QUANTILE = rules.STEP_PARAMETERS.index("q")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[grid,](*arguments, **constants)`."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@cache
def mixes_state(kind: str) -> bool:
    """Is the direction of this prediction type made of the state too? Read off the rule table.

    A coefficient that is the literal 0.0 stays a float there, a computed one becomes complex.
    """
    number = 1 + 0j
    along_x = rules.direction(kind, number, number, number, number)[0]
    return not (isinstance(along_x, float) and along_x == 0.0)


def _bits(number: float) -> int:
    (pattern,) = struct.unpack("q", struct.pack("d", number))
    return int(pattern) ^ BIT_PATTERN_KEY.value


def _number(parameter: Parameter, rows: int) -> tuple[int | Tensor, bool]:
    """What a kernel takes for one parameter, and whether each row has its own."""
    if not isinstance(parameter, Tensor):
        return _bits(parameter), False
    per_row = parameter.shape == (rows,) and (rows == 1 or parameter.stride(0) != 0)
    return (parameter.contiguous() if per_row else parameter), per_row


def _quantile_term(q: float, columns: int) -> float:
    """sqrt(2 D) ndtri(q); NaN, which the kernel flags, outside (0, 1). Algorithm AS 241, as in the kernel."""
    return math.sqrt(2.0 * columns) * NormalDist().inv_cdf(q) if 0.0 < q < 1.0 else math.nan


def _numbers(rule: str, parameters: tuple[Parameter, ...], rows: int, columns: int) -> tuple[list[Any], int]:
    """The ten numbers of a kernel (None where the rule has fewer), and the bits of those that are one per row."""
    if rule in ("prediction", "step") and not isinstance(parameters[QUANTILE], Tensor):
        term = _quantile_term(parameters[QUANTILE], columns)  # type: ignore[arg-type]
        parameters = (*parameters[:QUANTILE], term, *parameters[QUANTILE + 1 :])
    pairs = [_number(parameter, rows) for parameter in parameters]
    padding = [None] * (len(rows_kernels.NUMBERS) - len(pairs))
    return [number for number, _ in pairs] + padding, sum(per_row << index for index, (_, per_row) in enumerate(pairs))


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
    size = group * tensor.element_size()
    rows_aligned = tensor.shape[0] == 1 or tensor.stride(0) % group == 0
    return rows_aligned and tensor.data_ptr() % size == 0


def _aligned(operand: Tensor | None, group: int) -> Tensor | None:
    """The operand, or a copy if its rows begin off the boundaries that their length would allow.

    A kernel for such rows would load narrower and add a row's squares up in another order: other bits.
    """
    if operand is None or _is_aligned(operand, group):
        return operand
    return operand.clone(memory_format=torch.contiguous_format)


def _stride(tensor: Tensor | None, group: int) -> int:
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0) // group


def _warps(tile: int, itemsize: int, warp: int) -> int:
    """Warps for a tile. Few threads with much each: every one of them repeats the arithmetic of the row's scalars."""
    return min(max(tile * itemsize // BYTES_PER_THREAD, warp), MOST_THREADS) // warp


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
) -> list[Launch]:
    """The one or two launches of a call; `out`'s rows must be aligned. The sizes are the constants above."""
    rows, columns = out.shape[0], out.numel() // out.shape[0]
    dtype = compute_dtype(operands)
    noise = _noise(rule, operands, noise_key)
    read = _read(rule, kind, operands, noise)
    group = _group(columns, [tensor for tensor in (*read, out) if tensor is not None], noise)
    read = tuple(_aligned(operand, group) for operand in read)  # type: ignore[assignment]
    numbers, per_row = _numbers(rule, parameters, rows, columns)
    seed, sample_ids, step = noise_key if noise_key is not None and noise == "drawn" else (0, None, 0)
    vectors = (*read, _stride(out, group), *(_stride(operand, group) for operand in read))
    shared = (*vectors, sample_ids, seed, step, columns // group)
    constants: dict[str, Any] = {
        "RULE": rule, "KIND": kind, "MIXED": mixes_state(kind), "NOISE": noise, "PER_ROW": per_row,
        "DTYPE": tl.float64 if dtype is torch.float64 else tl.float32, "VECTOR": group, "enable_fp_fusion": True,
    }  # fmt: skip
    whole = max(triton.next_power_of_2(columns), 4 * warp)
    if columns * dtype.itemsize <= (whole_row_bytes if noise == "none" else whole_row_bytes // 2):
        constants |= {"TILE": whole, "num_warps": _warps(whole, dtype.itemsize, warp)}
        return [Launch(rows_kernels.whole_rows, rows, (out, report, *shared, *numbers), constants)]
    tile = tile_bytes // dtype.itemsize
    tiles = -(-columns // tile)
    chunk_tiles = -(-tiles // most_chunks)
    chunks = -(-tiles // chunk_tiles)
    sums = torch.empty((rows, chunks, 2), dtype=torch.float64, device=out.device)
    arguments = (out, report, sums, *shared, chunks, *numbers)
    constants |= {"TILE": tile, "num_warps": _warps(tile, dtype.itemsize, warp), "CHUNK_TILES": chunk_tiles}
    constants["CHUNKS"] = triton.next_power_of_2(chunks)
    return [
        Launch(rows_kernels.partial_sums, rows * chunks, arguments, constants),
        Launch(rows_kernels.finish_rows, rows * tiles, arguments, constants),
    ]


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
        target = out if _is_aligned(out, 8) else torch.empty_like(out)
        for launch in plan(rule, kind, operands, parameters, noise_key, target, report, **sizes):
            launch.kernel[launch.grid,](*launch.arguments, **launch.constants)
        if target is not out:
            out.copy_(target)
