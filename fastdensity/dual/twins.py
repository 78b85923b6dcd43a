"""The functional form of operators that write into a tensor: `relu_`, `sin(out=)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastdensity.dual import runtime

aten = torch.ops.aten
_OF_OTHER_NAME = {
    aten.copy_.default: runtime.overwrite,
    aten.fill_diagonal_.default: runtime.fill_diagonal,
    aten.normal_.default: aten.normal_functional.default,
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.pow_.Tensor: aten.pow.Tensor_Tensor,
    aten.float_power_.Tensor: aten.float_power.Tensor_Tensor,
    aten.floor_divide_.Tensor: aten.floor_divide.default,
}
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def functional(node: fx.Node, line: str) -> tuple[fx.Node, Call]:
    """The node that is written into, and the call that gives what is written; ValueError where there is none."""
    target: Any = node.target
    places = [item for item in target._schema.arguments if item.alias_info is not None and item.alias_info.is_write]
    if len(places) == 1 and places[0].name in node.kwargs:
        return _without_out(node, places[0].name, line)
    written = node.args[0]
    assert isinstance(written, fx.Node)
    twin = _OF_OTHER_NAME.get(target) or _of_the_same_name(target)
    if twin is None or len(places) != 1:
        raise ValueError(f"{target} changes a tensor in place at {line}, and has no functional form here")
    arguments = node.args
    if twin is aten.bernoulli.p and len(arguments) == 1 and "p" not in node.kwargs:
        arguments = (written, 0.5)  # a default of the one only
    return written, (twin, arguments, dict(node.kwargs))


def _of_the_same_name(target: Any) -> Any:
    name = target._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None)
    if packet is None or not name.endswith("_") or target._overloadname not in packet.overloads():
        return None
    return getattr(packet, target._overloadname)


def _without_out(node: fx.Node, place: str, line: str) -> tuple[fx.Node, Call]:
    """An operator with `out=`; memory of another shape would be resized, which no graph holds."""
    target: Any = node.target
    written = node.kwargs[place]
    assert isinstance(written, fx.Node)
    rest = [item.name for item in target._schema.arguments if item.name != place]
    packet = target._overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        if not overload._schema.is_mutable and [item.name for item in overload._schema.arguments] == rest:
            before, after = written.meta.get("val"), node.meta.get("val")
            if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
                break
            keywords = {name: value for name, value in node.kwargs.items() if name != place}
            return written, (overload, node.args, keywords)
    raise ValueError(f"{target} writes into `{place}` at {line}, and has no functional form here; use what it returns")
