"""What every trace estimator returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdensity.sums import pairwise_sum


@dataclass(frozen=True, slots=True)
class Trace:
    """Traces of a block of rows: `div` and its standard error, (R,) in float64; `products` J v were taken for each row.

    `colours`: how many colours a sample's elements were given, where an estimator colours them.
    """

    div: Tensor
    std_err: Tensor
    products: int
    colours: int | None = None


def mean_and_error(forms: Tensor) -> tuple[Tensor, Tensor]:
    """(k, R) estimates -> their mean (R,) and its standard error, with k - 1; NaN at k = 1, where it is undefined.

    A row with an estimate that is not finite is NaN.
    """
    count = forms.shape[0]
    mean = pairwise_sum(forms, 0) / count
    mean = torch.where(torch.isfinite(mean), mean, math.nan)
    if count == 1:
        return mean, torch.full_like(mean, math.nan)
    variance = pairwise_sum((forms - mean) ** 2, 0) / (count - 1)
    return mean, torch.sqrt(variance / count)
