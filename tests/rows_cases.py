"""Row problems shared by the tests of every backend: operands, parameters, and the float64 answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity.reference import rows as reference

EPSILON_OF = {torch.float64: 2.2e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.8e-3, torch.float16: 9.8e-4}


@dataclass
class Problem:
    """One call of the contract in fastdensity/reference/rows.py."""

    rule: str
    kind: str
    operands: tuple[Tensor | None, ...]
    parameters: tuple[Any, ...]
    noise_key: tuple[int, Tensor, int] | None = None

    @property
    def like(self) -> Tensor:
        found = self.operands[1] if self.rule == "prediction" or self.operands[0] is None else self.operands[0]
        assert found is not None
        return found

    def exact(self) -> tuple[Tensor, Tensor]:
        """The reference in float64 on these very numbers."""
        doubles = tuple(None if operand is None else operand.double().flatten(1) for operand in self.operands)
        return reference.rows(self.rule, self.kind, doubles, self.parameters, self.noise_key)

    def eager(self) -> tuple[Tensor, Tensor]:
        """The reference in the problem's own dtypes: what plain torch reaches."""
        flat = tuple(None if operand is None else operand.flatten(1) for operand in self.operands)
        return reference.rows(self.rule, self.kind, flat, self.parameters, self.noise_key)


def random_problem(
    rule: str,
    kind: str = "epsilon",
    rows: int = 3,
    columns: int = 50,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    cfg: bool = False,
    noise: str = "none",
    per_row: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Random operands of `dtype` (the state's may differ) and parameters in their usual ranges."""
    generator = torch.Generator().manual_seed(seed)

    def vector(its_dtype: torch.dtype) -> Tensor:
        made = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
        return made.to(its_dtype).to(device)

    def number(low: float, high: float) -> Any:
        values = low + (high - low) * torch.rand(rows, dtype=torch.float64, generator=generator)
        return values.to(device) if per_row else float(values[0])

    state_dtype = state_dtype or dtype
    if rule == "drift":
        return Problem(rule, kind, (vector(state_dtype), vector(dtype), None, vector(dtype)),
                       (number(-3, 3), number(-2, 2), number(-0.1, 0.1)))  # fmt: skip
    if rule == "radius":
        return Problem(rule, kind, (vector(state_dtype), None, None, None), (number(0, 9),))
    given = vector(state_dtype) if noise == "given" else None
    ids = torch.randint(0, 2**40, (rows,), generator=generator).to(device)
    key = (2**40 + 17, ids, 5) if noise == "drawn" else None
    parameters = (
        number(0.2, 1), number(0.2, 1), number(0.2, 1), number(0.2, 1),
        number(0.1, 0.9), number(-3, 3), number(-0.2, 0.2),
        number(1, 7.5) if cfg else 1.0, number(0, 0.5) if noise != "none" else 0.0, 0.5,
    )  # fmt: skip
    operands = (vector(state_dtype), vector(dtype), vector(dtype) if cfg else None, given)
    return Problem(rule, kind, operands, parameters, key)


def number_forms(rows: int) -> tuple[Any, ...]:
    """What makes a parameter of a number, in every form: floats, 0-dimensional, one for all rows, one per row, strided,
    expanded; float32 and float64."""
    return (
        lambda value: value,
        lambda value: torch.tensor(value),
        lambda value: torch.tensor([value], dtype=torch.float64),
        lambda value: torch.full((rows,), value),
        lambda value: torch.tensor([[value, torch.nan]] * rows, dtype=torch.float64)[:, 0],
        lambda value: torch.tensor(value, dtype=torch.float64).expand(rows),
    )


def all_problems(**options: Any) -> list[Problem]:
    """Every rule, prediction type, with and without classifier-free guidance, every source of noise."""
    problems = [random_problem("drift", **options), random_problem("radius", **options)]
    for kind in rules.PREDICTION_TYPES:
        for cfg in (False, True):
            problems.append(random_problem("prediction", kind, cfg=cfg, **options))
            for noise in ("none", "given", "drawn"):
                problems.append(random_problem("step", kind, cfg=cfg, noise=noise, **options))
    return problems


def assert_as_good_as_eager(problem: Problem, out: Tensor, report: Tensor) -> None:
    """err(kernel) < 2 err(eager, same dtype) + a few roundings of the result's own dtype."""
    exact, exact_report = problem.exact()
    eager, eager_report = problem.eager()
    # in float64 the eager result is the exact one itself, so its error says nothing: allow a chain of roundings
    roundings = 32 if report.dtype == torch.float64 else 4
    tiny = roundings * EPSILON_OF[out.dtype] * float(exact.abs().max())
    error = float((out.flatten(1).double() - exact).abs().max())
    allowed = 2 * float((eager.double() - exact).abs().max()) + tiny
    assert error <= allowed, (problem.rule, problem.kind, error, allowed)
    scale = exact_report[:, :3].abs().amax(dim=0)
    report_error = (report[:, :3].double() - exact_report[:, :3]).abs().amax(dim=0)
    eager_error = (eager_report[:, :3].double() - exact_report[:, :3]).abs().amax(dim=0)
    assert (report_error <= 2 * eager_error + 2 * roundings * EPSILON_OF[report.dtype] * scale).all()
    assert torch.equal(report[:, 3].long(), exact_report[:, 3].long())
