"""A network on a path: what reaches the model, what is made of its output, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import SCHEDULES, largest_error, mixture, normals
from torch import Tensor

import fastdensity as fd
from fastdensity.rules import PREDICTION_TYPES


def perfect(kind: str, name: str = "VP") -> tuple[fd.Flow, fd.GaussianMixture]:
    """A Flow whose network knows a mixture's prediction, and that mixture."""
    known = mixture(SCHEDULES[name], prediction_type=kind, sigma_data=0.7)
    return fd.Flow(known.prediction, known.schedule, prediction_type=kind, sigma_data=0.7), known


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("lam", [-6.0, 0.5, torch.tensor([-6.0, 0.0, 1.0, 6.0], dtype=torch.float64)])
def test_perfect_networks_give_the_exact_flow(kind: str, name: str, lam: float | Tensor) -> None:
    flow, known = perfect(kind, name)
    x = normals(4, 5)
    for quantity in ("prediction", "eps", "score", "drift"):
        assert largest_error(getattr(flow, quantity)(x, lam), getattr(known, quantity)(x, lam)) < 1e-9


class Recorder:
    """A model that remembers what it was called with."""

    def __init__(self, output: Any = None) -> None:
        self.output, self.calls = output, list[tuple[Tensor, Tensor]]()

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        self.calls.append((x, t))
        return x if self.output is None else self.output


@pytest.mark.parametrize("lam", [1.5, torch.tensor(1.5), torch.tensor([1.5]), torch.tensor([1.5, 1.5, 1.5])])
@pytest.mark.parametrize(
    ("dtype", "time_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_time_is_lam_by_default(lam: float | Tensor, dtype: torch.dtype, time_dtype: torch.dtype) -> None:
    model = Recorder()
    fd.Flow(model, fd.VP()).prediction(normals(3, 2).to(dtype), lam)
    time = model.calls[0][1]
    assert time.dtype == time_dtype
    assert torch.equal(time, torch.full((3,), 1.5, dtype=time_dtype))


def test_time_functions_work_in_float64() -> None:
    """Digits of t near 1, where a rectified flow starts, must not be lost before the last rounding."""
    model = Recorder()
    lam = fd.RectifiedFlow.lam_from_time(0.999_999)
    fd.Flow(model, fd.RectifiedFlow(), "velocity", time=fd.RectifiedFlow.time_from_lam).prediction(normals(2, 3), lam)
    torch.testing.assert_close(model.calls[0][1], torch.full((2,), 0.999_999, dtype=torch.float64), rtol=1e-15, atol=0)


def test_integer_times_reach_the_model_as_they_are() -> None:
    model = Recorder()
    flow = fd.Flow(model, fd.VP(), time=lambda lam: (500 - 50 * lam).round().long())
    flow.prediction(normals(2, 3).float(), 2.0)
    assert torch.equal(model.calls[0][1], torch.tensor([400, 400]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_keep_the_state_in_float32(dtype: torch.dtype) -> None:
    flow = fd.Flow(lambda x, t: (2 * x).to(dtype), fd.VP())
    x = normals(3, 4).float()
    assert flow.prediction(x, 0.0).dtype == dtype
    assert flow.eps(x, 0.0).dtype == torch.float32
    assert torch.equal(flow.eps(x, 0.0), (2 * x).to(dtype).float())
    assert flow.drift(x, 0.0).dtype == torch.float32


def test_half_precision_states_are_computed_in_float32() -> None:
    flow, x = fd.Flow(lambda x, t: x, fd.VP()), normals(3, 4).bfloat16()
    wanted = fd.Flow(lambda x, t: x, fd.VP()).drift(x.float(), 2.0).bfloat16()
    assert torch.equal(flow.drift(x, 2.0), wanted)


def test_sigma_data_comes_from_the_schedule() -> None:
    assert fd.Flow(Recorder(), fd.EDM(0.8), "edm").sigma_data == 0.8
    assert fd.Flow(Recorder(), fd.EDM(0.8), "edm", sigma_data=1.5).sigma_data == 1.5
    assert fd.Flow(Recorder(), fd.VE(), "edm").sigma_data == 0.5


def test_a_row_that_is_not_finite_stays_alone() -> None:
    flow, _ = perfect("velocity")
    x = normals(3, 5)
    clean = flow.score(x, 1.0)
    x[1] = math.nan
    assert torch.equal(flow.score(x, 1.0)[[0, 2]], clean[[0, 2]])


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fd.Flow("model", fd.VP()), TypeError, r"model must be callable as model\(x, t\), got str"),
        (lambda: fd.Flow(Recorder(), "VP"), TypeError, r"schedule must be a fastdensity Schedule such as VP\(\)"),
        (lambda: fd.Flow(Recorder(), fd.VP(), "noize"), ValueError, "prediction_type must be one of epsilon"),
        (lambda: fd.Flow(Recorder(), fd.VP(), time=3), TypeError, "time must be a function of lam, got int 3"),
        (lambda: fd.Flow(Recorder(), fd.VP(), sigma_data=0), ValueError, "sigma_data must be positive and finite"),
        (lambda: fd.Flow(Recorder([1.0]), fd.VP()).score(X, 0.0), TypeError, "must return a torch.Tensor, got list"),
        (lambda: fd.Flow(Recorder(X.long()), fd.VP()).eps(X, 0.0), TypeError, "must return a floating tensor"),
        (lambda: fd.Flow(Recorder(X[:1]), fd.VP()).drift(X, 0.0), ValueError, r"like x, .*\(2, 3\).*got .*\(1, 3\)"),
        (lambda: fd.Flow(Recorder(), fd.VP()).score(X, "0"), TypeError, "lam must be a number or a tensor"),
        (lambda: fd.Flow(Recorder(), fd.VP()).score(X, torch.zeros(5)), ValueError, r"lam must be .*shape \(2,\)"),
        (lambda: fd.Flow(Recorder(), fd.VP()).score(X, math.inf), ValueError, "lam must be finite"),
        (lambda: fd.Flow(Recorder(), fd.VP()).score(X.long(), 0.0), TypeError, "x must be float32"),
        (
            lambda: fd.Flow(Recorder(), fd.VP(), time=lambda lam: 3).eps(X, 0.0),
            ValueError,
            "must return a tensor of shape",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
