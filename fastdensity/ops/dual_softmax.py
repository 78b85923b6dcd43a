"""Softmax over the last dimension of a dual."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.boundary import describe
from fastdensity.ops.dual_operator import define
from fastdensity.reference import dual_softmax as reference


def _empty_result(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_run = define("dual_softmax", "Tensor x", reference.dual_softmax, _empty_result)


def dual_softmax(x: Tensor) -> Tensor:
    """p = softmax(x) over the last dimension and its tangents tp_k = p (tx_k - sum(p tx_k)).

    Args:
        x: a dual (1 + K, *S) of at least one dimension besides the first; floating, any strides.

    Returns:
        A dual (1 + K, *S), contiguous. Rows that hold nothing but -inf are NaN, as in torch.softmax.

    Raises:
        ValueError: x has no dimension to normalise over.
    """
    if x.dim() < 2:
        raise ValueError(f"x must be a dual (1 + K, *S) with a dimension to normalise over, got {describe(x)}")
    return _run(x)
