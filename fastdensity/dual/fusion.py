"""Which nodes become one kernel: layers with what follows them, and chains of elementwise operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from fastdensity.dual import rules_network
from fastdensity.dual.elementwise import Earlier, Operand, is_chainable, steps_of
from fastdensity.dual.fallback import in_complex_numbers
from fastdensity.dual.rewrite import Builder, Rule, shape_of
from fastdensity.ops.dual_chain import dual_chain

aten = torch.ops.aten
_MOST_STEPS = 24
_MOST_INPUTS = 8


@dataclass
class Plan:
    """rules: what to emit at the last node of each group; absorbed: its other nodes, and that last node."""

    rules: dict[fx.Node, tuple[str, Rule]] = field(default_factory=dict)
    absorbed: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def take(self, last: fx.Node, others: list[fx.Node], name: str, rule: Rule) -> None:
        """Emit the group by `rule` where its last node stands."""
        self.rules[last] = (name, rule)
        self.absorbed.update(dict.fromkeys(others, last))

    def free(self, *nodes: fx.Node) -> bool:
        """May these be taken? What stood under no_grad stays a node of its own, which guards its backward."""
        return not any(node in self.rules or node in self.absorbed or node.meta.get("without_grad") for node in nodes)


def plan(graph: fx.Graph, dependent: set[fx.Node]) -> Plan:
    """Decide for the nodes of a functional graph; `dependent` are those that carry tangents."""
    found = Plan()
    for node in graph.nodes:
        if node in dependent and node.op == "call_function" and not in_complex_numbers(node):
            for pattern in (_geglu, _activated, _modulated, _folded):
                if found.free(node) and pattern(found, node, dependent):
                    break
    _chains(found, graph, dependent)
    return found


# -- layers and what follows them -------------------------------------------------------------------------------------
def activation_of(node: fx.Node) -> str | None:
    """The epilogue's name of an activation node."""
    if node.target is aten.gelu.default:
        kind = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")
        return "gelu_tanh" if kind == "tanh" else "gelu"
    if node.target is aten.softplus.default and len(node.args) > 1:
        return None
    return {
        aten.silu.default: "silu",
        aten.relu.default: "relu",
        aten.tanh.default: "tanh",
        aten.sigmoid.default: "sigmoid",
        aten.softplus.default: "softplus",
    }.get(node.target)


_EPILOGUES: dict[Any, tuple[Callable[..., fx.Node], tuple[str, ...]]] = {
    aten.linear.default: (
        rules_network.linear,
        ("silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid", "softplus"),
    ),
    aten.conv2d.default: (rules_network.conv2d, ("silu", "relu")),
    aten.group_norm.default: (rules_network.group_norm, ("silu",)),
}


def _activated(found: Plan, node: fx.Node, dependent: set[fx.Node]) -> bool:
    """linear + activation, conv2d + activation, group_norm + silu."""
    activation = activation_of(node)
    layer = node.args[0] if node.args else None
    if activation is None or not isinstance(layer, fx.Node) or layer.target not in _EPILOGUES:
        return False
    emit, known = _EPILOGUES[layer.target]
    if activation not in known or not _only_for(layer, node) or not _plain_weights(layer, dependent):
        return False
    if not found.free(layer) or (layer.target is aten.conv2d.default and len(shape_of(layer)) != 4):
        return False
    found.take(node, [layer], emit.__name__, lambda b, n: emit(b, layer, activation))
    return True


def _folded(found: Plan, node: fx.Node, dependent: set[fx.Node]) -> bool:
    """conv2d + batch norm with running statistics [+ activation]: the norm is a factor of the kernel."""
    if node.target is not aten.batch_norm.default or node.args[5] or len(shape_of(node)) != 4:
        return False
    layer = node.args[0]
    if not isinstance(layer, fx.Node) or layer.target is not aten.conv2d.default or not found.free(layer):
        return False
    plain = _plain_weights(layer, dependent) and _plain_weights(node, dependent)
    if not plain or not _only_for(layer, node) or layer.meta["val"].dtype != node.meta["val"].dtype:
        return False
    user = next(iter(node.users))
    activation = activation_of(user) if _only_for(node, user) else None
    if activation in _EPILOGUES[aten.conv2d.default][1]:
        found.take(user, [layer, node], "conv2d", lambda b, n: rules_network.conv2d(b, layer, activation, node))
    else:
        found.take(node, [layer], "conv2d", lambda b, n: rules_network.conv2d(b, layer, "none", node))
    return True


def _geglu(found: Plan, node: fx.Node, dependent: set[fx.Node]) -> bool:
    """h * gelu(g) with [h, g] the halves of a linear layer."""
    if node.target is not aten.mul.Tensor or not all(isinstance(item, fx.Node) for item in node.args):
        return False
    for half, gate in (node.args, node.args[::-1]):
        if not isinstance(gate, fx.Node) or not isinstance(half, fx.Node) or activation_of(gate) != "gelu":
            continue
        second = gate.args[0]
        chunk = half.args[0] if half.target is operator.getitem else None
        if not isinstance(second, fx.Node) or not isinstance(chunk, fx.Node) or chunk.target is not aten.chunk.default:
            continue
        rank = len(shape_of(half)) or 1
        last = len(chunk.args) > 2 and chunk.args[2] in (-1, rank - 1)
        layer = chunk.args[0]
        if second.args != (chunk, 1) or half.args != (chunk, 0) or chunk.args[1] != 2 or not last:
            continue
        group = [layer, chunk, half, second, gate]
        if not isinstance(layer, fx.Node) or layer.target is not aten.linear.default or not found.free(*group):
            continue
        alone = _only_for(layer, chunk) and len(chunk.users) == 2 and _only_for(half, node) and _only_for(gate, node)
        if alone and _only_for(second, gate) and _plain_weights(layer, dependent) and _even(layer):
            found.take(node, group, "linear", partial(_emit_geglu, layer=layer))
            return True
    return False


