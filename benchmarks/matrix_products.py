"""Products with given matrices: Jacobians whose traces are known, for benchmarks and tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.reference.philox import normals

STREAM = 0x50000000


class MatrixProducts:
    """Row r has the Jacobian `matrices[r]`; a single matrix (n, n) is shared by `rows` rows with probes of their own.

    Nothing of a row depends on another: also not the bits, unless the matrix is shared, where one product of matrices
    serves all rows. `taken` counts the products with one row, probes' quadratic forms among them.
    """

    def __init__(
        self,
        matrices: Tensor,
        rows: int | None = None,
        shape: tuple[int, ...] | None = None,
        seed: int = 0,
        sample_ids: Tensor | None = None,
        tangents: int = 1 << 20,
    ) -> None:
        self.matrices = matrices
        self.columns = matrices.shape[-1]
        self.rows = rows if rows is not None else matrices.shape[0]
        self.dtype, self.device = matrices.dtype, matrices.device
        self.shape = shape if shape is not None else (self.columns,)
        self.seed = seed
        self.sample_ids = torch.arange(self.rows) if sample_ids is None else sample_ids
        self.tangents = tangents
        self.taken = 0

    def traces(self) -> Tensor:
        diagonals = self.matrices.double().diagonal(dim1=-2, dim2=-1)
        return diagonals.sum(-1).expand(self.rows)

    def probes(self, first: int, count: int, distribution: str) -> Tensor:
        numbers = range(first, first + count)
        if distribution == "orthogonal":
            drawn = torch.stack([self._normals(probe) for probe in numbers], 1)
            return (_haar(drawn) * math.sqrt(self.columns)).movedim(1, 0).to(self.dtype)
        return torch.stack([self._probe(probe, distribution) for probe in numbers]).to(self.dtype)

    def apply(self, vectors: Tensor) -> Tensor:
        assert vectors.shape[1:] == (self.rows, self.columns)
        assert vectors.dtype == self.dtype
        self.taken += vectors.shape[0]
        if self.matrices.dim() == 2:
            return vectors @ self.matrices.T
        products = torch.full_like(vectors, math.nan)
        for row, matrix in enumerate(self.matrices):
            products[:, row] = vectors[:, row].clone() @ matrix.clone().T
        return products

    def forms(self, first: int, count: int, distribution: str) -> Tensor:
        probes = self.probes(first, count, distribution)
        return (probes.double() * self.apply(probes).double()).sum(2)

    def _normals(self, probe: int) -> Tensor:
        return normals(self.seed, self.sample_ids, 0, self.columns, STREAM + probe)

    def _probe(self, probe: int, distribution: str) -> Tensor:
        drawn = self._normals(probe)
        if distribution == "normal":
            return drawn
        if distribution == "rademacher":
            return torch.where(drawn < 0, -1.0, 1.0).to(drawn.dtype)
        assert distribution == "sphere", distribution
        return drawn * (math.sqrt(self.columns) / torch.linalg.vector_norm(drawn, dim=1, keepdim=True))


def _haar(drawn: Tensor) -> Tensor:
    """Rows of Haar-orthogonal matrices from normals (R, k, n): the factorisation whose diagonal is positive."""
    basis, triangle = torch.linalg.qr(drawn.mT)
    return (basis * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT
