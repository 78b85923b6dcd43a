"""Errors of the trace estimators on the six spectra of the XTrace paper: `python -m benchmarks.xtrace_spectra`.

Symmetric matrices of 1,000 columns with eigenvectors that are random once, 120 products, 200 trials. A trial is a row
with probes of its own. Reported is the mean of |error| / trace over trials, with its Monte Carlo error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.matrix_products import MatrixProducts
from benchmarks.run import RESULTS, environment
from fastdensity.traces import Trace, hutchpp, xtrace
from fastdensity.traces.products import Products

COLUMNS, NUM_MATVECS, TRIALS = 1000, 120, 200
# mean |error| / trace that the project asks for, and what the paper's figures show
WANTED = {
    "hutchpp": (2.2e-3, 4e-4, 1.4e-3, 1.5e-7, 1.3e-2, 1.2e-2),
    "xtrace": (2.2e-3, 2.3e-4, 1.9e-4, 1.2e-10, 2.5e-5, 2.5e-10),
    "resphered": (1.4e-3, 2e-4, 2e-4, 1.2e-10, 8e-6, 1e-13),
}
# name: what it is held against, and the estimator
METHODS: dict[str, tuple[str, Callable[[Products], Trace]]] = {
    "hutchpp, signs": ("hutchpp", lambda products: hutchpp(products, NUM_MATVECS)),
    "hutchpp, normal": ("hutchpp", lambda products: hutchpp(products, NUM_MATVECS, "normal")),
    "xtrace, signs": ("xtrace", lambda products: xtrace(products, NUM_MATVECS, False, "rademacher")),
    "xtrace, normal": ("xtrace", lambda products: xtrace(products, NUM_MATVECS, False, "normal")),
    "xtrace, sphere": ("xtrace", lambda products: xtrace(products, NUM_MATVECS, False, "sphere")),
    "xtrace, sphere, resphered": ("resphered", lambda products: xtrace(products, NUM_MATVECS)),
}


def spectra(columns: int) -> dict[str, Tensor]:
    """The eigenvalues, by name."""
    number = torch.arange(columns, dtype=torch.float64)

    def step(low: float) -> Tensor:
        return torch.where(number < columns // 20, 1.0, low).to(torch.float64)

    return {
        "flat": torch.linspace(1, 3, columns, dtype=torch.float64),
        "i^-2": (number + 1) ** -2,
        "0.9^i": 0.9**number,
        "0.7^i": 0.7**number,
        "step to 1e-3": step(1e-3),
        "step to 1e-8": step(1e-8),
    }


def eigenvectors(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator))[0]


class RememberedProbes(MatrixProducts):
    """Probes that are drawn once for all spectra: drawing them takes longer than their products."""

    drawn: dict[tuple[int, int, str], Tensor]

    def probes(self, first: int, count: int, distribution: str) -> Tensor:
        key = (first, count, distribution)
        if key not in self.drawn:
            self.drawn[key] = super().probes(first, count, distribution)
        return self.drawn[key]


def measure(products: MatrixProducts, estimator: Callable[[Products], Trace]) -> dict[str, float]:
    """Errors of one estimator over the rows, relative to the trace."""
    trace = products.traces()
    estimate = estimator(products)
    relative = (estimate.div - trace) / trace
    bars = estimate.std_err / trace.abs()
    return {
        "mean_error": relative.abs().mean().item(),
        "monte_carlo_error": relative.abs().std().item() / products.rows**0.5,
        "bias_in_standard_errors": (relative.mean() / (relative.std() / products.rows**0.5)).item(),
        "bar_over_rmse": (bars.square().mean().sqrt() / relative.square().mean().sqrt()).item(),
        "products": estimate.products,
    }


def run(
    columns: int = COLUMNS, trials: int = TRIALS, methods: tuple[str, ...] = tuple(METHODS)
) -> list[dict[str, Any]]:
    """One record for each spectrum and method."""
    vectors = eigenvectors(columns)
    records = []
    drawn: dict[tuple[int, int, str], Tensor] = {}
    for number, (spectrum, values) in enumerate(spectra(columns).items()):
        products = RememberedProbes(vectors * values @ vectors.T, rows=trials)
        products.drawn = drawn
        for method in methods:
            standard, estimator = METHODS[method]
            wanted = WANTED[standard][number]
            record = {"spectrum": spectrum, "method": method, "wanted": wanted, **measure(products, estimator)}
            print(
                f"{spectrum:13s} {method:26s} {record['mean_error']:.2e} +- {record['monte_carlo_error']:.0e}"
                f"   wanted {wanted:.1e}   bar/rmse {record['bar_over_rmse']:.2f}",
                flush=True,
            )
            records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xtrace_spectra", description=__doc__)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--out", type=Path, default=RESULTS / "xtrace-spectra.json")
    options = parser.parse_args()
    with torch.no_grad():
        records = run(trials=options.trials)
    options.out.write_text(json.dumps({"environment": environment(), "records": records}, indent=1) + "\n")
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
