"""diffusers' schedulers, guided: what they do without guidance is kept, what they do with it comes out as commanded."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers_runs import CLOSED, OTHERS, SHAPE, realised_over_commanded, run

import fastdensity as fd

ALL = CLOSED | OTHERS


@pytest.mark.parametrize("name", ALL)
def test_a_half_without_the_loop_changes_no_bit(name: str) -> None:
    guided = fd.guide(ALL[name](), q=0.5, track=False)
    assert torch.equal(run(guided, 8).sample, run(ALL[name](), 8).sample)


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("name", CLOSED)
def test_density_comes_out_as_commanded(name: str, steps: int) -> None:
    """Within 2%, but for UniPC's corrector in 20 steps; without the loop they are off by 2% to 600%."""
    found = realised_over_commanded(run(fd.guide(CLOSED[name](), q=0.4), steps), 0.4)
    assert found == pytest.approx(1.0, abs=0.04 if (name, steps) == ("unipc", 20) else 0.02)


@pytest.mark.filterwarnings("ignore:DDIMScheduler has clip_sample")
@pytest.mark.parametrize("name", ALL)
def test_guidance_moves_samples_and_keeps_them_finite(name: str) -> None:
    plain = run(ALL[name](), 20).sample
    for q in (0.3, 0.6):
        for track in (False, True):
            guided = run(fd.guide(ALL[name](), q=q, track=track), 20).sample
            assert guided.isfinite().all()
            assert not torch.equal(guided, plain)


def test_clipping_opens_the_loop() -> None:
    with pytest.warns(UserWarning, match="clip_sample: a clipped pixel moves against its guidance"):
        guided = fd.guide(DDIMScheduler(), q=0.4)
    assert torch.equal(run(guided, 8).sample, run(fd.guide(DDIMScheduler(), q=0.4, track=False), 8).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++ 2m", "flow euler"])
def test_dtypes_are_kept(name: str, dtype: torch.dtype) -> None:
    plain, guided = run(CLOSED[name](), 6, dtype), run(fd.guide(CLOSED[name](), q=0.4), 6, dtype)
    assert guided.sample.dtype == plain.sample.dtype == dtype


def test_a_new_run_has_new_books() -> None:
    scheduler = fd.guide(CLOSED["euler"](), q=0.4)
    first = run(scheduler, 10)
    commanded = scheduler.step.state.commanded.clone()
    assert torch.equal(run(scheduler, 10).sample, first.sample)
    assert torch.equal(scheduler.step.state.commanded, commanded)
    assert float(scheduler.step.state.residual.abs().max()) < 1e-6
    assert scheduler.step.flags.eq(0).all()


def test_quantiles_of_each_row() -> None:
    quantiles = torch.linspace(0.3, 0.6, SHAPE[0])
    rows = run(fd.guide(CLOSED["ddim"](), q=quantiles), 10).sample
    alone = run(fd.guide(CLOSED["ddim"](), q=float(quantiles[2])), 10).sample
    torch.testing.assert_close(rows[2], alone[2], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"q must be a number or have one number per row"):
        run(fd.guide(CLOSED["ddim"](), q=torch.full((3,), 0.4)), 10)


def test_an_interval_bounds_it() -> None:
    plain, guided = (
        run(make, 20) for make in (CLOSED["euler"](), fd.guide(CLOSED["euler"](), q=0.4, interval=(0.0, 2.0)))
    )
    same = [torch.equal(one[1], other[1]) for one, other in zip(plain.calls, guided.calls, strict=True)]
    lams = [2.0 * torch.log(torch.tensor(level[0] / level[1])) for level, _ in plain.calls]
    assert same == [bool(lam <= lams[same.index(False) - 1]) for lam in lams]
    assert 0.0 <= float(lams[same.index(False) - 1]) < 2.0


def test_copies_signatures_and_removal() -> None:
    scheduler = EulerDiscreteScheduler()
    signature = inspect.signature(scheduler.step)
    guided = fd.guide(scheduler, q=0.4)
    assert guided is scheduler
    assert inspect.signature(guided.step) == signature
    twin = copy.deepcopy(guided)
    assert torch.equal(run(twin, 8).sample, run(guided, 8).sample)
    assert twin.step.state is not guided.step.state
    fd.guide(guided, q=0.6)  # again: in the place of the first
    assert guided.step.__wrapped__ == scheduler.__class__.step.__get__(scheduler)
    assert dict(EulerDiscreteScheduler.from_config(guided.config).config) == dict(EulerDiscreteScheduler().config)


def guided_midway() -> Any:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.step(torch.zeros(1, 1), scheduler.timesteps[0], torch.ones(1, 1))
    return scheduler


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="LCMScheduler cannot be guided: its steps jump"):
        fd.guide(LCMScheduler(), q=0.4)
    with pytest.raises(ValueError, match=r"scheduler must be one of DDIMScheduler, .* got DDPMScheduler"):
        fd.guide(DDPMScheduler(), q=0.4)
    with pytest.raises(ValueError, match="in the middle of a run"):
        fd.guide(guided_midway(), q=0.4)
    with pytest.raises(ValueError, match=r"q must be in \(0, 1\)"):
        fd.guide(DDIMScheduler(), q=1.0)
    with pytest.raises(TypeError, match="track must be True or False"):
        fd.guide(DDIMScheduler(), track=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="target must be a diffusers scheduler"):
        fd.guide(torch.nn.Linear(2, 2), q=0.4)
    scheduler = fd.guide(DDIMScheduler(clip_sample=False), q=0.4)
    scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type was 'epsilon' when the scheduler was guided"):
        run(scheduler, 5)
    flow = fd.guide(FlowMatchEulerDiscreteScheduler(), q=0.4)
    flow.set_timesteps(5)
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="per_token_timesteps has no density guidance"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=torch.ones(2, 3))
