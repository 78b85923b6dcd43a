"""The trace graph of a network: `(primals, probes, captured) -> (value, forms)`, forms (K, B) being z.(J z).

It is the dual graph with other ends, where the network's allow it. A first layer that is linear in the whole of each
sample takes probes that it makes itself (`dual_linear_probe`); a last one that is linear gives its products to probes
made again (`dual_linear_trace`). Between the two nothing as large as the probes of a sample is ever stored.

`probes` is the tuple (seed, sample_ids, step, first, count, distribution, stream).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fastdensity.dual import fusion, runtime
from fastdensity.dual.rewrite import Builder, dependents, emit, module_of, shape_of
from fastdensity.dual.rules_network import arguments_of
from fastdensity.dual.tracing import Traced
from fastdensity.ops.dual_linear import dual_linear
from fastdensity.ops.probe import make_probes, probe_forms
from fastdensity.ops.trace_linear import dual_linear_probe, dual_linear_trace
from fastdensity.reference.trace_linear import DISTRIBUTIONS

if TYPE_CHECKING:
    from fastdensity.dual.cache import Dual

aten = torch.ops.aten
CPU_BYTES = 1 << 22  # probes up to here stay in a CPU's cache: storing them is 0 to 3% faster than these ends
Probes = tuple[int, Tensor, int, int, int, str, int]
_SAME_ORDER = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
    aten.contiguous.default, aten.clone.default,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ends:
    """What the ends of a network allow.

    Attributes:
        first: the linear layer that alone reads the input. beside: nodes whose columns follow the input's there, as
            a time's. last: the linear layer that is the output.
    """

    first: fx.Node | None
    beside: tuple[fx.Node, ...]
    last: fx.Node | None


@dataclass(frozen=True, slots=True)
class TraceGraph:
    """graph: see above. fused: "first" and "last", those of them that hold."""

    graph: fx.GraphModule
    fused: frozenset[str]


def fused_ends(fn: Callable[..., Any], primals: tuple[Any, ...]) -> frozenset[str]:
    """Which ends of fn's trace graph make their probes themselves: of "first" and "last"; arguments as `jvp`'s."""
    found = _graph_of(fn, primals)[1]
    return frozenset() if found is None else found.fused


def trace_forms(fn: Callable[..., Any], primals: tuple[Any, ...], probes: Probes) -> tuple[Tensor, Tensor] | None:
    """fn(*primals) (B, *) and z.(J z) (K, B) in float64; None where to store the probes is as good, or the only way."""
    x: Tensor = primals[0]
    small = x.device.type == "cpu" and probes[4] * x.numel() * x.element_size() <= CPU_BYTES
    if small or probes[5] not in DISTRIBUTIONS:
        return None
    dual, found, tensors = _graph_of(fn, primals)
    return None if found is None else dual.call(found.graph, primals, probes, tensors)


def _graph_of(fn: Callable[..., Any], primals: tuple[Any, ...]) -> tuple[Dual, TraceGraph | None, list[Tensor]]:
    from fastdensity.dual.cache import Dual, find

    dual, tensors = find(fn, primals)
    return dual, dual.trace_graph() if isinstance(dual, Dual) else None, tensors


def build(traced: Traced) -> TraceGraph | None:
    """The trace graph of a traced network; None if neither end is of use."""
    plan = fusion.plan(traced.graph, dependents(traced))
    ends = _ends(traced, plan)
    if ends.first is None and ends.last is None:
        return None
    builder = _TraceBuilder(traced, ends)
    emit(builder, plan)
    if ends.first is not None:
        builder.feed_probes(builder.new[plan.absorbed.get(ends.first, ends.first)])
    builder.graph.eliminate_dead_code()
    fused = frozenset(name for name in ("first", "last") if getattr(ends, name) is not None)
    return TraceGraph(module_of(builder, "TraceGraph"), fused)


class _TraceBuilder(Builder):
    DIRECTIONS = "probes"

    def __init__(self, traced: Traced, ends: Ends) -> None:
        self._ends = ends
        super().__init__(traced, None)

    def stack_input(self, first: fx.Node, directions: fx.Node) -> tuple[fx.Node, fx.Node]:
        seed, ids, step, start, count, distribution, stream = self._probes = [
            self.call(operator.getitem, directions, position) for position in range(7)
        ]
        stacked = self.call(_with_probes, first, seed, ids, step, start, count, distribution, stream)
        return stacked, self.call(operator.add, count, 1)

    def feed_probes(self, layer: fx.Node) -> None:
        """The first layer, already emitted, on probes of its own; what fed it is dead code then."""
        seed, ids, step, start, count, distribution, stream = self._probes
        assert layer.target is dual_linear, layer.target
        _, weight, bias, activation = layer.args
        with self.graph.inserting_before(layer):
            value = self.call(aten.flatten.using_ints, self._first, 1)
            columns = self.call(runtime.size, value, 1)
            if self._ends.beside:
                value = self.call(aten.cat.default, [value, *(self.new[node] for node in self._ends.beside)], 1)
            key = (seed, ids, step, start, count, columns, distribution, stream)
            layer.replace_all_uses_with(self.call(dual_linear_probe, value, weight, bias, activation, *key))

    def output(self, result: fx.Node) -> None:
        seed, ids, step, start, _, distribution, stream = self._probes
        key = (seed, ids, step, start, distribution, stream)
        last = self._ends.last
        if last is None:
            stacked = self.stacked(result)
            value = self.call(operator.getitem, stacked, 0)
            forms = self.call(_forms, self.call(operator.getitem, stacked, slice(1, None)), *key)
        else:
            stacked, weight, bias, _ = self.new[last].args
            both = self.call(dual_linear_trace, stacked, weight, bias, *key)
            value = self.call(aten.view_as.default, self.call(operator.getitem, both, 0), self._first)
            forms = self.call(operator.getitem, both, 1)
        self.graph.output((value, forms))


def _with_probes(
    x: Tensor, seed: int, sample_ids: Tensor, step: int, first: int, count: int, distribution: str, stream: int
) -> Tensor:
    """x and probes of its size as one dual, for a first layer that cannot make them."""
    columns = x.shape[1:].numel()
    probes = make_probes(seed, sample_ids, step, first, count, columns, distribution, stream, x.dtype)
    return runtime.stack(x, probes.reshape(count, *x.shape))


def _forms(tangents: Tensor, *key: Any) -> Tensor:
    return probe_forms(tangents.flatten(2), *key)


# -- what the ends of a network are -----------------------------------------------------------------------------------
def _ends(traced: Traced, plan: fusion.Plan) -> Ends:
    """Neither, unless the network's result has the shape of its input."""
    depends = dependents(traced)
    inputs = traced.graph.find_nodes(op="placeholder")
    x = next(node for node in inputs if traced.sources[node.name] == ("primal", (0,)))
    (output,) = traced.graph.find_nodes(op="output")
    (result,) = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    if result not in depends or _sizes(result) != _sizes(x) or len(_sizes(x)) < 2:
        return Ends(None, (), None)
    last = _last(result, plan, depends, _sizes(x)[0])
    first, beside = _first(x, plan, depends)
    return Ends(None, (), last) if first is last else Ends(first, beside, last)


