"""Orthonormal bases of what a Jacobian did to a few vectors, row by row.

Everything here is float64, whatever the products are. Vectors lie along the last dimension: a basis of m vectors of n
elements is (..., m, n), the transpose of the tall matrices of the literature.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROW_BY_ROW = ("cpu",)  # devices; see per_row
Row = Callable[..., tuple[Tensor, ...]]


def per_row(function: Row, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`function` of every row: tensors are (m, R, n) and arrive as float64 (m, n); results are stacked, row first.

    On a CPU rows go one at a time, each in memory of its own: libraries for matrices choose their blocking by the size
    and the alignment of what they get, and a row's bits must not depend on its batch-mates. Elsewhere a call for each
    row costs too much, and `function` gets (R, m, n) at once.
    """
    count = tensors[0].shape[1]
    if count == 0 or tensors[0].device.type not in ROW_BY_ROW:
        return function(*(tensor.movedim(1, 0).to(torch.float64).contiguous() for tensor in tensors))
    rows = [function(*(_dense_row(tensor, row) for tensor in tensors)) for row in range(count)]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def _dense_row(tensor: Tensor, row: int) -> Tensor:
    return tensor[:, row].to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def finite_rows(products: Tensor) -> Tensor:
    """(m, R, n) -> (R,): which rows hold finite numbers only."""
    return torch.isfinite(products).all(2).all(0)


def range_basis(products: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of each row's `products` (m, R, n), in their dtype, and its coordinates (R, m, m).

    Row r of `products` is triangle[r].T @ basis[:, r], as in the QR factorisation of the tall matrix. A row that is not
    finite is factorised as zeros: LAPACK may raise on NaN, or not return.
    """
    usable = torch.where(finite_rows(products)[:, None], products, 0)
    basis, triangle = per_row(_factorise, usable)
    return basis.movedim(0, 1).to(products.dtype).contiguous(), triangle


def orthonormalise(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """A basis (..., m, n) that was rounded to the products' dtype, made orthonormal again, and J of it.

    `images` is J times the rounded vectors. The small triangle that undoes the rounding acts on both sides alike, so
    that the projector onto the basis is a projector to float64, and J's products stay those of the new basis.
    """
    gram = basis @ basis.mT
    lower = torch.linalg.cholesky_ex(gram).L
    return _solve(lower, basis), _solve(lower, images)


def _factorise(products: Tensor) -> tuple[Tensor, Tensor]:
    basis, triangle = torch.linalg.qr(products.mT)
    return basis.mT, triangle


def _solve(lower: Tensor, vectors: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(lower, vectors, upper=False)
