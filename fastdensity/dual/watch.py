"""Has anything changed since a network was traced?

A trace fixes the modules' structure and every plain attribute that their code may have read: a dropout's `training`, an
adapter's scale, a replaced `forward`, a hook. Parameters are read anew by each call, so their values may change, and
they may be swapped for others of the same kind. All of that is looked at in every call, which has to be cheap: what is
compared is the identity of the entries of each module's dictionaries, and of the lists and dictionaries they hold.
Only where something differs are contents compared.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

from torch import Tensor, nn

from fastdensity._backend import native

_HOLDERS = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers")
_TENSORS = ("_parameters", "_buffers")
STORE = "_fastdensity_duals"  # the attribute in which a module keeps its own dual graphs
_OPAQUE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_MOST_DEPTH = 4
Container = Any  # a dict or a list


class Watch:
    """A snapshot of modules and objects; `fresh()` says whether the graph that was made then still holds."""

    def __init__(self, modules: Iterable[nn.Module], objects: Iterable[Any]) -> None:
        self._modules = list(modules)
        self._objects = list(objects)
        self._take()

    def _take(self) -> None:
        containers: dict[int, Container] = {}
        for module in self._all_modules():
            for entries in (vars(module), *(vars(module)[name] for name in _HOLDERS)):
                containers[id(entries)] = entries
            for name, value in vars(module).items():
                if name not in (*_HOLDERS, STORE):
                    containers.update((id(item), item) for item in _containers(value, _MOST_DEPTH))
        for value in self._objects:
            containers.update((id(item), item) for item in _containers(value, _MOST_DEPTH))
        self._containers = list(containers.values())
        self._snapshots = [_values(container) for container in self._containers]
        self._tensors = _state(self._modules)
        self._values = list(self._tensors.values())
        self._dtypes = [tensor.dtype for tensor in self._values]
        self._kinds = [_kind(tensor) for tensor in self._values]
        self._contents = self._read_contents()

    def _all_modules(self) -> list[nn.Module]:
        return [module for root in self._modules for module in root.modules()]

    def _read_contents(self) -> list[Any]:
        found = []
        for module in self._all_modules():
            found.append({name: _content(value, _MOST_DEPTH) for name, value in _plain_entries(module)})
        return [*found, *(_content(value, _MOST_DEPTH) for value in self._objects)]

    def fresh(self) -> bool:
        """True if nothing has changed but the values of parameters and buffers."""
        if [tensor.dtype for tensor in self._values] != self._dtypes:
            return False
        return _unchanged(self._containers, self._snapshots) or self._same_contents()

    def _same_contents(self) -> bool:
        """Parameters replaced by others of the same kind are no change: the graph asks the module for them.

        Nor is another order of a dictionary, or an equal tuple in the place of another: tracing leaves both behind.
        """
        tensors = _state(self._modules)
        if list(tensors) != list(self._tensors) or [_kind(tensor) for tensor in tensors.values()] != self._kinds:
            return False
        if not _same(self._read_contents(), self._contents):
            return False
        self._take()
        return True


def _plain_entries(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes, submodules and hooks of a module, but no parameters and no buffers."""
    yield "self", module
    for name, value in vars(module).items():
        if name not in (*_TENSORS, STORE):
            yield name, value


def _containers(value: Any, depth: int) -> Iterator[Container]:
    """The dictionaries and lists in which `value` keeps what it is made of; modules and tensors are no part of it."""
    if depth == 0 or isinstance(value, _OPAQUE):
        return
    if isinstance(value, (dict, list)):
        yield value
    elif not isinstance(value, tuple):
        value = getattr(value, "__dict__", None)
        if not isinstance(value, dict):
            return
        yield value
    for item in value.values() if isinstance(value, dict) else value:
        yield from _containers(item, depth - 1)


def _content(value: Any, depth: int) -> Any:
    """`value` with its containers copied, so that a change in place shows."""
    if depth == 0 or isinstance(value, _OPAQUE):
        return value
    if isinstance(value, (tuple, list)):
        return [_content(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {name: _content(item, depth - 1) for name, item in value.items()}
    attributes = getattr(value, "__dict__", None)
    return value if not isinstance(attributes, dict) else [value, _content(attributes, depth - 1)]


def _same(content: Any, before: Any) -> bool:
    """The same objects and equal constants, in the same places."""
    if content is before:
        return True
    if type(content) is not type(before):
        return False
    if isinstance(content, list):
        return len(content) == len(before) and all(map(_same, content, before))
    if isinstance(content, dict):
        return content.keys() == before.keys() and all(_same(content[name], before[name]) for name in content)
    return isinstance(content, (bool, int, float, str)) and content == before


def _values(container: Container) -> tuple[Any, ...]:
    return tuple(container.values() if isinstance(container, dict) else container)


def _unchanged_in_python(containers: list[Container], snapshots: list[tuple[Any, ...]]) -> bool:
    """What the extension's function `unchanged` does, for where it is not built."""
    for container, snapshot in zip(containers, snapshots, strict=True):
        if len(container) != len(snapshot) or not all(map(is_, _values(container), snapshot)):
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
