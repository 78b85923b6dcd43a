"""Steps of a size that each row chooses for itself: Dormand and Prince's pair of order 5(4), through torchode.

torchode (Lienen and Guennemann 2022) keeps a step size for each row, so a row is solved as if it were alone. Its loop,
its control of step sizes and its tableau are used; sums are elementwise here, so that this holds to the last bit, and
a row whose numbers stop being finite is given up without an end to the others.

The state is float64 whatever x is, since differences of its stages are the error estimate; the network sees x's dtype.
Beside x it carries log p in nats per dimension. The error norm of a step is the larger of two: the root mean square
over x, and log p's own. So neither is drowned in the other, and at D dimensions log p is held to D times the tolerance.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdensity.quadrature import Step
from fastdensity.sums import pairwise_sum
from fastdensity.trajectory import Trajectory

MOST_STEPS = 10_000  # of a row between two entries of the grid, tried and rejected ones included
SMALLEST_STEP = 1e-9  # of the way, after which a row without finite numbers is given up
Field = Callable[[Tensor, Tensor], Tensor]  # (lam (B,), state (B, n)) -> its slope (B, n)


def import_torchode() -> Any:
    """The package; ImportError that names what brings it."""
    try:
        return importlib.import_module("torchode")
    except ImportError as error:
        raise ImportError(f"solver 'dopri5' needs torchode ({error}): pip install 'fastdensity[adaptive]'") from error


def dopri5(run: Trajectory, x: Tensor, rtol: float, atol: float) -> Tensor:
    """The flow from the grid's first entry to its last, log p with it; a solver as in `fastdensity.solvers`.

    Between two entries of the grid probes stay the same, or error estimates would see them change; from one to the
    next they are fresh. The standard errors of one stretch are added up as if the probes' errors went one way all
    along it, which bounds the true one from above. Where guidance begins or ends a step ends too. A row that needs
    more than MOST_STEPS steps in a stretch ends as NaN.
    """
    problem, columns = run.problem, run.problem.dimension
    if x.numel() == 0:
        return x
    account = torch.zeros(x.shape[0], 2 if problem.tracks else 0, dtype=torch.float64, device=x.device)
    state = x.flatten(1).double()
    for step in run.steps():
        whole = torch.cat([state, account], dim=1)
        for piece in _pieces(run, step):
            whole = _solve(_field(run, piece, x), whole, piece, columns, (rtol, atol))
        state = whole[:, :columns]
        if problem.tracks:
            run.log_change += columns * whole[:, columns]
            run.log_variance += whole[:, columns + 1] ** 2
        run.finish(step, state.to(x.dtype).reshape(x.shape))
    return state.to(x.dtype).reshape(x.shape)


def _pieces(run: Trajectory, step: Step) -> Iterator[Step]:
    """The step, cut where guidance begins or ends."""
    low, high = sorted((step.lam, step.lam_next))
    ends = () if run.guidance is None else run.guidance.ends()
    levels = sorted({low, high, *(end for end in ends if low < end < high)}, reverse=step.size < 0)
    for lam, lam_next in pairwise(levels):
        yield Step(step.index, lam, lam_next)


def _field(run: Trajectory, piece: Step, like: Tensor) -> Field:
    problem, columns = run.problem, run.problem.dimension

    def slope(lam: Tensor, state: Tensor) -> Tensor:
        x = state[:, :columns].to(like.dtype).reshape(like.shape)
        drift, rate, std_err = run.slope(run.evaluate(x, lam, piece, key=piece.index))
        drift = drift.flatten(1).double()
        if not problem.tracks:
            return drift
        direction = math.copysign(1.0, piece.size)
        return torch.cat([drift, rate[:, None] / columns, direction * std_err[:, None]], dim=1)

    return slope


def _solve(field: Field, state: Tensor, piece: Step, columns: int, tolerances: tuple[float, float]) -> Tensor:
    """The state (B, n) at the piece's end."""
    torchode = import_torchode()
    rtol, atol = tolerances

    def norm(scaled: Tensor) -> Tensor:
        size = torch.sqrt(pairwise_sum(scaled[:, :columns] ** 2, 1) / columns)
        return torch.maximum(size, scaled[:, columns].abs()) if scaled.shape[1] > columns else size

    term = torchode.ODETerm(field, with_stats=False)
    plain = torchode.IntegralController(atol=atol, rtol=rtol, term=term, norm=norm)
    method, control = _Method(torchode.Dopri5.TABLEAU), _Control(plain, abs(piece.size))
    loop = torchode.AutoDiffAdjoint(method, control, max_steps=MOST_STEPS)
    begin, end = (torch.full_like(state[:, 0], lam) for lam in (piece.lam, piece.lam_next))
    solution = loop.solve(torchode.InitialValueProblem(state, begin, end), term=term)
    return torch.where((solution.status == 0)[:, None], solution.ys[:, 0], math.nan)


