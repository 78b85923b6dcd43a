"""A linear layer on a dual with the bias and activation that follow it: one GEMM for the value and all tangents."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.ops.dual_operator import define
from fastdensity.reference import dual_linear as reference


def _empty_result(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.empty(reference.result_shape(x, weight, bias, activation), dtype=x.dtype, device=x.device)


_run = define(
    "dual_linear", "Tensor x, Tensor weight, Tensor? bias, str activation", reference.dual_linear, _empty_result
)


def dual_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """act(x W^T + b) and its tangents act'(x W^T + b) * (tx_k W^T).

    Args:
        x: a dual (1 + K, *, C).
        weight: plain, (N, C); the layer's weight does not depend on what is differentiated.
        bias: plain, (N,), or None.
        activation: "none", "silu", "gelu" (by erf), "gelu_tanh", "relu", "tanh", "softplus", "sigmoid", or "geglu",
            which multiplies the first half of the columns with the gelu of the second.

    Returns:
        The dual (1 + K, *, N), for geglu (1 + K, *, N / 2), contiguous.

    Raises:
        ValueError: an unknown activation, or shapes that do not fit together.
        TypeError: a weight or bias of another dtype than x.
    """
    return _run(x, weight, bias, activation)
