"""Has anything changed since a network was traced?

A trace fixes the modules' structure and every plain attribute that their code may have read: a dropout's `training`, an
adapter's scale, a replaced `forward`, a hook. Parameters are read anew by each call, so their values may change, and
they may be swapped for others of the same kind. What attributes lead to counts as well: entries of their lists and
dictionaries (an adapter's scale is one), attributes of plain objects, modules that are registered nowhere. All of that
is looked at in every call; it has to be cheap, so what is compared is the identity of the entries of each dictionary.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fastdensity._backend import native

_HOLDERS = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_ENDS = (
    type(None), bool, int, float, complex, str, bytes, Tensor, type, types.ModuleType, types.FunctionType,
    types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_LIBRARIES = ("torch", "fastdensity", "builtins", "_thread", "threading", "logging")
_MOST_DEPTH = 4


class Watch:
    """A snapshot of modules and objects; `fresh()` says whether the graph that was made then still holds."""

    def __init__(self, modules: Iterable[nn.Module], objects: Iterable[Any]) -> None:
        self._modules = list(modules)
        self._objects = list(objects)
        self._take()

    def _take(self) -> None:
        everything = [module for root in self._modules for module in root.modules()]
        self._dicts = [vars(module) for module in everything]
        self._dicts += [vars(module)[name] for module in everything for name in _HOLDERS]
        self._dicts += [vars(value) for value in self._objects if hasattr(value, "__dict__")]
        self._reached = Reached(everything, self._objects)
        self._dicts += self._reached.dicts
        self._snapshots = [tuple(entries.values()) for entries in self._dicts]
        self._readings = [read() for read in self._reached.others]
        self._tensors = _state(self._modules)
        self._values = list(self._tensors.values())
        self._kinds = _kinds(self._values)
        self._plain = _plain_entries(everything, self._objects, self._reached.dicts)

    def fresh(self) -> bool:
        """True if nothing has changed but the values of parameters and buffers."""
        if _kinds(self._values) != self._kinds:  # `.data = ` leaves the tensor itself in its place
            return False
        if not all(map(_same_items, (read() for read in self._reached.others), self._readings)):
            return False
        return _unchanged(self._dicts, self._snapshots) or self._only_tensors_were_swapped()

    def _only_tensors_were_swapped(self) -> bool:
        """Parameters replaced by others of the same kind are no change: the graph asks the module for them.

        Nor is another order of a dictionary, or an equal tuple in the place of another: tracing leaves both behind.
        """
        everything = [module for root in self._modules for module in root.modules()]
        plain = _plain_entries(everything, self._objects, Reached(everything, self._objects).dicts)
        if plain.keys() != self._plain.keys() or not all(_same(plain[name], self._plain[name]) for name in plain):
            return False
        before = {name: _kind(tensor) for name, tensor in self._tensors.items()}
        if {name: _kind(tensor) for name, tensor in _state(self._modules).items()} != before:
            return False
        self._take()
        return True


class Reached:
    """What the attributes of modules and objects lead to, and a trace has read as constants.

    `dicts`: dictionaries, among them those of plain objects and of modules that are not registered. `others`: readers
    of lists, sets and slots. `containers`: those lists and sets.
    """

    def __init__(self, modules: list[nn.Module], objects: list[Any]) -> None:
        self.dicts: list[dict[Any, Any]] = []
        self.others: list[Callable[[], list[Any]]] = []
        self.containers: list[Any] = []
        self._seen = {id(module) for module in modules}
        for value in objects:
            self._visit(value, 0)
        for module in modules:
            self._attributes(module, 0)

    def _visit(self, value: Any, depth: int) -> None:
        if isinstance(value, _ENDS) or id(value) in self._seen or depth > _MOST_DEPTH:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self.dicts += [vars(value), *(vars(value)[name] for name in _HOLDERS if name in vars(value))]
            self._attributes(value, depth)
            self._all(value.children(), depth)
        elif isinstance(value, dict):
            self.dicts.append(value)
            self._all(value.values(), depth)
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            if not isinstance(value, (tuple, frozenset)):
                self.others.append(lambda: list(value))
                self.containers.append(value)
            self._all(value, depth)
        else:
            self._object(value, depth)

    def _all(self, values: Iterable[Any], depth: int) -> None:
        for value in list(values):
            self._visit(value, depth + 1)

    def _attributes(self, module: nn.Module, depth: int) -> None:
        self._all((value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE), depth)

    def _object(self, value: Any, depth: int) -> None:
        """A plain object; torch's own (generators, graphs) and this package's are taken as they are."""
        if type(value).__module__.split(".")[0] in _LIBRARIES:
            return
        entries = getattr(value, "__dict__", None)
        if isinstance(entries, dict):
            self.dicts.append(entries)
            self._all(entries.values(), depth)
        slots = slots_of(type(value))
        if slots:
            self.others.append(lambda: [getattr(value, slot, None) for slot in slots])
            self._all((getattr(value, slot, None) for slot in slots), depth)


def _same_items(items: list[Any], before: list[Any]) -> bool:
    return len(items) == len(before) and all(map(_same, items, before))


def slots_of(kind: type) -> list[str]:
    """The names of a class's slots, its bases' included."""
    found: list[str] = []
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        found += [name for name in ((names,) if isinstance(names, str) else names) if not name.startswith("__")]
    return found


def _same(value: Any, before: Any) -> bool:
    """The same object, or an equal constant."""
    if value is before:
        return True
    return type(value) is type(before) and _is_constant(value) and _is_constant(before) and value == before


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _unchanged_in_python(dicts: list[dict[str, Any]], snapshots: list[tuple[Any, ...]]) -> bool:
    """What the extension's function of this name does, for where it is not built."""
    for entries, snapshot in zip(dicts, snapshots, strict=True):
        if len(entries) != len(snapshot) or not all(map(is_, entries.values(), snapshot)):
            return False
    return True


try:
    _unchanged = native().unchanged
except ImportError:  # the torch backend works without the extension
    _unchanged = _unchanged_in_python


def _state(modules: list[nn.Module]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, module in enumerate(modules):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found[f"{number}.{name}"] = tensor
    return found


def _kinds(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.shape) for tensor in tensors]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _plain_entries(modules: list[nn.Module], objects: list[Any], reached: list[dict[Any, Any]]) -> dict[Any, Any]:
    """Every attribute and hook, but no registered parameter or buffer, by its owner and name."""
    found: dict[Any, Any] = {}
    for module in modules:
        found.update({(id(module), "", name): value for name, value in vars(module).items()})
        for holder in ("_modules", "_forward_hooks", "_forward_pre_hooks"):
            found.update({(id(module), holder, name): value for name, value in vars(module)[holder].items()})
    for value in objects:
        found.update({(id(value), "", name): item for name, item in getattr(value, "__dict__", {}).items()})
    for entries in reached:
        found.update({(id(entries), "entry", name): item for name, item in entries.items()})
    return found
