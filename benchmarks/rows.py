"""The rows family on the CPU against plain torch: `python -m benchmarks.run rows`.

Rivals: the formula in plain eager torch, tuned eager (vector_norm, addcmul), and torch.compile of the formula, each
allocating its result and writing into a given one. Floor: a triad of the same streams, compiled with the same
compiler, with and without stores past the cache, whichever is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdensity as fd
from benchmarks import peers
from benchmarks.cases import ROW_SHAPES, least_bytes
from benchmarks.harness import Timing, Variant, measure
from fastdensity._backend import native

Path = tuple[float, float, float, float]
PATH: Path = (0.6, 0.8, 0.66, 0.75)
Q = 0.4


def triad_variants(rows: int, columns: int, reads: int) -> dict[str, Variant]:
    """The fastest way known to read `reads` streams and write one: the floor, as two candidates."""
    streams = [torch.randn(rows, columns) for _ in range(reads)]
    while len(streams) < 3:
        streams.append(streams[-1])  # a repeated stream is in the cache already: it costs no memory traffic
    out = torch.empty(rows, columns)
    addresses = [stream.data_ptr() for stream in streams]
    extension, threads = native(), torch.get_num_threads()

    def variant(streaming: bool) -> Variant:
        def call(held: list[Tensor] = streams) -> None:
            extension.triad(*addresses, 0.5, 0.1, rows * columns, out.data_ptr(), streaming, threads)

        return call

    return {"floor: triad": variant(False), "floor: triad, past the cache": variant(True)}


def drift_variants(rows: int, columns: int) -> tuple[dict[str, Variant], Callable[[], Tensor]]:
    """Variants of x + dt (u + (div + b) s / ||s||^2), and the float64 answer."""
    x, u, score = (torch.randn(rows, columns) for _ in range(3))
    div, b, dt, out = torch.randn(rows), 0.5, 0.01, torch.empty(rows, columns)
    compiled = torch.compile(peers.guided_drift_eager, dynamic=False)
    compiled_into = torch.compile(peers.guided_drift_into, dynamic=False)
    variants: dict[str, Variant] = {
        "fastdensity, out=": lambda: fd.guided_drift(x, u, score, div, b, dt=dt, out=out),
        "fastdensity": lambda: fd.guided_drift(x, u, score, div, b, dt=dt),
        "tuned eager, out=": lambda: peers.guided_drift_tuned(x, u, score, div, b, dt, out),
        "tuned eager": lambda: peers.guided_drift_tuned(x, u, score, div, b, dt),
        "eager": lambda: peers.guided_drift_eager(x, u, score, div, b, dt),
        "torch.compile, out=": lambda: compiled_into(x, u, score, div, b, dt, out),
        "torch.compile": lambda: compiled(x, u, score, div, b, dt),
    }
    return variants, lambda: peers.guided_drift_eager(x.double(), u.double(), score.double(), div.double(), b, dt)


def step_variants(rows: int, columns: int) -> tuple[dict[str, Variant], Callable[[], Tensor]]:
    """Variants of the quantile-guided DDIM step, and the float64 answer."""
    x, eps, out = torch.randn(rows, columns), torch.randn(rows, columns), torch.empty(rows, columns)
    names = ("alpha", "sigma", "alpha_next", "sigma_next")
    path: dict[str, Any] = dict(zip(names, PATH, strict=True))
    shift = peers.quantile_shift(Q, columns)
    compiled = torch.compile(peers.guided_step_eager, dynamic=False)
    compiled_into = torch.compile(peers.guided_step_into, dynamic=False)
    variants: dict[str, Variant] = {
        "fastdensity, out=": lambda: fd.guided_step(x, eps, **path, q=Q, out=out).sample,
        "fastdensity": lambda: fd.guided_step(x, eps, **path, q=Q).sample,
        "tuned eager, out=": lambda: peers.guided_step_tuned(x, eps, *PATH, shift, out),
        "tuned eager": lambda: peers.guided_step_tuned(x, eps, *PATH, shift),
        "eager": lambda: peers.guided_step_eager(x, eps, *PATH, shift),
        "torch.compile, out=": lambda: compiled_into(x, eps, *PATH, shift, out),
        "torch.compile": lambda: compiled(x, eps, *PATH, shift),
    }
    return variants, lambda: peers.guided_step_eager(x.double(), eps.double(), *PATH, shift)


def check(variants: dict[str, Variant], exact: Tensor) -> None:
    """Refuses to time a variant that is wrong."""
    for name, variant in variants.items():
        result = variant()
        assert isinstance(result, Tensor)
        error = float((result.double() - exact).norm() / exact.norm())
        if not error < 1e-6:
            raise SystemExit(f"{name} is wrong (relative error {error:.1e}): not timed")


def overhead(rounds: int) -> Timing:
    """A checked call on four small tensors, where nothing but the call itself costs anything."""
    x, u, score, div, out = (
        torch.randn(4, 64),
        torch.randn(4, 64),
        torch.randn(4, 64),
        torch.randn(4),
        torch.empty(4, 64),
    )
    return measure(
        {
            "fastdensity.guided_drift": lambda: fd.guided_drift(x, u, score, div, 0.5, dt=0.01),
            "fastdensity.guided_drift, out=": lambda: fd.guided_drift(x, u, score, div, 0.5, dt=0.01, out=out),
            "fastdensity.guided_step": lambda: fd.guided_step(
                x, u, alpha=0.6, sigma=0.8, alpha_next=0.66, sigma_next=0.75, q=0.4
            ),
            "torch.add": lambda: torch.add(x, u),
        },
        rounds,
        seconds=0.01,
    )


def run(rounds: int = 30) -> list[dict[str, object]]:
    """One record per rule and shape: seconds of each variant, the floor, how many rounds were thrown away."""
    records: list[dict[str, object]] = []
    for rule, make in (("guided_drift", drift_variants), ("guided_step", step_variants)):
        for rows, columns in ROW_SHAPES:
            torch.manual_seed(0)
            variants, exact = make(rows, columns)
            check(variants, exact())
            floors = triad_variants(rows, columns, 3 if rule == "guided_drift" else 2)
            timing = measure({**variants, **floors}, rounds)
            records.append(_record(rule, f"{rows} x {columns:,}", least_bytes(rule, rows, columns), timing))
    records.append(_record("call overhead", "4 x 64", 0, overhead(rounds)))
    return records


def _record(rule: str, shape: str, bytes_moved: int, timing: Timing) -> dict[str, object]:
    return {
        "rule": rule,
        "shape": shape,
        "least_bytes": bytes_moved,
        "median_seconds": timing.medians(),
        "rounds_discarded": timing.discarded,
        "undisturbed": timing.guarded,
    }
