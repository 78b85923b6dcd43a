"""Hutch++: the trace on the range of a sketch exactly, on the rest by probes (Meyer, Musco, Musco, Woodruff 2021).

tr J = tr(Q' J Q) + tr((I - QQ') J (I - QQ')) holds for every orthonormal Q and every J, symmetric or not.

A multiple of the identity in J costs signs nothing, but the signs that are left on the complement no longer have one
length. So the squared length of each residual, whose mean is known, serves as a control variate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.sums import pairwise_sum, row_dot
from fastdensity.traces.hutchinson import population
from fastdensity.traces.products import Products
from fastdensity.traces.result import Trace, mean_and_error
from fastdensity.traces.subspace import finite_rows, orthonormalise, per_row, range_basis


def hutchpp(products: Products, num_matvecs: int, distribution: str = "rademacher") -> Trace:
    """A third of the products for the sketch J S, a third for J Q, the rest for the complement.

    Args:
        products: the Jacobians. num_matvecs: how many products to take, >= 1; a third of it at most `columns`.
        distribution: of the sketch (probes 0 .. m-1, m = num_matvecs // 3) and of the complement's probes (m .. ).
            Those of a set without replacement shun the sketch's directions: the complement has a set of its own then.

    Returns:
        The traces; std_err is that of the complement's probes, NaN when there is only one. A row with a product that
        is not finite is NaN, without harm to others.
    """
    columns = num_matvecs // 3
    rest = num_matvecs - 2 * columns
    if columns == 0:
        div, std_err = mean_and_error(products.forms(0, rest, distribution))
        return Trace(div, std_err, rest)
    sketch = products.apply(products.probes(0, columns, distribution))
    basis, _ = range_basis(sketch)
    images = products.apply(basis)
    on_range = per_row(_trace_on, basis, images)[0]
    together = population(distribution, products.columns)
    probes = products.probes(columns if together is None else together, rest, distribution)
    residuals = per_row(_residuals, basis, probes)[0].movedim(0, 1).to(products.dtype).contiguous()
    outside = products.apply(residuals)
    forms = torch.stack([row_dot(left, right) for left, right in zip(residuals, outside, strict=True)])
    lengths = torch.stack([row_dot(residual, residual) for residual in residuals])
    level = on_range / columns
    if together is None and rest > 1:
        level = _level_of_others(forms, lengths)
    mean, std_err = mean_and_error(forms + level * (products.columns - columns - lengths))
    finite = finite_rows(sketch) & finite_rows(images)
    div = torch.where(finite, on_range + mean, math.nan)
    return Trace(div, torch.where(finite, std_err, math.nan), num_matvecs)


def _trace_on(basis: Tensor, images: Tensor) -> tuple[Tensor]:
    basis, images = orthonormalise(basis, images)
    return ((basis * images).sum((-2, -1)),)


def _residuals(basis: Tensor, probes: Tensor) -> tuple[Tensor]:
    basis = orthonormalise(basis, basis)[0]
    return (probes - (probes @ basis.mT) @ basis,)


def _level_of_others(forms: Tensor, lengths: Tensor) -> Tensor:
    """What the squared lengths (k, R) of residuals explain of their forms: the ratio of the two in all other probes.

    It is independent of the probe that it corrects, and so without bias, and exact for J = a I. A single probe has no
    others, and those of a set without replacement depend on each other: they take the mean over the range, which is
    independent of them too.
    """
    rest = pairwise_sum(lengths, 0) - lengths
    return torch.where(rest > 0, (pairwise_sum(forms, 0) - forms) / rest, 0)
