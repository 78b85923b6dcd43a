"""Which rows are computed together, and how many tangents at once.

On a CPU a matrix product may round a row differently in a batch of another size. So the network is always called with
the same number of rows, missing ones filled up with copies: then a row's bits cannot depend on its batch. That number
is set by the network, the shape of a sample and the number of products, such that filling up costs some milliseconds at
most: one or two rows for large networks. On other devices the rows stay together, as memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from fastdensity.traces.function import Function, checked_value

MOST_ROWS = 256
VALUE_OPERATIONS, BLOCK_OPERATIONS = 1 << 28, 1 << 30  # of a call on one block, without and with its tangents
LEAST_PLANES = 4  # values and tangents of a call, below which a large network, too, runs slower than it could
MEMORY = {"cpu": 1 << 28}  # bytes of a call's intermediate results
DEVICE_MEMORY = 1 << 31
UNKNOWN_LAYERS = 16  # of a function that is not traced: it holds so many tensors of its input's size
MOST_COMPARED = 64  # a larger batch is hardly written out in fn's code
CLOSE = 1e-2  # relative: what rounding leaves, also in half precision, and another function does not
_apart: WeakSet[Any] = WeakSet()
_uncut: WeakSet[Any] = WeakSet()  # graphs of one row that do not give what the batch gives
_known_costs: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Plan:
    """rows: of every call of the function. tangents: at most, in a call. together: may rows be cut at all?"""

    rows: int
    tangents: int
    together: bool


def plan(function: Function, x: Tensor, memory: int | None, products: int = 1) -> Plan:
    """How fn is called on a batch like x for so many products; checks, once per function, that rows are independent.

    Raises:
        ValueError: a row of fn's result depends on another row.
    """
    budget = MEMORY.get(x.device.type, DEVICE_MEMORY) if memory is None else memory
    dual = _one_row(function, x, products)
    if dual is None:
        row_bytes = x[0].numel() * x.element_size() * UNKNOWN_LAYERS
        result = Plan(x.shape[0], _tangents(budget, x.shape[0] * row_bytes), True)
    else:
        cost, row_bytes = _costs(dual)
        rows = (
            _rows_on_cpu(cost, products)
            if x.device.type == "cpu"
            else min(x.shape[0], max(1, budget // (2 * row_bytes)))
        )
        result = Plan(rows, _tangents(budget, rows * row_bytes), False)
    try:
        graph = _whole_graph(function, x) if dual is None else dual
    except Exception as error:
        _check_rows_apart(function, x, result)  # the better reason, if it is one
        if isinstance(error, (ValueError, TypeError, NotImplementedError)):
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"fn runs, but fd.jvp cannot trace it ({type(error).__name__}: {reason}). Transforms of torch.func in fn "
            "do this, for example; forward='torch' takes such functions"
        ) from error
    if graph is None or graph not in _apart:
        _check_rows_apart(function, x, result)
        if not result.together and not _is_the_same_alone(function, x):
            _uncut.add(graph)
            return plan(function, x, memory, products)
    if graph is not None:
        _apart.add(graph)
    return result


def _rows_on_cpu(cost: int, products: int) -> int:
    planes = 1 + products
    affordable = min(VALUE_OPERATIONS // cost, BLOCK_OPERATIONS // (cost * planes))
    return min(MOST_ROWS, max(1 << max(0, affordable.bit_length() - 1), -(-LEAST_PLANES // planes)))


def _whole_graph(function: Function, x: Tensor) -> Any:
    """What fd.jvp keeps of fn on the whole batch; None where it is not asked."""
    if function.forward != "dual":
        return None
    from fastdensity.dual.cache import find

    return find(function.fn, (x, *function.args))[0]


def _costs(dual: Any) -> tuple[int, int]:
    """Operations of one row, and bytes that its results, or those of one of its tangents, hold at most."""
    from fastdensity.dual.table import operations, plane_bytes

    if dual not in _known_costs:
        _known_costs[dual] = max(1, operations(dual)), max(1, plane_bytes(dual))
    return _known_costs[dual]


def _tangents(budget: int, bytes_each: int) -> int:
    return max(1, budget // max(1, bytes_each) - 1)


def _one_row(function: Function, x: Tensor, products: int) -> Any:
    """The dual of fn on one row; None where only the whole batch can be computed at once."""
    if function.forward != "dual":
        return None
    from fastdensity.dual.cache import Dual, find
    from fastdensity.dual.capture import capture

    batch = x.shape[0]
    if batch > 1 and any(tensor.dim() and tensor.shape[0] == batch for tensor in capture(function.fn).tensors):
        return None  # what it closes over may belong to the rows, and cannot be cut with them
    one = function.rows(torch.zeros(1, dtype=torch.int64, device=x.device), batch)
    try:
        dual = find(one.fn, (x[:1], *one.args))[0]
        if dual in _uncut or not isinstance(dual, Dual) or not _keeps_rows(dual, x[:1]):
            return None  # a module that holds a tensor of the batch gives more than the one row
        if batch == 1 and not _takes_copies(function, x, dual, products):
            return None
    except Exception:  # fn takes no single row, say: if the fault is another, the whole batch has it, too
        return None
    return dual


def _takes_copies(function: Function, x: Tensor, dual: Any, products: int) -> bool:
    """Can a single row be filled up? Its mask (1, H, W) may belong to it or to all: what only its own size fits cannot.

    One row of a costly network stays alone, if its products fill a call.
    """
    from fastdensity.dual.cache import find

    if x.device.type != "cpu" or _rows_on_cpu(_costs(dual)[0], products) == 1:
        return True
    index = torch.zeros(2, dtype=torch.int64)
    pair = function.rows(index, 1)
    return _keeps_rows(find(pair.fn, (x[index], *pair.args))[0], x[index])


def _keeps_rows(dual: Any, x: Tensor) -> bool:
    """Has the result x's shape, with as many rows as the trace had?"""
    from fastdensity.dual.table import hint

    result = next(iter(dual.traced.graph.find_nodes(op="output"))).args[0]
    value = (result[0] if isinstance(result, (tuple, list)) else result).meta["val"]
    rows = x.shape[0] if dual.traced.batch is None else dual.traced.batch
    return tuple(map(hint, value.shape)) == (rows, *x.shape[1:])


