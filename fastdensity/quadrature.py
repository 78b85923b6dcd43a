"""What the rate of log p at each evaluation of a run counts, in lam, so that their weighted sum is the integral.

Weights of whole evaluations, not of steps, as the variance of an estimated rate has to be weighed by the square of all
that it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Grid = list[float]


@dataclass(frozen=True, slots=True)
class Step:
    """From lam to lam_next, the index-th of the run; size is negative when encoding."""

    index: int
    lam: float
    lam_next: float

    @property
    def size(self) -> float:
        """lam_next - lam."""
        return self.lam_next - self.lam


def adams_bashforth_weight(grid: Grid, index: int) -> float:
    """Of the evaluation at grid[index] by the two-step rule: 1 + r/2 in its own step, -r/2 in the next one."""
    size = grid[index + 1] - grid[index]
    weight = size
    if index > 0:
        weight += size * size / (2.0 * (grid[index] - grid[index - 1]))
    if index + 2 < len(grid):
        after = grid[index + 2] - grid[index + 1]
        weight -= after * after / (2.0 * size)
    return weight


def one_evaluation_weight(grid: Grid, index: int, is_closed: Callable[[float], bool]) -> float:
    """Of the evaluation at grid[index] for solvers with one a step: the step's length, by the left-hand rule.

    Where the loop is closed (asked of the lam where a step begins) the divergence is the only error left in log p, so
    there it goes by the trapezoid rule, whose right end is the next step's evaluation; the grid's last step by
    extrapolation, as Adams and Bashforth's rule does.
    """
    size, last = grid[index + 1] - grid[index], len(grid) - 2
    before = grid[index] - grid[index - 1] if index > 0 else 0.0
    weight = size
    if is_closed(grid[index]):
        extrapolated = size * size / (2.0 * before) if index > 0 else 0.0
        weight = size + extrapolated if index == last else size / 2.0
    if index > 0 and is_closed(grid[index - 1]):
        weight += before / 2.0
    if index + 1 == last and is_closed(grid[last]):
        after = grid[last + 1] - grid[last]
        weight -= after * after / (2.0 * size)
    return weight
