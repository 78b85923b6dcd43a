"""Divergences of functions with known Jacobians, the statistics of the probes, and what they do not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import largest_error, normals
from torch import Tensor, nn

import fastdensity.divergence as divergence_module
from fastdensity.divergence import STREAM_MEASURE, STREAM_STEER, DivergenceMethod, estimate_divergence, rademacher
from fastdensity.sums import pairwise_sum, row_dot, row_sum

MATRIX = normals(12, 12, seed=9)


def linear(x: Tensor) -> Tensor:
    return (x.flatten(1) @ MATRIX.T.to(x.dtype)).reshape(x.shape)


def curved(x: Tensor) -> Tensor:
    return torch.sin(linear(x)) * x.flatten(1).pow(2).sum(1).reshape(-1, *[1] * (x.dim() - 1))


def dense_trace(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    size = x[0].numel()
    jacobians = [torch.autograd.functional.jacobian(function, row[None]) for row in x]
    return torch.stack([jacobian.reshape(size, size).trace() for jacobian in jacobians])


@pytest.mark.parametrize("function", [linear, curved])
@pytest.mark.parametrize("at_once", [1, 5 * 12, 1 << 20])
def test_exact(function: Callable[[Tensor], Tensor], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_module, "TANGENT_ELEMENTS", at_once)
    x = normals(5, 3, 4)
    value, div, std_err = estimate_divergence(function, x, "exact")
    torch.testing.assert_close(value, function(x))
    assert largest_error(div, dense_trace(function, x)) < 1e-13
    assert torch.equal(std_err, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_hutchinson_is_the_mean_of_its_probes(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_module, "TANGENT_ELEMENTS", at_once)
    x, ids = normals(3, 3, 4), torch.tensor([4, 0, 2**40 + 1])
    value, div, std_err = estimate_divergence(curved, x, "hutchinson", 6, 11, ids, 7)
    probes = [rademacher(11, ids, 7, probe, x, STREAM_MEASURE) for probe in range(6)]
    forms = torch.stack([(z * torch.func.jvp(curved, (x,), (z,))[1]).flatten(1).sum(1) for z in probes])
    torch.testing.assert_close(value, curved(x))
    torch.testing.assert_close(div, forms.mean(0))
    torch.testing.assert_close(std_err, forms.std(0) / 6**0.5)


def test_one_probe_has_no_standard_error() -> None:
    _, _, std_err = estimate_divergence(linear, normals(3, 12), "hutchinson", 1)
    assert std_err.isnan().all()


def test_hutchinson_has_the_theory_s_bias_and_variance() -> None:
    """Var = 2 (||S||_F^2 - sum S_ii^2) / k with S = (J + J^T) / 2, over 4000 independent samples."""
    samples, count = 4000, 3
    _, div, std_err = estimate_divergence(linear, torch.zeros(samples, 12).double(), "hutchinson", count, seed=5)
    symmetric = (MATRIX + MATRIX.T) / 2
    variance = float(2 * (symmetric.pow(2).sum() - symmetric.diagonal().pow(2).sum()) / count)
    assert abs(float(div.mean() - MATRIX.trace())) < 4 * math.sqrt(variance / samples)
    assert float(div.var()) == pytest.approx(variance, rel=0.15)
    assert float((std_err**2).mean()) == pytest.approx(variance, rel=0.15)


def test_the_identity_costs_nothing() -> None:
    _, div, std_err = estimate_divergence(lambda x: 3.0 * x, normals(4, 50), "hutchinson", 2)
    torch.testing.assert_close(div, torch.full((4,), 150.0, dtype=torch.float64))
    assert float(std_err.max()) < 1e-12


def test_probes_are_signs_keyed_by_everything() -> None:
    like = torch.empty(4000, 50)
    ids = torch.arange(4000)
    base = rademacher(1, ids, 2, 3, like, STREAM_MEASURE)
    assert torch.equal(base.abs(), torch.ones_like(base))
    bound = 5 / base.numel() ** 0.5
    assert abs(float(base.mean())) < bound
    others = {
        "seed": rademacher(2, ids, 2, 3, like, STREAM_MEASURE),
        "sample id": rademacher(1, ids + 4000, 2, 3, like, STREAM_MEASURE),
        "step": rademacher(1, ids, 1, 3, like, STREAM_MEASURE),
        "probe": rademacher(1, ids, 2, 4, like, STREAM_MEASURE),
        "stream": rademacher(1, ids, 2, 3, like, STREAM_STEER),
        "element": base.roll(1, dims=1),
        "row": base.roll(1, dims=0),
    }
    for what, other in others.items():
        assert abs(float((base * other).mean())) < bound, what


@given(rows=st.integers(1, 6), first=st.integers(0, 9), columns=st.integers(1, 300))
def test_probes_do_not_depend_on_the_batch(rows: int, first: int, columns: int) -> None:
    ids = torch.arange(16) * 3
    whole = rademacher(7, ids, 1, 0, torch.empty(16, columns), STREAM_STEER)
    part = slice(first, first + rows)
    assert torch.equal(whole[part], rademacher(7, ids[part], 1, 0, torch.empty(rows, columns), STREAM_STEER))


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        query = x.reshape(x.shape[0], 2, 3, 4)
        return nn.functional.scaled_dot_product_attention(query, 2 * query, query).reshape(x.shape)


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_networks_under_any_gradient_mode(method: str, context: Callable[[], torch.no_grad]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.SiLU(), Attention()).double()
    x = normals(3, 24)
    with context():
        value, div, _ = estimate_divergence(network, x, method, 400 if method == "hutchinson" else 1)
    torch.testing.assert_close(value, network(x))
    exact = dense_trace(network, x)
    assert largest_error(div, exact) < (1e-10 if method == "exact" else 0.5)


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_empty_batches(method: str) -> None:
    value, div, std_err = estimate_divergence(lambda x: x, torch.zeros(0, 4), method)
    assert (value.shape, div.shape, std_err.shape) == ((0, 4), (0,), (0,))


@given(rows=st.integers(1, 5), columns=st.integers(1, 70))
def test_sums_add_everything_once(rows: int, columns: int) -> None:
    values = torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns)
    assert torch.equal(pairwise_sum(values, 1), values.sum(1))
    assert torch.equal(pairwise_sum(values, 0), values.sum(0))
    assert torch.equal(row_dot(values.float(), values.float()), (values * values).sum(1))


def test_long_sums_do_not_depend_on_the_batch() -> None:
    """torch.sum cuts a single long row over threads, and several rows not."""
    values = normals(3, 100_003)
    assert torch.equal(row_sum(values)[:1], row_sum(values[:1]))
    torch.testing.assert_close(row_sum(values), values.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("xact", ValueError, "method of divergence must be one of exact, hutchinson, got str 'xact'"),
        (3, TypeError, "divergence must be None, a method's name or a dict, got int 3"),
        (
            {"method": "exact", "probes": 3},
            ValueError,
            "divergence takes the keys method, num_matvecs, seed, got 'probes'",
        ),
        ({"num_matvecs": 0}, ValueError, "num_matvecs must be in"),
        ({"num_matvecs": 2.0}, TypeError, "num_matvecs must be an int"),
        ({"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_bad_methods(spec: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DivergenceMethod.parse(spec, "exact")


@pytest.mark.parametrize("returned", [torch.zeros(2, 3), [0.0]])
def test_functions_must_keep_the_shape(returned: object) -> None:
    with pytest.raises(ValueError, match=r"fn\(x\) must return a tensor of x's shape \(2, 4\)"):
        estimate_divergence(lambda x: returned, torch.zeros(2, 4), "hutchinson")
