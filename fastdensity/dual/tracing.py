"""One trace of a callable by torch.export, with errors that name the user's line.

Non-strict export runs the user's Python once on fake tensors and records torch's operators, whole: linear, conv2d,
group_norm, scaled_dot_product_attention stay one node each. Parameters become placeholders with the name under which
the module holds them; the dual graph later asks the live module by that name.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fastdensity.dual.capture import Captured

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)
SLOW_SECONDS = 3.0  # after this long, say that a trace is going on
Path_ = tuple[Any, ...]  # how to reach a leaf of the primals: indices and keys


class NotTraceableError(Exception):
    """What the user's code did that no graph can hold; turned into a ValueError at the door."""


@dataclass
class Traced:
    """A flat graph of torch operators, and where each of its placeholders comes from."""

    graph: fx.Graph
    module: fx.GraphModule  # holds the submodules of higher-order operators
    sources: dict[str, tuple[str, Any]]  # placeholder -> ("primal", path) | ("captured", index) | ("live", name) | ...
    roots: list[nn.Module]
    batch: int | None  # the batch size it was traced at, if other sizes may be used
    holds_for: Callable[[int], bool]


class _Callable(nn.Module):
    """The captured callable as the module that torch.export wants."""

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        for number, root in enumerate(captured.modules):
            self.add_module(f"root{number}", root)
        self._rebuild = captured.rebuild

    def forward(self, primals: tuple[Any, ...], tensors: list[Tensor]) -> Any:
        out = self._rebuild(tensors)(*primals)
        if not isinstance(out, Tensor):
            raise NotTraceableError(
                f"fn must return one tensor, got {type(out).__name__}; wrap it, for example "
                "`lambda x: model(x, t).sample` or `model(x, t, return_dict=False)[0]`"
            )
        return out


def trace(captured: Captured, primals: tuple[Any, ...]) -> Traced:
    """Trace `captured(*primals)`, with a symbolic batch size where the code allows one.

    Raises:
        ValueError: Python control flow that depends on tensor values, or an output that is no tensor.
    """
    root = _Callable(captured)
    batch = primals[0].shape[0] if primals[0].dim() else 0
    with _quietly(), _progress(), _attributes_kept(captured.modules):
        arguments = pytree.tree_map_only(Tensor, _example, (primals, captured.tensors))
        if batch > 1:
            try:
                return _read(_export(root, arguments, batch), captured, batch)
            except NotTraceableError as error:
                raise ValueError(str(error)) from error
            except Exception:
                pass  # this network is made for one batch size only, or fails for another reason: the next call says
        try:
            return _read(_export(root, arguments, None), captured, None)
        except NotTraceableError as error:
            raise ValueError(str(error)) from error
        except Exception as error:
            if _is_data_dependent(error):
                raise ValueError(
                    f"fn's control flow depends on the values of tensors, which no graph can hold, at "
                    f"{_innermost(traceback.extract_tb(error.__traceback__))}. "
                    "Use torch.where, or move the decision out of fn"
                ) from error
            raise


def _export(root: nn.Module, arguments: tuple[Any, ...], batch: int | None) -> Any:
    shapes = None
    if batch is not None:
        dim = {0: torch.export.Dim.AUTO}
        shapes = pytree.tree_map(
            lambda leaf: dim if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else None, arguments
        )
    return torch.export.export(root, arguments, strict=False, dynamic_shapes=shapes)


def _example(tensor: Tensor) -> Tensor:
    """A plain tensor of this one's kind: only shapes enter the trace, and no wrapper of a transform may."""
    if type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        plain = tensor.detach()
        if not plain.is_inference():
            return plain
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape).contiguous()


@contextmanager
def _quietly() -> Iterator[None]:
    """Outside every mode of the caller, and without torch's own advice on failures that are translated here."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())  # so that a block under no_grad shows
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(_lines_of_functions())
        stack.enter_context(_own_derivatives_refused())
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _lines_of_functions() -> Iterator[None]:
    """Nodes remember the lines of plain functions, too; torch keeps those of modules' forward methods only."""
    kind = fx.proxy.TracerBase
    original = getattr(kind, "_filter_traceback_frames", None)
    if original is None:
        yield
        return

    def keep(self: Any, summary: traceback.StackSummary) -> traceback.StackSummary:
        return traceback.StackSummary.from_list(_user_frames(summary)[-3:])

    kind._filter_traceback_frames = keep
    try:
        yield
    finally:
        kind._filter_traceback_frames = original


@contextmanager
def _attributes_kept(roots: list[nn.Module]) -> Iterator[None]:
    """torch.export leaves equal copies of modules' tuples, lists and dicts behind; the originals come back here.

    A container that two modules share must stay shared, and earlier graphs must not take the copies for a change.
    """
    kept = [(vars(module), dict(vars(module))) for root in roots for module in root.modules()]
    try:
        yield
    finally:
        for entries, before in kept:
            entries.update(before)


