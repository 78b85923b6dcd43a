"""The variants of the probe kernels that benchmarks/offline.py compiles."""

from __future__ import annotations

import torch

from benchmarks.offline_dual import DualCase, Shape
from fastdensity.reference.probe import STREAM_MEASURE

PROBES, SAMPLES = 4, 8


def _forms(distribution: str, dtype: str, columns: int) -> DualCase:
    # a tile gives a thread 32 elements, or 16 where warps are wide
    due = getattr(torch, dtype).itemsize
    return DualCase(
        "probe",
        f"forms, {distribution}, {dtype}, D={columns}",
        (
            Shape(dtype, (PROBES, SAMPLES, columns)),
            *(1, Shape("int64", (SAMPLES,)), 3, 0, distribution, STREAM_MEASURE),
        ),
        Shape("float64", (PROBES, SAMPLES)),
        due,
        kernels=("sum_probes",),
        function="probe_forms_triton",
    )


def _make(distribution: str, dtype: str, columns: int) -> DualCase:
    return DualCase(
        "probe",
        f"make, {distribution}, {dtype}, D={columns}",
        (
            *(1, Shape("int64", (SAMPLES,)), 3, 0, PROBES, columns),
            *(distribution, STREAM_MEASURE, getattr(torch, dtype)),
        ),
        Shape(dtype, (PROBES, SAMPLES, columns)),
        0,
        function="make_probes_triton",
    )


def cases(target: str, brief: bool = False) -> list[DualCase]:
    """Both operators; signs, normals and what each takes besides; every dtype, a row of one chunk and of many."""
    found = [
        _forms("hadamard", "float32", 196_608),
        _forms("sphere", "float32", 196_608),
        _forms("rademacher", "bfloat16", 3_072),
        _make("sphere", "bfloat16", 196_608),
        _make("hadamard", "float32", 3_072),
    ]
    if not brief or target == "sm_90":
        found += [
            _forms("rademacher", "float32", 3_072),
            _forms("normal", "float32", 3_072),
            _forms("normal", "bfloat16", 196_608),
            _forms("sphere", "float64", 196_608),
            _forms("hadamard", "float16", 3_000),
            _make("rademacher", "float32", 196_608),
            _make("normal", "float32", 3_072),
            _make("sphere", "float64", 3_072),
        ]
    return found
