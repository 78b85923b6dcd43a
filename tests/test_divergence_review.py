"""What a hostile reading of fd.divergence found: inputs that were once wrong, refused without need, or badly named."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from mixtures import largest_error, normals
from torch import Tensor, nn

import fastdensity as fd

WIDE = normals(300, 300, seed=1)
METHODS = ("hutchinson", "hutchpp", "xtrace", "colour")


# -- tolerances -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most", [8, 9, 10, 11, 17, 19, 20, 33])
def test_any_cap_keeps_the_error_bar(method: str, most: int) -> None:
    """A last round too small for a spread once made all bars NaN, or ended in an error about num_colours or K."""
    with pytest.warns(UserWarning, match="did not meet the tolerance"):
        found = fd.divergence(lambda x: x @ WIDE, normals(3, 300), method=method, abstol=0.0, max_matvecs=most)
    assert bool(found.std_err.isfinite().all())
    assert max(most - 4, 8) <= int(found.num_matvecs.max()) <= most
    assert largest_error(found.div, WIDE.trace().expand(3)) * float(WIDE.trace()) < 6 * float(found.std_err.max())


@pytest.mark.parametrize(("method", "least"), [("hutchinson", 1), ("hutchpp", 3), ("xtrace", 2), ("colour", 1)])
def test_least_caps(method: str, least: int) -> None:
    with pytest.warns(UserWarning, match="did not meet the tolerance"):
        found = fd.divergence(lambda x: x @ WIDE, normals(3, 300), method=method, abstol=0.0, max_matvecs=least)
    assert found.num_matvecs.tolist() == [least] * 3
    if least > 1:
        with pytest.raises(ValueError, match=f"method '{method}' needs max_matvecs >= {least} here, got {least - 1}"):
            fd.divergence(lambda x: x, normals(3, 300), method=method, abstol=0.0, max_matvecs=least - 1)


def test_a_cap_below_one_sweep_is_named() -> None:
    with pytest.raises(ValueError, match="method 'colour' needs max_matvecs >= 5 here, got 4"):
        fd.divergence(
            lambda x: x, normals(3, 300), method="colour", num_matvecs=5, num_colours=5, abstol=0.0, max_matvecs=4
        )


@pytest.mark.parametrize("most", [12, 16, 19, 20])
def test_the_cap_holds_for_the_exact_divergence_too(most: int) -> None:
    """8 probes and then all 12 elements are 20 products: with a lower cap only probes are left."""
    matrix = normals(12, 12, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = fd.divergence(lambda x: x @ matrix, normals(3, 12), abstol=0.0, max_matvecs=most)
    assert found.num_matvecs.tolist() == [20 if most == 20 else 12] * 3
    assert found.converged.tolist() == [most == 20] * 3


@pytest.mark.parametrize("distribution", ["orthogonal", "hadamard"])
def test_rounds_without_replacement_are_calibrated(distribution: str) -> None:
    """Rounds share one population: bars that took each for itself were 1.8 times too long at 48 of 64."""
    matrix = normals(64, 64, seed=3)
    with pytest.warns(UserWarning, match="did not meet the tolerance"):
        found = fd.divergence(
            lambda x: x @ matrix,
            torch.zeros(1000, 64, dtype=torch.float64),
            distribution=distribution,
            abstol=0.0,
            max_matvecs=48,
            seed=2,
        )
    error = found.div - matrix.trace()
    assert 0.9 < float(found.std_err.square().mean().sqrt() / error.square().mean().sqrt()) < 1.1


# -- bias -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", ["rademacher", "sphere", "orthogonal", "hadamard"])
@pytest.mark.parametrize("count", [4, 9, 12])
def test_hutchpp_has_no_bias(distribution: str, count: int) -> None:
    """Probes without replacement shun the sketch of their own set: 50 standard errors of bias at 20,000 samples."""
    matrix = torch.diag(torch.linspace(0.0, 4.0, 12, dtype=torch.float64) ** 2) + 0.3 * normals(12, 12, seed=5)
    x = torch.zeros(3000, 12, dtype=torch.float64)
    found = fd.divergence(
        lambda x: x @ matrix, x, method="hutchpp", num_matvecs=count, distribution=distribution, seed=3
    )
    error = found.div - matrix.trace()
    assert abs(float(error.mean())) < 4 * float(error.std()) / 3000**0.5
