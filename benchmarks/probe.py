"""Probes and their forms on the CPU against plain torch: `python -m benchmarks.run probe`.

Making: rivals are torch's own generators, neither keyed by sample nor the same in another batch. Forms z.(J z):
a rival draws z as it would have to, multiplies and sums, eagerly or by torch.compile; "probes given" is a rival that
kept the probes of the first layer in memory and draws nothing. Floor: torch's fill of the result, or its sum of the
products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Timing, Variant, measure
from fastdensity.ops.probe import make_probes, probe_forms
from fastdensity.reference import probe as reference
from fastdensity.reference.probe import STREAM_MEASURE

SHAPES = ((4, 64, 3_072), (4, 8, 196_608))  # probes, samples, elements
BYTES = 4
DISTRIBUTIONS = ("rademacher", "hadamard", "normal", "sphere")


def draw(distribution: str, like: Tensor) -> Tensor:
    """Probes as a user of plain torch draws them."""
    if distribution in ("rademacher", "hadamard"):
        return torch.empty_like(like).bernoulli_().mul_(2).sub_(1)
    z = torch.randn_like(like)
    if distribution == "sphere":
        z *= like.shape[-1] ** 0.5 / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z


def forms_eager(distribution: str, products: Tensor) -> Tensor:
    return (draw(distribution, products) * products).sum(-1)


def product_sum(z: Tensor, products: Tensor) -> Tensor:
    return (z * products).sum(-1)


def make_variants(distribution: str, shape: tuple[int, int, int]) -> dict[str, Variant]:
    count, samples, columns = shape
    ids, like = torch.arange(samples), torch.empty(shape)

    def ours() -> Tensor:
        return make_probes(1, ids, 0, 0, count, columns, distribution, STREAM_MEASURE, torch.float32)

    return {"fastdensity": ours, "torch": lambda: draw(distribution, like)}


def forms_variants(distribution: str, shape: tuple[int, int, int]) -> dict[str, Variant]:
    ids, products = torch.arange(shape[1]), torch.randn(shape)
    compiled = torch.compile(forms_eager, dynamic=False)
    compiled_given = torch.compile(product_sum, dynamic=False)
    z = draw(distribution, products)

    def ours() -> Tensor:
        return probe_forms(products, 1, ids, 0, 0, distribution, STREAM_MEASURE)

    want = reference.probe_forms(products, 1, ids, 0, 0, distribution, STREAM_MEASURE)
    error = float(((ours() - want).abs() / products.double().norm(dim=-1)).max())
    if not error < 1e-6:
        raise SystemExit(f"forms of {distribution} are wrong (relative error {error:.1e}): not timed")
    return {
        "fastdensity": ours,
        "eager": lambda: forms_eager(distribution, products),
        "torch.compile": lambda: compiled(distribution, products),
        "eager, probes given": lambda: product_sum(z, products),
        "torch.compile, probes given": lambda: compiled_given(z, products),
    }


def _floor(operator: str, shape: tuple[int, int, int]) -> dict[str, Variant]:
    """What no implementation can do without: to write the probes once, or to read the products once."""
    memory = torch.randn(shape)
    if operator == "make_probes":
        return {"floor: one write": lambda: memory.fill_(1.0)}
    return {"floor: one read": lambda: memory.sum()}


def run(rounds: int = 15) -> list[dict[str, Any]]:
    """One record per operator, distribution and shape: seconds of each variant and of the floor."""
    records = []
    kinds: tuple[tuple[str, Callable[[str, tuple[int, int, int]], dict[str, Variant]]], ...] = (
        ("make_probes", make_variants),
        ("probe_forms", forms_variants),
    )
    for operator, make in kinds:
        for distribution in DISTRIBUTIONS:
            for shape in SHAPES:
                torch.manual_seed(0)
                variants = make(distribution, shape)
                timing = measure({**variants, **_floor(operator, shape)}, rounds)
                records.append(_record(f"{operator} {distribution}", shape, timing))
    return records


def _record(rule: str, shape: tuple[int, int, int], timing: Timing) -> dict[str, Any]:
    count, samples, columns = shape
    return {
        "rule": rule,
        "shape": f"{count} x {samples} x {columns:,}",
        "least_bytes": count * samples * columns * BYTES,
        "median_seconds": timing.medians(),
        "rounds_discarded": timing.discarded,
        "undisturbed": timing.guarded,
    }
