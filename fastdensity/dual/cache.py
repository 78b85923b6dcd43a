"""One trace per kind of arguments: where dual graphs are kept, and when they hold.

The graphs of a module live and die with it: they are kept in an attribute of the module that does not show in its
state, is not copied and not pickled. Those of functions that call no module are kept in a bounded table.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fastdensity.boundary import describe
from fastdensity.dual.capture import Captured, capture
from fastdensity.dual.cautions import warn_of_dropout, warn_of_lost_derivatives
from fastdensity.dual.functional import make_functional
from fastdensity.dual.nested import NestedDual, NestedJvpError, end_outer_trace, inside_trace
from fastdensity.dual.patterns import recognise
from fastdensity.dual.precision import make_casts_explicit
from fastdensity.dual.replay import Replay, sizes_follow
from fastdensity.dual.rewrite import rewrite
from fastdensity.dual.tracing import Traced, trace
from fastdensity.dual.watch import Watch

if TYPE_CHECKING:
    from fastdensity.dual.trace_graph import TraceGraph

STORE = "_fastdensity_duals"  # the attribute in which a module keeps its own graphs
_MOST_GRAPHS = 64
_MANY_TRACES = 16
_lock = threading.RLock()


class Dual:
    """A dual graph with what it was made from."""

    def __init__(self, captured: Captured, primals: tuple[Any, ...], autocast: bool) -> None:
        self.traced: Traced = trace(captured, primals)
        make_functional(self.traced.graph, self.traced.module, self.traced.sources)
        make_casts_explicit(self.traced.graph, autocast)
        recognise(self.traced.graph, self.traced.sources)
        warn_of_dropout(self.traced.graph)
        warn_of_lost_derivatives(self.traced)
        self.graph, self.records = rewrite(self.traced)
        self.replay = Replay(self.graph, sizes_follow(self.traced))
        self.watch = Watch(captured.modules, captured.objects)
        self.captured = captured  # keeps what the key names alive
        self.device_type = primals[0].device.type
        self._trace_graph: tuple[TraceGraph | None] | None = None

    def run(
        self, fn: Callable[..., Any], primals: tuple[Any, ...], vectors: Tensor, tensors: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The graph on these arguments. `tensors`: what fn closes over."""
        return self.call(self.replay, primals, vectors, tensors)

    def call(
        self,
        graph: Callable[..., tuple[Tensor, Tensor]],
        primals: tuple[Any, ...],
        directions: Any,
        tensors: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """A graph of this function; what autocast did is in it already."""
        if torch.is_autocast_enabled(self.device_type):
            with torch.autocast(self.device_type, enabled=False):
                return graph(primals, directions, tensors)
        return graph(primals, directions, tensors)

    def trace_graph(self) -> TraceGraph | None:
        """The graph whose result is z.(J z), made when it is first wanted; None where it would save nothing."""
        if self._trace_graph is None:
            from fastdensity.dual.trace_graph import build

            with _lock:
                self._trace_graph = (build(self.traced),)
        return self._trace_graph[0]

    def bound_graph(self, fn: Callable[..., Any]) -> fx.GraphModule:
        """The graph with the closed-over tensors as they are now."""
        return rewrite(self.traced, capture(fn).tensors)[0]


class _Store:
    """The graphs of one module."""

    def __init__(self) -> None:
        self.exact: OrderedDict[Hashable, Dual | NestedDual] = OrderedDict()  # by all shapes
        self.general: dict[Hashable, list[Dual]] = {}  # by all shapes but the batch's
        self.traces: Counter[Hashable] = Counter()  # by the function's code

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles of the module start anew
        return _Store, ()

    def __deepcopy__(self, memo: Any) -> _Store:
        return _Store()

    def put(self, key: Hashable, general: Hashable, dual: Dual | NestedDual) -> None:
        self.exact[key] = dual
        if (
            isinstance(dual, Dual)
            and dual.traced.batch is not None
            and dual not in (duals := self.general.setdefault(general, []))
        ):
            duals.append(dual)
        while len(self.exact) > _MOST_GRAPHS:
            _, dropped = self.exact.popitem(last=False)
            if isinstance(dropped, Dual) and all(kept is not dropped for kept in self.exact.values()):
                self.forget(dropped)

    def used(self, key: Hashable) -> None:
        """The graphs that were not used for the longest time go first."""
        with suppress(KeyError):  # another thread has dropped it
            self.exact.move_to_end(key)

    def forget(self, dual: Dual) -> None:
        """Drop a graph that no longer holds."""
        self.exact = OrderedDict((key, kept) for key, kept in self.exact.items() if kept is not dual)
        for general, duals in list(self.general.items()):
            if dual in duals:
                duals.remove(dual)
            if not duals:
                del self.general[general]


_functions = _Store()


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="fd.jvp looks its graph up in Python; where fullgraph=True is wanted, compile fd.trace_jvp(fn, primals)"
)
def find(fn: Callable[..., Any], primals: tuple[Any, ...]) -> tuple[Dual | NestedDual, list[Tensor]]:
    """The dual of fn for such arguments, a kept one that still holds or a new trace, and the tensors fn closes over.

    Those belong to one call, not to the dual: another thread may run it with its own.
    """
    end_outer_trace()
    if not callable(fn):
        raise TypeError(f"fn must be a module or a function, got {describe(fn)}")
    captured = capture(fn)
    store = _store(captured)
    leaves, structure = _leaves(primals)
    x = primals[0]
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    mode = (captured.key, structure, torch.get_autocast_dtype(device) if autocast else None, *_modes())
    everything = leaves + captured.tensors
    key = (mode, *map(_kind, everything))
    dual = store.exact.get(key)
    if isinstance(dual, NestedDual):
        return dual, captured.tensors
    if dual is not None and dual.watch.fresh():
        store.used(key)
        return dual, captured.tensors
    with _lock:
        return _find_slowly(captured, primals, store, dual, key, (mode, everything, x), autocast), captured.tensors


