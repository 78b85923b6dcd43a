"""Calls of a dual graph on arguments of a kind that has been seen before, without what that call has settled.

A call of a small network is mostly Python: checks of shapes that cannot have changed, the sizes of results, a walk to
each parameter. From the second call on, a `Program` launches the kernels themselves, on memory that is kept from one
call to the next and is shared by results that are not alive at the same time. It serves plain CPU tensors without grad
mode; derivatives, transforms, compilers and other devices go to the graph as ever.
"""

from __future__ import annotations

import enum
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fastdensity._backend import launcher
from fastdensity.boundary import PLAIN, route
from fastdensity.dual.arena import Arena, Result, arena_for
from fastdensity.dual.nearest import NEAREST
from fastdensity.dual.tracing import Traced
from fastdensity.ops.dual_attention import dual_attention
from fastdensity.ops.dual_chain import dual_chain
from fastdensity.ops.dual_conv import dual_conv2d
from fastdensity.ops.dual_linear import dual_linear
from fastdensity.ops.dual_norm import dual_group_norm, dual_layer_norm, dual_rms_norm
from fastdensity.ops.dual_operator import EMPTY_RESULTS
from fastdensity.ops.dual_softmax import dual_softmax

MOST_PROGRAMS = 8  # of a graph
OPS: dict[Any, tuple[str, str | None]] = {  # the op of a function, and the room that it shares
    dual_attention: ("dual_attention", None),
    dual_chain: ("dual_chain", None),
    dual_conv2d: ("dual_conv", None),
    dual_group_norm: ("dual_group_norm", "dual_norm"),
    dual_layer_norm: ("dual_layer_norm", "dual_norm"),
    dual_linear: ("dual_linear", None),
    dual_rms_norm: ("dual_rms_norm", "dual_norm"),
    dual_softmax: ("dual_softmax", None),
}
_is_compiling = torch.compiler.is_compiling


class _Seen(enum.Enum):
    ONCE = 0
    IN_VAIN = 1  # too large to be replayed


