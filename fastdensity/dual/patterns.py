"""Layers that users write out in pieces, put together again: each becomes the one operator that has a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten.type_as.default)


def recognise(graph: fx.Graph, sources: dict[str, tuple[str, Any]]) -> None:
    """Replace x * rsqrt(mean(x^2, -1) + eps) [* weight] by rms_norm, wherever that is all its pieces are for.

    `sources` tells parameters from the function's arguments; only a weight that cannot depend on the input is taken in.
    Casts to a wider type on the way, and back, are what the kernel does anyway.
    """
    for node in list(graph.nodes):
        if node.target is aten.rsqrt.default:
            _rms_norm(graph, node, sources)
    graph.eliminate_dead_code()


def _rms_norm(graph: fx.Graph, root: fx.Node, sources: dict[str, tuple[str, Any]]) -> None:
    found = _mean_square(root)
    scaled = _only_user(root)
    if found is None or scaled is None or scaled.target is not aten.mul.Tensor:
        return
    x, wide, eps = found
    if set(scaled.args) not in ({x, root}, {wide, root}):
        return
    last = _cast_back(scaled, x)
    weight = None
    user = _only_user(last)
    if user is not None and user.target is aten.mul.Tensor:
        (other,) = [item for item in user.args if item is not last] or [None]
        if _is_weight(other, x, sources):
            weight, last = other, _cast_back(user, x)
    if last.meta["val"].dtype != x.meta["val"].dtype or last.meta["val"].shape != x.meta["val"].shape:
        return
    with graph.inserting_before(last):
        norm = graph.call_function(aten.rms_norm.default, (x, [x.meta["val"].shape[-1]], weight, eps))
    norm.meta = dict(last.meta)
    last.replace_all_uses_with(norm)


def _mean_square(root: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(x, x in the type of the arithmetic, eps) of rsqrt(mean(x^2, -1, keepdim) + eps)."""
    added: Any = root.args[0]
    if added.target not in (aten.add.Tensor, aten.add.Scalar) or added.kwargs or len(added.args) != 2:
        return None
    mean, eps = added.args
    if not isinstance(mean, fx.Node) or not isinstance(eps, float) or mean.target is not aten.mean.dim or mean.kwargs:
        return None
    square: Any = mean.args[0]
    rank = square.meta["val"].dim()
    if len(mean.args) != 3 or mean.args[1] not in ([-1], [rank - 1]) or mean.args[2] is not True:
        return None
    if any(_only_user(item) is None for item in (added, mean, square)):
        return None
    power = square.target is aten.pow.Tensor_Scalar and square.args[1] == 2
    product = square.target is aten.mul.Tensor and square.args[0] is square.args[1]
    if not (power or product or square.target is aten.square.default):
        return None
    wide = square.args[0]
    x = wide.args[0] if wide.target in _CASTS and _wider(wide.args[0], wide) else wide
    value = x.meta["val"]
    return (x, wide, eps) if value.is_floating_point() and isinstance(value.shape[-1], int) else None


def _wider(narrow: Any, wide: fx.Node) -> bool:
    before, after = narrow.meta["val"].dtype, wide.meta["val"].dtype
    return before.is_floating_point and torch.promote_types(before, after) is after


def _cast_back(node: fx.Node, x: fx.Node) -> fx.Node:
    """The cast to x's type behind `node`, if that is what its result is for; else the node."""
    user = _only_user(node)
    cast = user is not None and user.target in _CASTS and user.args[0] is node
    return user if cast and user.meta["val"].dtype == x.meta["val"].dtype else node  # type: ignore[union-attr]


def _is_weight(node: Any, x: fx.Node, sources: dict[str, tuple[str, Any]]) -> bool:
    if not isinstance(node, fx.Node) or node.op != "placeholder" or sources[node.name][0] == "primal":
        return False
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.shape == x.meta["val"].shape[-1:] and value.dtype == x.meta["val"].dtype


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None
