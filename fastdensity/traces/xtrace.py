"""XTrace: every test vector is a sketch for all others (Epperly, Tropp, Webber, "XTrace: making the most of every
sample in stochastic trace estimation", SIAM J. Matrix Anal. Appl. 2024).

With W the m test vectors, Y = J W = Q R and Z = J Q, estimate i is Hutch++ with one probe w_i and the basis of all
products but the i-th. That basis is Q without the unit vector Q s_i, where s_i is orthogonal to all columns of R but
the i-th: s_i is parallel to R^-T e_i. So m estimates cost 2 m products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.traces.products import Products
from fastdensity.traces.result import Trace, mean_and_error
from fastdensity.traces.subspace import finite_rows, orthonormalise, per_row, range_basis


def xtrace(products: Products, num_matvecs: int, resphere: bool = True, distribution: str = "sphere") -> Trace:
    """The mean of m = num_matvecs // 2 leave-one-out estimates; 2 m products.

    Args:
        products: the Jacobians. num_matvecs: >= 2, and m at most `columns`.
        resphere: give every residual of a test vector the length that it has on average, sqrt(n - m + 1). The residual
            of a vector that is uniform on a sphere, or normal, has a uniform direction, so the estimate stays unbiased.
        distribution: of the test vectors; without resphering any will do.

    Returns:
        The traces; std_err is the spread of the m estimates (k-1, over sqrt(m)), NaN at m = 1. A row with a product
        that is not finite is NaN, without harm to others. Jacobians of a rank below m come out exact to rounding.
    """
    count = num_matvecs // 2
    tests = products.probes(0, count, distribution)
    sketch = products.apply(tests)
    basis, triangle = range_basis(sketch)
    images = products.apply(basis)
    finite = finite_rows(sketch) & finite_rows(images)

    def estimates(tests: Tensor, sketch: Tensor, basis: Tensor, images: Tensor, triangle: Tensor) -> tuple[Tensor]:
        return (_leave_one_out(tests, sketch, basis, images, _left_out(triangle), resphere),)

    each = per_row(estimates, tests, sketch, basis, images, triangle.movedim(0, 1))[0]
    div, std_err = mean_and_error(each.T)
    return Trace(torch.where(finite, div, math.nan), torch.where(finite, std_err, math.nan), 2 * count)


def _left_out(triangle: Tensor) -> Tensor:
    """Unit vectors s_i, the columns of (..., m, m), orthogonal to all columns of `triangle` but the i-th.

    Where the products are linearly dependent, the diagonal is raised to rounding error. Any direction may then leave
    the basis that keeps the products in it, and that is what the inverse of nearly singular matrices gives.
    """
    count = triangle.shape[-1]
    largest = triangle.abs().amax((-2, -1), keepdim=True)
    scaled = triangle / torch.where(largest > 0, largest, 1)
    diagonal = scaled.diagonal(dim1=-2, dim2=-1)
    floor = count * torch.finfo(triangle.dtype).eps
    raised = torch.where(diagonal.abs() < floor, torch.copysign(torch.full_like(diagonal, floor), diagonal), diagonal)
    scaled = scaled - torch.diag_embed(diagonal) + torch.diag_embed(raised)
    identity = torch.eye(count, dtype=triangle.dtype, device=triangle.device).expand_as(scaled)
    inverse = torch.linalg.solve_triangular(scaled.mT, identity, upper=False)
    inverse = inverse / inverse.abs().amax(-2, keepdim=True)
    return inverse / torch.linalg.vector_norm(inverse, dim=-2, keepdim=True)


def _leave_one_out(
    tests: Tensor, sketch: Tensor, basis: Tensor, images: Tensor, left_out: Tensor, resphere: bool
) -> Tensor:
    """The m estimates of a row; all arguments (..., m, n) but `left_out`, (..., m, m)."""
    basis, images = orthonormalise(basis, images)
    compressed = basis @ images.mT  # H = Q' J Q
    coordinates = basis @ tests.mT  # Q' w_i in column i
    coordinates = coordinates - left_out * (left_out * coordinates).sum(-2, keepdim=True)
    residuals = tests - coordinates.mT @ basis
    products = sketch - coordinates.mT @ images
    forms = (residuals * products).sum(-1)
    if resphere:
        count, columns = tests.shape[-2:]
        norms = (residuals * residuals).sum(-1)
        forms = forms * torch.where(norms > 0, (columns - count + 1) / norms, 0)
    inner = compressed.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return inner - (left_out * (compressed @ left_out)).sum(-2) + forms