def _first(x: fx.Node, plan: fusion.Plan, depends: set[fx.Node]) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """The linear layer on whole samples, as they are or with plain columns behind them, that alone reads x."""
    beside: tuple[fx.Node, ...] = ()
    node = x
    while True:
        user = _only_user(node)
        if user is None or user.meta.get("without_grad"):
            return None, ()
        if user.target is aten.cat.default and not beside and _is_rows(node, _sizes(x)[0]):
            parts: Any = user.args[0]
            dim = user.args[1] if len(user.args) > 1 else 0
            if parts[0] is not node or dim not in (1, -1) or any(part in depends for part in parts[1:]):
                return None, ()
            if user.meta["val"].dtype != x.meta["val"].dtype:
                return None, ()
            beside = tuple(parts[1:])
        elif user.target not in _SAME_ORDER or beside:
            break
        node = user
    owner = plan.absorbed.get(user, user)
    guarded = owner.meta.get("without_grad")
    if guarded or not _is_layer(user, depends, _sizes(x)[0]) or arguments_of(user)["input"] is not node:
        return None, ()
    return user, beside


def _last(result: fx.Node, plan: fusion.Plan, depends: set[fx.Node], batch: str) -> fx.Node | None:
    """The linear layer, without an activation, whose result is the network's."""
    node: Any = result
    while node.target in _SAME_ORDER and not node.meta.get("without_grad"):
        node = node.args[0]
    own = node not in plan.rules and node not in plan.absorbed and not node.meta.get("without_grad")
    return node if own and _is_layer(node, depends, batch) else None


def _is_layer(node: fx.Node, depends: set[fx.Node], batch: str) -> bool:
    """A linear layer with plain weights on rows that are the samples."""
    if node.target is not aten.linear.default or not _is_rows(node, batch):
        return False
    given = arguments_of(node)
    return given["weight"] not in depends and given["bias"] not in depends and given["input"] in depends


def _only_user(node: fx.Node) -> fx.Node | None:
    """Who reads the elements of a node, if only one does."""
    users = [user for user in node.users if user.target is not aten.sym_size.int]
    return users[0] if len(users) == 1 else None


def _is_rows(node: fx.Node, batch: str) -> bool:
    return len(_sizes(node)) == 2 and _sizes(node)[0] == batch


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in shape_of(node)]
