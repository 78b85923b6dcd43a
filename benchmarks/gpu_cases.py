"""The rows benchmark on a CUDA device: inputs, variants and exact answers of each case.

A case is a rule and the element types of its operands. fastdensity runs on each of its backends; the rivals are
those of benchmarks/peers.py, with what mixed types and classifier-free guidance add to the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastdensity as fd
from benchmarks import peers
from benchmarks.gpu_timing import Call, Variant, sets_beyond_cache

Make = Callable[["Inputs"], Call]
ENDS = (0.6, 0.8, 0.66, 0.75)
PATH: dict[str, Any] = dict(zip(("alpha", "sigma", "alpha_next", "sigma_next"), ENDS, strict=True))
DEVICE = "cuda"
Q, CFG, DT, B = 0.4, 4.0, 0.01, 0.5


@dataclass
class Inputs:
    """The operands of one call: x, then u and score, or the predictions (the last one unconditional)."""

    vectors: tuple[Tensor, ...]
    out: Tensor
    div: Tensor
    numbers: dict[str, Tensor]  # the path and q once more, one number per row
    shift: float  # q in nats: sqrt(2 D) ndtri(q)

    def exact(self, eager: Callable[..., Tensor]) -> Tensor:
        """What `eager` makes of these numbers in float64."""
        return eager(*(vector.double() for vector in self.vectors), self.div.double(), self.shift)


@dataclass(frozen=True)
class Case:
    """What is computed on what: `vectors` operands in all, the state in float32, the others in `dtype`."""

    name: str
    vectors: int
    dtype: torch.dtype
    ours: Callable[[Inputs, Tensor | None], Tensor]
    eager: Callable[..., Tensor]  # of the vectors, div and shift
    tuned: Callable[[Inputs, Tensor | None], Tensor] | None = None
    autotuned: bool = False  # also against max-autotune, which takes long to compile

    def least_bytes(self, rows: int, columns: int) -> int:
        """Each operand read once, the result written once."""
        return rows * columns * (4 + (self.vectors - 1) * self.dtype.itemsize + 4)

    def inputs(self, rows: int, columns: int, generator: torch.Generator) -> Inputs:
        def vector(dtype: torch.dtype) -> Tensor:
            return torch.randn(rows, columns, device=DEVICE, generator=generator).to(dtype)

        vectors = (vector(torch.float32), *(vector(self.dtype) for _ in range(self.vectors - 1)))
        div = torch.randn(rows, device=DEVICE, generator=generator)
        numbers = {name: torch.full_like(div, value) for name, value in (PATH | {"q": Q}).items()}
        out = torch.full_like(vectors[0], float("nan"))
        return Inputs(vectors, out, div, numbers, peers.quantile_shift(Q, columns))


def _drift(inputs: Inputs, out: Tensor | None) -> Tensor:
    x, u, score = inputs.vectors
    return fd.guided_drift(x, u, score, inputs.div, B, dt=DT, out=out)


def _drift_eager(x: Tensor, u: Tensor, score: Tensor, div: Tensor, shift: float) -> Tensor:
    return peers.guided_drift_eager(x, u, score, div, B, DT)


def _drift_tuned(inputs: Inputs, out: Tensor | None) -> Tensor:
    x, u, score = inputs.vectors
    return peers.guided_drift_tuned(x, u, score, inputs.div, B, DT, out)


def _step(inputs: Inputs, out: Tensor | None) -> Tensor:
    x, eps = inputs.vectors
    return fd.guided_step(x, eps, **PATH, q=Q, out=out).sample


def _step_per_row(inputs: Inputs, out: Tensor | None) -> Tensor:
    x, eps = inputs.vectors
    numbers: dict[str, Any] = dict(inputs.numbers)
    return fd.guided_step(x, eps, **numbers, out=out).sample


def _step_eager(x: Tensor, eps: Tensor, div: Tensor, shift: float) -> Tensor:
    return peers.guided_step_eager(x, eps.to(x.dtype), *ENDS, shift)


def _tuned(x: Tensor, eps: Tensor, shift: float, out: Tensor | None) -> Tensor:
    return peers.guided_step_tuned(x, eps, *ENDS, shift, out)


def _step_tuned(inputs: Inputs, out: Tensor | None) -> Tensor:
    x, eps = inputs.vectors
    return _tuned(x, eps, inputs.shift, out)


def _cfg(inputs: Inputs, out: Tensor | None) -> Tensor:
    x, cond, uncond = inputs.vectors
    return fd.guided_step(x, cond, **PATH, q=Q, uncond=uncond, cfg_scale=CFG, out=out).sample


def _cfg_eager(x: Tensor, cond: Tensor, uncond: Tensor, div: Tensor, shift: float) -> Tensor:
    base = uncond.to(x.dtype)
    return _step_eager(x, base + CFG * (cond.to(x.dtype) - base), div, shift)


def _cfg_tuned(inputs: Inputs, out: Tensor | None) -> Tensor:
    x, cond, uncond = inputs.vectors
    return _tuned(x, torch.lerp(uncond.float(), cond.float(), CFG), inputs.shift, out)


CASES = (
    Case("guided_drift", 3, torch.float32, _drift, _drift_eager, _drift_tuned, autotuned=True),
    Case("guided_step", 2, torch.float32, _step, _step_eager, _step_tuned, autotuned=True),
    Case("guided_step, bf16 prediction", 2, torch.bfloat16, _step, _step_eager, _step_tuned),
    Case("guided_step, bf16, CFG", 3, torch.bfloat16, _cfg, _cfg_eager, _cfg_tuned),
    Case("guided_step, a number per row", 2, torch.float32, _step_per_row, _step_eager),
)


def _floor(case: Case, rows: int, columns: int, sets: int) -> Variant:
    """A device copy that moves the case's bytes: half read, half written."""
    size = case.least_bytes(rows, columns) // 2
    pairs = [torch.randint(0, 255, (2, size), dtype=torch.uint8, device=DEVICE) for _ in range(sets)]
    return Variant([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs])  # type: ignore[misc]


