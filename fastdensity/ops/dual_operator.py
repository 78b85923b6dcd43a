"""A dual op from its three parts: a torch reference, a kernel per backend, and the shape of its result.

A dual tensor holds a value and its K tangents in one block of memory, `(1 + K, *shape)`: index 0 is the value,
index 1 + k the k-th tangent. One GEMM, one convolution, one kernel serves them all.

Calls take the same three ways as those of the rows (`fastdensity.ops.rows_operator`): plain tensors go to the kernel;
tensors that carry a derivative go to the reference, which torch differentiates once more (nested forward mode,
backward, vmap); compilers, fake tensors and dispatch modes see a torch operator. None of them drops a tangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdensity._backend import launcher
from fastdensity.boundary import DERIVATIVE, OPERATOR, route, wants_derivative

_library = torch.library.Library("fastdensity", "FRAGMENT")
_is_compiling = torch.compiler.is_compiling
EMPTY_RESULTS: dict[str, Callable[..., Any]] = {}  # of each op by name, see `define`


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    empty_result: Callable[..., Any],
    room: str | None = None,
    results: int = 1,
) -> Callable[..., Any]:
    """The function that runs op `name` whatever its arguments are.

    Args:
        name: the stem of the op's room; its kernels are found by `fastdensity._backend.launcher(name, device, room)`
            and called as `launch(*arguments, out)`.
        schema: the argument list in torch's schema language, e.g. "Tensor x, Tensor? weight, float eps".
        reference: the op in differentiable torch, called with the same arguments.
        empty_result: the same arguments to an uninitialised result; the fake implementation, too.
        room: the stem of the room where several ops share one.
        results: how many tensors the op returns; more than one come as a tuple, from the reference, from
            `empty_result` and to the launcher behind the arguments.
    """
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    _library.define(f"{name}({schema}) -> {returned}", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.fastdensity, name)
    EMPTY_RESULTS[name] = empty_result

    def launch(arguments: tuple[Any, ...], tensors: list[Tensor]) -> Any:
        out = empty_result(*arguments)
        first = out if results == 1 else out[0]
        if first.numel():
            if any([tensor.is_neg() for tensor in tensors]):  # noqa: C419  a generator costs more than all it asks
                arguments = tuple(_resolved(arguments))
            launcher(name, first.device.type, room)(*arguments, *(out if results > 1 else (out,)))
        return out

    def kernel(*arguments: Any) -> Any:
        return launch(arguments, _tensors(arguments))

    def autograd(*arguments: Any) -> Any:
        if wants_derivative(tuple(_tensors(arguments))):
            return reference(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def run(*arguments: Any) -> Any:
        if _is_compiling():
            return operator(*arguments)
        tensors = _tensors(arguments)
        how = route(tensors)
        if how == OPERATOR:
            return operator(*arguments)
        return reference(*arguments) if how == DERIVATIVE else launch(arguments, tensors)

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"fastdensity::{name}", empty_result, lib=_library)
    return run


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif argument.__class__ is list or argument.__class__ is tuple:
            found += [item for item in argument if isinstance(item, Tensor)]
    return found


def _resolved(arguments: tuple[Any, ...]) -> list[Any]:
    """Negative views made plain: a kernel reads memory, and their sign is not in it."""
    return [_resolve(argument) for argument in arguments]


def _resolve(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.resolve_neg()
    if isinstance(argument, (list, tuple)):
        return [_resolve(item) for item in argument]
    return argument
