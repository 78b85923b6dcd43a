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


# -- numbers that are not finite --------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["exact", *METHODS])
@pytest.mark.parametrize("forward", ["dual", "torch"])
@pytest.mark.parametrize("outside", [-1.0, 0.0, math.inf])
def test_a_result_that_is_not_finite_has_no_divergence(method: str, forward: str, outside: float) -> None:
    """log at -1 is NaN, its derivative -1: div was 0 with bar 0, and converged; at 0 it was infinite, not NaN."""
    x = normals(4, 12).abs() + 1.0
    clean = fd.divergence(torch.log, x, method=method, num_matvecs=8, forward=forward)
    x[1, 5] = outside
    found = fd.divergence(torch.log, x, method=method, num_matvecs=8, forward=forward)
    assert found.div.isnan().tolist() == [False, True, False, False]
    assert bool(found.std_err[1].isnan())
    assert found.converged.tolist() == [True, False, True, True]
    kept = torch.tensor([0, 2, 3])
    for name in ("value", "div", "std_err"):
        assert torch.equal(getattr(found, name)[kept].nan_to_num(-1), getattr(clean, name)[kept].nan_to_num(-1)), name


def test_a_result_that_is_not_finite_meets_no_tolerance() -> None:
    x = torch.tensor([[-1.0, 1.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="1 of 2 samples did not meet the tolerance"):
        found = fd.divergence(torch.log, x, abstol=1.0)
    assert found.div.isnan().tolist() == found.std_err.isnan().tolist() == [True, False]
    assert found.converged.tolist() == [False, True]


# -- which rows belong together ---------------------------------------------------------------------------------------
class HoldsTheBatch(nn.Module):
    """Keeps a tensor of the batch, as wrappers of conditional models do."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale, self.inner = scale, nn.Linear(12, 12).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("rows", [2, 5, 256, 257])
def test_tensors_of_the_batch_in_containers_and_modules(rows: int) -> None:
    x, scale, weight = normals(rows, 12), normals(rows, 1), normals(12, 12)
    wanted = weight.trace() * scale[:, 0]
    for given in ({"scale": scale}, [scale], ({"a": [scale]},)):

        def scaled(x: Tensor, given: Any) -> Tensor:
            while not isinstance(given, Tensor):
                given = next(iter(given.values())) if isinstance(given, dict) else given[0]
            return (x @ weight.T) * given

        assert largest_error(fd.divergence(scaled, x, given, method="exact").div, wanted) < 1e-12
        some = fd.divergence(scaled, x, given, abstol=5.0, num_matvecs=8)  # rows leave in turn
        whole = fd.divergence(scaled, x, scale, abstol=5.0, num_matvecs=8)
        assert torch.equal(some.div, whole.div)
    module = HoldsTheBatch(scale)
    found = fd.divergence(module, x, method="exact").div
    assert largest_error(found, module.inner.weight.trace() * scale[:, 0]) < 1e-12
    with pytest.raises(ValueError, match="need a fn whose batch can be cut"):
        fd.divergence(module, x, abstol=0.1)


def test_a_batch_of_one_is_like_any_other() -> None:
    """A closed-over (1,) tensor has the batch's size by accident: bits and tolerances must not change with that."""
    torch.manual_seed(0)
    model, time = nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 24)), torch.tensor([0.7])
    x = normals(7, 24).float()

    def fn(x: Tensor) -> Tensor:
        return model(x * time)

    whole = fd.divergence(fn, x, num_matvecs=4)
    alone = fd.divergence(fn, x[3:4], num_matvecs=4, sample_ids=torch.tensor([3]))
    assert torch.equal(alone.div, whole.div[3:4])
    assert bool(fd.divergence(fn, x[3:4], abstol=10.0).converged.all())


@pytest.mark.parametrize("closed_over", [False, True])
def test_a_mask_beside_a_batch_of_one(closed_over: bool) -> None:
    """(1, H, W) fits one row (1, C, H, W), but not copies of both."""
    torch.manual_seed(0)
    model, mask = nn.Conv2d(3, 3, 3, padding=1), normals(1, 6, 6).float()
    x = normals(4, 3, 6, 6).float()

    def fn(x: Tensor, m: Tensor = mask) -> Tensor:
        return model(x) * m

    arguments = () if closed_over else (mask,)
    alone = fd.divergence(fn, x[:1], *arguments, method="exact")
    torch.testing.assert_close(alone.div, fd.divergence(fn, x, *arguments, method="exact").div[:1])


