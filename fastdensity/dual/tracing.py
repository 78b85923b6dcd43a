"""One trace of a callable by torch.export, with errors that name the user's line.

Non-strict export runs the user's Python once on fake tensors and records torch's operators, whole: linear, conv2d,
group_norm, scaled_dot_product_attention stay one node each. Parameters become placeholders with the name under which
the module holds them; the dual graph later asks the live module by that name.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fastdensity.dual.capture import Captured, NotTraceableError
from fastdensity.dual.inner_derivatives import (
    InnerGradientError,
    gradients_noted,
    own_derivatives_refused,
    transforms_end_the_trace,
)
from fastdensity.dual.kept import FakesMade, empty_caches_of_fakes, inference_tensors_replaced, state_kept
from fastdensity.dual.lines import innermost, user_frames
from fastdensity.dual.surroundings import progress, quietly

Path_ = tuple[Any, ...]  # how to reach a leaf of the primals: indices and keys


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
        if not out.is_floating_point() and not out.is_complex():
            raise NotTraceableError(
                f"fn must return a floating tensor, got one of {out.dtype}, which has no tangents (of an argmax or a "
                "comparison, say)"
            )
        return out


def trace(captured: Captured, primals: tuple[Any, ...]) -> Traced:
    """Trace `captured(*primals)`, with a symbolic batch size where the code allows one.

    Raises:
        ValueError: Python control flow that depends on tensor values, or an output that is no tensor.
    """
    root = _Callable(captured)
    batch = primals[0].shape[0] if primals[0].dim() else 0
    with quietly(), progress(), inference_tensors_replaced(captured.modules), own_derivatives_refused():
        arguments = pytree.tree_map_only(Tensor, _example, (primals, captured.tensors))
        with transforms_end_the_trace(), gradients_noted() as gradients:
            try:
                return _general_or_special(root, arguments, captured, batch)
            except NotTraceableError as error:
                raise ValueError(str(error)) from error
            except Exception as error:
                explained = _explained(error, gradients)
                if explained is error:
                    raise
                raise explained from error


def _general_or_special(root: nn.Module, arguments: tuple[Any, ...], captured: Captured, batch: int) -> Traced:
    """For any batch size if that can be, else for this one."""
    if batch > 1:
        try:
            return _run(root, arguments, captured, batch)
        except NotTraceableError:
            raise
        except Exception:
            pass  # this network is made for one batch size only, or fails for another reason: the next call says
    return _run(root, arguments, captured, None)


def _explained(error: Exception, gradients: list[str]) -> Exception:
    """An error of torch.export that is not fn's own, in words that name fn's line."""
    if _is_data_dependent(error):
        return ValueError(
            "fn's control flow depends on the values of tensors, which no graph can hold, at "
            f"{innermost(traceback.extract_tb(error.__traceback__))}. Use torch.where, or move the decision out of fn"
        )
    if isinstance(error, UnsupportedOperatorException):
        line = innermost(traceback.extract_tb(error.__traceback__))
        return NotImplementedError(f"{error.func} cannot be traced, at {line}; call it outside of fn, pass its result")
    if gradients and not user_frames(traceback.extract_tb(error.__traceback__)):
        return InnerGradientError(
            f"fn takes a gradient by torch.autograd in a way that no graph can hold, at {gradients[-1]}; take it by "
            "torch.func.grad(potential)(x), which fd.jvp differentiates by torch's forward mode"
        )
    return error


def _run(root: nn.Module, arguments: tuple[Any, ...], captured: Captured, batch: int | None) -> Traced:
    """One run of fn, after which nothing that outlives it holds a fake tensor."""
    with FakesMade() as fakes:
        try:
            with state_kept(captured):
                program = _export(root, arguments, batch)
                traced = _read(program, captured, batch)
        except BaseException:
            empty_caches_of_fakes()
            raise
    fakes.take_out_of_caches(_fakes_of(program))
    return traced


def _fakes_of(program: Any) -> list[Any]:
    """The fake tensors that a program holds itself: those of its nodes, erased ones too, and of its inputs."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    nodes = {*(node for graph in graphs for node in graph.nodes)}
    for graph in graphs:
        nodes.update(item for item in graph._graph_namespace._obj_to_name if isinstance(item, fx.Node))
    found = pytree.tree_leaves([(node.meta.get("val"), node.args, node.kwargs) for node in nodes])
    environment = _shape_environment(program)
    return found + [tracked.fake for tracked in (environment.tracked_fakes if environment else None) or ()]


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
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _is_data_dependent(error: BaseException) -> bool:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
    return isinstance(error, kinds) or "data-dependent" in str(error)


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
