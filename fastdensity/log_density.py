"""Log densities in the units that likelihoods are reported in."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from fastdensity.boundary import FLOATING, check_integer, describe


def bits_per_dimension(log_prob: Tensor, dimension: int, *, data_scale: float) -> Tensor:
    """-log2 p / D for data counted in units of their own, such as grey levels: the density of y = data_scale x + shift.

    p(y) = p(x) / data_scale^D, so this is -log p(x) / (D ln 2) + log2(data_scale). For pixels 0..255 that were mapped
    to [-1, 1], data_scale is 127.5 (128 if they were dequantised first, 256 levels to a width of 2). There is no
    default, as comparing numbers of different scales is the usual mistake: log2(data_scale) is 7 bits here.

    Args:
        log_prob: log p(x) in nats, any shape. dimension: D, numbers in one sample.
        data_scale: how many of the data's units make one unit of x, positive.

    Returns:
        Bits, in log_prob's shape and dtype. For dequantised data it bounds from above the bits of a lossless code.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dimension < 1, data_scale not positive and finite.
    """
    if not isinstance(log_prob, Tensor) or log_prob.dtype not in FLOATING:
        raise TypeError(f"log_prob must be a floating torch.Tensor, got {describe(log_prob)}")
    count = check_integer("dimension", dimension, 1, 2**63 - 1)
    return log_prob / (-count * math.log(2.0)) + math.log2(_check_scale(data_scale))


def _check_scale(data_scale: Any) -> float:
    if isinstance(data_scale, bool) or not isinstance(data_scale, Real):
        raise TypeError(f"data_scale must be a number, got {describe(data_scale)}")
    scale = float(data_scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"data_scale must be positive and finite, got {scale}")
    return scale
