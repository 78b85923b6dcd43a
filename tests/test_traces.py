"""Trace estimators on Jacobians that are given matrices, none of them symmetric unless a test says so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_products import MatrixProducts, matrices, symmetric_part, variance_of_signs
from mixtures import normals
from torch import Tensor

from benchmarks import xtrace_spectra
from fastdensity.sums import pairwise_sum
from fastdensity.traces import Trace, colour, hutchpp, subspace, xtrace
from fastdensity.traces.colour import sample_colours

Estimator = Callable[..., Trace]
ESTIMATORS = [hutchpp, xtrace, colour]


def low_rank(columns: int, rank: int, seed: int = 0) -> Tensor:
    return normals(columns, rank, seed=seed) @ normals(rank, columns, seed=seed + 1)


# against the definitions


def test_hutchpp_is_its_definition() -> None:
    products = MatrixProducts(matrices(3, 40), seed=4)
    result = hutchpp(products, 14)
    for row, matrix in enumerate(products.matrices):
        sketch = products.probes(0, 4, "rademacher")[:, row].T
        basis = torch.linalg.qr(matrix @ sketch)[0]
        outside = torch.eye(40, dtype=torch.float64) - basis @ basis.T
        rest = outside @ products.probes(4, 6, "rademacher")[:, row].T
        forms, lengths = (rest * (matrix @ rest)).sum(0), (rest * rest).sum(0)
        others = ~torch.eye(6, dtype=torch.bool)
        levels = torch.stack([forms[other].sum() / lengths[other].sum() for other in others])
        forms = forms + levels * (36 - lengths)
        torch.testing.assert_close(result.div[row], (basis.T @ matrix @ basis).trace() + forms.mean())
        torch.testing.assert_close(result.std_err[row], forms.std() / math.sqrt(6))


@pytest.mark.parametrize(("distribution", "resphere"), [("sphere", True), ("rademacher", False), ("normal", False)])
def test_xtrace_leaves_one_out(distribution: str, resphere: bool) -> None:
    products = MatrixProducts(matrices(3, 40), seed=4)
    result = xtrace(products, 13, resphere, distribution)
    tests = products.probes(0, 6, distribution)
    for row, matrix in enumerate(products.matrices):
        estimates = []
        for left_out in range(6):
            others = [test for test in range(6) if test != left_out]
            basis = torch.linalg.qr(matrix @ tests[others, row].T)[0]
            residual = tests[left_out, row] - basis @ (basis.T @ tests[left_out, row])
            scale = (40 - 6 + 1) / residual.dot(residual) if resphere else 1
            estimates.append((basis.T @ matrix @ basis).trace() + scale * residual.dot(matrix @ residual))
        wanted = torch.stack(estimates)
        torch.testing.assert_close(result.div[row], wanted.mean(), rtol=1e-10, atol=0)
        torch.testing.assert_close(result.std_err[row], wanted.std() / math.sqrt(6), rtol=1e-9, atol=0)


def test_colour_is_its_definition() -> None:
    products = MatrixProducts(matrices(3, 40), shape=(2, 4, 5), seed=4)
    result = colour(products, 32, 11)
    colours = sample_colours((2, 4, 5), 11)
    assert (result.colours, result.products) == (10, 30)
    sweeps = []
    for sweep in range(3):
        signs = products.probes(sweep, 1, "rademacher")[0]
        parts = [torch.where(colours == number, signs, 0) for number in range(10)]
        sweeps.append(sum(torch.einsum("ri,rij,rj->r", part, products.matrices, part) for part in parts))
    torch.testing.assert_close(result.div, torch.stack(sweeps).mean(0))
    torch.testing.assert_close(result.std_err, torch.stack(sweeps).std(0) / math.sqrt(3))


# what all of them share


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("num_matvecs", [2, 3, 8, 15])
def test_products_are_counted(estimator: Estimator, num_matvecs: int) -> None:
    products = MatrixProducts(matrices(2, 40))
    result = estimator(products, num_matvecs)
    assert result.products == products.taken <= num_matvecs
    assert result.div.shape == result.std_err.shape == (2,)
    assert result.div.dtype == result.std_err.dtype == torch.float64
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.div = result.std_err


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_matvecs", [2, 9, 26])
def test_a_row_does_not_depend_on_others(estimator: Estimator, dtype: torch.dtype, num_matvecs: int) -> None:
    every = matrices(7, 53).to(dtype)
    ids = torch.tensor([5, 3, 11, 0, 8, 2, 9])
    together = estimator(MatrixProducts(every, sample_ids=ids), num_matvecs)
    for rows in ([3], [6], [5, 0, 3]):
        apart = estimator(MatrixProducts(every[rows], sample_ids=ids[rows]), num_matvecs)
        assert torch.equal(apart.div, together.div[rows])
        assert torch.equal(apart.std_err.nan_to_num(-1), together.std_err[rows].nan_to_num(-1))


@pytest.mark.parametrize("estimator", [hutchpp, xtrace])
def test_all_rows_at_once(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices do on which a call for each row costs too much."""
    every = torch.cat([matrices(3, 31), low_rank(31, 2)[None], torch.zeros(1, 31, 31, dtype=torch.float64)])
    every[1, 3, 3] = math.nan
    apart = estimator(MatrixProducts(every), 17)
    monkeypatch.setattr(subspace, "ROW_BY_ROW", ())
    together = estimator(MatrixProducts(every), 17)
    torch.testing.assert_close(together.div, apart.div, rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(together.std_err, apart.std_err, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("num_matvecs", [2, 9])
def test_no_rows(estimator: Estimator, num_matvecs: int) -> None:
    result = estimator(MatrixProducts(matrices(1, 20)[:0]), num_matvecs)
    assert result.div.shape == result.std_err.shape == (0,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_matvecs", [2, 12])
def test_a_bad_row_is_nan_and_harms_no_other(estimator: Estimator, bad: float, num_matvecs: int) -> None:
    every = matrices(4, 30)
    wanted = estimator(MatrixProducts(every), num_matvecs).div
    every[1, 4, 7] = bad
    every[3] = bad
    result = estimator(MatrixProducts(every), num_matvecs)
    assert result.div.isnan().tolist() == [False, True, False, True]
    assert result.std_err[[1, 3]].isnan().all()
    assert torch.equal(result.div[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 0.03)])
@settings(deadline=None, max_examples=15)
@given(
    scale=st.floats(-8, 8).filter(lambda scale: abs(scale) > 1e-3),
    columns=st.integers(7, 40),
    num_matvecs=st.integers(2, 7),
)
def test_a_multiple_of_the_identity_is_exact(
    estimator: Estimator, dtype: torch.dtype, rounding: float, scale: float, columns: int, num_matvecs: int
) -> None:
    products = MatrixProducts((scale * torch.eye(columns)).to(dtype)[None])
    result = estimator(products, num_matvecs)
    assert abs(result.div.item() / products.traces().item() - 1) < rounding
    assert not result.std_err.item() > rounding * abs(products.traces().item())


@settings(deadline=None, max_examples=25)
@given(diagonal=st.lists(st.floats(-8, 8), min_size=4, max_size=30), num_matvecs=st.integers(1, 20))
def test_diagonals_are_exact_for_colours(diagonal: list[float], num_matvecs: int) -> None:
    values = torch.tensor(diagonal, dtype=torch.float64)
    result = colour(MatrixProducts(values.diag()[None]), num_matvecs)
    assert abs(result.div.item() - values.sum().item()) < 1e-13 * values.abs().sum().item() + 1e-300
    if num_matvecs < 3:  # no sketch: signs alone
        signs = hutchpp(MatrixProducts(values.diag()[None]), num_matvecs)
        assert abs(signs.div.item() - values.sum().item()) < 1e-13 * values.abs().sum().item() + 1e-300


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_are_unbiased_and_their_errors_known(estimator: Estimator) -> None:
    """Errors over 3,000 keys: their mean is 0 within 4 of its standard errors; bars agree with their spread.

    XTrace's estimates share their basis, so that its bar falls short of the error, here by up to a third.
    """
    products = MatrixProducts(matrices(1, 24)[0], rows=3000)
    options = {} if estimator is not colour else {"num_colours": 4}
    result = estimator(products, 24, **options)
    errors = result.div - products.traces()
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(3000)
    calibration = result.std_err.square().mean().sqrt() / errors.square().mean().sqrt()
    assert (0.65 if estimator is xtrace else 0.95) < calibration < 1.05


# low ranks


@pytest.mark.parametrize("estimator", [hutchpp, xtrace])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("rank", [0, 1, 2, 5, 8])
def test_low_ranks_are_exact(estimator: Estimator, dtype: torch.dtype, rounding: float, rank: int) -> None:
    matrix = low_rank(50, rank) if rank else torch.zeros(50, 50, dtype=torch.float64)
    products = MatrixProducts(matrix.to(dtype)[None])
    for options in ({}, {"distribution": "rademacher"}):
        resphere = {"resphere": False} if estimator is xtrace and options else {}
        result = estimator(products, 27, **options, **resphere)
        assert abs(result.div - products.traces()).item() <= rounding * torch.linalg.matrix_norm(matrix).item()
        assert result.std_err.item() <= rounding * torch.linalg.matrix_norm(matrix).item()


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_scales_far_from_one(scale: float) -> None:
    matrix = low_rank(30, 4)[None]
    for estimator in (hutchpp, xtrace):
        result = estimator(MatrixProducts(scale * matrix), 18)
        torch.testing.assert_close(result.div / scale, MatrixProducts(matrix).traces(), rtol=1e-10, atol=0)


def test_coordinates_that_meet_no_others() -> None:
    """Signs on a diagonal with zeros: some products are 0 or repeat up to a sign."""
    matrix = torch.zeros(12, 12, dtype=torch.float64)
    matrix[0, 0] = matrix[0, 1] = 3.0
    result = xtrace(MatrixProducts(matrix[None]), 16, False, "rademacher")
    torch.testing.assert_close(result.div, torch.tensor([3.0], dtype=torch.float64))


def test_bases_are_orthonormal_after_rounding() -> None:
    matrix = matrices(1, 30)[0]
    rounded = torch.linalg.qr(normals(30, 6, seed=2))[0].T.bfloat16().double()
    basis, images = subspace.orthonormalise(rounded, rounded @ matrix.T)
    assert (rounded @ rounded.T - torch.eye(6)).abs().max() > 1e-4
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(images, basis @ matrix.T, rtol=0, atol=1e-13)


def test_as_many_tests_as_columns() -> None:
    for columns in (1, 2, 5):
        products = MatrixProducts(matrices(4, columns, seed=3))
        result = xtrace(products, 2 * columns)
        torch.testing.assert_close(result.div, products.traces(), rtol=1e-9, atol=1e-9)


# the errors that were promised


def test_six_spectra() -> None:
    """Mean errors are no worse than wanted, within 2 Monte Carlo errors of few trials; the benchmark has more."""
    methods = ("hutchpp, signs", "xtrace, sphere", "xtrace, sphere, resphered")
    records = xtrace_spectra.run(trials=24, methods=methods)
    assert len(records) == 18
    for record in records:
        assert record["mean_error"] < record["wanted"] + 2 * record["monte_carlo_error"], record
        assert record["products"] == 120


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("distribution", ["normal", "rademacher", "sphere", "orthogonal"])
def test_variances_of_probes(distribution: str, count: int) -> None:
    columns, rows = 10, 8000
    matrix = matrices(1, columns)[0]
    symmetric = symmetric_part(matrix)
    square, trace = symmetric.square().sum(), symmetric.trace()
    sphere = 2 * columns / (columns + 2) * (square - trace**2 / columns)
    wanted = {
        "normal": 2 * square,
        "rademacher": variance_of_signs(matrix),
        "sphere": sphere,
        "orthogonal": sphere * (columns - count) / (columns - 1),
    }[distribution]
    forms = MatrixProducts(matrix, rows=rows, seed=1).forms(0, count, distribution)
    means = pairwise_sum(forms, 0) / count
    error = means - trace
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(rows)
    spread = (error.square() - error.square().mean()).std() / math.sqrt(rows)  # Monte Carlo error of the variance
    assert spread < 0.05 * error.square().mean()
    assert abs(error.square().mean() - wanted / count) < 4 * spread
