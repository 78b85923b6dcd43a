"""One estimate for a whole batch: rows in blocks, methods by name, tolerances row by row."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdensity.traces.blocks import Plan, blocks, plan
from fastdensity.traces.colour import colour, usable_colours
from fastdensity.traces.function import Function
from fastdensity.traces.hutchinson import hutchinson, without_replacement
from fastdensity.traces.hutchpp import hutchpp
from fastdensity.traces.key import ProbeKey
from fastdensity.traces.options import DivergenceMethod
from fastdensity.traces.products import JacobianProducts, exact_trace
from fastdensity.traces.result import Trace
from fastdensity.traces.xtrace import xtrace

LEAST_OF_A_TOLERANCE = 8  # products, or two sweeps of colours: below, a standard error means little

BYTES_OF_DOUBLE = 8


@dataclass(frozen=True, slots=True)
class Task:
    """The divergence of `function` at x (B, *); of `identity` (B,) times the identity in it, the trace is known."""

    function: Function
    x: Tensor
    key: ProbeKey
    identity: Tensor | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """value (B, *); div, std_err (B,) float64; num_matvecs (B,) int64; met (B,) bool, the tolerance."""

    value: Tensor
    div: Tensor
    std_err: Tensor
    num_matvecs: Tensor
    met: Tensor


def estimate(task: Task, how: DivergenceMethod) -> Estimate:
    """The divergence of each row; see `fastdensity.divergence`."""
    x = task.x
    columns = x.shape[1:].numel()
    if x.numel() == 0:
        zero = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        return Estimate(task.function.fn(x, *task.function.args), zero, zero, zero.long(), zero == 0)
    method = how.method
    if method != "exact" and not 0 < how.num_matvecs <= columns:
        method = _say_exact(how.num_matvecs, columns)
    products = columns if method == "exact" else how.num_matvecs
    cut = plan(task.function, x, how.memory, products, _kept_bytes(how, method, x))
    if method != "exact" and how.has_tolerance:
        found = _until_tolerance(task, how, cut, columns)
    else:
        value, (div, std_err), products = _all_rows(task, how, cut, method, how.num_matvecs, 0)
        found = Estimate(value, div, std_err, torch.full_like(div, products, dtype=torch.int64), div.isfinite())
    if how.distribution == "normal" and method == "hutchinson" and task.identity is None:
        _warn_of_identity(found, columns)
    return found


def _kept_bytes(how: DivergenceMethod, method: str, x: Tensor) -> int:
    """What an estimator keeps of each row between calls: vectors, or a basis of them, as many as it has products."""
    columns = x.shape[1:].numel()
    if method in ("hutchpp", "xtrace"):
        return 2 * how.num_matvecs * columns * x.element_size()
    orthogonal = method == "hutchinson" and how.distribution == "orthogonal"
    return min(how.num_matvecs, columns) * columns * BYTES_OF_DOUBLE if orthogonal else 0


def _all_rows(
    task: Task, how: DivergenceMethod, cut: Plan, method: str, count: int, offset: int, rows: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """fn's values, (div, std_err) and the number of products, of all or the given rows.

    A row is NaN if its result is not finite, though its derivatives may be: those of log at -1 are.
    """
    batch = task.x.shape[0]
    if rows is None:
        rows = torch.arange(batch, device=task.x.device)
    div, std_err = (torch.empty(len(rows), dtype=torch.float64, device=rows.device) for _ in range(2))
    values: Tensor | None = None
    begin, products = 0, 0
    for index, valid in blocks(rows, len(rows) if cut.together else cut.rows):
        block = JacobianProducts(
            task.function.rows(index, batch),
            task.x[index],
            task.key.rows(index),
            cut.tangents,
            None if task.identity is None else task.identity[index],
            offset,
            valid,
        )
        trace = _trace(block, how, method, count)
        assert block.value is not None
        if values is None:  # one piece of memory: parts of it between the memory of calls would scatter that
            values = block.value.new_empty((len(rows), *task.x.shape[1:]))
        unknown = ~(block.value.reshape(len(index), -1).isfinite().all(1) & trace.div.isfinite())
        here = slice(begin, begin + valid)
        values[here] = block.value[:valid]
        div[here] = trace.div.masked_fill(unknown, math.nan)[:valid]
        std_err[here] = trace.std_err.masked_fill(unknown, math.nan)[:valid]
        begin, products = begin + valid, trace.products
    assert values is not None
    return values, (div, std_err), products


def _trace(products: JacobianProducts, how: DivergenceMethod, method: str, count: int) -> Trace:
    """One method on one block, the identity's part added."""
    if method == "exact":
        div = exact_trace(products)
        return Trace(div, torch.zeros_like(div), products.columns)
    if method == "hutchinson":
        trace = hutchinson(products, count, how.distribution)
    elif method == "hutchpp":
        trace = hutchpp(products, count, how.distribution)
    elif method == "xtrace":
        trace = xtrace(products, count, how.resphere)
    else:
        trace = colour(products, count, how.num_colours)
    if products.identity is None:
        return trace
    return Trace(trace.div + products.identity * products.columns, trace.std_err, trace.products)