def _compiled(case: Case, mode: str | None) -> Callable[[Inputs], Tensor]:
    def into(*arguments: Any) -> Tensor:
        *operands, out = arguments
        return out.copy_(case.eager(*operands))  # inductor fuses the copy

    compiled = torch.compile(into, dynamic=False, mode=mode)
    return lambda inputs: compiled(*inputs.vectors, inputs.div, inputs.shift, inputs.out)


def variants(
    case: Case, rows: int, columns: int, backends: list[str], compile_modes: list[str]
) -> tuple[dict[str, Variant], list[Inputs]]:
    """All variants of a case, writing into a given output unless the name says otherwise, and their inputs."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    sets = sets_beyond_cache(case.least_bytes(rows, columns))
    inputs = [case.inputs(rows, columns, generator) for _ in range(sets)]

    def variant(make: Make, backend: str | None = None) -> Variant:
        return Variant([make(one) for one in inputs], backend)

    found = {"floor: copy": _floor(case, rows, columns, sets)}
    for name in backends:
        found[name] = variant(lambda one: lambda: case.ours(one, one.out), name)
        found[f"{name}, allocating"] = variant(lambda one: lambda: case.ours(one, None), name)
    tuned = case.tuned
    if tuned is not None:
        found["tuned eager"] = variant(lambda one: lambda: tuned(one, one.out))
        found["tuned eager, allocating"] = variant(lambda one: lambda: tuned(one, None))
        found["eager, allocating"] = variant(lambda one: lambda: case.eager(*one.vectors, one.div, one.shift))
    for mode in compile_modes:
        call = _compiled(case, None if mode == "default" else mode)
        found[f"torch.compile, {mode}"] = variant(lambda one, call=call: lambda: call(one))  # type: ignore[misc]
    return found, inputs
