"""Few steps of the closed loop against the guided flow itself, and the benchmark that draws them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import few_steps, few_steps_cases, few_steps_report
from benchmarks.few_steps_cases import ISOTROPIC, MIXTURE, PATHS, SPREAD, Problem, problem

BOUNDS = {(path, steps): bound for path, steps, bound in few_steps_report.FIRST_ORDER_BOUNDS}
# Targets of DPM-Solver++(2M) that are missed, all on the wide spectrum; strict, so that reaching one shows up.
_, KARRAS_NAME, RECTIFIED_NAME = (path.name for path in PATHS)
MISSED = {(KARRAS_NAME, 20, 0.3), (RECTIFIED_NAME, 20, 0.5), (RECTIFIED_NAME, 20, 0.6), (RECTIFIED_NAME, 50, 0.6)}
WANTED = [
    (path, steps, solver)
    for path in PATHS
    for steps in (20, 50)
    for solver in ("ddim", "dpmpp_2m")
    if (path.name, steps) in BOUNDS or (solver == "dpmpp_2m" and steps == 20)
]


@cache
def case(name: str, path: few_steps_cases.Path) -> Problem:
    return problem(name, path, rows=8, fine=200)


def errors(found: Problem, solver: str, steps: int, q: float) -> tuple[float, float]:
    """Mean |nats|, plain and tracked."""
    guided = (few_steps.measure(found, solver, steps, q, track)["log_prob_error"] for track in (False, True))
    return tuple(float("inf") if error is None else error for error in guided)


def wanted_cases() -> Iterator[Any]:
    for name, (path, steps, solver), q in product((SPREAD, ISOTROPIC), WANTED, (0.3, 0.5, 0.6)):
        missed = solver == "dpmpp_2m" and name == SPREAD and (path.name, steps, q) in MISSED
        marks = [pytest.mark.xfail(strict=True, reason="target missed")] if missed else []
        yield pytest.param(name, path, steps, solver, q, marks=marks, id=f"{name}; {path.name}; {solver} {steps}, {q}")


@pytest.mark.parametrize(("name", "path", "steps", "solver", "q"), list(wanted_cases()))
def test_log_prob_comes_out_as_commanded(
    name: str, path: few_steps_cases.Path, steps: int, solver: str, q: float
) -> None:
    plain, tracked = errors(case(name, path), solver, steps, q)
    if solver == "ddim":
        assert tracked <= BOUNDS[path.name, steps]
        assert tracked <= plain / 5
    else:
        assert tracked <= max(plain / few_steps_report.TIMES_BETTER, few_steps_report.NATS_ENOUGH)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_gaussian_s_guided_flow_is_known(path: few_steps_cases.Path) -> None:
    """Many short steps go where the closed form says: the plain flow's end, and log p as commanded."""
    found = problem(SPREAD, path, rows=4, fine=800)
    exact = found.gaussian_end()
    assert exact is not None
    fine = found._fine_end(0.5)
    torch.testing.assert_close(fine, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.log_prob(found._fine_end(0.4)), found.end_log_prob(0.4), rtol=0, atol=0.01)


def test_grids_increase_from_noise_to_data() -> None:
    for path in PATHS:
        grid = path.grid(20)
        assert grid.shape == (21,)
        assert bool((grid.diff() > 0).all())
    assert float(PATHS[1].schedule.sigma(float(PATHS[1].grid(20)[-1]))) == pytest.approx(0.02)


def test_benchmark_runs_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = few_steps.Settings(
        rows=2, steps=(4, 8), quantiles=(0.4,), fine=16, digits_rows=0, noise_steps=(4,)
    )  # fmt: skip
    out, picture = tmp_path / "few.json", tmp_path / "images" / "few.png"
    few_steps.main(["--out", str(out), "--picture", str(picture)], settings)
    found = json.loads(out.read_text())
    assert set(found["environment"]) >= {"processor", "torch", "commit"}
    assert len(found["records"]) == 3 * 3 * 4 * 2
    assert len(found["accounts"]) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert MIXTURE in printed
    assert "b = -1" in printed


def test_what_is_not_finite_is_counted_and_misses_every_target() -> None:
    found = case(SPREAD, PATHS[0])
    broken = Problem(found.name, found.flow, found.path, found.latents.clone(), found.fine)
    broken.end(0.5)
    broken.end_log_prob(0.5)
    broken.latents[3] = float("nan")
    form = few_steps.measure(broken, "ddim", 20, 0.5, True)
    assert form["log_prob_error"] is None
    assert form["non_finite_rows"] == 1
    record = {"target": SPREAD, "path": PATHS[0].name, "solver": "ddim", "steps": 20, "q": 0.5, "rows": 8}
    record |= {"plain": form, "tracked": form}
    assert few_steps_report.worst([record], "tracked") == float("inf")
    assert [met for met, _ in few_steps_report.targets([record])] == [False]
    assert few_steps_report.worse_than_plain([record], "log_prob_error") == []  # as bad