@pytest.mark.parametrize("state", ["nan", "half"])
def test_coupling_shows_at_any_state(state: str) -> None:
    """A first row of NaN made all comparisons equal; at 0.5 the changed rows were the same rows."""
    x = torch.full((5, 12), 0.5, dtype=torch.float64)
    if state == "nan":
        x = normals(5, 12)
        x[0] = math.nan
    with pytest.raises(ValueError, match="fn couples the rows"):
        fd.divergence(lambda x: torch.tanh(x) - 1e-3 * x.mean(0), x)


# -- what belongs to the user -----------------------------------------------------------------------------------------
class Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 2.0).expand(12))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("scale")


def test_buffers_that_cannot_be_written_to() -> None:
    assert fd.divergence(Spread(), normals(3, 12).float(), method="exact").div.tolist() == [24.0] * 3


def test_no_random_state_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed, which seeds every device, was called for x on a CPU: nothing puts the others back."""
    seeded: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    for forward in ("dual", "torch"):
        fd.divergence(lambda x: torch.sin(x), normals(3, 12), forward=forward)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


# -- types ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_result_of_another_dtype(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 12)
    count = {"hutchpp": 9, "xtrace": 12}.get(method, 9)
    wanted = fd.divergence(model, normals(3, 12).float(), method=method, num_matvecs=count).div
    double = nn.Linear(12, 12).double()
    double.load_state_dict(model.state_dict())
    found = fd.divergence(lambda x: double(x.double()), normals(3, 12).float(), method=method, num_matvecs=count)
    assert float((found.div - wanted).abs().max()) < 1e-4
    assert found.value.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fd.divergence(model, normals(3, 12).float(), method=method, num_matvecs=count)
    assert float((found.div - wanted).abs().max()) < 0.3
    assert found.value.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["hutchpp", "xtrace", "colour"])
def test_an_identity_that_bfloat16_does_not_hold(method: str) -> None:
    """0.3 rounds to 0.3008, which was subtracted, while 0.3 was added: 2.4 of 921.6 too little."""
    x, columns = torch.ones(2, 3072, dtype=torch.bfloat16), 3072
    found = fd.divergence(lambda x: 0.3 * x, x, method=method, num_matvecs=10, identity=0.3)
    own = fd.divergence(lambda x: 0.3 * x, x, method=method, num_matvecs=10)
    assert float((found.div - own.div).abs().max()) < 0.3 * columns * 2**-10


@pytest.mark.parametrize("result", [lambda x: x.long(), lambda x: x * (1 + 1j)])
def test_results_must_be_real(result: Any) -> None:
    with pytest.raises(ValueError, match="must return floating numbers"):
        fd.divergence(result, normals(3, 4))


def test_ids_that_are_equal_modulo_2_to_the_32_are_repeated() -> None:
    with pytest.raises(ValueError, match=r"distinct, got 1 repeated \(they count modulo"):
        fd.divergence(torch.sin, normals(2, 4), sample_ids=torch.tensor([1, 2**32 + 1]))


def test_transforms_in_fn_are_named() -> None:
    """The score of an energy, written with torch.func.grad, ended in an error of the compiler's."""
    weight = normals(12, 12)

    def energy(x: Tensor) -> Tensor:
        return (torch.sin(x) @ weight * x).sum()

    score, x = torch.func.vmap(torch.func.grad(energy)), normals(3, 12)
    with pytest.raises(
        (ValueError, NotImplementedError), match=r"forward='torch' takes such functions|torch\.func\.grad"
    ):
        fd.divergence(score, x)
    found = fd.divergence(score, x, method="exact", forward="torch").div
    wanted = torch.stack([torch.func.hessian(energy)(row).trace() for row in x])
    assert largest_error(found, wanted) < 1e-12
