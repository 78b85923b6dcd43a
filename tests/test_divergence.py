"""fd.divergence on known Jacobians: values, error bars, tolerances, what nothing depends on, bad input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import largest_error, mixture, normals
from torch import Tensor, nn

import fastdensity as fd
from fastdensity.traces import blocks
from fastdensity.traces.options import DISTRIBUTIONS, METHODS, DivergenceMethod

MATRIX = normals(12, 12, seed=9)
OTHER = {"exact": 1, "hutchinson": 6, "hutchpp": 9, "xtrace": 8, "colour": 6}


def linear(x: Tensor) -> Tensor:
    return (x.flatten(1) @ MATRIX.T.to(x.dtype)).reshape(x.shape)


def curved(x: Tensor) -> Tensor:
    return torch.sin(linear(x)) * x.flatten(1).pow(2).sum(1).reshape(-1, *[1] * (x.dim() - 1))


def dense_trace(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    size = x[0].numel()
    jacobians = [torch.autograd.functional.jacobian(function, row[None]) for row in x]
    return torch.stack([jacobian.reshape(size, size).trace() for jacobian in jacobians])


def network(width: int = 32, columns: int = 24) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(columns, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, columns)
    )


def convolutions() -> nn.Sequential:
    torch.manual_seed(4)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)]
    return nn.Sequential(*layers)


# -- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("forward", ["dual", "torch"])
@pytest.mark.parametrize("function", [linear, curved])
@pytest.mark.parametrize("memory", [1, None])
def test_exact(function: Callable[[Tensor], Tensor], memory: int | None, forward: str) -> None:
    x = normals(5, 3, 4)
    found = fd.divergence(function, x, method="exact", memory=memory, forward=forward)
    torch.testing.assert_close(found.value, function(x))
    assert largest_error(found.div, dense_trace(function, x)) < 1e-13
    assert torch.equal(found.std_err, torch.zeros(5, dtype=torch.float64))
    assert found.num_matvecs.tolist() == [12] * 5
    assert bool(found.converged.all())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("memory", [1, 3 * 12 * 8 * 4, None])
def test_hutchinson_is_the_mean_of_its_probes(distribution: str, memory: int | None) -> None:
    x, ids = normals(3, 3, 4), torch.tensor([4, 0, 2**31 + 1])
    found = fd.divergence(
        curved, x, num_matvecs=6, distribution=distribution, seed=11, sample_ids=ids, step=7, memory=memory
    )
    probes = fd.probes(11, ids, 7, range(6), (3, 4), distribution, dtype=torch.float64)
    forms = torch.stack([(z * torch.func.jvp(curved, (x,), (z,))[1]).flatten(1).sum(1) for z in probes])
    torch.testing.assert_close(found.value, curved(x))
    torch.testing.assert_close(found.div, forms.mean(0))
    finite_population = {"orthogonal": 1 - 6 / 12, "hadamard": 1 - 6 / 16}.get(distribution, 1.0)
    torch.testing.assert_close(found.std_err, forms.std(0) / 6**0.5 * finite_population**0.5)
    assert found.num_matvecs.tolist() == [6] * 3


@pytest.mark.parametrize("method", ["hutchinson", "hutchpp", "xtrace", "colour"])
def test_estimates_agree_with_exact_within_their_error_bars(method: str) -> None:
    """600 samples of one state: the mean is right, and the bars have the size of the scatter."""
    x = normals(1, 3, 4, seed=2).expand(600, 3, 4)
    exact = float(dense_trace(curved, x[:1]))
    options: dict[str, Any] = {"num_colours": 4} if method == "colour" else {}
    count = {"hutchinson": 10, "colour": 12, "hutchpp": 11, "xtrace": 10}[method]
    found = fd.divergence(curved, x, method=method, num_matvecs=count, seed=1, **options)
    error = found.div - exact
    assert abs(float(error.mean())) < 4 * float(error.std()) / 600**0.5
    calibration = float(found.std_err.square().mean().sqrt() / error.square().mean().sqrt())
    assert 0.7 < calibration < 1.4


def test_standard_errors_of_eight_probes_are_calibrated() -> None:
    """RMS bar over RMSE within 0.9 to 1.1, for each distribution."""
    x = torch.zeros(3000, 12, dtype=torch.float64)
    for distribution in DISTRIBUTIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # normal probes and the identity
            found = fd.divergence(linear, x, num_matvecs=8, distribution=distribution, seed=5)
        error = found.div - MATRIX.trace()
        calibration = float(found.std_err.square().mean().sqrt() / error.square().mean().sqrt())
        assert 0.9 < calibration < 1.1, distribution


@pytest.mark.parametrize("distribution", DISTRIBUTIONS[:4])
def test_variances_are_those_of_the_theory(distribution: str) -> None:
    samples, count, n = 6000, 3, 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = fd.divergence(
            linear, torch.zeros(samples, n).double(), num_matvecs=count, distribution=distribution, seed=6
        )
    symmetric = (MATRIX + MATRIX.T) / 2
    squares, trace = float(symmetric.pow(2).sum()), float(MATRIX.trace())
    sphere = 2 * n / (n + 2) * (squares - trace**2 / n) / count
    wanted = {
        "normal": 2 * squares / count,
        "rademacher": 2 * (squares - float(symmetric.diagonal().pow(2).sum())) / count,
        "sphere": sphere,
        "orthogonal": sphere * (n - count) / (n - 1),
    }[distribution]
    assert abs(float(found.div.mean()) - trace) < 4 * math.sqrt(wanted / samples)
    assert float(found.div.var()) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("method", ["hutchinson", "hutchpp", "xtrace"])
@pytest.mark.parametrize("per_row", [False, True])
def test_the_identity_is_added_exactly(method: str, per_row: bool) -> None:
    x = normals(4, 12)
    part = torch.tensor([3.0, -1.0, 0.0, 7.0], dtype=torch.float64) if per_row else torch.tensor(3.0).double().expand(4)
    found = fd.divergence(
        lambda x, a: a[:, None] * x + 1e-3 * linear(x),
        x,
        part.contiguous(),
        method=method,
        num_matvecs=6,
        distribution="normal",
        identity=part if per_row else 3.0,
    )
    assert float((found.div - 12 * part - 1e-3 * MATRIX.trace()).abs().max()) < 0.1
    assert float(found.std_err.max()) < 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(24,), (3, 8), (3, 4, 2), (1, 2, 4, 3)])
def test_samples_of_any_rank(method: str, shape: tuple[int, ...]) -> None:
    model = network().double()
    x = normals(3, *shape)

    def reshaped(x: Tensor) -> Tensor:
        return model(x.flatten(1)).reshape(x.shape)

    found = fd.divergence(reshaped, x, method=method, num_matvecs=OTHER[method])
    assert found.value.shape == x.shape
    exact = fd.divergence(reshaped, x, method="exact").div
    assert float((found.div - exact).abs().max()) < 1.0
    assert found.div.dtype == found.std_err.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_lower_precision_accumulates_in_float32_or_better(dtype: torch.dtype, method: str) -> None:
    model = network().to(dtype)
    x = normals(3, 24).to(dtype)
    found = fd.divergence(model, x, method=method, num_matvecs=OTHER[method])
    wide = fd.divergence(network().double(), x.double(), method=method, num_matvecs=OTHER[method])
    assert float((found.div - wide.div).abs().max()) < 60 * torch.finfo(dtype).eps
    assert found.value.dtype == dtype


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_under_any_gradient_mode(context: Callable[[], torch.no_grad]) -> None:
    model, x = network().double(), normals(3, 24).requires_grad_()
    with context():
        found = fd.divergence(model, x, method="exact")
    assert not found.div.requires_grad
    assert not found.value.requires_grad
    assert largest_error(found.div, dense_trace(model, x.detach())) < 1e-12


def test_arguments_belong_to_rows_or_to_all() -> None:
    model, x = network().double(), normals(5, 24)
    scale, shared = normals(5, 1), normals(24)
    found = fd.divergence(lambda x, s, c: model(x + c) * s, x, scale, shared, method="exact")
    wanted = fd.divergence(lambda x: model(x + shared), x, method="exact").div * scale[:, 0]
    torch.testing.assert_close(found.div, wanted)
    closed_over = fd.divergence(lambda x: model(x + shared) * scale, x, method="exact")
    torch.testing.assert_close(closed_over.div, wanted)


def test_a_mixture_s_divergence() -> None:
    flow, x = mixture(), normals(4, 5)
    lam = torch.tensor([0.3, -2.0, 1.0, 4.0], dtype=torch.float64)
    found = fd.divergence(flow.drift, x, lam, method="exact")
    assert largest_error(found.div, flow.divergence(x, lam)) < 1e-12


# -- what nothing depends on ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [network, convolutions])
def test_a_sample_s_bits_depend_on_nothing_but_itself(method: str, make: Callable[[], nn.Module]) -> None:
    """Alone, in a batch of 7, in chunks, in another order, and in a batch of 70: the same bits."""
    model = make().eval()
    shape = (24,) if make is network else (3, 6, 6)
    x, ids = normals(70, *shape).float(), torch.arange(70) + 5

    def run(index: Any, **options: Any) -> fd.DivergenceEstimate:
        rows = torch.as_tensor(index)
        return fd.divergence(model, x[rows], method=method, num_matvecs=OTHER[method], sample_ids=ids[rows], **options)

    whole = run(range(70))
    shuffled = [3, 2, 6, 0, 1, 5, 4]
    for rows in ([3], list(range(7)), shuffled, [3, 69]):
        part = run(rows)
        for name in ("value", "div", "std_err"):
            found, wanted = getattr(part, name), getattr(whole, name)[torch.tensor(rows)]
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), (name, rows)


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**40), count=st.integers(1, 12))
def test_the_same_key_gives_the_same_bits(seed: int, step: int, count: int) -> None:
    x = normals(3, 12)
    first, again = (fd.divergence(linear, x, num_matvecs=count, seed=seed, step=step) for _ in range(2))
    assert torch.equal(first.div, again.div)


def test_one_probe_has_no_standard_error() -> None:
    assert fd.divergence(linear, normals(3, 12), num_matvecs=1).std_err.isnan().all()


# -- tolerances -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["hutchinson", "hutchpp", "xtrace", "colour"])
def test_samples_stop_one_by_one(method: str) -> None:
    """The second sample's Jacobian is diagonal: Rademacher probes and colours know it at once."""
    columns = 200
    rest = normals(columns, columns, seed=1) / columns
    weight = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return x + w[:, None] * (x @ rest.T)

    x = normals(3, columns)
    found = fd.divergence(fn, x, weight, method=method, abstol=0.5, sample_ids=torch.tensor([7, 8, 9]))
    assert bool(found.converged.all())
    assert bool((found.std_err <= 0.5).all())
    assert int(found.num_matvecs[1]) == int(found.num_matvecs.min())
    exact = columns + weight * rest.trace()
    assert float((found.div - exact).abs().max()) < 2.5
    alone = fd.divergence(fn, x[2:], weight[2:], method=method, abstol=0.5, sample_ids=torch.tensor([9]))
    assert torch.equal(alone.div, found.div[2:])
    assert torch.equal(alone.num_matvecs, found.num_matvecs[2:])


