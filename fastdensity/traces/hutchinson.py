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
    return Trace(mean, std_err * without_replacement(distribution, products.columns, num_matvecs), num_matvecs)


def population(distribution: str, columns: int) -> int | None:
    """The size of the sets that probes are drawn from without replacement; None for independent probes."""
    if distribution == "orthogonal":
        return columns
    if distribution == "hadamard":
        return 1 << (columns - 1).bit_length()
    return None


def without_replacement(distribution: str, columns: int, number: int) -> float:
    """The factor of the standard error of `number` probes, sqrt(1 - k/n); 1 for independent ones."""
    size = population(distribution, columns)
    return 1.0 if size is None else max(0.0, 1.0 - number / size) ** 0.5
