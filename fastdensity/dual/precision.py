"""Autocast made explicit: the casts it did during the trace become nodes.

A dual stack goes through other operators than its value did, and autocast knows none of ours. The trace has recorded
the dtype of each result; where torch's own promotion would not give it, autocast cast the inputs to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_CHOOSE_THEIR_DTYPE = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}


_NORMS = {aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default}  # take weights of another dtype


def make_casts_explicit(graph: fx.Graph, everywhere: bool) -> None:
    """Insert `.to(dtype)` before every operator whose result has a dtype that its floating inputs do not promote to.

    `everywhere` if the trace ran under autocast; otherwise only in blocks of the code that switch it.
    """
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            value = value[0] if value else None
        if not everywhere and not node.meta.get("autocast"):
            continue
        if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if node.target in _CHOOSE_THEIR_DTYPE or node.kwargs.get("dtype") is not None:
            continue
        given = node.all_input_nodes[:1] if node.target in _NORMS else node.all_input_nodes
        inputs = [item for item in given if _floating(item) is not None]
        if not inputs or _promoted(inputs) == value.dtype:
            continue
        for item in inputs:
            if item.meta["val"].dtype != value.dtype:
                with graph.inserting_before(node):
                    cast = graph.call_function(aten.to.dtype, (item, value.dtype))
                cast.meta = {**node.meta, "val": item.meta["val"].to(value.dtype)}
                node.replace_input_with(item, cast)


def _floating(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _promoted(nodes: list[fx.Node]) -> torch.dtype:
    """torch's promotion: tensors with dimensions decide before those without."""
    values = [value for node in nodes if (value := _floating(node)) is not None]
    with_dims = [value for value in values if value.dim()] or values
    dtype = with_dims[0].dtype
    for value in with_dims[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype
