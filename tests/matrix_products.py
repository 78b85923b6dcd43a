"""Matrices for the tests of trace estimators, none of them symmetric, and their products."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.matrix_products import MatrixProducts
from fastdensity.reference.philox import normals

__all__ = ["MatrixProducts", "matrices", "symmetric_part", "variance_of_signs"]
STREAM_MATRICES = 0x60000000


def matrices(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Non-symmetric, of full rank, with a falling spectrum and a part that is a multiple of the identity."""
    falling = 1 / torch.arange(1, columns + 1, dtype=torch.float64)
    drawn = normals(seed, torch.arange(rows), 0, columns * columns, STREAM_MATRICES).reshape(rows, columns, columns)
    return drawn * falling + torch.eye(columns, dtype=torch.float64)


def symmetric_part(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def variance_of_signs(matrix: Tensor) -> Tensor:
    """Of z'Jz for signs z: 2 (||S||_F^2 - sum S_ii^2)."""
    symmetric = symmetric_part(matrix)
    return 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum())