# -- tolerances -------------------------------------------------------------------------------------------------------
def _until_tolerance(task: Task, how: DivergenceMethod, cut: Plan, columns: int) -> Estimate:
    """Rounds of fresh probes, each as large as all before; rows that are done take no part in the next."""
    if cut.together:
        raise ValueError(
            "abstol and reltol need a fn whose batch can be cut: it closes over a tensor with the batch's first "
            "dimension (pass it as an argument of divergence), takes no single row, calls fd.jvp itself, or forward is "
            "'torch'"
        )
    cap = columns if how.max_matvecs is None else min(how.max_matvecs, columns)
    if how.method == "colour" and how.num_colours is None:  # the same colours in all rounds
        how = replace(how, num_colours=min(max(LEAST_OF_A_TOLERANCE, how.num_matvecs) // 2, cap))
    size, used, least = min(_first_round(how), cap), 0, _least_round(how, task.x.shape[1:])
    rows = torch.arange(task.x.shape[0], device=task.x.device)
    method = _method(how, 0, size, columns)
    value, (div, spread), took = _all_rows(task, how, cut, method, size, 0)
    spread = spread / _unseen(how, columns, size)
    products = torch.full_like(div, took, dtype=torch.int64)
    std_err = spread * _unseen(how, columns, size)
    weight = took
    while True:
        used += size
        target = torch.maximum(div.abs() * (how.reltol or 0.0), torch.full_like(div, how.abstol or 0.0))
        met = std_err <= target
        rows = (~met & div.isfinite()).nonzero()[:, 0]
        size = min(used, cap - used)
        method = _method(how, used, size, columns)
        if rows.numel() == 0 or (method == how.method and size < least):
            return Estimate(value, div, std_err, products, met)
        if method == "exact":
            size = cap - used
        _, (more, error), took = _all_rows(task, how, cut, method, size, used, rows)
        products[rows] += took
        if method == "exact":
            div[rows], std_err[rows] = more, error
        else:
            share = took / (weight + took)
            div[rows] = (1.0 - share) * div[rows] + share * more
            error = error / _unseen(how, columns, size)
            spread[rows] = torch.hypot((1.0 - share) * spread[rows], share * error)
            std_err[rows] = spread[rows] * _unseen(how, columns, used + size)
            weight += took


def _first_round(how: DivergenceMethod) -> int:
    return max(how.num_matvecs, 2 * (how.num_colours or 0), LEAST_OF_A_TOLERANCE)


def _least_round(how: DivergenceMethod, shape: torch.Size) -> int:
    """The fewest products of a later round: fewer show no spread, and would take away the error bar that there is."""
    if how.method == "colour":
        return 2 * usable_colours(tuple(shape), how.num_colours or 1)
    return 2 if how.method == "hutchinson" else 4


def _unseen(how: DivergenceMethod, columns: int, number: int) -> float:
    """What `hutchinson` multiplies error bars with: rounds draw from one population, so the whole has one factor."""
    return without_replacement(how.distribution, columns, number) if how.method == "hutchinson" else 1.0


def _method(how: DivergenceMethod, used: int, size: int, columns: int) -> str:
    """The method of the next round, or exact where that costs no more than all probes, and is allowed."""
    allowed = how.max_matvecs is None or used + columns <= how.max_matvecs
    return "exact" if used + size >= columns and allowed else how.method


def _say_exact(num_matvecs: int, columns: int) -> str:
    reason = f"is above the {columns} elements of a sample" if num_matvecs else "leaves nothing to estimate from"
    warnings.warn(f"num_matvecs={num_matvecs} {reason}: the divergence is computed exactly", stacklevel=4)
    return "exact"


def _warn_of_identity(found: Estimate, columns: int) -> None:
    """Normal probes estimate an identity part a with variance 2 n a^2 / k: say so where that is most of the error.

    Not those of hutchpp, whose control variate knows it.
    """
    known = found.div.isfinite()
    part = found.div[known] / columns
    variance = 2.0 * columns * part**2 / found.num_matvecs[known]
    # one probe shows no error to compare with: then any identity part is named
    shown = found.std_err[known].square().nan_to_num(0.0)
    if bool(known.any()) and bool((variance.median() > 0.5 * shown.median()).item()):
        warnings.warn(
            f"distribution='normal' on a fn with an identity part of about {float(part.median()):.3g}: the probes "
            "estimate it with variance 2 n a^2 / k. Rademacher, sphere and orthogonal probes know it exactly; take one "
            "of these, or give identity=a",
            stacklevel=4,
        )