def test_a_tolerance_ends_in_the_exact_divergence() -> None:
    found = fd.divergence(linear, normals(3, 12), reltol=0.0)
    torch.testing.assert_close(found.div, MATRIX.trace().expand(3))
    assert bool(found.converged.all())
    assert found.std_err.tolist() == [0.0] * 3


def test_a_tolerance_that_cannot_be_met() -> None:
    with pytest.warns(UserWarning, match="3 of 3 samples did not meet the tolerance within 20 products"):
        found = fd.divergence(lambda x: x @ normals(300, 300, seed=1), normals(3, 300), abstol=0.0, max_matvecs=20)
    assert not bool(found.converged.any())
    assert found.num_matvecs.tolist() == [20] * 3


# -- bad input --------------------------------------------------------------------------------------------------------
def test_more_products_than_elements_are_exact_and_it_is_said() -> None:
    with pytest.warns(UserWarning, match="num_matvecs=13 is above the 12 elements of a sample"):
        found = fd.divergence(linear, normals(3, 12), num_matvecs=13)
    torch.testing.assert_close(found.div, MATRIX.trace().expand(3))
    assert found.num_matvecs.tolist() == [12] * 3


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("options", [{}, {"abstol": 1.0}])
def test_no_products_are_exact_and_it_is_said(method: str, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="num_matvecs=0 leaves nothing .* the divergence is computed exactly"):
        found = fd.divergence(linear, normals(3, 12), method=method, num_matvecs=0, **options)
    torch.testing.assert_close(found.div, MATRIX.trace().expand(3))
    assert found.num_matvecs.tolist() == [12] * 3
    assert found.std_err.tolist() == [0.0] * 3


