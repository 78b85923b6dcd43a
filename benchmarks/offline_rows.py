"""The variants of the row kernels that benchmarks/offline.py compiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.offline import TARGETS, Launch
from fastdensity import rules
from fastdensity.reference.rows import Operands, Parameter, compute_dtype

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
LONG_ROW = 196_608  # 3 x 256 x 256, more than is held in registers


@dataclass(frozen=True)
class RowsCase:
    """A call of the rows contract: state and prediction dtypes, row length, and what is optional."""

    rule: str
    kind: str = "epsilon"
    state: str = "float32"
    prediction: str = "float32"
    columns: int = 4096
    uncond: bool = False
    noise: str = "none"
    rows: int = 4
    room = "rows"

    def __str__(self) -> str:
        dtypes = self.state if self.state == self.prediction else f"{self.state}/{self.prediction}"
        options = ["cfg"] * self.uncond + [f"noise {self.noise}"] * (self.noise != "none")
        kind = f" {self.kind}" if self.rule in ("prediction", "step") else ""
        return ", ".join([f"{self.rule}{kind}", dtypes, f"D={self.columns}", *options])

    def launches(self, target: str) -> list[Launch]:
        """Its one or two kernels, chosen by `fastdensity.triton_kernels.rows.plan` as in a real call."""
        from fastdensity.triton_kernels.rows import plan

        warp = TARGETS[target][2]
        return [
            Launch(launch.kernel, launch.arguments, launch.constants, _wide_loads_due(launch, warp))
            for launch in plan(*_call(self), warp=warp).launches
        ]


def cases(target: str, brief: bool = False) -> list[RowsCase]:
    """Every rule and prediction type; the dtypes and both regimes on the type with the most arithmetic, EDM.

    Prediction types differ in a few scalar instructions, so all of them are compiled for one target only; in brief,
    dtypes too, but for the one with the most registers.
    """
    edm = partial(RowsCase, "step", "edm")
    found = []
    if target == "sm_90":
        found += [RowsCase("prediction", kind) for kind in rules.PREDICTION_TYPES]
        found += [RowsCase("step", kind, noise="drawn") for kind in rules.PREDICTION_TYPES]
    dtypes = [("float32", "float32", 16_384), ("float32", "bfloat16", 16_384), ("float64", "float64", 8_192)]
    for state, prediction, longest in dtypes[:1] if brief and target != "sm_90" else dtypes:
        found += [
            RowsCase("drift", "epsilon", state, prediction, longest),
            edm(state, prediction, longest, uncond=True),
            edm(state, prediction, longest // 2, noise="drawn"),
            edm(state, prediction, LONG_ROW, uncond=True, noise="drawn"),
        ]
    return [
        *found,
        RowsCase("drift", columns=LONG_ROW),
        RowsCase("radius", columns=16_384),
        edm(columns=8_192, uncond=True, noise="given"),
        RowsCase("prediction", "edm", "bfloat16", "bfloat16", 16_384),
    ]


def _call(variant: RowsCase) -> tuple[Any, ...]:
    """The arguments of `plan`, as tensors that have no memory. q is a tensor: its quantile is found in the kernel."""

    def vector(dtype: str) -> Tensor:
        return torch.empty(variant.rows, variant.columns, dtype=DTYPES[dtype], device="meta")

    x, p = vector(variant.state), vector(variant.prediction)
    noise_key = None
    operands: Operands
    parameters: tuple[Parameter, ...]
    if variant.rule == "drift":
        operands, parameters = (x, p, None, p), (0.1, 0.2, 0.3)
    elif variant.rule == "radius":
        operands, parameters = (x, None, None, None), (5.0,)
    else:
        quantile = torch.empty(variant.rows, device="meta")
        operands = (x, p, p if variant.uncond else None, x if variant.noise == "given" else None)
        parameters = (0.1, 0.2, 0.3, 0.4, quantile, 0.6, 0.7, 0.8, 0.9, 0.5)
        if variant.noise == "drawn":
            noise_key = (1, torch.empty(variant.rows, dtype=torch.int64, device="meta"), 3)
    out = torch.empty_like(p if variant.rule == "prediction" else x)
    report = torch.empty(variant.rows, 4, dtype=compute_dtype(operands), device="meta")
    return variant.rule, variant.kind, operands, parameters, noise_key, out, report


def _wide_loads_due(launch: Any, warp: int) -> int:
    """How many 16-byte loads a thread makes at least if operands are read that wide; sums need one of them or more."""
    constants = launch.constants
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    vectors = [named[name] for name in ("v0", "v1", "uncond", "v2") if named[name] is not None]
    wide = sum(vector.element_size() * constants["VECTOR"] == 16 for vector in vectors)
    if launch.kernel.__name__ == "partial_sums":
        wide = int(wide == len(vectors))
    return wide * constants["TILE"] // (constants["num_warps"] * warp * constants["VECTOR"])
