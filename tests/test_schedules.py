"""Paths: their defining identities at every log-SNR, floats and tensors alike, and the conversions of time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import SCHEDULES

import fastdensity as fd
from fastdensity.schedules import Schedule, karras_sigmas, lam_from_alpha_sigma

LAM = st.floats(-1400.0, 1400.0)
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


@each_schedule
@given(lam=LAM)
def test_log_snr_is_the_time(name: str, lam: float) -> None:
    schedule = SCHEDULES[name]
    alpha, sigma = schedule.alpha(lam), schedule.sigma(lam)
    assert isinstance(alpha, float)
    assert isinstance(sigma, float)
    assert alpha > 0
    assert sigma > 0
    assert lam_from_alpha_sigma(alpha, sigma) == pytest.approx(lam, rel=1e-13, abs=1e-14)


@given(lam=LAM)
def test_vp_preserves_variance_and_rectified_flow_is_straight(lam: float) -> None:
    assert math.hypot(fd.VP().alpha(lam), fd.VP().sigma(lam)) == pytest.approx(1.0, rel=1e-15)
    assert fd.RectifiedFlow().alpha(lam) + fd.RectifiedFlow().sigma(lam) == pytest.approx(1.0, rel=1e-15)
    assert fd.VE().alpha(lam) == 1.0


@pytest.mark.parametrize("lam", [-1400.0, -700.0, -100.0, -1e-9])
def test_small_alpha_keeps_its_digits(lam: float) -> None:
    """alpha ~ e^(lam/2), relative to which its distance from that is e^lam: nothing cancels, nothing underflows."""
    wanted = math.exp(lam / 2)
    assert fd.VP().alpha(lam) == pytest.approx(wanted / math.sqrt(1 + wanted * wanted), rel=4e-16)
    assert fd.RectifiedFlow().alpha(lam) == pytest.approx(wanted / (1 + wanted), rel=4e-16)
    assert fd.VP().sigma(-lam) == fd.VP().alpha(lam)


@each_schedule
@pytest.mark.parametrize("method", ["alpha", "sigma", "dlog_alpha"])
@given(lams=st.lists(LAM, min_size=1, max_size=20))
def test_tensors_agree_with_floats(name: str, method: str, lams: list[float]) -> None:
    function = getattr(SCHEDULES[name], method)
    found = function(torch.tensor(lams, dtype=torch.float64))
    wanted = torch.tensor([function(lam) for lam in lams], dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0.0)
    # and element by element to the bit, wherever in a tensor it lies
    single = torch.cat([function(torch.tensor([lam], dtype=torch.float64)) for lam in lams])
    assert torch.equal(found, single)


@each_schedule
@given(lams=st.lists(st.floats(-600.0, 600.0), min_size=1, max_size=4))
def test_dlog_alpha_is_the_derivative(name: str, lams: list[float]) -> None:
    """Also exactly at lam = 0, where the formulas switch branch."""
    schedule, at = SCHEDULES[name], torch.tensor([0.0, *lams], dtype=torch.float64)
    _, wanted = torch.func.jvp(lambda lam: torch.log(schedule.alpha(lam)), (at,), (torch.ones_like(at),))
    torch.testing.assert_close(schedule.dlog_alpha(at), wanted, rtol=1e-12, atol=1e-14)


@each_schedule
def test_gradients_and_low_precision_stay_finite(name: str) -> None:
    schedule = SCHEDULES[name]
    lam = torch.tensor([-170.0, -90.0, 0.0, 90.0, 170.0], requires_grad=True)
    total = (schedule.alpha(lam) + schedule.sigma(-lam) + schedule.dlog_alpha(lam)).sum()
    (gradient,) = torch.autograd.grad(total, lam)
    assert gradient.isfinite().all()
    assert schedule.alpha(lam).dtype == torch.float32
    assert (schedule.alpha(lam) > 0).all()


@pytest.mark.parametrize("schedule", [fd.VP(), fd.RectifiedFlow()])
@given(time=st.floats(1e-6, 1.0 - 1e-9))
def test_times_invert(schedule: fd.VP | fd.RectifiedFlow, time: float) -> None:
    lam = schedule.lam_from_time(time)
    assert schedule.time_from_lam(lam) == pytest.approx(time, rel=1e-12)
    tensor = schedule.lam_from_time(torch.tensor([time], dtype=torch.float64))
    assert float(tensor) == pytest.approx(lam, rel=1e-12, abs=1e-12)
    assert float(schedule.time_from_lam(tensor)) == pytest.approx(time, rel=1e-12)


def test_times_mean_what_they_say() -> None:
    assert fd.RectifiedFlow().sigma(fd.RectifiedFlow.lam_from_time(0.3)) == pytest.approx(0.3)
    # Song et al. 2021: ln alpha(1) = -(beta_max - beta_min) / 4 - beta_min / 2
    assert math.log(fd.VP().alpha(fd.VP.lam_from_time(1.0))) == pytest.approx(-(20.0 - 0.1) / 4 - 0.05)


def test_karras_sigmas() -> None:
    sigmas = karras_sigmas(18)
    # Karras et al. 2022, table of the default discretisation
    torch.testing.assert_close(
        sigmas[[0, 1, -1]], torch.tensor([80.0, 57.58598, 0.002], dtype=torch.float64), rtol=1e-5, atol=0
    )
    grid = lam_from_alpha_sigma(1.0, sigmas)
    assert (grid.diff() > 0).all()
    torch.testing.assert_close(fd.VE().sigma(grid), sigmas)


def test_edm_carries_sigma_data() -> None:
    assert fd.EDM(0.7).sigma_data == 0.7
    assert fd.EDM().sigma(3.0) == fd.VE().sigma(3.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fd.VP().alpha("noise"), TypeError, "lam must be a number or a tensor, got str 'noise'"),
        (lambda: fd.VE().sigma(None), TypeError, "lam must be a number"),
        (lambda: fd.EDM(0.0), ValueError, r"sigma_data must be in \(0.0, inf\), got 0.0"),
        (lambda: fd.EDM("big"), TypeError, "sigma_data must be a number"),
        (lambda: fd.RectifiedFlow.lam_from_time(1.0), ValueError, r"time must be in \(0.0, 1.0\), got 1.0"),
        (lambda: fd.VP.lam_from_time(0.0), ValueError, "time must be in"),
        (lambda: lam_from_alpha_sigma(1.0, 0.0), ValueError, "sigma must be in"),
        (lambda: karras_sigmas(1), ValueError, "count must be an int of at least 2"),
        (lambda: karras_sigmas(10, 1.0, 0.5), ValueError, r"sigma_min must be in \(0.0, 0.5\), got 1.0"),
        (lambda: Schedule.from_functions(1.0, torch.exp), TypeError, "alpha must be a function of lam"),
        (lambda: Schedule.from_functions(torch.exp, torch.exp), ValueError, "must be functions of lam"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
