"""Launches the two ends of a trace with Triton; tiles are those of `dual_linear`, and no tile depends on the batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fastdensity.reference.probe import hadamard_order
from fastdensity.triton_kernels import trace_linear_kernels
from fastdensity.triton_kernels.dual_linear import MOST_STAGES, STRIP, TILES, tangents_per_program
from fastdensity.triton_kernels.probe import hadamard_rows
from fastdensity.triton_kernels.rows import Launch

# two probes of 16 bits beside the value: on tiles of `dual_linear` those of Hadamard's matrix spill
PROBE_TILES = TILES | {(2, 3): TILES[2, 4]}
MOST_PLANES = 3  # of a program of the last layer
PAIRS_AT_ONCE, TILES_AT_ONCE = 16, 64


def probe_plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, key: tuple[Any, ...], out: Tensor,
    most_stages: int = MOST_STAGES,
) -> Launch:  # fmt: skip
    """The first layer on contiguous operands; key: (seed, sample ids, step, first, columns, distribution, stream,
    rows of Hadamard's matrix)."""
    seed, ids, step, first, moved, distribution, stream, chosen = key
    tangents, rows, columns = out.shape[0] - 1, out.shape[1], out.shape[2]
    inputs = x.shape[1]
    group = tangents_per_program(tangents, activation)
    products = (1 + group) * (2 if activation == "geglu" else 1)
    block_m, block_n, block_k, warps, stages = PROBE_TILES[x.element_size(), products]
    numbers = (seed, step, stream, first, hadamard_order(moved))
    arguments = (out, x, weight, bias, ids, chosen, rows, columns, inputs, moved, tangents, *numbers)
    constants = {
        "ACTIVATION": activation, "GROUP": group, **_constants(x, inputs, block_m, block_n, block_k, distribution),
        "num_warps": warps, "num_stages": min(stages, most_stages),
    }  # fmt: skip
    grid = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) * triton.cdiv(tangents, group)
    return Launch(trace_linear_kernels.probe_tiles, grid, arguments, constants)


def form_plan(
    stacked: Tensor, weight: Tensor, bias: Tensor | None, key: tuple[Any, ...], value: Tensor, forms: Tensor,
    most_stages: int = MOST_STAGES,
) -> list[Launch]:  # fmt: skip
    """The last layer on contiguous operands; key: (seed, sample ids, step, first, distribution, stream, rows of
    Hadamard's matrix)."""
    seed, ids, step, first, distribution, stream, chosen = key
    planes, rows, inputs = stacked.shape
    columns = weight.shape[0]
    groups = -(-planes // MOST_PLANES)
    group = -(-planes // groups)
    block_m, block_n, block_k, warps, stages = TILES[stacked.element_size(), max(group, 2)]
    dtype = torch.float64 if stacked.dtype is torch.float64 else torch.float32
    tiles = triton.cdiv(columns, block_n)
    partials = torch.empty((planes - 1, rows, tiles), dtype=dtype, device=stacked.device)
    numbers = (seed, step, stream, first, hadamard_order(columns))
    arguments = (value, partials, stacked, weight, bias, ids, chosen, rows, columns, inputs, planes - 1, *numbers)
    constants = {
        "GROUP": group, **_constants(stacked, inputs, block_m, block_n, block_k, distribution),
        "num_warps": warps, "num_stages": min(stages, most_stages),
    }  # fmt: skip
    grid = triton.cdiv(rows, block_m) * tiles * groups
    pairs = (planes - 1) * rows
    sizes = {"PAIRS": PAIRS_AT_ONCE, "TILES": TILES_AT_ONCE, "num_warps": 1}
    return [
        Launch(trace_linear_kernels.form_tiles, grid, arguments, constants),
        Launch(
            trace_linear_kernels.add_partials, triton.cdiv(pairs, PAIRS_AT_ONCE), (forms, partials, pairs, tiles), sizes
        ),
    ]


def _constants(x: Tensor, inputs: int, block_m: int, block_n: int, block_k: int, distribution: str) -> dict[str, Any]:
    return {
        "DISTRIBUTION": distribution,
        "DTYPE": tl.float64 if x.dtype is torch.float64 else tl.float32,
        # the interpreter multiplies bfloat16 wrongly, the bits being those of integers there
        "WIDEN": knobs.runtime.interpret and x.dtype is torch.bfloat16,
        "DEPTH_FITS": inputs % block_k == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "STRIP": STRIP,
        "enable_fp_fusion": True,
    }


def dual_linear_probe_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    out: Tensor,
) -> None:
    """Run on the caller's current stream; the contract is that of `fastdensity.reference.trace_linear`."""
    with _on(out):
        ids = sample_ids.to(torch.int64).contiguous()
        chosen = hadamard_rows(seed, ids, step, first, count, columns, stream) if distribution == "hadamard" else None
        bias = None if bias is None else bias.contiguous()
        key = (seed, ids, step, first, columns, distribution, stream, chosen)
        _run(probe_plan(x.contiguous(), weight.contiguous(), bias, activation, key, out))


def dual_linear_trace_triton(
    stacked: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    distribution: str,
    stream: int,
    value: Tensor,
    forms: Tensor,
) -> None:
    """Run on the caller's current stream; the contract is that of `fastdensity.reference.trace_linear`."""
    with _on(value):
        ids, columns = sample_ids.to(torch.int64).contiguous(), weight.shape[0]
        chosen = None
        if distribution == "hadamard":
            chosen = hadamard_rows(seed, ids, step, first, stacked.shape[0] - 1, columns, stream)
        bias = None if bias is None else bias.contiguous()
        key = (seed, ids, step, first, distribution, stream, chosen)
        for launch in form_plan(stacked.contiguous(), weight.contiguous(), bias, key, value, forms):
            _run(launch)


def _run(launch: Launch) -> None:
    launch.kernel[launch.grid,](*launch.arguments, **launch.constants)


def _on(out: Tensor) -> Any:
    return torch.cuda.device(out.device) if out.is_cuda else nullcontext()