class Replay:
    """The programs of one graph, by the kind of their arguments.

    The sizes of all results must follow from those of the arguments: not where a mask selects elements, say.
    """

    def __init__(self, graph: fx.GraphModule, sizes_follow: bool) -> None:
        self.graph = graph
        self._sizes_follow = sizes_follow
        self._programs: OrderedDict[Hashable, Program | _Seen] = OrderedDict()

    def __call__(self, primals: tuple[Any, ...], vectors: Tensor, captured: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the graph returns."""
        key = _kind_of_call([*primals, vectors, *captured]) if self._sizes_follow else None
        if key is None:
            return self.graph(primals, vectors, captured)
        program = self._programs.get(key)
        if isinstance(program, Program):
            return program(primals, vectors, captured)
        if program is _Seen.ONCE:
            return self._record(key, primals, vectors, captured)
        if program is None:
            self._programs[key] = _Seen.ONCE
            while len(self._programs) > MOST_PROGRAMS:
                self._programs.popitem(last=False)
        return self.graph(primals, vectors, captured)

    def _record(
        self, key: Hashable, primals: tuple[Any, ...], vectors: Tensor, captured: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        recorder = _Recorder(self.graph)
        result: tuple[Tensor, Tensor] = recorder.run(primals, vectors, captured)
        arena = arena_for(self.graph.graph, recorder.results)
        self._programs[key] = _Seen.IN_VAIN if arena is None else Program(self.graph, recorder.results, arena)
        return result


def sizes_follow(traced: Traced) -> bool:
    """Do the sizes of all results follow from those of the inputs?"""
    made = pytree.tree_leaves(
        [node.meta.get("val") for node in traced.graph.nodes]
    )  # a generator of random numbers, too
    return not any(free_unbacked_symbols(item) for item in made if isinstance(item, (Tensor, torch.SymInt)))


def _kind_of_call(tensors: list[Any]) -> Hashable:
    """What sizes and memory of all results follow from; None where the graph itself is to be called."""
    if torch.is_grad_enabled() or _is_compiling():
        return None
    if not all([isinstance(tensor, Tensor) for tensor in tensors]) or route(tensors) != PLAIN:  # noqa: C419
        return None
    for tensor in tensors:
        if not tensor.is_cpu or tensor.is_neg():
            return None
    kinds = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
    return (torch.is_inference_mode_enabled(), *kinds)  # memory made in one mode cannot be written to in the other


class _Recorder(fx.Interpreter):  # type: ignore[misc]
    """Runs a graph once and notes what its ops make."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.results: dict[fx.Node, Result] = {}

    def run_node(self, node: fx.Node) -> Any:
        if node.target not in OPS:
            return super().run_node(node)
        name, room = OPS[node.target]
        arguments = _bound(node.target, *self.fetch_args_kwargs_from_env(node))
        if any(item.is_neg() for item in pytree.tree_leaves(arguments) if isinstance(item, Tensor)):
            return super().run_node(node)  # which resolves them; kernels read memory
        out: Tensor = EMPTY_RESULTS[name](*arguments)
        before = out.data_ptr()
        if out.numel():
            launcher(name, out.device.type, room)(*arguments, out)
        self.results[node] = Result(tuple(out.shape), out.dtype, out.data_ptr() == before)
        return out


def _bound(target: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of an op by position, defaults among them."""
    bound = inspect.signature(target).bind(*arguments, **keywords)
    bound.apply_defaults()
    return bound.args


def _into(name: str, room: str | None) -> Callable[..., Tensor]:
    """Launches an op into given memory."""

    def run(out: Tensor, *arguments: Any) -> Tensor:
        launcher(name, "cpu", room)(*arguments, out)
        return out

    run.__name__ = f"into_{name}"
    return run


def _fresh(name: str, room: str | None) -> Callable[..., Tensor]:
    """Launches an op into new memory."""

    def run(shape: tuple[int, ...], dtype: torch.dtype, *arguments: Any) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device="cpu")
        if out.numel():
            launcher(name, "cpu", room)(*arguments, out)
        return out

    run.__name__ = f"fresh_{name}"
    return run


_INTO = {target: _into(*op) for target, op in OPS.items()}
_FRESH = {target: _fresh(*op) for target, op in OPS.items()}


class Program:
    """A graph whose ops launch their kernels; called as the graph is, on arguments of the kind it was made for."""

    def __init__(self, source: fx.GraphModule, results: dict[fx.Node, Result], arena: Arena) -> None:
        self._arena = arena
        self._live: list[tuple[Any, str]] = []  # dictionaries of the modules, and the names of parameters in them
        self._source = source
        module = fx.GraphModule(nn.Module(), self._rewritten(source, results), "Program")
        self._run = module.forward  # past what every call of a module looks for

    def __call__(self, primals: tuple[Any, ...], vectors: Tensor, captured: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the graph returns."""
        try:
            live = [entries[name] for entries, name in self._live]
        except KeyError:  # a parameter that became a buffer, say
            return self._source(primals, vectors, captured)
        if route(live) != PLAIN or any([tensor.is_neg() for tensor in live]):  # noqa: C419
            return self._source(primals, vectors, captured)
        with self._arena.memory() as memory:
            return self._run(primals, vectors, captured, live, memory)

    def _rewritten(self, source: fx.GraphModule, results: dict[fx.Node, Result]) -> fx.Graph:
        graph, new = fx.Graph(), {}
        for node in source.graph.find_nodes(op="placeholder"):
            new[node] = graph.placeholder(node.name)
        live, memory = graph.placeholder("live_tensors"), graph.placeholder("memory")
        for node in source.graph.nodes:
            if node.op == "get_attr":
                self._live.append(_owner(source, str(node.target)))
                new[node] = graph.call_function(operator.getitem, (live, len(self._live) - 1))
            elif node in results:
                arguments = fx.map_arg(_bound(node.target, node.args, node.kwargs), lambda item: new[item])
                number, result = self._arena.numbers.get(node), results[node]
                if number is None:
                    where: tuple[Any, ...] = (result.shape, result.dtype)
                    new[node] = graph.call_function(_FRESH[node.target], (*where, *arguments))
                else:
                    out = graph.call_function(operator.getitem, (memory, number))
                    new[node] = graph.call_function(_INTO[node.target], (out, *arguments))
            elif node.op != "placeholder":
                new[node] = graph.node_copy(node, lambda item: new[item])
                new[node].target = NEAREST.get(node.target, node.target)
        return graph


def _owner(module: Any, path: str) -> tuple[Any, str]:
    """The dictionary that holds a tensor of `module` now, and its name there."""
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    for entries in (module._parameters, module._buffers):
        if name in entries:
            return entries, name
    return vars(module), name
