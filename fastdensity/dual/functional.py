"""A traced graph made functional: blocks inlined, no-ops dropped, in-place operations turned into plain ones.

A dual of `relu_(h)` that wrote into its argument would write into memory that other nodes still read. What is
overwritten here is always a fresh intermediate; writing into the input or into a buffer is refused.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastdensity.dual import twins

aten = torch.ops.aten
_BLOCKS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_DROPPED = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
)
_SAME = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.alias.default)
_VIEWS_THAT_SCATTER = {aten.select.int: aten.select_scatter.default, aten.slice.Tensor: aten.slice_scatter.default}


def line_of(node: fx.Node) -> str:
    """The user's line that made this node: the innermost frame outside torch, 'file:line, `code`'."""
    frames = [part.strip() for part in (node.meta.get("stack_trace") or "").split('File "') if part.strip()]
    own = [frame for frame in frames if "/torch/" not in frame.split('"')[0]]
    if not own:
        return "an unknown line"
    head, _, code = own[-1].partition("\n")
    file, _, rest = head.partition('", line ')
    return f"{file}:{rest.split(',')[0]}, `{code.strip()}`"


def make_functional(graph: fx.Graph, module: fx.GraphModule, sources: dict[str, tuple[str, Any]]) -> None:
    """Change `graph` in place; ValueError where the code overwrites its input or memory that others still see."""
    while any(_inline(node, module) for node in list(graph.nodes)):
        pass
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):  # one block of the user's or torch's code
            raise NotImplementedError(f"{node.target} has no forward-mode rule known here, at {line_of(node)}")
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target in _DROPPED:
                graph.erase_node(node)
            elif node.target._schema.is_mutable:
                _replace_mutation(graph, node, sources)
    for node in list(graph.nodes):
        if _is_same(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _inline(node: fx.Node, module: fx.GraphModule) -> bool:
    """Put a block under no_grad or autocast where it is called; precision.py keeps what autocast did."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") not in _BLOCKS:
        return False
    position = next(
        number
        for number, argument in enumerate(node.args)
        if isinstance(argument, fx.Node) and argument.op == "get_attr"
    )
    inner = getattr(module, str(node.args[position].target)).graph
    values = dict(zip(inner.find_nodes(op="placeholder"), node.args[position + 1 :], strict=True))
    grad_mode = node.target.__name__ == _BLOCKS[0]
    mark = "without_grad" if grad_mode and node.args[0] is False else "autocast" if not grad_mode else None
    with node.graph.inserting_before(node):
        results = node.graph.graph_copy(inner, values)
        copied = [values[item] for item in inner.nodes if item.op not in ("placeholder", "output")]
    for item in copied:
        if mark is not None and isinstance(item, fx.Node):
            item.meta[mark] = True
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            node.graph.erase_node(user)
    if node.users:
        single = results[0] if isinstance(results, (tuple, list)) else results
        node.replace_all_uses_with(single)
    node.graph.erase_node(node)
    return True


def _is_same(node: fx.Node) -> bool:
    """Nodes that hand their argument on."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _SAME:
        return True
    if node.target is aten.slice.Tensor and len(node.args) == 4:  # x[:], as `x[:, None]` leaves it behind
        return node.args[2] in (0, None) and node.args[3] in (None, 2**63 - 1)
    if node.target is aten.dropout.default:
        return node.args[2] is False or node.args[1] == 0
    if node.target in (aten.mul.Tensor, aten.div.Tensor):  # by an output scale of 1, as many networks do
        factor: Any = node.args[1]
        return bool(factor == 1) and not node.kwargs and _same_kind(node.args[0], node)
    casts = (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default, aten.to.device, aten.to.other)
    return node.target in casts and _same_kind(node.args[0], node)


def _same_kind(before: fx.Node, after: fx.Node) -> bool:
    old, new = before.meta.get("val"), after.meta.get("val")
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return False
    return old.dtype == new.dtype and old.device == new.device


def _storage(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _replace_mutation(graph: fx.Graph, node: fx.Node, sources: dict[str, tuple[str, Any]]) -> None:
    if node.target is aten.detach_.default:  # how torch.tensor(...) in the code looks; memory is not touched
        node.target = aten.detach.default
        return
    written, call = twins.functional(node, line_of(node))
    owner = _placeholder_of(written)
    if owner is not None:
        kind, name = sources[owner.name]
        what = {"primal": "its input", "captured": "a tensor that it closes over"}.get(kind, repr(name))
        hint = " (call model.eval() if that is a running statistic)" if kind not in ("primal", "captured") else ""
        raise ValueError(f"fn writes into {what} in place at {line_of(node)}; write to a copy instead{hint}")
    with graph.inserting_before(node):
        value = graph.call_function(*call)
        value.meta = dict(node.meta)
        natural = _natural_dtype(value)
        if natural is not None and natural != node.meta["val"].dtype:  # what is written keeps its own type
            value.meta["val"] = node.meta["val"].to(natural)
            value = graph.call_function(aten.to.dtype, (value, node.meta["val"].dtype))
            value.meta = dict(node.meta)
    _rebind(graph, written, node, value)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _placeholder_of(node: fx.Node) -> fx.Node | None:
    """The placeholder whose memory this node shows, if any."""
    storage = _storage(node)
    for placeholder in node.graph.find_nodes(op="placeholder"):
        if placeholder is node or (storage is not None and _storage(placeholder) == storage):
            return placeholder
    return None


def _natural_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that this node's operator gives by itself; None if it cannot be asked."""
    mode = getattr(node.meta["val"], "fake_mode", None)
    if mode is None or not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
    with mode:
        result = node.target(*arguments, **keywords)
    return result.dtype if isinstance(result, Tensor) else None


def _rebind(graph: fx.Graph, written: fx.Node, mutation: fx.Node, value: fx.Node) -> None:
    """Whoever reads `written`, or what it is a view of, after the mutation reads the new value."""
    views: list[fx.Node] = []
    base, new = written, value
    replaced = {written: value}  # the written tensor, and each that it is a view of
    while base.op == "call_function" and base.target in _VIEWS_THAT_SCATTER:
        views.append(base)
        with graph.inserting_before(mutation):
            scatter = _VIEWS_THAT_SCATTER[base.target]
            new = graph.call_function(scatter, (base.args[0], new, *base.args[1:]), dict(base.kwargs))
        source = base.args[0]
        assert isinstance(source, fx.Node)
        new.meta = {**mutation.meta, "val": source.meta["val"]}
        base = source
        replaced[base] = new
    after = _later(graph, mutation)
    storage = _storage(base)
    for node in graph.nodes:
        own = node is base or node is written or node is mutation or node in views
        aliased = not own and _storage(node) == storage
        if aliased and node not in after and storage is not None and any(user in after for user in node.users):
            raise ValueError(
                f"{mutation.target} at {line_of(mutation)} overwrites memory that is read later through another view; "
                "write to a copy instead"
            )
    for old, current in replaced.items():
        old.replace_all_uses_with(current, lambda user: user in after)


def _later(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    nodes = list(graph.nodes)
    return set(nodes[nodes.index(node) + 1 :])
