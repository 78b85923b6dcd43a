"""What the closed loop costs on the CPU: `python -m benchmarks.run track`.

A guided step of 64 rows with and without its state, the torch reference of both, and a small network beside it, since
the loop's promise is a share of a step, network call included. Floor: a triad of the same streams.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fastdensity as fd
from benchmarks.harness import Variant, measure
from benchmarks.rows import triad_variants
from fastdensity._backend import use

SHAPES = ((64, 4, 64, 64), (64, 1, 8, 8))
PATH = ((0.5, 0.85), (0.6, 0.8), (0.66, 0.75))
ROUNDS = 15


def network(channels: int) -> nn.Module:
    """Three convolutions of 64 channels: the least that could be called a network."""
    layers = (nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1), nn.SiLU())
    return nn.Sequential(*layers, nn.Conv2d(64, channels, 3, padding=1)).requires_grad_(False)


def variants(shape: tuple[int, ...]) -> dict[str, Variant]:
    """A second step of a run, from the same state each time."""
    x, eps = torch.randn(shape), torch.randn(shape)
    turned = 0.9 * eps + 0.1 * torch.randn(shape)
    begun = fd.GuidanceState.fresh(x)
    before, here, after = PATH
    ends: dict[str, Any] = {"alpha": here[0], "sigma": here[1], "alpha_next": after[0], "sigma_next": after[1]}
    first: dict[str, Any] = {"alpha": before[0], "sigma": before[1], "alpha_next": here[0], "sigma_next": here[1]}
    moved = fd.guided_step(x, eps, **first, q=0.4, state=begun).sample
    model = network(shape[1])

    def step(tracked: bool) -> Any:
        state = fd.GuidanceState(begun.sample, begun.eps, begun.memory) if tracked else None
        return fd.guided_step(moved, turned, **ends, q=0.4, state=state)

    def in_torch(tracked: bool) -> Any:
        with use("torch"):
            return step(tracked)

    return {
        "plain": lambda: step(False),
        "tracked": lambda: step(True),
        "torch, plain": lambda: in_torch(False),
        "torch, tracked": lambda: in_torch(True),
        "network alone": lambda: model(moved),
    }


def check(found: dict[str, Variant]) -> None:
    """Refuses to time what is wrong: kernels and reference must agree."""
    for ours, reference in (("plain", "torch, plain"), ("tracked", "torch, tracked")):
        left, right = (found[name]().sample for name in (ours, reference))  # type: ignore[attr-defined]
        error = float((left - right).norm() / right.norm())
        if not error < 1e-6:
            raise SystemExit(f"{ours} is wrong (relative error {error:.1e}): not timed")


def run(rounds: int = ROUNDS, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[dict[str, Any]]:
    """One record per shape."""
    records = []
    for shape in shapes:
        torch.manual_seed(0)
        timed = variants(shape)
        check(timed)
        columns = shape[1] * shape[2] * shape[3]
        timing = measure({**timed, **triad_variants(shape[0], columns, 3)}, rounds)
        seconds = timing.medians()
        extra = seconds["tracked"] - seconds["plain"]
        records.append(
            {
                "rule": "closed loop",
                "shape": f"{shape[0]} x {columns:,}",
                "median_seconds": seconds,
                "extra_seconds": extra,
                "share_of_a_step": extra / (seconds["network alone"] + seconds["plain"]),
                "rounds_discarded": timing.discarded,
                "undisturbed": timing.guarded,
            }
        )
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    """Milliseconds, and the share of a step."""
    for record in records:
        disturbed = "" if record["undisturbed"] else "   (other load on this machine: do not quote)"
        print(f"\nclosed loop, {record['shape']}{disturbed}")
        for name, value in record["median_seconds"].items():
            print(f"  {name:32s} {value * 1e3:9.4f} ms")
        print(f"  {record['extra_seconds'] * 1e3:.3f} ms more, {record['share_of_a_step']:.2%} of a step (wanted: 3%)")
