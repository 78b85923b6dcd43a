"""A traced graph becomes its dual graph.

Nodes that do not depend on the first primal are copied: they carry no tangent at all. Every other node is handed to
the rule of its operator (`rules.py` and the files it names), which emits nodes on stacked duals `(1 + K, *shape)`; an
operator without a rule goes to `fallback.py`. The result asks the live modules for their parameters at every call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fastdensity.dual import fallback, runtime
from fastdensity.dual.functional import line_of
from fastdensity.dual.tracing import Traced

if TYPE_CHECKING:
    from fastdensity.dual.fusion import Plan

aten = torch.ops.aten
Emitted = Any  # a node of the dual graph; NotImplemented where a rule does not cover the arguments
Rule = Callable[["Builder", fx.Node], Emitted]
RULES: dict[Any, Rule] = {}
_IDENTITIES_OF_A_NUMBER = {  # in torch; its vmap is wrong for some of them (torch 2.13)
    aten.squeeze.dim, aten.squeeze.dims, aten.flip.default, aten.roll.default, aten.transpose.int, aten.movedim.int,
    aten.swapaxes.default, aten.swapdims.default,
}  # fmt: skip
_READS = (aten.item.default, aten._local_scalar_dense.default)


def rule(*names: str) -> Callable[[Any], Any]:
    """Register the rule of these operators of torch, "name.overload"; those that a torch version lacks are left out."""

    def register(function: Any) -> Any:
        for name in names:
            packet, _, overload = name.partition(".")
            target = getattr(getattr(aten, packet, None), overload, None)
            if target is not None:
                RULES[target] = function
        return function

    return register


@dataclass
class Record:
    """What became of one node of the traced graph; a row of `fd.explain`."""

    node: fx.Node
    treatment: str  # "plain", the rule's name, "fallback", or "in NAME" for nodes that another one took in


class Builder:
    """Emits the dual graph; what rules see."""

    DIRECTIONS = "vectors"  # the graph's second argument

    def __init__(self, traced: Traced, bind: list[Tensor] | None) -> None:
        self.traced = traced
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {f"root{number}": root for number, root in enumerate(traced.roots)}
        self.new: dict[fx.Node, fx.Node] = {}
        self.is_dual: dict[fx.Node, bool] = {}
        self.records: dict[fx.Node, Record] = {}
        self._cache: dict[tuple[str, fx.Node], fx.Node] = {}
        self._bind = bind
        self._primals = self.graph.placeholder("primals")
        directions = self.graph.placeholder(self.DIRECTIONS)
        self._captured = self.graph.placeholder("captured") if bind is None else None
        self._first = self.graph.call_function(operator.getitem, (self._primals, 0))
        self._input, self.count = self.stack_input(self._first, directions)  # count is 1 + K

    def stack_input(self, first: fx.Node, directions: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The first primal as a dual, and the length of the stack."""
        stacked = self.graph.call_function(runtime.stack, (first, directions))
        return stacked, self.graph.call_function(runtime.size, (stacked, 0))

    # -- placeholders -------------------------------------------------------------------------------------------------
    def source(self, node: fx.Node) -> None:
        """The new node for a placeholder of the traced graph."""
        kind, where = self.traced.sources[node.name]
        dual = kind == "primal" and where == (0,)
        if dual:
            new = self._input
            self._cache["value", new] = self._first
        elif kind == "primal":
            new = self._primals
            for key in where:
                new = self.graph.call_function(operator.getitem, (new, key))
        elif kind == "captured" and self._captured is not None:
            new = self.graph.call_function(operator.getitem, (self._captured, where))
        elif kind == "live":
            new = self.graph.get_attr(where)
        else:
            new = self._held(where if kind == "constant" or self._bind is None else self._bind[where])
        self.new[node], self.is_dual[node] = new, dual

    def _held(self, tensor: Tensor) -> fx.Node:
        name = f"tensor{sum(key.startswith('tensor') for key in self.attributes)}"
        self.attributes[name] = tensor
        return self.graph.get_attr(name)

    # -- what rules use -----------------------------------------------------------------------------------------------
    def call(self, target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
        """Emit a call; arguments are new nodes or constants."""
        return self.graph.call_function(target, arguments, keywords)

    def dual(self, argument: Any) -> bool:
        """Does this argument of the traced graph carry tangents?"""
        return isinstance(argument, fx.Node) and self.is_dual[argument]

    def plain(self, argument: Any) -> Any:
        """The new form of an argument: nodes replaced wherever they stand in it."""
        return fx.map_arg(argument, lambda node: self.new[node])

    def stacked(self, argument: Any) -> fx.Node:
        """The argument as a dual `(1 + K, *shape)`; zeros are written only where an operator joins it with duals."""
        new: fx.Node = self.new[argument]
        return new if self.is_dual[argument] else self._once("promoted", new, runtime.promote, new, self.count)

    def value(self, argument: Any) -> Any:
        """The argument without its tangents."""
        new = self.plain(argument)
        return self._once("value", new, aten.select.int, new, 0, 0) if self.dual(argument) else new

    def aligned(self, argument: Any, rank: int, promote: bool = False) -> Any:
        """A dual with singleton dimensions after its first, so that its shape broadcasts with those of `rank`.

        A plain argument broadcasts as it is; `promote` makes it a dual first.
        """
        new = self.stacked(argument) if promote else self.plain(argument)
        if promote or self.dual(argument):
            for _ in range(rank - len(shape_of(argument))):
                new = self.call(aten.unsqueeze.default, new, 1)
        return new

    def _once(self, kind: str, new: fx.Node, target: Any, *arguments: Any) -> fx.Node:
        found = self._cache.get((kind, new))
        if found is None:
            found = self._cache[kind, new] = self.graph.call_function(target, arguments)
        return found

    # -- nodes --------------------------------------------------------------------------------------------------------
    def settle(self, node: fx.Node, treatment: str, new: fx.Node) -> None:
        """`new` is the dual of a node that depends on the input."""
        if node.meta.get("without_grad"):
            new = self.call(runtime.without_grad, new, line_of(node))
        self.new[node], self.is_dual[node] = new, True
        self.records[node] = Record(node, treatment)

    def copy(self, node: fx.Node) -> None:
        """A node that carries no tangent: as it was, on values."""
        arguments = fx.map_arg(node.args, lambda item: self.value(item))
        keywords = fx.map_arg(node.kwargs, lambda item: self.value(item))
        if node.target is aten.sym_size.int:
            self.new[node] = self.call(runtime.size, *arguments)
            self.is_dual[node] = False
            return
        self.new[node] = self.graph.create_node(node.op, node.target, arguments, keywords)
        self.is_dual[node] = False
        self.records[node] = Record(node, "plain")

    def output(self, result: fx.Node) -> None:
        """What the graph returns: (out, tangents); of an output that ignores the input the tangents are zero."""
        stacked = self.stacked(result)
        value = self.call(operator.getitem, stacked, 0)
        self.graph.output((value, self.call(operator.getitem, stacked, slice(1, None))))


def shape_of(argument: Any) -> tuple[Any, ...]:
    """The shape that a node of the traced graph had; () for numbers."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def rewrite(traced: Traced, bind: list[Tensor] | None = None) -> tuple[fx.GraphModule, list[Record]]:
    """The dual graph `(primals, vectors, captured) -> (out, tangents)`; without `captured` if those are bound.

    Raises:
        NotImplementedError: an operator without a forward derivative, with the line that calls it.
    """
    from fastdensity.dual import fusion, rules_linear, rules_memory, rules_network, rules_shape  # noqa: F401  they register

    builder = Builder(traced, bind)
    emit(builder, fusion.plan(traced.graph, dependents(traced)))
    return module_of(builder, "DualGraph"), list(builder.records.values())


def emit(builder: Builder, plan: Plan) -> None:
    """Every node of the traced graph in the builder's, but the output in the way that the builder has."""
    for node in builder.traced.graph.nodes:
        if node.op == "placeholder":
            builder.source(node)
        elif node.op == "output":
            (result,) = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            builder.output(result)
        elif node.op == "get_attr":
            raise NotImplementedError(f"a block of operators inside the graph has no dual, at {line_of(node)}")
        elif node in plan.absorbed:
            builder.records[node] = Record(node, f"in {plan.absorbed[node].name}")
        elif node in plan.rules:
            name, function = plan.rules[node]
            builder.settle(node, name, function(builder, node))
        else:
            _node(builder, node)


def module_of(builder: Builder, name: str) -> fx.GraphModule:
    """The emitted graph with the live modules that it asks for parameters."""
    module = fx.GraphModule(_Holder(builder.attributes), builder.graph, name)
    for attribute, value in builder.attributes.items():
        if isinstance(value, nn.Module):
            setattr(module, attribute, value)  # the live module in place of the copied path to its parameters
    return module


class _Holder(nn.Module):
    """What the graph's attributes are taken from: the user's modules themselves, not copies."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        super().__init__()
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)


def dependents(traced: Traced) -> set[fx.Node]:
    """The nodes that depend on the first primal through operators that have a tangent."""
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            if traced.sources[node.name] == ("primal", (0,)):
                found.add(node)
        elif any(item in found for item in node.all_input_nodes):
            if node.target in _READS:
                raise ValueError(f"fn reads a tensor into a Python number, which has no tangent, at {line_of(node)}")
            if not fallback.has_no_tangent(node):
                found.add(node)
    return found


def _node(builder: Builder, node: fx.Node) -> None:
    dual = any(builder.is_dual[item] for item in node.all_input_nodes)
    if dual and node.target is operator.getitem and fallback.has_no_tangent(node):
        builder.new[node] = builder.call(operator.getitem, *builder.plain(node.args))  # the indices beside a maximum
        builder.is_dual[node] = False
        builder.records[node] = Record(node, "plain")
    elif not dual or fallback.has_no_tangent(node):
        builder.copy(node)
    elif node.target is operator.getitem:
        builder.settle(node, "view", builder.call(operator.getitem, *builder.plain(node.args)))
    elif _names_no_dimension(node) and node.target in _IDENTITIES_OF_A_NUMBER:
        builder.settle(node, "same", builder.stacked(node.args[0]))
    else:
        _by_rule(builder, node)


def _by_rule(builder: Builder, node: fx.Node) -> None:
    """By the rule of its operator; by the fallback where there is none, or where it does not cover these arguments."""
    function = RULES.get(node.target)
    if function is not None and not fallback.in_complex_numbers(node) and not _names_no_dimension(node):
        new = function(builder, node)
        if new is not NotImplemented:
            builder.settle(node, function.__name__, new)
            return
    builder.settle(node, "fallback", fallback.emit(builder, node))


def _names_no_dimension(node: fx.Node) -> bool:
    """Does this name a dimension of a tensor that has none? torch takes 0 and -1 there; in a stack they mean others."""
    if not isinstance(node.args[0], fx.Node) or not isinstance(node.args[0].meta.get("val"), Tensor):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None or shape_of(node.args[0]) != ():
        return False
    return any(argument.name.startswith(("dim", "start_dim", "axis", "source")) for argument in schema.arguments)
