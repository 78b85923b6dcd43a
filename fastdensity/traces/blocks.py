"""Which rows are computed together, and how many tangents at once.

On a CPU a matrix product may round a row differently in a batch of another size. So the network is always called with
the same number of rows, missing ones filled up with copies: then a row's bits cannot depend on its batch. That number
is set by the network, the shape of a sample and the number of products, such that filling up costs some milliseconds at
most and the results stay in a cache: one or two rows for large networks. It is never set by the memory that is allowed,
or a row's bits would depend on that; what the caller allows bounds the tangents of a call. On other devices the rows
stay together, as memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from fastdensity.dual.inner_derivatives import InnerGradientError
from fastdensity.traces import apart
from fastdensity.traces.function import Function

MOST_ROWS = 256
VALUE_OPERATIONS, BLOCK_OPERATIONS = 1 << 28, 1 << 30  # of a call on one block, without and with its tangents
LEAST_PLANES = 4  # values and tangents of a call, below which a large network, too, runs slower than it could
MEMORY = {"cpu": 1 << 28}  # bytes of a call's intermediate results
DEVICE_MEMORY = 1 << 31
CALL_BYTES = 1 << 22  # of the results of a call on a CPU with one tangent: larger blocks were 0 to 30 times slower
MOST_WRITTEN_OUT = apart.MOST_COMPARED  # a larger batch is hardly written out in fn's code
UNKNOWN_LAYERS = 16  # of a function that is not traced: it holds so many tensors of its input's size
_apart: WeakSet[Any] = WeakSet()  # graphs of one row that were found to be so
_apart_whole: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()  # others, and the batches where they were
_uncut: WeakSet[Any] = WeakSet()  # graphs of one row that do not give what the batch gives
_known_costs: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Plan:
    """rows: of every call of the function. tangents: at most, in a call. together: may rows be cut at all?"""

    rows: int
    tangents: int
    together: bool


def plan(function: Function, x: Tensor, memory: int | None, products: int = 1, kept: int = 0) -> Plan:
    """How fn is called on a batch like x for so many products; checks, once per function, that rows are independent.

    kept: bytes that the estimator keeps of each row from call to call.

    Raises:
        ValueError: a row of fn's result depends on another row.
    """
    budget = MEMORY.get(x.device.type, DEVICE_MEMORY) if memory is None else memory
    dual = _one_row(function, x, products, kept)
    if dual is not None:
        cost, row_bytes = _costs(dual, x)
        each = 2 * row_bytes + kept
        if dual in _apart or _can_be_cut(function, x, cost, row_bytes):
            _apart.add(dual)
            on_cpu = x.device.type == "cpu"
            rows = _rows_on_cpu(cost, each, products) if on_cpu else min(x.shape[0], max(1, budget // each))
            return Plan(rows, _tangents(budget, rows * row_bytes), False)
        _uncut.add(dual)
    graph = _traced_whole(function, x)
    if graph is None or x.shape[0] not in _apart_whole.get(graph, ()):
        _check_whole(function, x, thorough=graph is not None)
        if graph is not None:
            _apart_whole.setdefault(graph, set()).add(x.shape[0])
    row_bytes = x[0].numel() * x.element_size() * UNKNOWN_LAYERS
    return Plan(x.shape[0], _tangents(budget, x.shape[0] * row_bytes), True)


def _traced_whole(function: Function, x: Tensor) -> Any:
    """The graph of fn on the whole batch, None where fd.jvp is not asked; a ValueError that helps where it fails."""
    try:
        return _whole_graph(function, x)
    except Exception as error:
        _check_whole(function, x, thorough=False)  # the better reason, if it is one
        told = isinstance(error, (ValueError, TypeError, NotImplementedError))
        if told and not isinstance(error, InnerGradientError):  # whose advice is for fd.jvp
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"fn runs, but fd.jvp cannot trace it ({type(error).__name__}: {reason}). Transforms of torch.func in fn "
            "do this, for example; forward='torch' takes such functions"
        ) from error


def _check_whole(function: Function, x: Tensor, thorough: bool) -> None:
    """ValueError if fn couples the rows of the batch as it is."""
    index = torch.arange(x.shape[0], device=x.device)
    if x.shape[0] > 1 and apart.results_apart(function, x, index, thorough) is None:
        raise apart.refusal()


def _can_be_cut(function: Function, x: Tensor, cost: int, row_bytes: int) -> bool:
    """Does fn give a row the same among any others? ValueError if it couples rows.

    Not if its code has the batch's size, or counts rows, or mixes the rows of other arguments than x.
    """
    batch = x.shape[0]
    count = apart.rows_compared(cost, batch, CALL_BYTES // row_bytes)
    index = torch.arange(count, device=x.device) % batch  # copies, where the batch is smaller than what is to come
    found = apart.results_apart(function, x, index)
    if found is None and not 1 < batch <= MOST_WRITTEN_OUT:
        raise apart.refusal()
    if found is None or (batch > 1 and not apart.arguments_are_apart(function, x, index, found)):
        return False
    if 1 < batch <= MOST_WRITTEN_OUT:
        return apart.is_the_same_alone(function, x, torch.arange(batch, device=x.device))
    return apart.is_the_same_alone(function, x, index, found)


def _rows_on_cpu(cost: int, row_bytes: int, products: int) -> int:
    """A power of two. row_bytes: of a row's results and one tangent's, and of what is kept of it."""
    planes = 1 + products
    affordable = min(VALUE_OPERATIONS // cost, BLOCK_OPERATIONS // (cost * planes))
    rows = min(MOST_ROWS, max(_power_of_two(affordable), -(-LEAST_PLANES // planes)))
    return min(rows, _power_of_two(CALL_BYTES // row_bytes))


def _power_of_two(number: int) -> int:
    """The largest up to `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def _whole_graph(function: Function, x: Tensor) -> Any:
    """What fd.jvp keeps of fn on the whole batch; None where it is not asked."""
    if function.forward != "dual":
        return None
    from fastdensity.dual.cache import find

    return find(function.fn, (x, *function.args))[0]


def _costs(dual: Any, x: Tensor) -> tuple[int, int]:
    """Operations of one row, and bytes that it holds at most, or one of its tangents.

    Beside the results there is the tangent itself, and its copy behind the state.
    """
    from fastdensity.dual.table import operations, plane_bytes

    if dual not in _known_costs:
        _known_costs[dual] = max(1, operations(dual)), plane_bytes(dual) + 2 * x[0].numel() * x.element_size()
    return _known_costs[dual]


def _tangents(budget: int, bytes_each: int) -> int:
    return max(1, budget // max(1, bytes_each) - 1)


def _one_row(function: Function, x: Tensor, products: int, kept: int) -> Any:
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
        if batch == 1 and not _takes_copies(function, x, dual, products, kept):
            return None
    except Exception:  # fn takes no single row, say: if the fault is another, the whole batch has it, too
        return None
    return dual


def _takes_copies(function: Function, x: Tensor, dual: Any, products: int, kept: int) -> bool:
    """Can a single row be filled up? Its mask (1, H, W) may belong to it or to all: what only its own size fits cannot.

    One row of a costly network stays alone, if its products fill a call.
    """
    from fastdensity.dual.cache import find

    cost, row_bytes = _costs(dual, x)
    if x.device.type != "cpu" or _rows_on_cpu(cost, 2 * row_bytes + kept, products) == 1:
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
