"""What a callable is made of: the modules it calls, the tensors it closes over, the constants that shaped it.

Users write `fd.jvp(lambda x: model(x, t), ...)` in a loop: a new function object each time, the same code, another t.
So a function is not known by its identity but by its code and what that refers to. Tensors that are found in its
closure, defaults, globals or partial arguments are lifted to inputs of the graph, and read anew at every call; modules
keep their identity, and their parameters stay where they are; all other values are constants of the trace.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdensity.dual.watch import slots_of

Rebuild = Callable[[list[Tensor]], Any]
_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)
_LIBRARIES = ("torch", "numpy", "builtins", "fastdensity")
_MOST_DEPTH = 6


class NotTraceableError(Exception):
    """What the user's code did that no graph can hold; turned into a ValueError at the door."""


@dataclass
class Captured:
    """A callable taken apart; `rebuild(tensors)` puts it together with other tensors in place of its own."""

    key: Hashable
    family: Hashable  # the same for all functions of one code
    modules: list[nn.Module] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)  # neither tensor nor module: watched, and kept alive
    containers: list[Any] = field(default_factory=list)  # lists and dictionaries, which are constants of the trace
    rebuild: Rebuild = lambda tensors: None


def capture(fn: Callable[..., Any]) -> Captured:
    """Take `fn` apart; cheap enough for every call."""
    captured = Captured(None, getattr(fn, "__code__", None) or id(fn))
    if isinstance(fn, nn.Module):
        _refuse_script(fn)
        captured.modules.append(fn)
        captured.key = ("module", id(fn))
        captured.rebuild = lambda tensors: fn
        return captured
    captured.key, captured.rebuild = _Walk(captured).value(fn, 0)
    return captured


class _Walk:
    """One walk over the object graph of a callable; each method returns (key, rebuild)."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.seen: set[int] = set()  # functions and objects on the way: recursion must end

    def value(self, value: Any, depth: int) -> tuple[Hashable, Rebuild]:
        if isinstance(value, _PLAIN_TYPES):
            return (type(value), value), _constant(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            _refuse_script(value)
            if all(value is not module for module in self.captured.modules):
                self.captured.modules.append(value)
            return ("module", id(value)), _constant(value)
        if id(value) in self.seen or depth > _MOST_DEPTH or isinstance(value, (type, types.ModuleType)):
            return ("same", id(value)), _constant(value)
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            return self._method(value, depth)
        if isinstance(value, functools.partial):
            return self._partial(value, depth)
        if isinstance(value, (tuple, list, dict)):
            return self._container(value, depth)
        return self._object(value, depth)

    def _tensor(self, tensor: Tensor) -> tuple[Hashable, Rebuild]:
        number = len(self.captured.tensors)
        self.captured.tensors.append(tensor)
        return ("tensor", tensor.dim()), lambda tensors: tensors[number]

    def _function(self, function: types.FunctionType, depth: int) -> tuple[Hashable, Rebuild]:
        library = of_library(function.__module__)
        if library and not function.__closure__:
            return ("same", id(function)), _constant(function)
        self.seen.add(id(function))
        cells = tuple(_content(cell) for cell in function.__closure__ or ())
        names = {} if library else _globals_of(function)
        parts = (cells, function.__defaults__, function.__kwdefaults__, names)
        before = len(self.captured.tensors)
        keys, rebuilds = zip(*(self.value(part, depth + 1) for part in parts), strict=True)
        key = ("function", function.__code__, keys)
        if len(self.captured.tensors) == before:
            self.captured.objects.append(function)
            return key, _constant(function)

        def rebuild(tensors: list[Tensor]) -> Any:
            closure, defaults, keyword_defaults, global_names = (make(tensors) for make in rebuilds)
            scope = {**function.__globals__, **global_names}
            contents = tuple(types.CellType(content) for content in closure)
            made = types.FunctionType(function.__code__, scope, function.__name__, defaults, contents)
            made.__kwdefaults__ = keyword_defaults
            return made

        return key, rebuild

    def _method(self, method: types.MethodType, depth: int) -> tuple[Hashable, Rebuild]:
        key, _ = self.value(method.__self__, depth + 1)
        return ("method", method.__func__, key), _constant(method)

    def _partial(self, part: functools.partial[Any], depth: int) -> tuple[Hashable, Rebuild]:
        key, rebuild = self._container((part.func, part.args, part.keywords), depth)

        def make(tensors: list[Tensor]) -> Any:
            function, arguments, keywords = rebuild(tensors)
            return functools.partial(function, *arguments, **keywords)

        return ("partial", key), make

    def _container(self, values: Any, depth: int) -> tuple[Hashable, Rebuild]:
        kind = type(values)
        if kind not in (tuple, list, dict):  # a named tuple, an ordered dict: as an object
            return self._object(values, depth)
        if kind is not tuple:
            self.captured.containers.append(values)
        items = values.values() if kind is dict else values
        walked = [self.value(item, depth + 1) for item in items]
        names = tuple(map(str, values)) if kind is dict else ()

        def rebuild(tensors: list[Tensor]) -> Any:
            made = [make(tensors) for _, make in walked]
            return dict(zip(values, made, strict=True)) if kind is dict else kind(made)

        return (kind, names, tuple(key for key, _ in walked)), rebuild

    def _object(self, value: Any, depth: int) -> tuple[Hashable, Rebuild]:
        """Anything else keeps its identity; its attributes are watched, and modules among them are found.

        Slots stand in no dictionary that could be watched: what they hold is part of the key.
        """
        self.seen.add(id(value))
        self.captured.objects.append(value)
        tensors = len(self.captured.tensors)
        for attribute in getattr(value, "__dict__", {}).values():
            self.value(attribute, depth + 1)
        held = [getattr(value, name) for name in slots_of(type(value)) if hasattr(value, name)]
        slots = [self._in_slot(attribute, depth + 1) for attribute in held]
        del self.captured.tensors[tensors:]  # they cannot be replaced from outside: constants, known by identity
        return ("object", id(value), *slots), _constant(value)

    def _in_slot(self, value: Any, depth: int) -> Hashable:
        return ("same", id(value)) if isinstance(value, Tensor) else self.value(value, depth)[0]


def of_library(module: str | None) -> bool:
    """Is this the name of a module of torch, numpy, Python or this package?"""
    return module is not None and module.split(".")[0] in _LIBRARIES


def _refuse_script(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("a torch.jit module cannot be traced; pass the module that it was made from")


def _constant(value: Any) -> Rebuild:
    return lambda tensors: value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not assigned yet
        return None


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The globals that the function's code may read, but for libraries and classes, which are taken as they are."""
    found = {}
    for name in _names(function.__code__):
        value = function.__globals__.get(name, function)
        if value is not function and not isinstance(value, (types.ModuleType, type, types.BuiltinFunctionType)):
            found[name] = value
    return found


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.extend(_names(constant))
    return tuple(dict.fromkeys(names))
