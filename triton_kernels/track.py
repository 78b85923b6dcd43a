"""Launches the closed loop's kernel with Triton: how large a tile, how wide it is read.

Every choice follows from the row's length and the dtypes, never from the batch: a row's result is the same bit for bit
whatever its batch-mates. Nothing here waits for the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdensity.reference.rows import Parameter
from fastdensity.reference.track import PARAMETERS, Operands, Step
from fastdensity.triton_kernels import track_kernels
from fastdensity.triton_kernels.rows import (
    MOST_PROGRAMS,
    WARP,
    Launch,
    _aligned,
    _group,
    _is_aligned,
    _noise,
    mixes_state,
)
from fastdensity.triton_kernels.rows_arguments import pack

# Of a row, in the dtype of the arithmetic, that a program holds at a time: with five operands that is half of what the
# row kernels take, for the same number of threads. Each of them repeats the decision, up to 3,000 instructions.
TILE_BYTES = 8 * 1024
BYTES_PER_THREAD = 64


class Work(NamedTuple):
    """One launch, and what it writes: eps and the step's result, or aligned memory in their place."""

    launches: tuple[Launch]
    targets: tuple[Tensor, ...]


def plan(
    kind: str, scheme: str, operands: Operands, parameters: tuple[Parameter, ...], memory: Tensor,
    eps: Tensor, report: Tensor, memory_out: Tensor, step: Step | None = None, tile_bytes: int = TILE_BYTES,
) -> Work:  # fmt: skip
    """What `launch_triton` launches; its sizes are the constants above."""
    rows, columns = eps.shape[0], eps.numel() // eps.shape[0]
    if rows > MOST_PROGRAMS:
        raise ValueError(f"{rows} rows need as many programs, more than {MOST_PROGRAMS}")
    rule, noise, key, out, step_report = ("none", None, None, None, None) if step is None else step
    source = _noise(rule, (None, None, None, noise), key)
    x, prediction, uncond, last_x, last_eps = operands
    if last_x is None or last_eps is None:
        last_x = last_eps = None
    read = (x, prediction, uncond, last_x, last_eps, noise)
    written = (eps,) if out is None else (eps, out)
    dtype = eps.dtype
    group = _group(columns, [tensor for tensor in (*read, *written) if tensor is not None], source)
    targets = tuple(tensor if _is_aligned(tensor, group) else torch.empty_like(tensor) for tensor in written)
    vectors = [_aligned(operand, group) for operand in read]
    numbers, per_row = pack(parameters, PARAMETERS.index("q"), rows, columns)
    tile = min(max(triton.next_power_of_2(columns), 4 * WARP), tile_bytes // dtype.itemsize)
    constants = {
        "RULE": rule, "KIND": kind, "MIXED": mixes_state(kind), "NOISE": source, "SCHEME": scheme, "PER_ROW": per_row,
        "DTYPE": tl.float64 if dtype is torch.float64 else tl.float32, "VECTOR": group, "enable_fp_fusion": True,
        "TILE": tile, "num_warps": max(tile * dtype.itemsize // BYTES_PER_THREAD // WARP, 1),
    }  # fmt: skip
    seed, sample_ids, index = key if key is not None and source == "drawn" else (0, None, 0)
    target = None if out is None else targets[1]
    arguments = (
        targets[0], report, memory_out, target, step_report, *vectors, memory, sample_ids, seed, index,
        columns // group, *numbers,
    )  # fmt: skip
    return Work((Launch(track_kernels.track_rows, rows, arguments, constants),), targets)


def launch_triton(
    kind: str, scheme: str, operands: Operands, parameters: tuple[Parameter, ...], memory: Tensor,
    eps: Tensor, report: Tensor, memory_out: Tensor, step: Step | None = None, **sizes: int,
) -> None:  # fmt: skip
    """Run on the caller's current stream of the device that holds `eps`; the contract of `fastdensity.reference.track`.

    All tensors dense, operands (B, *), parameters floats or tensors of shape (), (1,) or (B,). `sizes` are those of
    `plan`.
    """
    with torch.cuda.device(eps.device) if eps.is_cuda else nullcontext():
        work = plan(kind, scheme, operands, parameters, memory, eps, report, memory_out, step, **sizes)
        for launch in work.launches:
            launch.kernel[launch.grid,](*launch.arguments, **launch.constants)
        wanted = (eps,) if step is None else (eps, step.out)
        for tensor, target in zip(wanted, work.targets, strict=True):
            if target is not tensor:
                tensor.copy_(target)
