"""What is said once, when a function is traced: dropout that is active, and places at which derivatives end."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx

from fastdensity.dual.functional import line_of
from fastdensity.dual.rewrite import dependents
from fastdensity.dual.tracing import Traced

aten = torch.ops.aten
_LARGEST = (aten.amax.default, aten.max.default, aten.max.dim)
_PARAMETERS_OF_DRAWS = {  # by operator: the arguments that its distribution depends on
    "normal": ("mean", "std"), "bernoulli": ("p",), "poisson": ("self",), "binomial": ("count", "prob"),
    "multinomial": ("self",),
}  # fmt: skip


def warn_of_dropout(graph: fx.Graph) -> None:
    """One mask for all directions is right, but few mean to have one."""
    for node in graph.nodes:
        if _drops(arguments_of(node)):
            warnings.warn(
                f"dropout is active in fn, at {line_of(node)}: the value and its tangents share one mask, and "
                "results change from call to call; call model.eval() for the network itself",
                stacklevel=6,
            )
            return


def _drops(arguments: dict[str, Any]) -> bool:
    """Has this operator a dropout that is active? Those of attention are active where they are not zero."""
    if "dropout_p" in arguments:
        return bool(arguments["dropout_p"] != 0)
    if arguments.get("train") is not True or arguments.get("num_layers") == 1:  # between layers of a recurrent network
        return False
    return bool(arguments.get("p", arguments.get("dropout", 0)) != 0)


def warn_of_lost_derivatives(traced: Traced) -> None:
    """Derivatives that end within fn, as they do for torch, where few mean that.

    At a detach, as in the gradient of a potential taken at x.detach(), and at a draw from what depends on x.
    """
    carries = dependents(traced)
    for node in traced.graph.nodes:
        advice = _advice(node, carries)
        if advice is not None:
            warnings.warn(
                f"fn {advice[0]}, at {line_of(node)}: derivatives end there, as for torch.func.jvp. {advice[1]}",
                stacklevel=6,
            )
            return


def _advice(node: fx.Node, carries: set[fx.Node]) -> tuple[str, str] | None:
    """What ends the derivatives, and what to write in its place."""
    if node.target is aten.detach.default:
        of_shift_only = all(user.target in _LARGEST for user in node.users)  # as in a stable softmax
        if node.args[0] not in carries or of_shift_only:
            return None
        wanted = "The gradient of a potential, torch.func.grad(potential)(x), is differentiated whole"
        return "detaches what depends on its input", wanted
    arguments = arguments_of(node)
    name = node.target._schema.name.split("::")[1] if arguments else ""
    parameters = _PARAMETERS_OF_DRAWS.get(name, ())
    if name == "bernoulli" and node.target._overloadname == "default":
        parameters = ("self",)
    if not any(arguments.get(parameter) in carries for parameter in parameters):
        return None
    wanted = "Write the draw as a function of noise, as mean + std * torch.randn_like(mean)"
    return f"draws from a distribution that depends on its input ({node.target})", wanted


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments that an operator of torch was called with, by name; nothing for other nodes."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return {}
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return {**given, **node.kwargs}
