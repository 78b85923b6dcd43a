"""Sums whose value depends on the summed numbers alone: neither on the batch around them nor on the device's blocking.

`torch.sum` splits a long row over threads when the batch is one row, and over blocks by the batch size on a GPU, so
a row's sum changes by an ulp with its batch-mates. Folding halves onto each other is made of elementwise additions
only; it is the pairwise sum, whose rounding error grows with log2 of the length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_sum(values: Tensor, dim: int) -> Tensor:
    """The sum along `dim`, as a tree of elementwise additions; dtype and other dimensions kept."""
    length = values.shape[dim]
    if length == 0:
        return values.sum(dim)
    while length > 1:
        half = (length + 1) // 2
        folded = values.narrow(dim, 0, length - half) + values.narrow(dim, half, length - half)
        if 2 * half > length:
            folded = torch.cat([folded, values.narrow(dim, half - 1, 1)], dim)
        values, length = folded, half
    return values.squeeze(dim)


def row_sum(values: Tensor) -> Tensor:
    """Each row's sum in float64: (B, *) -> (B,)."""
    return pairwise_sum(values.flatten(1).to(torch.float64) if values.dim() > 1 else values.double()[:, None], 1)


def row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Each row's inner product in float64: (B, *), (B, *) -> (B,)."""
    return row_sum(left.to(torch.float64) * right.to(torch.float64))