def test_non_finite_samples_harm_no_other() -> None:
    model, x = network(), normals(5, 24).float()
    clean = fd.divergence(model, x, num_matvecs=4)
    for method in METHODS:
        count = OTHER[method]
        clean = fd.divergence(model, x, method=method, num_matvecs=count)
        spoilt = x.clone()
        spoilt[2, 3] = math.nan
        found = fd.divergence(model, spoilt, method=method, num_matvecs=count)
        kept = torch.tensor([0, 1, 3, 4])
        assert torch.equal(found.div[kept], clean.div[kept]), method
        assert bool(found.div[2].isnan())
        assert found.converged.tolist() == [True, True, False, True, True]


class CoupledByMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) - 1e-3 * x.mean(0)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("forward", ["dual", "torch"])
def test_coupled_rows_are_refused(rows: int, forward: str) -> None:
    if rows == 1 and forward == "torch":
        pytest.skip("a batch of one in one piece: nothing to couple with")
    with pytest.raises(ValueError, match="fn couples the rows of a batch"):
        fd.divergence(CoupledByMean(), normals(rows, 24), forward=forward)


def test_batch_norm_in_training_is_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="Batch normalisation in training mode"):
        fd.divergence(model, normals(5, 24).float())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    fd.divergence(model.eval(), normals(5, 24).float())


