"""What a trace must leave as it was: the containers that fn fills, its caches, its parameters.

A trace runs fn on fake tensors. Whatever fn keeps of those (a table of frequencies under functools.lru_cache, an entry
of `self.cache`) would come back in later calls of fn itself, as a tensor without numbers.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastdensity.dual.capture import Captured, NotTraceableError, capture, of_library
from fastdensity.dual.lines import is_users
from fastdensity.dual.watch import Reached

_MOST_DEPTH = 4  # of containers in containers
_CONTAINERS = (dict, list, tuple, set, deque)


@contextmanager
def state_kept(captured: Captured) -> Iterator[None]:
    """Attributes of modules and objects, and the containers that these and functions read, hold what they held before.

    torch.export, too, leaves equal copies of modules' tuples, lists and dictionaries behind; a container that two
    modules share must stay shared, and earlier graphs must not take the copies for a change.
    """
    modules = [module for root in captured.modules for module in root.modules()]
    parts = [captured, *map(capture, _functions_of(modules))]
    read = [value for part in parts for value in (*part.objects, *part.containers)]
    reached = Reached(modules, [*read, *_globals_of(modules)])
    dicts = [vars(module) for module in modules] + reached.dicts
    before = [dict(entries) for entries in dicts]
    contents = [list(container) for container in reached.containers]
    try:
        yield
    finally:
        for entries, kept in zip(dicts, before, strict=True):
            _restore_entries(entries, kept)
        for container, items in zip(reached.containers, contents, strict=True):
            _restore_items(container, items)


def _functions_of(modules: list[nn.Module]) -> list[types.FunctionType]:
    """Hooks, and methods that were replaced."""
    holders = [
        entries for module in modules for entries in (vars(module), module._forward_hooks, module._forward_pre_hooks)
    ]
    return [value for entries in holders for value in entries.values() if isinstance(value, types.FunctionType)]


def _globals_of(modules: list[nn.Module]) -> list[Any]:
    """The containers that stand in the users' classes of modules, and beside these in their files."""
    classes = {kind for module in modules for kind in type(module).__mro__ if not of_library(kind.__module__)}
    files = {kind.__module__: vars(sys.modules[kind.__module__]) for kind in classes if kind.__module__ in sys.modules}
    scopes = [*map(vars, classes), *files.values()]
    return [
        value for scope in scopes for name, value in scope.items()
        if isinstance(value, _CONTAINERS) and not name.startswith("__")
    ]  # fmt: skip


def _restore_entries(entries: dict[Any, Any], before: dict[Any, Any]) -> None:
    for name in [name for name in entries if name not in before]:
        del entries[name]
    changed = {name: value for name, value in before.items() if entries.get(name, entries) is not value}
    if changed:
        entries.update(changed)


def _restore_items(container: Any, items: list[Any]) -> None:
    if len(container) != len(items) or any(now is not then for now, then in zip(container, items, strict=True)):
        container.clear()
        container.update(items) if isinstance(container, set) else container.extend(items)


@contextmanager
def inference_tensors_replaced(roots: list[nn.Module]) -> Iterator[None]:
    """Parameters and buffers that were made in inference mode, in which nothing can be traced, as ordinary ones."""
    dicts: list[dict[str, Any]] = [
        entries
        for root in roots
        for module in root.modules()
        for entries in (module._parameters, module._buffers, vars(module))
    ]
    twins: dict[Tensor, Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for entries in dicts:
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.is_inference():
                twins[value] = twins[value] if value in twins else _ordinary(value)
                replaced.append((entries, name, value))
    for entries, name, value in replaced:
        entries[name] = twins[value]
    try:
        yield
    finally:
        for entries, name, value in replaced:
            entries[name] = value


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor of this one's kind with any numbers: a trace reads none."""
    with torch.inference_mode(False):
        plain = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return nn.Parameter(plain, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain


class FakesMade:
    """The fake tensors that this thread makes within the block, and what keeps them afterwards."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[FakeTensor]] = []
        self._original: Callable[..., FakeTensor] = FakeTensor.__new__

    def __enter__(self) -> FakesMade:
        thread, original = threading.get_ident(), self._original

        def make(cls: type[FakeTensor], *arguments: Any, **keywords: Any) -> FakeTensor:
            made = original(cls, *arguments, **keywords)
            if threading.get_ident() == thread:
                self._made.append(weakref.ref(made))
            return made

        FakeTensor.__new__ = staticmethod(make)  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *error: object) -> None:
        FakeTensor.__new__ = staticmethod(self._original)  # type: ignore[method-assign,assignment]

    def take_out_of_caches(self, own: Iterable[Any]) -> None:
        """Empty the caches of functions that hold one; `own` are those that the trace itself needs.

        Raises:
            NotTraceableError: one is kept in another place.
        """
        ours = {id(tensor) for tensor in own}
        if not self._left(ours):
            return
        empty_caches_of_fakes()
        if self._left(ours):
            gc.collect()  # what only holds itself is kept by nobody
        left = self._left(ours)
        for tensor in left:
            holder = _holder(tensor)
            if holder:
                raise NotTraceableError(
                    f"fn keeps a tensor that it makes, of shape {tuple(tensor.shape)}, in {holder}, and a trace "
                    "leaves one without numbers there: make it before and set it anew, or keep it in a dictionary, a "
                    "buffer or under functools.lru_cache"
                )

    def _left(self, ours: set[int]) -> list[FakeTensor]:
        return [tensor for made in self._made if (tensor := made()) is not None and id(tensor) not in ours]


def empty_caches_of_fakes() -> None:
    """Empty every functools.lru_cache that holds a fake tensor; it will be filled again."""
    for wrapper in [item for item in gc.get_objects() if type(item) is functools._lru_cache_wrapper]:
        if _holds_fake(gc.get_referents(wrapper), 0):
            wrapper.cache_clear()


def _holds_fake(values: Iterable[Any], depth: int) -> bool:
    for value in values:
        if isinstance(value, FakeTensor):
            return True
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, _CONTAINERS) else ()
        if depth < _MOST_DEPTH and inner and _holds_fake(inner, depth + 1):
            return True
    return False


def _holder(value: Any, depth: int = 0) -> str | None:
    """What of the user's holds it, in few words: a variable, a class, an object; None for what only torch holds."""
    for item in gc.get_referrers(value):
        if isinstance(item, (dict, list, tuple, set, deque)):
            found = _holder(item, depth + 1) if depth < _MOST_DEPTH else None
            names = [name for name, held in item.items() if held is value] if isinstance(item, dict) else []
            if found and names and not found.startswith("'"):
                found = f"{names[0]!r} of {found}"
        else:
            found = _described(item)
        if found:
            return found
    return None


def _described(item: Any) -> str | None:
    """A place of the user's in few words."""
    if isinstance(item, types.ModuleType):
        return f"the globals of {item.__name__}" if is_users(getattr(item, "__file__", None) or "<") else None
    if isinstance(item, types.CellType):
        closures = [held for held in gc.get_referrers(item) if isinstance(held, tuple)]
        functions = [held for held in gc.get_referrers(*closures) if isinstance(held, types.FunctionType)]
        names = [held.__name__ for held in functions if is_users(held.__code__.co_filename)]
        return f"a variable around {names[0]}" if names else None
    if isinstance(item, types.FunctionType):
        return f"the function {item.__name__}" if is_users(item.__code__.co_filename) else None
    if isinstance(item, types.FrameType):
        return None
    kind = item if isinstance(item, type) else type(item)
    return None if of_library(kind.__module__) else f"{'the class' if kind is item else 'an object of'} {kind.__name__}"
