"""Torch reference of `dual_linear`: one product for the value and its tangents, then a chain on the result.

The contract, for every implementation: bias and activation act on the product in the arithmetic of `dual_chain`, in
float32 for half types. A backend may keep the product in float32 up to there or round it to the tensors' dtype.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastdensity.reference.dual_chain import dual_chain

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu", "tanh", "softplus", "sigmoid", "geglu")


def epilogue(product: Tensor, bias: Tensor | None, activation: str) -> tuple[list[Tensor], list[bool], str]:
    """(inputs, is_dual, program) of the chain that follows the product; an empty program if nothing does.

    geglu takes halves of the product's columns, h gelu(g), as views.
    """
    if activation != "geglu":
        act = "" if activation == "none" else activation
        if bias is None:
            return [product], [True], f"{act} 0" if act else ""
        return [product, bias], [True, False], f"add 0 1;{act} 2" if act else "add 0 1"
    halves = list(product.chunk(2, dim=-1))
    if bias is None:
        return halves, [True, True], "gelu 1;mul 0 2"
    return [*halves, *bias.chunk(2)], [True, True, False, False], "add 0 2;add 1 3;gelu 5;mul 4 6"


def result_shape(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[int, ...]:
    """(1 + K, *, N), or N / 2 for geglu; ValueError or TypeError where the arguments do not fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dim() < 2 or x.shape[0] < 2:
        raise ValueError(f"x must be a dual, (1 + K, *, C), got shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (N, {x.shape[-1]}) for x of {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    columns = weight.shape[0]
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias must have shape ({columns},), got {tuple(bias.shape)}")
    found = None if bias is None else bias.dtype
    if weight.dtype != x.dtype or found not in (None, x.dtype):
        raise TypeError(f"weight and bias must be {x.dtype} like x, got {weight.dtype} and {found}")
    if activation == "geglu":
        if columns % 2:
            raise ValueError(f"weight must have an even number of rows for geglu, got shape {tuple(weight.shape)}")
        columns //= 2
    return (*x.shape[:-1], columns)


def dual_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """(1 + K, *, N) in torch; the arguments are those of `fastdensity.ops.dual_linear`."""
    result_shape(x, weight, bias, activation)
    inputs, is_dual, program = epilogue(functional.linear(x, weight), bias, activation)
    return dual_chain(inputs, is_dual, program) if program else inputs[0]


def launch_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    """Compute into `out`, of any device."""
    out.copy_(dual_linear(x, weight, bias, activation))
