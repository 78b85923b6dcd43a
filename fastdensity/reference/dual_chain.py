"""Torch reference of `dual_chain`: values and tangents side by side, step by step, in differentiable torch.

The contract, for every implementation: half types are computed in float32 from the first step to the last and rounded
once; derivatives at kinks are torch's (0 for relu and abs at 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastdensity.chain_program import Step, parse, result_shape

Dual = tuple[Tensor, Tensor | None]  # a value (*S) and its tangents (K, *S), or None where it depends on no dual


def dual_chain(inputs: list[Tensor], is_dual: list[bool], program: str) -> Tensor:
    """(1 + K, *S) of the last step of `program`; the arguments are those of `fastdensity.ops.dual_chain`."""
    parsed = parse(program, tuple(is_dual))
    shape = result_shape(inputs, is_dual)
    dtype = inputs[0].dtype
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    rank = len(shape) - 1
    values = [_split(tensor.to(compute), dual, rank) for tensor, dual in zip(inputs, is_dual, strict=True)]
    for step in parsed.steps:
        values.append(_run(step, values[step.left], values[step.right]))
    value, tangents = values[-1]
    assert tangents is not None
    stacked = torch.cat([value.expand(shape[1:]).unsqueeze(0), tangents.expand((shape[0] - 1, *shape[1:]))])
    return stacked.to(dtype)


def launch_torch(inputs: list[Tensor], is_dual: list[bool], program: str, out: Tensor) -> None:
    """Compute into `out`, of any device."""
    out.copy_(dual_chain(inputs, is_dual, program))


def _split(tensor: Tensor, dual: bool, rank: int) -> Dual:
    """Value and tangents, the tangents with dimensions of one inserted so that they broadcast as values do."""
    if not dual:
        return tensor, None
    value, tangents = tensor[0], tensor[1:]
    return value, tangents.reshape((tangents.shape[0], *(1,) * (rank - value.dim()), *value.shape))


def _run(step: Step, left: Dual, right: Dual) -> Dual:
    if step.name in BINARY:
        return BINARY[step.name](left, right)
    value, tangents = left
    function, slope = UNARY[step.name]
    result = function(value, step.constant)
    if tangents is None:
        return result, None
    if step.name == "relu":  # no product: 0 * inf is not 0
        return result, torch.where(value <= 0, torch.zeros_like(tangents), tangents)
    return result, tangents * slope(value, step.constant)


def _add(left: Dual, right: Dual) -> Dual:
    (a, ta), (b, tb) = left, right
    if ta is None or tb is None:
        return a + b, ta if tb is None else tb
    return a + b, ta + tb


def _subtract(left: Dual, right: Dual) -> Dual:
    b, tb = right
    return _add(left, (-b, None if tb is None else -tb))


def _multiply(left: Dual, right: Dual) -> Dual:
    (a, ta), (b, tb) = left, right
    from_left = None if ta is None else ta * b
    from_right = None if tb is None else tb * a
    return a * b, from_left if from_right is None else from_right if from_left is None else from_left + from_right


def _divide(left: Dual, right: Dual) -> Dual:
    (a, ta), (b, tb) = left, right
    ratio = a / b
    from_left = None if ta is None else ta / b
    from_right = None if tb is None else -tb * (ratio / b)
    return ratio, from_left if from_right is None else from_right if from_left is None else from_left + from_right


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * torch.sigmoid(-x))


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * torch.special.erfc(-x / math.sqrt(2)) + x * density


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    """Of x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    twice_u = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    twice_slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    sigmoid = torch.sigmoid(twice_u)
    return sigmoid + x * twice_slope * sigmoid * torch.sigmoid(-twice_u)


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _softplus_slope(x: Tensor) -> Tensor:
    return torch.where(x > 20, torch.ones_like(x), torch.sigmoid(x))


def _leaky_slope(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


BINARY: dict[str, Callable[[Dual, Dual], Dual]] = {"add": _add, "sub": _subtract, "mul": _multiply, "div": _divide}
# name -> (function, its derivative), both of the value and the constant
UNARY: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor | float]]] = {
    "scale": (lambda x, c: x * c, lambda x, c: c),
    "shift": (lambda x, c: x + c, lambda x, c: 1.0),
    "neg": (lambda x, c: -x, lambda x, c: -1.0),
    "silu": (lambda x, c: functional.silu(x), lambda x, c: _silu_slope(x)),
    "gelu": (lambda x, c: functional.gelu(x), lambda x, c: _gelu_slope(x)),
    "gelu_tanh": (lambda x, c: functional.gelu(x, approximate="tanh"), lambda x, c: _gelu_tanh_slope(x)),
    "relu": (lambda x, c: torch.relu(x), lambda x, c: 1.0),  # see `_run`
    "tanh": (lambda x, c: torch.tanh(x), lambda x, c: 4 * _sigmoid_slope(2 * x)),
    "sigmoid": (lambda x, c: torch.sigmoid(x), lambda x, c: _sigmoid_slope(x)),
    "softplus": (lambda x, c: functional.softplus(x), lambda x, c: _softplus_slope(x)),
    "exp": (lambda x, c: torch.exp(x), lambda x, c: torch.exp(x)),
    "log": (lambda x, c: torch.log(x), lambda x, c: 1 / x),
    "sqrt": (lambda x, c: torch.sqrt(x), lambda x, c: 0.5 / torch.sqrt(x)),
    "rsqrt": (lambda x, c: torch.rsqrt(x), lambda x, c: -0.5 * torch.rsqrt(x) / x),
    "square": (lambda x, c: torch.square(x), lambda x, c: 2 * x),
    "reciprocal": (lambda x, c: torch.reciprocal(x), lambda x, c: -torch.square(torch.reciprocal(x))),
    "sin": (lambda x, c: torch.sin(x), lambda x, c: torch.cos(x)),
    "cos": (lambda x, c: torch.cos(x), lambda x, c: -torch.sin(x)),
    "leaky_relu": (lambda x, c: functional.leaky_relu(x, c), _leaky_slope),
    "abs": (lambda x, c: torch.abs(x), lambda x, c: torch.sgn(x)),
}
