"""How exact few steps are, plain and with the closed loop: `python -m benchmarks.few_steps [--rows N] [--out FILE]`.

Numbers, not times. Each sample is held against the guided flow from the same latents: its log p in nats, and itself,
|x - x_ref| / |x_ref|. Means over the rows; a row that is not finite makes its mean so, and is counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdensity as fd
from benchmarks.few_steps_cases import DIGITS, DIGITS_PATHS, MIXTURE, PATHS, TARGETS, Problem, problem
from benchmarks.few_steps_report import picture, print_accounts, print_steps, print_targets
from benchmarks.run import RESULTS, environment
from fastdensity.rules import FLAG_LIMITED
from fastdensity.trajectory import log_normal_density

SOLVERS = ("euler", "ddim", "heun", "dpmpp_2m")
FORMS = ("plain", "tracked")
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "few_steps.png"
Record = dict[str, Any]
Guide = Callable[[bool], fd.DensityGuidance]


@dataclass(frozen=True)
class Settings:
    """How much is measured. An encoding of 8 digits that finds their log p takes seconds: few of them."""

    rows: int = 64
    steps: Sequence[int] = (10, 20, 50, 100)
    quantiles: Sequence[float] = (0.3, 0.4, 0.5, 0.6)
    fine: int = 2000
    digits_rows: int = 8
    digits_steps: Sequence[int] = (20, 50)
    digits_quantiles: Sequence[float] = (0.4,)
    noise_steps: Sequence[int] = (20, 50, 200)


def measure(case: Problem, solver: str, steps: int, q: float, track: bool) -> Record:
    """One run against the guided flow."""
    guidance = fd.DensityGuidance(q, track=track)
    result = fd.sample(case.flow, case.latents, case.path.grid(steps), solver, guidance)
    finite = result.x.flatten(1).isfinite().all(1)
    if bool(finite.all()):
        error = (case.log_prob(result.x) - case.end_log_prob(q)).abs()
    else:
        error = torch.full_like(case.end_log_prob(q), float("nan"))
    end = case.end(q)
    distance = (result.x - end).flatten(1).norm(dim=1) / end.flatten(1).norm(dim=1)
    return {
        "log_prob_error": number(error.mean()),
        "largest_log_prob_error": number(error.max()),
        "sample_error": number(distance.mean()),
        "limited_rows": int((result.flags & FLAG_LIMITED).ne(0).sum()),
        "non_finite_rows": int((~finite).sum()),
        "evaluations": result.nfe,
    }


def number(value: Tensor) -> float | None:
    """For JSON, which knows no NaN."""
    return float(value) if bool(value.isfinite()) else None


def compare(case: Problem, steps: Sequence[int], quantiles: Sequence[float]) -> Iterator[Record]:
    """Every solver, both forms."""
    for solver, q, count in product(SOLVERS, quantiles, steps):
        forms = {form: measure(case, solver, count, q, form == "tracked") for form in FORMS}
        where = {"target": case.name, "path": case.path.name, "solver": solver, "q": q, "steps": count}
        yield {**where, **forms, "rows": len(case.latents), "reference_change": case.changes.get(q)}


def step_records(settings: Settings) -> list[Record]:
    records: list[Record] = []
    for name, path in product(TARGETS, PATHS):
        records += compare(problem(name, path, settings.rows, settings.fine), settings.steps, settings.quantiles)
        print(f"measured: {name}; {path.name}", flush=True)
    for path in DIGITS_PATHS if settings.digits_rows else ():
        case = problem(DIGITS, path, settings.digits_rows, settings.fine)
        records += compare(case, settings.digits_steps, settings.digits_quantiles)
        print(f"measured: {DIGITS}; {path.name}", flush=True)
    return records


def account(case: Problem, solver: str, steps: int, guidance: fd.DensityGuidance, rate: float | None) -> Record:
    """What log p really gained against what it was to gain, and against what `fd.sample` says that it gained.

    It was to gain rate nats per unit of lam; without a rate, what was commanded and what -div u gave on the way.
    """
    grid = case.path.grid(steps)
    result = fd.sample(case.flow, case.latents, grid, solver, guidance, log_prob=True, divergence="exact", seed=3)
    assert isinstance(case.flow, fd.GaussianMixture)
    assert result.log_prob is not None
    gained = case.log_prob(result.x) - case.flow.log_prob(case.latents, float(grid[0]))
    reported = result.log_prob - log_normal_density(case.latents, float(case.path.schedule.sigma(float(grid[0]))))
    wanted = reported if result.residual is None else reported + result.residual
    if rate is not None:
        wanted = torch.full_like(gained, rate * float(grid[-1] - grid[0]))
    return {
        "commanded_error": number((gained - wanted).abs().mean()),
        "mean_of_signed_error": number((gained - wanted).mean()),
        "reported_error": number((gained - reported).abs().mean()),
        "limited_rows": int((result.flags & FLAG_LIMITED).ne(0).sum()),
        "non_finite_rows": int((~result.x.isfinite().all(1)).sum()),
    }


def account_records(settings: Settings) -> list[Record]:
    """Noise beside q = 0.4, and the explicit rate b = -1, in the mixture on the VP path."""
    case = problem(MIXTURE, PATHS[0], settings.rows, settings.fine)

    def noisy(track: bool) -> fd.DensityGuidance:
        return fd.StochasticDensityGuidance(0.4, noise=lambda lam: 0.5, track=track)

    def explicit(track: bool) -> fd.DensityGuidance:
        return fd.DensityGuidance(b=lambda x, lam: -1.0, track=track)

    runs: list[tuple[str, Guide, float | None, str]] = [("q = 0.4, noise 0.5", noisy, None, "ddim")]
    runs += [("b = -1", explicit, -1.0, solver) for solver in ("ddim", "heun", "dpmpp_2m")]
    records = []
    for (name, make, rate, solver), steps in product(runs, settings.noise_steps):
        forms = {form: account(case, solver, steps, make(form == "tracked"), rate) for form in FORMS}
        records.append({"guidance": name, "solver": solver, "steps": steps, **forms, "rows": settings.rows})
    return records


def write(out: Path, steps: list[Record], accounts: list[Record]) -> None:
    """One record a line."""
    lists = {"records": steps, "accounts": accounts}
    parts = [f'"environment": {json.dumps(environment())}']
    parts += [f'"{name}": [\n' + ",\n".join(json.dumps(r) for r in rows) + "\n]" for name, rows in lists.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_steps", description=__doc__)
    parser.add_argument("--rows", type=int, default=Settings.rows)
    parser.add_argument("--out", type=Path, default=RESULTS / "few-steps.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--draw-only", action="store_true", help="tables and picture of what --out holds already")
    options = parser.parse_args(arguments)
    if not options.draw_only:
        settings = settings or Settings(rows=options.rows)
        with torch.no_grad():
            write(options.out, step_records(settings), account_records(settings))
    found = json.loads(options.out.read_text())
    print_steps(found["records"])
    print_accounts(found["accounts"])
    print_targets(found["records"])
    picture(options.picture, found["records"])
    print(f"\nwritten: {options.out}, {options.picture}")


if __name__ == "__main__":
    main()
