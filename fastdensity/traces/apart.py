"""Does each row of fn's result depend on its own row of x alone? Found by values: fn is called, and called again with
some rows changed, and the results of the other rows must keep every bit.

Which rows are changed together is a code. With sets such that each row is in half of them and no two rows are in the
same ones, any two rows are told apart in both directions: some set has the one without the other (Sperner 1928). That
takes t sets for C(t, t / 2) rows: 2 for 2, 4 for 6, 8 for 61. So a coupling of any of the rows compared to any other
is seen, towards earlier rows as towards later ones: a mean, a cumulative sum, a shift, causal attention.

What is not seen: a coupling that is not active at these states (behind a branch on values), or lost in rounding; one
that reaches farther than the rows compared, 61 of a cheap network and 2 of the dearest. Where a batch in one piece has
more than 61 rows, or forward is "torch", one half of the rows is changed and then the other: that finds a single pair
of rows every other time, and any structure of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdensity.traces.function import Function, checked_value

MOST_COMPARED = 61  # a prime: a shift by any other number of rows moves something
OPERATIONS = 1 << 29  # of all calls on the rows compared, unless the batch itself costs more
SHARE = 4  # the calls may cost the values of a quarter of the batch
CLOSE = 1e-2  # relative: what rounding leaves, also in half precision, and another function does not


def rows_compared(cost: int, batch: int, most: int) -> int:
    """How many rows are called together, of `cost` operations each: at least 2, otherwise no more than `most`."""
    affordable = max(OPERATIONS // cost, batch // SHARE)
    count = 2
    while count < min(MOST_COMPARED, most) and (count + 1) * (1 + _number_of_sets(count + 1)) <= affordable:
        count += 1
    return count


def results_apart(function: Function, x: Tensor, index: Tensor, thorough: bool = True) -> Tensor | None:
    """The results of rows `index` of the batch x, called together; None if one of them changes with another row.

    thorough: by the code above; otherwise, or for too many rows, by two sets only. Random numbers that fn draws are the
    same in all calls.
    """
    function = function.rows(index, x.shape[0])
    rows = x.detach()[index].nan_to_num(0.0, 0.0, 0.0)
    other = torch.where(rows.abs() < 1.0, 0.5 * torch.flip(rows, (-1,)) + 1.75, 0.5 * rows)  # no element is what it was
    before = _value(function, rows)
    for changed in _sets(index.shape[0], thorough).to(x.device):
        after = _value(function, torch.where(changed.reshape(-1, *[1] * (x.dim() - 1)), other, rows))
        if not torch.equal(before[~changed], after[~changed]):
            return None
    return before


def refusal() -> ValueError:
    """Of a fn whose rows are not apart."""
    return ValueError(
        "fn couples the rows of a batch: its result for one row changes with another row, so that no row has a "
        "divergence of its own. Batch normalisation in training mode does this: call model.eval()"
    )


def arguments_are_apart(function: Function, x: Tensor, index: Tensor, before: Tensor) -> bool:
    """Does no row change with the arguments of another? `before` as `results_apart` returned it.

    Half of the rows get the arguments of the rows before them; arguments that are equal in all rows tell nothing.
    """
    batch = x.shape[0]
    changed = _sets(index.shape[0], thorough=False)[0].to(x.device)
    exchanged = function.rows(torch.where(changed, index.roll(1), index), batch)
    if all(new is old for new, old in zip(*map(pytree.tree_leaves, (exchanged.args, function.args)), strict=True)):
        return True  # nothing belongs to the rows
    after = _value(exchanged, x.detach()[index].nan_to_num(0.0, 0.0, 0.0))
    return torch.equal(before[~changed], after[~changed])


def is_the_same_alone(function: Function, x: Tensor, index: Tensor, together: Tensor | None = None) -> bool:
    """Does the last of the rows alone give what it gives among them? Not where their number, or its place, counts.

    `together` as `results_apart` returned it. Not asked of a fn that draws random numbers, which are others in
    another shape.
    """
    batch, rows = x.shape[0], x.detach()[index].nan_to_num(0.0, 0.0, 0.0)
    if index.shape[0] < 2:
        return True
    alone = function.rows(index[-1:], batch)
    with _random_numbers_of_their_own(x.device), _buffers_kept(function):
        before = _random_state(x.device)
        single = alone.fn(rows[-1:], *alone.args).double().nan_to_num()
        if not torch.equal(before, _random_state(x.device)):
            return True
    if together is None:
        together = _value(function.rows(index, batch), rows)
    wide = together[-1:].double()
    return bool((single - wide).norm() <= CLOSE * wide.norm())


def _value(function: Function, rows: Tensor) -> Tensor:
    """fn's result, which leaves no trace in buffers or in the state of random numbers."""
    with _random_numbers_of_their_own(rows.device), _buffers_kept(function):
        return checked_value(function.fn(rows, *function.args), rows).nan_to_num()


def _number_of_sets(count: int) -> int:
    """The fewest that tell any two of `count` rows apart in both directions."""
    number = 0
    while comb(number, number // 2) < count:
        number += 1
    return number


def _sets(count: int, thorough: bool) -> Tensor:
    """Which rows are changed in each call, bool (sets, count)."""
    if count < 2:
        return torch.zeros(0, count, dtype=torch.bool)
    if not thorough or count > MOST_COMPARED:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        half = order < count // 2
        return torch.stack([half, ~half])
    number = _number_of_sets(count)
    words = list(combinations(range(number), number // 2))[:count]
    sets = torch.zeros(number, count, dtype=torch.bool)
    for row, word in enumerate(words):
        sets[list(word), row] = True
    return sets


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _random_numbers_of_their_own(device: torch.device) -> Iterator[None]:
    """The same each time. Only generators that are put back are seeded: torch.manual_seed would seed all devices'."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


@contextmanager
def _buffers_kept(function: Function) -> Iterator[None]:
    """Puts back what a call writes into buffers: running statistics are not to learn from made-up rows."""
    from fastdensity.dual.capture import capture

    buffers: list[Any] = [buffer for module in capture(function.fn).modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                if not torch.equal(buffer.nan_to_num(), value.nan_to_num()):  # not all can be written to
                    buffer.copy_(value)