def test_a_model_that_becomes_coupled_is_noticed() -> None:
    model, x = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24)).eval(), normals(5, 24).float()
    fd.divergence(model, x)
    model.train()
    with pytest.raises(ValueError, match=r"couples the rows|training"):
        fd.divergence(model, x)


def test_normal_probes_and_an_identity_part_warn() -> None:
    x = normals(5, 12)
    with pytest.warns(UserWarning, match="identity part of about 3"):
        fd.divergence(lambda x: 3.0 * x + 0.1 * linear(x), x, num_matvecs=8, distribution="normal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fd.divergence(lambda x: linear(x) - x @ torch.diag(MATRIX.diagonal()), x, num_matvecs=8, distribution="normal")
    x[:2] = math.nan
    with pytest.warns(UserWarning, match=r"identity part of about [23]"):
        fd.divergence(lambda x: 3.0 * x + 0.1 * linear(x), x, num_matvecs=8, distribution="normal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fd.divergence(lambda x: 3.0 * x, math.nan * x, num_matvecs=8, distribution="normal")


def test_hutchpp_knows_an_identity_part_with_normal_probes_too() -> None:
    """Its control variate takes the lengths of probes out: 3 I adds little to the error, and no warning is due."""
    x, errors = torch.zeros(2000, 12, dtype=torch.float64), []
    for part in (0.0, 3.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = fd.divergence(
                lambda x, a: a * x + 0.1 * linear(x), x, part, method="hutchpp", num_matvecs=9, distribution="normal"
            )
        errors.append(float((found.div - 12 * part - 0.1 * MATRIX.trace()).square().mean().sqrt()))
    assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_matvecs": -1}, ValueError, "num_matvecs must be in"),
        ({"num_matvecs": 2.0}, TypeError, "num_matvecs must be an int"),
        ({"method": "xact"}, ValueError, "method of divergence must be one of exact, hutchinson"),
        ({"method": "xtrace"}, ValueError, "method 'xtrace' needs num_matvecs >= 2"),
        ({"distribution": "uniform"}, ValueError, "distribution must be one of rademacher"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"sample_ids must have shape \(4,\)"),
        ({"sample_ids": torch.tensor([0, 1, 1, 2])}, ValueError, "sample_ids must be distinct, got 1 repeated"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"step": 1.5}, TypeError, "step must be an int"),
        ({"abstol": -1.0}, ValueError, "abstol must be finite and not negative"),
        ({"reltol": "a"}, TypeError, "reltol must be a number"),
        ({"num_colours": 3}, ValueError, "num_colours belongs to method 'colour'"),
        ({"method": "colour", "num_matvecs": 3, "num_colours": 4}, ValueError, "num_colours must be in"),
        ({"identity": torch.zeros(3)}, ValueError, "identity"),
        ({"forward": "reverse"}, ValueError, "forward must be one of dual, torch"),
        ({"memory": 0}, ValueError, "memory must be in"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fd.divergence(linear, normals(4, 12), **options)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("xact", ValueError, "method of divergence must be one of exact, hutchinson"),
        (3, TypeError, "divergence must be None, a method's name or a dict, got int 3"),
        (
            {"method": "exact", "probes": 3},
            ValueError,
            "divergence takes the keys method, num_matvecs, .* got 'probes'",
        ),
        ({"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_bad_methods(spec: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DivergenceMethod.parse(spec, "exact")


@pytest.mark.parametrize("returned", [lambda x: x[:, :3], lambda x: [x], lambda x: x.sum(1)])
def test_a_jacobian_must_be_square(returned: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"must return a tensor of x's shape|fn must return one tensor|return"):
        fd.divergence(returned, normals(2, 4))


@pytest.mark.parametrize("method", METHODS)
def test_empty_batches(method: str) -> None:
    found = fd.divergence(lambda x: x, torch.zeros(0, 4), method=method, num_matvecs=3)
    assert (found.value.shape, found.div.shape, found.std_err.shape) == ((0, 4), (0,), (0,))


def test_costly_networks_are_called_with_fewer_rows() -> None:
    x = normals(9, 1024).float()
    small = blocks.plan(blocks.Function(network()), normals(9, 24).float(), None)
    large = blocks.plan(blocks.Function(network(2048, 1024)), x, None)
    huge = blocks.plan(blocks.Function(network(8192, 1024)), x, None)
    assert (small.rows, large.rows, huge.rows) == (blocks.MOST_ROWS, 8, 2)
    assert [blocks._rows_on_cpu(1 << 30, 1, products) for products in (1, 2, 3, 8)] == [2, 2, 1, 1]
    assert blocks.plan(blocks.Function(network()), normals(9, 24).float(), 1).tangents == 1


def test_a_batch_size_in_the_code_is_respected() -> None:
    """One row, cut into eight, would pass through this function too, as another one."""
    x = normals(8, 24)

    def fn(x: Tensor) -> Tensor:
        return torch.softmax(x.reshape(8, -1), dim=1).reshape(x.shape)

    found = fd.divergence(fn, x, method="exact")
    torch.testing.assert_close(found.value, fn(x))
    share = torch.softmax(x, dim=1)
    torch.testing.assert_close(found.div, (share * (1 - share)).sum(1))


def test_a_detached_state_is_named() -> None:
    """The gradient of a potential at x.detach() has no derivative by x, and the divergence would be 0 in silence."""

    def score(x: Tensor) -> Tensor:
        return x.detach().sin() * 2.0 + 0.0 * x

    with pytest.warns(UserWarning, match="detach"):
        fd.divergence(score, normals(3, 12), method="exact")
