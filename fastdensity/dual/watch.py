"""Has anything changed since a network was traced?

A trace fixes the modules' structure and every plain attribute that their code may have read: a dropout's `training`, an
adapter's scale, a replaced `forward`, a hook. Parameters are read anew by each call, so their values may change, and
they may be swapped for others of the same kind. All of that is looked at in every call; it has to be cheap, so what is
compared is the identity of the entries of each module's dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import Tensor, nn

from fastdensity._backend import native

_HOLDERS = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers")


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
        self._snapshots = [tuple(entries.values()) for entries in self._dicts]
        self._tensors = _state(self._modules)
        self._dtypes = [tensor.dtype for tensor in self._tensors.values()]
        self._values = list(self._tensors.values())
        self._plain = _plain_entries(everything, self._objects)

    def fresh(self) -> bool:
        """True if nothing has changed but the values of parameters and buffers."""
        if [tensor.dtype for tensor in self._values] != self._dtypes:
            return False
        return _unchanged(self._dicts, self._snapshots) or self._only_tensors_were_swapped()

    def _only_tensors_were_swapped(self) -> bool:
        """Parameters replaced by others of the same kind are no change: the graph asks the module for them.

        Nor is another order of a dictionary, or an equal tuple in the place of another: tracing leaves both behind.
        """
        everything = [module for root in self._modules for module in root.modules()]
        plain = _plain_entries(everything, self._objects)
        if plain.keys() != self._plain.keys() or not all(_same(plain[name], self._plain[name]) for name in plain):
            return False
        before = {name: _kind(tensor) for name, tensor in self._tensors.items()}
        if {name: _kind(tensor) for name, tensor in _state(self._modules).items()} != before:
            return False
        self._take()
        return True


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


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _plain_entries(modules: list[nn.Module], objects: list[Any]) -> dict[Any, Any]:
    """Every attribute and hook, but no parameter and no buffer, by its owner and name."""
    found: dict[Any, Any] = {}
    for module in modules:
        found.update({(id(module), "", name): value for name, value in vars(module).items()})
        for holder in ("_modules", "_forward_hooks", "_forward_pre_hooks"):
            found.update({(id(module), holder, name): value for name, value in vars(module)[holder].items()})
    for value in objects:
        found.update({(id(value), "", name): item for name, item in getattr(value, "__dict__", {}).items()})
    return found
