"""What a trace estimator may ask of the Jacobians whose traces it estimates."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Products(Protocol):
    """A block of `rows` samples of `columns` elements: each row has a Jacobian J of its own, and a key for its probes.

    dtype, device: of the vectors. shape: of one sample, such as (C, H, W); its product is `columns`.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]

    def probes(self, first: int, count: int, distribution: str) -> Tensor:
        """Probes first .. first + count - 1 of every row, (count, rows, columns)."""
        ...

    def apply(self, vectors: Tensor) -> Tensor:
        """J v of every row for vectors (K, rows, columns); the same shape."""
        ...

    def forms(self, first: int, count: int, distribution: str) -> Tensor:
        """z.(J z) for the same probes, (count, rows) in float64."""
        ...
