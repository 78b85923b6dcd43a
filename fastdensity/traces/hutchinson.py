"""Hutchinson's estimator of the trace: the mean of z.(J z) over random z with E z z^T = I.

Hutchinson 1990; Skilling 1989. Variances in docs/divergence.md. Probes that are drawn without replacement from a set
that is exact as a whole, n orthogonal vectors or the N rows of a Hadamard matrix, err less: the square of the
standard error is multiplied by 1 - k/n, as for any mean of a sample from a finite population (Cochran 1977, 2.4).
"""

from __future__ import annotations

from fastdensity.traces.products import Products
from fastdensity.traces.result import Trace, mean_and_error


def hutchinson(products: Products, num_matvecs: int, distribution: str) -> Trace:
    """The mean of the forms of `num_matvecs` probes."""
    forms = products.forms(0, num_matvecs, distribution)
    mean, std_err = mean_and_error(forms)
    population = _population(distribution, products.columns)
    if population is not None:
        std_err = std_err * max(0.0, 1.0 - num_matvecs / population) ** 0.5
    return Trace(mean, std_err, num_matvecs)


def _population(distribution: str, columns: int) -> int | None:
    if distribution == "orthogonal":
        return columns
    if distribution == "hadamard":
        return 1 << (columns - 1).bit_length()
    return None