def _find_slowly(
    captured: Captured,
    primals: tuple[Any, ...],
    store: _Store,
    stale: Dual | None,
    key: Hashable,
    parts: tuple[Any, list[Any], Tensor],
    autocast: bool,
) -> Dual | NestedDual:
    if stale is not None:
        store.forget(stale)
    mode, everything, x = parts
    batch = x.shape[0] if x.dim() else 0
    general = (mode, *(_kind(leaf, batch) for leaf in everything))
    for dual in list(store.general.get(general, ())):
        if not dual.watch.fresh():
            store.forget(dual)
        elif dual.traced.holds_for(batch):
            store.put(key, general, dual)
            return dual
    try:
        with inside_trace():
            made: Dual | NestedDual = Dual(captured, primals, autocast)
    except NestedJvpError:
        made = NestedDual()
    store.put(key, general, made)
    store.traces[captured.family] += 1
    if store.traces[captured.family] == _MANY_TRACES:
        warnings.warn(
            f"fd.jvp has traced this function {_MANY_TRACES} times; what changes between calls (a Python number, an "
            "attribute, a shape) is a constant of the trace: pass it as a tensor",
            stacklevel=4,
        )
    return made


def _store(captured: Captured) -> _Store:
    if not captured.modules:
        return _functions
    attributes = vars(captured.modules[0])
    store = attributes.get(STORE)
    if store is None:
        store = attributes[STORE] = _Store()
    return store


def _modes() -> tuple[Hashable, ...]:
    """What code may ask torch for, and branch on."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()


def _leaves(primals: tuple[Any, ...]) -> tuple[list[Any], Hashable]:
    if all(isinstance(leaf, Tensor) for leaf in primals):
        return list(primals), len(primals)
    leaves, structure = pytree.tree_flatten(primals)
    return leaves, str(structure)


def _kind(leaf: Any, batch: int = -1) -> Hashable:
    """What a trace depends on in an argument; the batch size is left open where it stands first."""
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    shape: Any = leaf.shape
    if batch > 1 and len(shape) and shape[0] == batch:
        shape = ("batch", *shape[1:])
    if leaf.layout is not torch.strided:
        return shape, leaf.dtype, leaf.device, leaf.layout
    return shape, leaf.dtype, leaf.device, leaf.is_contiguous() or leaf.stride()
