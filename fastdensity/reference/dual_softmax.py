"""Softmax over the last dimension of a dual, in torch: p = softmax(x), tp_k = p (tx_k - sum(p tx_k))."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_tangents(probabilities: Tensor, tangents: Tensor) -> Tensor:
    """Tangents (K, *S) of softmax at its value (*S), from those of its argument."""
    return probabilities * (tangents - (probabilities * tangents).sum(-1, keepdim=True))


def dual_softmax(x: Tensor) -> Tensor:
    """A dual (1 + K, *S) to a dual (1 + K, *S); 16-bit types are computed in float32 and rounded once.

    A row of which nothing is finite is NaN, as in torch.softmax.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    value = torch.softmax(wide[0], -1)
    return torch.cat([value[None], softmax_tangents(value, wide[1:])]).to(x.dtype)


def launch_torch(x: Tensor, out: Tensor) -> None:
    """Write the result into `out`."""
    out.copy_(dual_softmax(x))
