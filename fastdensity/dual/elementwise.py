"""Elementwise operators of torch in the language of chains (`fastdensity.chain_program`): one kernel for a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

aten = torch.ops.aten


class Earlier(NamedTuple):
    """An operand that is the result of this node's own step `number`."""

    number: int


Operand = Any  # a node, an Earlier, or a number
Step = tuple[str, tuple[Operand, ...]]

_UNARY = {
    aten.neg.default: "neg",
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.square.default: "square",
    aten.reciprocal.default: "reciprocal",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
    aten.abs.default: "abs",
}
_POWERS = {2.0: "square", 0.5: "sqrt", -1.0: "reciprocal", -0.5: "rsqrt"}


def is_chainable(node: fx.Node) -> bool:
    """Can this node be written as steps? Its tensors must be floating, its numbers plain Python numbers."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or node.kwargs.get("rounding_mode") is not None:
        return False
    return bool(steps_of(node))


def steps_of(node: fx.Node) -> list[Step]:
    """The steps of a node, none if it is not elementwise or its arguments are of another kind."""
    write = _WRITERS.get(node.target)
    if write is None:
        name = _UNARY.get(node.target)
        return [(name, (node.args[0],))] if name is not None and _tensor(node.args[0]) else []
    return write(node)


def _tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Tensor)


def _number(argument: Any) -> bool:
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)


def _sum(node: fx.Node, sign: float, turned: bool = False) -> list[Step]:
    """left + sign * alpha * right, or with left and right changed places."""
    left, right = node.args[:2]
    alpha: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    if turned:
        left, right = right, left
    if not _number(alpha):
        return []
    if turned and alpha != 1:
        return []
    if _tensor(left) and _number(right):
        return [("shift", (left, float(right) * sign * alpha))]
    if _number(left) and _tensor(right):
        return [("scale", (right, sign * alpha)), ("shift", (Earlier(0), float(left)))]
    if not (_tensor(left) and _tensor(right)):
        return []
    if alpha != 1:
        return [("scale", (right, float(alpha))), ("add" if sign > 0 else "sub", (left, Earlier(0)))]
    return [("add" if sign > 0 else "sub", (left, right))]


def _mul(node: fx.Node) -> list[Step]:
    left, right = node.args[:2]
    if _tensor(left) and _number(right):
        return [("scale", (left, float(right)))]
    if _number(left) and _tensor(right):
        return [("scale", (right, float(left)))]
    return [("mul", (left, right))] if _tensor(left) and _tensor(right) else []


def _div(node: fx.Node) -> list[Step]:
    left, right = node.args[:2]
    if _tensor(left) and _number(right) and right != 0:
        return [("scale", (left, 1.0 / float(right)))]
    if _number(left) and _tensor(right):
        return [("reciprocal", (right,)), ("scale", (Earlier(0), float(left)))]
    return [("div", (left, right))] if _tensor(left) and _tensor(right) else []


def _pow(node: fx.Node) -> list[Step]:
    base, exponent = node.args[:2]
    if not (_tensor(base) and _number(exponent)):
        return []
    name = _POWERS.get(float(exponent))
    if name is not None:
        return [(name, (base,))]
    if exponent == 3:
        return [("square", (base,)), ("mul", (Earlier(0), base))]
    return []


def _gelu(node: fx.Node) -> list[Step]:
    kind = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")
    return [("gelu_tanh" if kind == "tanh" else "gelu", (node.args[0],))]


def _softplus(node: fx.Node) -> list[Step]:
    """softplus(beta x) / beta, with torch's own threshold."""
    given: tuple[Any, ...] = node.args[1:]
    beta, threshold = (given + (1, 20)[len(given) :])[:2]
    if not _number(beta) or beta == 0 or threshold != 20 or node.kwargs:
        return []
    if beta == 1:
        return [("softplus", (node.args[0],))]
    scaled: Any = ("scale", (node.args[0], float(beta)))
    return [scaled, ("softplus", (Earlier(0),)), ("scale", (Earlier(1), 1 / float(beta)))]


def _mish(node: fx.Node) -> list[Step]:
    gate: list[Step] = [("softplus", (node.args[0],)), ("tanh", (Earlier(0),))]
    return [*gate, ("mul", (node.args[0], Earlier(1)))]


def _leaky_relu(node: fx.Node) -> list[Step]:
    slope: Any = node.args[1] if len(node.args) > 1 else 0.01
    return [("leaky_relu", (node.args[0], float(slope)))] if _number(slope) else []


_WRITERS: dict[Any, Callable[[fx.Node], list[Step]]] = {
    aten.add.Tensor: lambda node: _sum(node, 1.0),
    aten.add.Scalar: lambda node: _sum(node, 1.0),
    aten.sub.Tensor: lambda node: _sum(node, -1.0),
    aten.sub.Scalar: lambda node: _sum(node, -1.0),
    aten.rsub.Scalar: lambda node: _sum(node, -1.0, turned=True),
    aten.rsub.Tensor: lambda node: _sum(node, -1.0, turned=True),
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.pow.Tensor_Scalar: _pow,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.mish.default: _mish,
    aten.leaky_relu.default: _leaky_relu,
}