class _Method:
    """torchode's explicit Runge-Kutta step; each row's sums are elementwise, and its end is the last step's own."""

    def __init__(self, tableau: Any) -> None:
        self.nodes, self.weights = tableau.c.tolist(), tableau.a.tolist()
        self.error_weights = tableau.b_err.tolist()

    def convergence_order(self) -> int:
        return 5

    def init(self, term: Any, problem: Any, slope: Tensor | None, *, stats: Any, args: Any) -> Tensor:
        return term.vf(problem.t_start, problem.y0, stats, args) if slope is None else slope

    def merge_states(self, accept: Tensor, current: Tensor, previous: Tensor) -> Tensor:
        return torch.where(accept[:, None], current, previous)

    def step(
        self,
        term: Any,
        running: Tensor,
        state: Tensor,
        lam: Tensor,
        size: Tensor,
        slope: Tensor,
        *,
        stats: Any,
        args: Any,
    ) -> tuple[Any, Tensor, Tensor, None]:
        slopes, reached, long = [slope], state, size[:, None]
        for node, weights in zip(self.nodes[1:], self.weights[1:], strict=True):
            reached = state + long * _combine(weights, slopes)
            slopes.append(term.vf(lam + node * size, reached, stats, args))
        result = import_torchode().single_step_methods.StepResult(reached, long * _combine(self.error_weights, slopes))
        return result, reached, slopes[-1], None

    def build_interpolation(self, reached: Tensor) -> _End:
        return _End(reached)


class _End:
    """In the place of an interpolation that is asked for the end alone."""

    def __init__(self, reached: Tensor) -> None:
        self.reached = reached

    def evaluate(self, lam: Tensor, rows: Tensor) -> Tensor:
        return self.reached[rows]


class _Control:
    """torchode's control of step sizes, in which no row can stop the others.

    Where a trial step meets numbers that are not finite it is tried shorter; a row that has none left even so takes
    the rest of the way at once, and ends as it is.
    """

    def __init__(self, plain: Any, way: float) -> None:
        self.plain, self.way = plain, way
        self.merge_states = plain.merge_states

    def init(self, term: Any, problem: Any, order: int, size: Any, *, stats: Any, args: Any) -> Any:
        size, state, slope = self.plain.init(term, problem, order, size, stats=stats, args=args)
        usable = size.isfinite() & (size != 0)
        return torch.where(usable, size, problem.time_direction * (SMALLEST_STEP * self.way)), state, slope

    def adapt_step_size(self, lam: Tensor, size: Tensor, before: Tensor, result: Any, state: Any, stats: Any) -> Any:
        accept, size_next, state, _ = self.plain.adapt_step_size(lam, size, before, result, state, stats)
        broken = ~(result.y.isfinite().all(dim=1) & result.error_estimate.isfinite().all(dim=1))
        hopeless = broken & ((size.abs() <= SMALLEST_STEP * self.way) | ~before.isfinite().all(dim=1))
        rest = torch.sign(size) * self.way
        size_next = torch.where(broken, torch.where(hopeless, rest, size / 5.0), size_next)
        return (accept & ~broken) | hopeless, size_next, state, None


def _combine(weights: list[float], vectors: list[Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for weight, vector in zip(weights, vectors, strict=False):
        if weight != 0.0:
            total = total + weight * vector
    return total