def blocks(rows: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """(index, how many of it count): `rows` in blocks of `size`, the last filled up with copies of its first."""
    for part in torch.split(rows, size):
        count = part.shape[0]
        yield torch.cat([part, part[:1].expand(size - count)]) if count < size else part, count


def _check_rows_apart(function: Function, x: Tensor, how: Plan) -> None:
    """Two calls that differ in all rows but the first must agree in the first, bit for bit.

    Random numbers that fn draws are the same in both.
    """
    batch = x.shape[0]
    index = torch.arange(batch) if how.together else torch.zeros(2, dtype=torch.int64)
    if index.shape[0] < 2:
        return
    index = index.to(x.device)
    pair = function.rows(index, batch)
    rows = x.detach()[index].nan_to_num(0.0, 0.0, 0.0)
    other = torch.where(rows[1:].abs() < 1.0, 0.5 * torch.flip(rows[1:], (-1,)) + 1.75, 0.5 * rows[1:])
    changed = torch.cat([rows[:1], other])  # no element is what it was
    results = []
    for state in (rows, changed):
        with _random_numbers_of_their_own(x.device), _buffers_kept(function):
            results.append(checked_value(pair.fn(state, *pair.args), state)[0].nan_to_num())
    if not torch.equal(*results):
        raise ValueError(
            "fn couples the rows of a batch: its result for one row changes with another row, so that no row has a "
            "divergence of its own. Batch normalisation in training mode does this: call model.eval()"
        )


def _is_the_same_alone(function: Function, x: Tensor) -> bool:
    """Does the last row alone give what it gives in the batch? Not where the batch's size is written out in fn.

    Not asked of a fn that draws random numbers, which are others in another shape.
    """
    batch = x.shape[0]
    if not 1 < batch <= MOST_COMPARED:
        return True
    alone = function.rows(torch.tensor([batch - 1], device=x.device), batch)
    with _random_numbers_of_their_own(x.device), _buffers_kept(function):
        before = _random_state(x.device)
        together = function.fn(x, *function.args)
        if not torch.equal(before, _random_state(x.device)):
            return True
        single = alone.fn(x[-1:], *alone.args)
    wide, found = together[-1:].double().nan_to_num(), single.double().nan_to_num()
    return bool((found - wide).norm() <= CLOSE * wide.norm())


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

    buffers = [buffer for module in capture(function.fn).modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                if not torch.equal(buffer.nan_to_num(), value.nan_to_num()):  # not all can be written to
                    buffer.copy_(value)