@contextmanager
def _own_derivatives_refused() -> Iterator[None]:
    """A trace goes through the forward of an autograd.Function, and would lose the derivative that its author wrote."""
    base, thread = torch.autograd.Function, threading.get_ident()
    original = base.__dict__["apply"]

    def apply(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        if threading.get_ident() == thread and not cls.__module__.startswith("torch."):
            raise NotImplementedError(
                f"{cls.__name__} is an autograd.Function with a derivative of its own, which no graph holds, at "
                f"{_innermost(traceback.extract_stack())}; write it in torch operators (a detach for what is not to be "
                "differentiated)"
            )
        return original.__get__(None, cls)(*arguments, **keywords)

    base.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        base.apply = original  # type: ignore[method-assign]


@contextmanager
def _progress() -> Iterator[None]:
    """One line on stderr when a trace takes long."""
    import sys

    start = time.perf_counter()
    shown = threading.Event()

    def show() -> None:
        shown.set()
        print("fastdensity: tracing the network once for its dual ...", end="", file=sys.stderr, flush=True)

    timer = threading.Timer(SLOW_SECONDS, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if shown.is_set():
            print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _is_data_dependent(error: BaseException) -> bool:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
    return isinstance(error, kinds) or "data-dependent" in str(error)


def _user_frames(summary: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """The frames that are neither torch's nor this package's."""
    return [frame for frame in summary if not frame.filename.startswith((_TORCH, _HERE, "<"))]


def _innermost(summary: traceback.StackSummary) -> str:
    """The user's line that was being run: 'file:line, `code`'."""
    frames = _user_frames(summary)
    return f"{frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else "an unknown line"


def _read(program: Any, captured: Captured, batch: int | None) -> Traced:
    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise NotTraceableError(
                f"fn writes into {spec.target!r} in place ({spec.kind.name.lower()}); call model.eval()"
            )
    sources: dict[str, tuple[str, Any]] = {}
    paths = iter(_paths(program))
    tensors = iter(range(len(captured.tensors)))
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            path = next(paths)
            sources[name] = ("captured", next(tensors)) if path[0] == 1 else ("primal", path[1:])
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            sources[name] = ("live", spec.target)
        else:
            sources[name] = _constant_source(program, spec.target, captured)
    return Traced(program.graph, program.graph_module, sources, captured.modules, batch, _guard(program, batch))


def _paths(program: Any) -> list[Path_]:
    """For each user input in order: how to reach it from (primals, tensors)."""
    (arguments, _) = pytree.tree_unflatten(list(range(program.call_spec.in_spec.num_leaves)), program.call_spec.in_spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(arguments)[0]]
    return [
        tuple(getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))) for key in path) for path in paths
    ]


def _constant_source(program: Any, target: str, captured: Captured) -> tuple[str, Any]:
    """A tensor that is no parameter: asked from the module by its attribute's name if it has one, else held."""
    tensor = program.constants[target]
    for number, root in enumerate(captured.modules):
        for name, module in root.named_modules():
            for attribute, value in vars(module).items():
                if value is tensor:
                    return "live", ".".join(filter(None, (f"root{number}", name, attribute)))
    return "constant", tensor


def _guard(program: Any, batch: int | None) -> Callable[[int], bool]:
    """For which batch sizes the trace holds: all conditions that the code has put on its symbols."""
    if batch is None:
        return lambda size: False
    environment = _shape_environment(program)
    symbols = _batch_symbols(program, batch)
    if environment is None or not symbols:
        return lambda size: size == batch
    conditions = [environment.replace(guard.expr) for guard in environment.guards]  # in symbols that are left

    def holds(size: int) -> bool:
        if size < 2:
            return False
        for symbol, allowed in program.range_constraints.items():
            if not allowed.lower <= size <= allowed.upper and symbol.is_symbol:
                return False
        at_size = {symbol: sympy.Integer(size) for symbol in symbols}
        return all(bool(condition.xreplace(at_size)) for condition in conditions if condition.free_symbols <= symbols)

    return holds


def _batch_symbols(program: Any, batch: int) -> set[sympy.Symbol]:
    """What stands for the batch size in the inputs; nothing if the code fixed it in one of them, as len(x) does."""
    inputs = set(program.graph_signature.user_inputs)
    found = set()
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name in inputs and isinstance(value, Tensor) and value.dim():
            size: Any = value.shape[0]
            expression = sympy.Integer(size) if isinstance(size, int) else size.node.expr
            if expression.is_symbol:
                found.add(expression)
            elif expression == batch or expression.free_symbols:
                return set()
    return found


def _shape_environment(program: Any) -> Any:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            mode = getattr(value, "fake_mode", None)
            return None if mode is None else mode.shape_env
    return None