def _emit_geglu(b: Builder, node: fx.Node, layer: fx.Node) -> fx.Node:
    return rules_network.linear(b, layer, "geglu")


def _even(layer: fx.Node) -> bool:
    return shape_of(layer)[-1] % 2 == 0


def _modulated(found: Plan, node: fx.Node, dependent: set[fx.Node]) -> bool:
    """norm(x) * multiplier + addend with plain factors per sample: adaptive layer norm."""
    norms = {aten.layer_norm.default: rules_network.layer_norm, aten.rms_norm.default: rules_network.rms_norm}
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    for scaled, addend in (node.args, node.args[::-1]):
        if not isinstance(scaled, fx.Node) or scaled.target is not aten.mul.Tensor or scaled not in dependent:
            continue
        for layer, multiplier in (scaled.args, scaled.args[::-1]):
            if not isinstance(layer, fx.Node) or layer.target not in norms or layer not in dependent:
                continue
            factors = _modulates(multiplier, layer, dependent) and _modulates(addend, layer, dependent)
            same = factors and tuple(map(str, shape_of(multiplier))) == tuple(map(str, shape_of(addend)))
            alone = _only_for(layer, scaled) and _only_for(scaled, node)
            if same and alone and _plain_weights(layer, dependent) and found.free(layer, scaled):
                emit: Any = norms[layer.target]
                rule = partial(_emit_modulated, emit=emit, layer=layer, multiplier=multiplier, addend=addend)
                found.take(node, [layer, scaled], emit.__name__, rule)
                return True
    return False


def _emit_modulated(b: Builder, node: fx.Node, emit: Any, layer: fx.Node, multiplier: Any, addend: Any) -> fx.Node:
    return emit(b, layer, multiplier, addend)


def _modulates(factor: Any, layer: fx.Node, dependent: set[fx.Node]) -> bool:
    """Is this a plain (B, 1, ..., C) or (C,) for rows of (B, N, ..., C)?"""
    if not isinstance(factor, fx.Node) or factor in dependent or not shape_of(factor):
        return False
    if len(layer.args[1]) != 1:
        return False
    if factor.meta["val"].dtype != layer.meta["val"].dtype:
        return False
    ours, theirs = [str(size) for size in shape_of(factor)], [str(size) for size in shape_of(layer)]
    if ours[-1] != theirs[-1] or len(ours) > len(theirs):
        return False
    leading = ours[:-1]
    while leading and leading[-1] == "1":
        leading.pop()
    return not leading or (len(ours) == len(theirs) and leading == theirs[: len(leading)])


def _only_for(node: fx.Node, user: fx.Node) -> bool:
    return len(node.users) == 1 and user in node.users


def _plain_weights(layer: fx.Node, dependent: set[fx.Node]) -> bool:
    inputs = layer.all_input_nodes
    return layer in dependent and inputs[0] in dependent and not any(item in dependent for item in inputs[1:])


# -- chains -----------------------------------------------------------------------------------------------------------
def _chains(found: Plan, graph: fx.Graph, dependent: set[fx.Node]) -> None:
    """Group elementwise nodes: a producer joins its only user if that has its shape and dtype."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node not in dependent or not found.free(node) or in_complex_numbers(node) or not is_chainable(node):
            continue
        members = [node]
        for source in node.all_input_nodes:
            inner = groups.get(source)
            if inner is None or not _only_for(source, node) or not _alike(source, node):
                continue
            candidate = [*inner, *members]
            if _size(candidate) <= _MOST_STEPS and len(_inputs(candidate)) <= _MOST_INPUTS:
                members = candidate
                del groups[source]
        groups[node] = members
    for last, members in groups.items():
        others = [member for member in members if member is not last]
        found.take(last, others, "elementwise", partial(_emit_chain, members=set(members)))


def _alike(source: fx.Node, node: fx.Node) -> bool:
    same = tuple(map(str, shape_of(source))) == tuple(map(str, shape_of(node)))
    return same and source.meta["val"].dtype == node.meta["val"].dtype


def _size(members: list[fx.Node]) -> int:
    return sum(len(steps_of(member)) for member in members)


def _inputs(members: list[fx.Node]) -> dict[fx.Node, None]:
    inside = set(members)
    return {item: None for member in members for item in member.all_input_nodes if item not in inside}


def _emit_chain(b: Builder, node: fx.Node, members: set[fx.Node]) -> fx.Node:
    ordered = [item for item in node.graph.nodes if item in members]
    inputs = list(_inputs(ordered))
    number: dict[fx.Node, int] = {item: position for position, item in enumerate(inputs)}
    program: list[str] = []
    for member in ordered:
        first = len(inputs) + len(program)
        for name, operands in steps_of(member):
            program.append(" ".join((name, *(_written(operand, number, first) for operand in operands))))
        number[member] = len(inputs) + len(program) - 1
    arguments = [_of_dtype(b, item, node.meta["val"].dtype) for item in inputs]
    return b.call(dual_chain, arguments, [b.dual(item) for item in inputs], ";".join(program))


def _written(operand: Operand, number: dict[fx.Node, int], first: int) -> str:
    if isinstance(operand, fx.Node):
        return str(number[operand])
    return str(first + operand.number) if isinstance(operand, Earlier) else repr(operand)


def _of_dtype(b: Builder, item: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The input in the chain's dtype, as torch's promotion would read it."""
    new: fx.Node = b.plain(item)
    return new if item.meta["val"].dtype == dtype else b.call(aten.to.dtype, new, dtype)
