"""Nodes without a rule: torch.func.jvp of that one node, vectorised over its tangents.

torch computes the forward derivative of its own operators, or says that it cannot. For an operator of anyone else
`torch.func.jvp` returns a zero tangent without a word unless its author has written one in C++; those are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastdensity.dual.functional import line_of

aten = torch.ops.aten
# results that are constant wherever they are differentiable, or that torch cuts off from differentiation
_NO_TANGENT = {
    "detach", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "sign", "sgn", "floor", "ceil", "round", "trunc",
    "floor_divide", "heaviside", "sym_size", "sym_stride", "sym_numel", "size", "numel",
    "bernoulli", "binomial", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal",
    "normal_functional", "poisson", "random", "uniform",
}  # fmt: skip


def has_no_tangent(node: fx.Node) -> bool:
    """Is the result no floating tensor, or one that does not change with the input?"""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target._schema.name.split("::")[1] in _NO_TANGENT:
        return True
    value = node.meta.get("val")
    results = value if isinstance(value, (tuple, list)) else (value,)
    return not any(isinstance(item, Tensor) and differentiable(item) for item in results)


def differentiable(tensor: Tensor) -> bool:
    """Is this of a type that has derivatives, real or complex?"""
    return tensor.is_floating_point() or tensor.is_complex()


def in_complex_numbers(node: fx.Node) -> bool:
    """Does this node read or give a complex tensor? Kernels know none; torch.func.jvp computes such nodes."""
    value = node.meta.get("val")
    values = [*(value if isinstance(value, (tuple, list)) else (value,))]
    values += [item.meta.get("val") for item in node.all_input_nodes]
    return any(isinstance(item, Tensor) and item.is_complex() for item in values)


def emit(builder: Any, node: fx.Node) -> fx.Node:
    """The fallback as a rule. NotImplementedError, with the user's line, where torch has no forward derivative."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        raise NotImplementedError(
            f"{target} has no forward-mode rule known here, at {line_of(node)}; forward mode through it would be a "
            "silent zero. Write it in torch operators"
        )
    flat, spec = pytree.tree_flatten(_plain_containers((node.args, dict(node.kwargs))))
    positions = [number for number, item in enumerate(flat) if builder.dual(item)]
    duals = [builder.new[flat[number]] for number in positions]
    constants = [None if number in positions else builder.plain(item) for number, item in enumerate(flat)]
    call = NodeCall(target, spec, positions, line_of(node))
    return builder.call(call, duals, constants)


def _plain_containers(value: Any) -> Any:
    """Lists and dictionaries of Python in place of the graph's immutable ones, which compilers do not know."""
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain_containers(item) for item in value)
    return {key: _plain_containers(item) for key, item in value.items()} if isinstance(value, dict) else value


class NodeCall:
    """One operator on duals: `call([stacked, ...], [other arguments])` is its dual result, or a tuple of them."""

    def __init__(self, target: Any, spec: Any, positions: list[int], line: str) -> None:
        self.target, self.spec, self.positions, self.line = target, spec, positions, line
        self._in_turn = False
        self.__name__ = f"jvp_of_{str(target).replace('.', '_')}"  # what the printed graph shows
        self.__module__, self.__qualname__ = __name__, self.__name__

    def __call__(self, duals: list[Tensor], constants: list[Any]) -> Any:
        """One torch.func.jvp of the operator, vectorised over the tangents."""

        def call(*values: Tensor) -> Any:
            flat = list(constants)
            for position, value in zip(self.positions, values, strict=True):
                flat[position] = value
            arguments, keywords = pytree.tree_unflatten(flat, self.spec)
            return self.target(*arguments, **keywords)

        primals = tuple(dual[0] for dual in duals)

        def push(*tangents: Tensor) -> Any:
            return torch.func.jvp(call, primals, tangents)

        try:
            with sdpa_kernel(SDPBackend.MATH):
                return _restack(*self._of_all(push, [dual[1:] for dual in duals]))
        except NotImplementedError as error:
            raise NotImplementedError(f"{self.target} has no forward-mode rule in torch, at {self.line}") from error

    def _of_all(self, push: Callable[..., Any], tangents: list[Tensor]) -> tuple[Any, Any]:
        """The value, and the tangents along all directions: by vmap, else one after the other."""
        if not self._in_turn:
            try:
                return torch.func.vmap(push, out_dims=(None, 0), randomness="same")(*tangents)  # type: ignore[arg-type]
            except RuntimeError as error:
                if "vmap: " not in str(error) and "Batching rule not implemented" not in str(error):
                    raise
                self._in_turn = True  # torch has no batching rule for it
        return _one_by_one(push, tangents)


def _one_by_one(push: Callable[..., Any], tangents: list[Tensor]) -> tuple[Any, Any]:
    """All directions share one draw of random numbers, as they do in vmap."""
    device = [tangents[0].device] if tangents[0].is_cuda else []
    results = []
    for directions in zip(*(item[1:].unbind() for item in tangents), strict=True):
        with torch.random.fork_rng(device):
            results.append(push(*directions))
    value, first = push(*(item[0] for item in tangents))  # moves the generator on, as one call does
    every = [first, *(tangent for _, tangent in results)]
    if isinstance(value, Tensor):
        return value, torch.stack(every)
    return value, tuple(map(torch.stack, zip(*every, strict=True)))


def _restack(values: Any, tangents: Any) -> Any:
    if isinstance(values, Tensor):
        if not differentiable(values):
            return values
        return torch.cat([values.unsqueeze(0), tangents])
    return tuple(_restack(value, tangent) for value, tangent in zip(values, tangents, strict=True))
