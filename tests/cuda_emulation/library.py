"""Builds csrc/rows_cuda.cu, or another source, with the CPU's compiler and the header beside this file."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from rows_cases import Problem
from torch import Tensor

from fastdensity import rules
from fastdensity.reference.rows import compute_dtype

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Rows of the small blocks that the emulation runs (csrc/rows_cuda_kernels.cuh): the longest of each regime.
SMALL_BLOCK, LARGE_BLOCK, ONE_TILE_CHUNKS = 1024, 4096, 73_728
GUARD = 64  # bytes after the scratch that nobody may write


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("row_stride", ctypes.c_int64)]


class Parameter(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64), ("value", ctypes.c_double),
    ]  # fmt: skip


class RowsCall(ctypes.Structure):
    """fastdensity::RowsCall of csrc/ops.h, field by field."""

    _fields_ = [
        ("rule", ctypes.c_int), ("type", ctypes.c_int), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64),
        ("v0", Rows), ("v1", Rows), ("uncond", Rows), ("v2", Rows),
        ("out", ctypes.c_void_p), ("out_dtype", ctypes.c_int), ("out_stride", ctypes.c_int64),
        ("parameters", Parameter * 10), ("report", ctypes.c_void_p),
        ("seed", ctypes.c_uint64), ("sample_ids", ctypes.c_void_p), ("step", ctypes.c_uint32),
    ]  # fmt: skip


def build(
    folder: Path, source: str = "rows_cuda.cu", entry: str = "entry.cpp", call: type[ctypes.Structure] = RowsCall
) -> ctypes.CDLL | None:
    """The library of one CUDA source, or None where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    target = folder / f"lib{Path(source).stem}_emulated.so"
    command = [
        compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", "-fsanitize=alignment,bounds,shift,signed-integer-overflow",
        "-fno-sanitize-recover=all", "-DFASTDENSITY_CUDA_EMULATION", "-I", str(HERE), "-I", str(SOURCES),
        "-x", "c++", str(SOURCES / source), str(HERE / entry), "-o", str(target),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.run.restype = ctypes.c_char_p
    library.call_bytes.restype = library.scratch_bytes.restype = ctypes.c_int64
    assert library.call_bytes() == ctypes.sizeof(call)
    return library


def _rows(vector: Tensor | None) -> Rows:
    return Rows() if vector is None else Rows(vector.data_ptr(), DTYPES[vector.dtype], vector.stride(0))


def _parameter(value: Any) -> Parameter:
    if not isinstance(value, Tensor):
        return Parameter(value=value)
    return Parameter(value.data_ptr(), DTYPES[value.dtype], value.stride(0) if value.numel() > 1 else 0)


def launch(
    library: ctypes.CDLL, problem: Problem, out: Tensor | None = None, report: bool = True, order: int = 0
) -> tuple[Tensor, Tensor, int]:
    """(out, report, number of kernels started). `order` seeds the order in which threads and blocks run."""
    if out is None:
        out = torch.full(problem.like.shape, float("nan"), dtype=problem.like.dtype)
    numbers = torch.full((out.shape[0], 4), float("nan"), dtype=compute_dtype(problem.operands))  # type: ignore[arg-type]
    seed, ids, step = problem.noise_key or (0, None, 0)
    vectors = [_rows(operand) for operand in problem.operands]
    parameters = (Parameter * 10)(*map(_parameter, problem.parameters))
    call = RowsCall(
        rules.RULES.index(problem.rule), rules.PREDICTION_TYPES.index(problem.kind), *out.shape, *vectors,
        out.data_ptr(), DTYPES[out.dtype], out.stride(0), parameters, numbers.data_ptr() if report else None,
        seed, None if ids is None else ids.data_ptr(), step,
    )  # fmt: skip
    size = library.scratch_bytes(ctypes.byref(call))
    scratch = torch.full((size + GUARD,), 0xA5, dtype=torch.uint8)
    launches = ctypes.c_int64()
    error = library.run(
        ctypes.byref(call), ctypes.c_void_p(scratch.data_ptr() if size else None), order, ctypes.byref(launches)
    )
    assert error is None, error
    assert (scratch[size:] == 0xA5).all()
    return out, numbers, launches.value
