"""The closed loop's kernel on CPU, against its reference in float64; the state that a sampler holds; bad input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from track_runs import assert_step_as_good_as_eager, launch, launch_step, random_call

import fastdensity as fd
from fastdensity import rules
from fastdensity._backend import launcher, use
from fastdensity.conversions import from_epsilon
from fastdensity.ops.track import run
from fastdensity.reference import track as reference
from fastdensity.reference.track import MEMORY, PARAMETERS, SCHEMES

COLUMNS = 2_500  # more than one chunk of the kernel
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NATS = ("deficit", "commanded_next", "realised_next", "commanded", "realised")
EPSILON_OF = {torch.float64: 2.2e-16, torch.float32: 1.2e-7}


def levels(count: int) -> list[tuple[float, float]]:
    """(alpha, sigma) of a variance preserving path, from noise to data."""
    kappas = [4.0 * 0.7**index for index in range(count)]
    return [(1.0 / math.hypot(1.0, kappa), kappa / math.hypot(1.0, kappa)) for kappa in kappas]


def parameters(here: tuple[float, float], end: tuple[float, float], **others: Any) -> tuple[Any, ...]:
    values = {"alpha": here[0], "sigma": here[1], "alpha_next": end[0], "sigma_next": end[1], "alpha_end": end[0],
              "sigma_end": end[1], "q": 0.4, "shift": 0.0, "cfg_scale": 1.0, "noise_scale": 0.0,
              "sigma_data": 0.5, "carry": 0.0} | others  # fmt: skip
    return tuple(values[name] for name in PARAMETERS)


class Walk:
    """Some steps of a guided flow of N(0, diag v), every number in float64: what a kernel meets in a real run."""

    def __init__(self, rows: int, columns: int = COLUMNS, steps: int = 3, **others: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        variances = torch.logspace(-2, 0, columns, dtype=torch.float64)
        x = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
        self.memory = torch.zeros(rows, len(MEMORY), dtype=torch.float64)
        self.last: tuple[Tensor | None, Tensor | None] = (None, None)
        path = levels(steps + 2)
        for here, end in pairwise(path[:-1]):
            eps = here[1] * x / (here[0] ** 2 * variances + here[1] ** 2)
            found = reference.track(
                "epsilon", "direct", (x, eps, None, *self.last), parameters(here, end, **others), self.memory
            )
            self.last, self.memory = (x, eps), found[2]
            x = end[0] * (x / here[0] + (end[1] / end[0] - here[1] / here[0]) * (1.0 + found[1][:, :1]) * eps)
        self.x, self.here, self.end = x, path[-2], path[-1]
        self.eps = self.here[1] * x / (self.here[0] ** 2 * variances + self.here[1] ** 2)

    def operands(self, kind: str, dtype: torch.dtype, cfg: bool = False) -> tuple[Tensor | None, ...]:
        prediction = from_epsilon(self.eps, self.x, *self.here, kind, 0.5)
        uncond = (prediction - 0.1 * torch.randn_like(prediction)).to(dtype) if cfg else None
        last = (None, None) if self.last[0] is None else (self.last[0].to(dtype), self.last[1].to(dtype))
        return self.x.to(dtype), prediction.to(dtype), uncond, *last


def natural_sizes(name: str, right: Tensor, square: float) -> Any:
    """What the roundings of a column are proportional to: nats are differences of numbers like ||eps||^2."""
    if name == "eps":
        return right.abs().max()
    names = ("eta_minus_one", "sq_norm", "deficit", "flags") if name == "report" else MEMORY
    return right.abs().amax(dim=0) + torch.tensor([square if column in NATS else 1.0 for column in names])


def assert_as_good_as_eager(kind: str, scheme: str, operands: Any, numbers: Any, memory: Tensor) -> None:
    doubles = tuple(None if operand is None else operand.double() for operand in operands)
    exact = reference.track(kind, scheme, doubles, numbers, memory)
    eager = reference.track(kind, scheme, operands, numbers, memory)
    found = run(kind, scheme, operands, numbers, memory)
    for name, right, plain, ours in zip(("eps", "report", "memory"), exact, eager, found, strict=True):
        tiny = 512 * EPSILON_OF[found[0].dtype] * natural_sizes(name, right, float(exact[1][:, 1].max()))
        allowed = 2 * (plain.double() - right).abs().amax(dim=0) + tiny
        error = (ours.double() - right).abs().amax(dim=0)
        assert (error <= allowed).all(), (kind, scheme, name, error / allowed)
    assert torch.equal(found[1][:, 3], exact[1][:, 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", rules.PREDICTION_TYPES)
def test_every_prediction_type_is_as_good_as_eager(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantiles = torch.tensor([0.3, 0.5, 0.6], dtype=torch.float64)
    for steps in (0, 1, 3):
        walk = Walk(3, steps=steps, q=quantiles)
        for cfg in (False, True):
            operands = walk.operands(kind, dtype, cfg)
            numbers = parameters(walk.here, walk.end, q=quantiles, cfg_scale=2.0 if cfg else 1.0)
            assert_as_good_as_eager(kind, "direct", operands, numbers, walk.memory)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"carry": 0.45},
        {"noise_scale": 0.1},
        {"shift": 30.0},
        {"alpha_next": 0.9, "sigma_next": -0.1},
        {"q": 1 - 1e-6},
    ],
)
def test_every_scheme_is_as_good_as_eager(scheme: str, others: dict[str, Any]) -> None:
    for before in ({}, {"noise_scale": 0.1}):
        walk = Walk(2, **before)
        numbers = parameters(walk.here, walk.end, **others)
        for dtype in (torch.float32, torch.float64):
            assert_as_good_as_eager("epsilon", scheme, walk.operands("epsilon", dtype), numbers, walk.memory)


@pytest.mark.parametrize("scheme", ["direct", "corrector"])
@pytest.mark.parametrize("kind", rules.PREDICTION_TYPES)
def test_the_step_in_the_same_pass_is_as_good_as_eager(kind: str, scheme: str) -> None:
    rows, columns = 4, 1_100
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    key = (3, torch.arange(rows) * 7, 2)
    sources: tuple[dict[str, Any], ...] = ({}, {"noise": noise}, {"key": key})
    for dtype in DTYPES:
        for source in sources:
            call = random_call(kind, scheme, rows, columns, cfg=not source, dtype=dtype)
            found = launch_step(call, "step", launcher("track", "cpu"), **source)
            assert_step_as_good_as_eager(call, "step", found, **source)
        found = launch_step(call, "prediction", launcher("track", "cpu"))
        assert_step_as_good_as_eager(call, "prediction", found)


def test_one_pass_is_two_to_the_last_bit() -> None:
    """Deciding, then a guided step with that gain: the same sample."""
    for columns in (50, 40_000):
        call = random_call("velocity", columns=columns, dtype=torch.float32)
        out, report, *decided = launch_step(call, "step", launcher("track", "cpu"))
        alone = launch(call, launcher("track", "cpu"))
        assert all(torch.equal(one, other) for one, other in zip(alone, decided, strict=True))
        names = ("alpha", "sigma", "alpha_next", "sigma_next")
        x, prediction = call.operands[:2]
        assert x is not None
        assert prediction is not None
        ends = {name: call.number(name) for name in names}
        step = fd.guided_step(x, prediction, **ends, gain=alone[1][:, 0], prediction_type="velocity")
        assert torch.equal(step.sample, out)
        torch.testing.assert_close(step.report[:, :3], report[:, :3], rtol=1e-6, atol=0.0)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 5_000), steps=st.integers(0, 3), seed=st.integers(0, 99))
def test_a_row_does_not_see_its_batch(rows: int, columns: int, steps: int, seed: int) -> None:
    walk, row = Walk(rows, columns, steps), seed % rows
    operands = walk.operands("v_prediction", torch.float32)
    numbers = parameters(walk.here, walk.end)
    together = run("v_prediction", "direct", operands, numbers, walk.memory)  # type: ignore[arg-type]
    alone: Any = tuple(None if operand is None else operand[row : row + 1] for operand in operands)
    single = run("v_prediction", "direct", alone, numbers, walk.memory[row : row + 1])
    for whole, one in zip(together, single, strict=True):
        assert torch.equal(whole[row], one[0])


def test_bits_do_not_depend_on_threads() -> None:
    walk, before = Walk(3, 20_000), torch.get_num_threads()
    operands, numbers = walk.operands("velocity", torch.float32), parameters(walk.here, walk.end)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("velocity", "direct", operands, numbers, walk.memory))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, results[0], strict=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_fresh_row_never_looks_at_its_last_vectors(backend: str) -> None:
    walk = Walk(2)
    memory = walk.memory.clone()
    memory[0] = 0.0
    x, prediction, _, last_x, last_eps = walk.operands("epsilon", torch.float32)
    assert last_x is not None
    assert last_eps is not None
    last_x[0], last_eps[0] = math.nan, math.nan
    with use(backend):
        numbers = parameters(walk.here, walk.end)
        mixed = run("epsilon", "direct", (x, prediction, None, last_x, last_eps), numbers, memory)
        alone = run("epsilon", "direct", (x[:1], prediction[:1], None, None, None), numbers, memory[:1])
    assert all(torch.equal(found[0], one[0]) for found, one in zip(mixed, alone, strict=True))
    assert mixed[2].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_rows_that_cannot_be_guided(backend: str) -> None:
    """Ends of the path, a broken row, no score, a stale state: passed through, flagged, the books kept."""
    walk = Walk(6)
    before = walk.memory
    x, prediction, _, last_x, last_eps = walk.operands("epsilon", torch.float64)
    prediction[1], prediction[2, 3] = 0.0, math.nan
    alpha_end = torch.full((6,), walk.end[0], dtype=torch.float64)
    sigma_end = torch.tensor([walk.end[1]] * 3 + [0.0, walk.end[1], 2.0], dtype=torch.float64)
    alpha = torch.tensor([walk.here[0]] * 4 + [0.5, walk.here[0]], dtype=torch.float64)
    numbers = parameters((alpha, walk.here[1]), (alpha_end, sigma_end))  # type: ignore[arg-type]
    with use(backend):
        eps, report, after = run("epsilon", "direct", (x, prediction, None, last_x, last_eps), numbers, before)
    expected = [0, rules.FLAG_ZERO_SCORE, rules.FLAG_NON_FINITE, rules.FLAG_ENDPOINT, rules.FLAG_STALE_STATE,
                rules.FLAG_BAD_PARAMETER]  # fmt: skip
    assert report[:, 3].tolist() == expected
    assert (report[[1, 2, 3, 5], 0] == 0).all()
    assert report[4, 0] != 0, "a row whose state is of another place begins anew"
    assert after.isfinite().all()
    column = MEMORY.index
    assert after[:, column("steps")].tolist() == [4, 0, 0, 0, 1, 0]
    pending = before[:, column("realised")] + before[:, column("realised_next")]
    for row in (1, 2, 4):  # not to be measured any more: believed as expected
        assert after[row, column("realised")] == pending[row]
    assert after[3, column("realised")] != pending[3], "the step that led to the last one was measured"
    assert torch.equal(eps[0], prediction[0])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_broken_last_vectors_begin_anew(backend: str) -> None:
    """A restored state may hold anything: a row with NaN in it is flagged, and is a fresh one."""
    walk = Walk(2)
    x, prediction, _, last_x, last_eps = walk.operands("epsilon", torch.float64)
    assert last_x is not None
    last_x[0, 5] = math.nan
    numbers = parameters(walk.here, walk.end)
    with use(backend):
        _, report, after = run("epsilon", "direct", (x, prediction, None, last_x, last_eps), numbers, walk.memory)
        fresh = run("epsilon", "direct", (x, prediction, None, None, None), numbers, torch.zeros_like(walk.memory))
    assert report[:, 3].tolist() == [rules.FLAG_STALE_STATE, 0]
    assert report[0, 0] == fresh[1][0, 0]
    assert after.isfinite().all()


@pytest.mark.parametrize("kind", rules.PREDICTION_TYPES)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_state_that_broke_keeps_its_books(backend: str, kind: str) -> None:
    """Also where eps is the prediction itself, which may be finite when x is not."""
    walk = Walk(2)
    x, *others = walk.operands(kind, torch.float64)
    assert x is not None
    for value in (math.nan, math.inf):
        x[0, 7] = value
        with use(backend):
            _, report, after = run(kind, "direct", (x, *others), parameters(walk.here, walk.end), walk.memory)
        assert report[:, 3].tolist() == [rules.FLAG_NON_FINITE, 0]
        assert report[0, 0] == 0
        assert after.isfinite().all()
        assert after[0, MEMORY.index("steps")] == 0


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_cancelling_predictions_keep_their_digits(backend: str) -> None:
    """eps = (x - alpha x0) / sigma at a small sigma: rounded once, not once a term."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, COLUMNS, generator=generator, dtype=torch.float64) for _ in range(2))
    x = (x0 + 0.002 * noise).float()
    numbers, memory = parameters((1.0, 0.002), (1.0, 0.001)), torch.zeros(2, len(MEMORY), dtype=torch.float64)
    with use(backend):
        eps, _, _ = run("sample", "direct", (x, x0.float(), None, None, None), numbers, memory)
    exact = (x.double() - x0.float().double()) / 0.002
    assert float((eps.double() - exact).norm() / exact.norm()) < 1e-6


def test_what_is_measured_is_what_log_p_did() -> None:
    """Over a whole run the realised nats are those of the flow's own log p, and what was commanded."""
    flow = fd.GaussianMixture(torch.ones(1), torch.zeros(1, 64), torch.full((1, 64), 0.3))
    latents = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(-5, 4, 61, dtype=torch.float64)
    result = fd.sample(flow, latents, grid, "ddim", fd.DensityGuidance(0.4))
    plain = fd.sample(flow, latents, [-5.0, 4.0], "dopri5", rtol=1e-9, atol=1e-9)
    gained = flow.log_prob(result.x, 4.0) - flow.log_prob(plain.x, 4.0)
    assert result.commanded is not None
    assert result.realised is not None
    wanted = math.sqrt(128) * float(torch.special.ndtri(torch.tensor(0.4, dtype=torch.float64))) * 4.5
    torch.testing.assert_close(result.commanded, torch.full((8,), wanted, dtype=torch.float64))
    torch.testing.assert_close(result.realised, gained, rtol=0, atol=0.02)
    assert result.residual is not None
    assert float(result.residual.abs().max()) < 1e-9


class TestState:
    """`GuidanceState` in the hands of someone who owns the loop."""

    def loop(self, steps: range, x: Tensor, state: fd.GuidanceState, stop: Any = None) -> tuple[Tensor, Any]:
        path = levels(9)
        for index in steps:
            (alpha, sigma), (alpha_next, sigma_next) = path[index], path[index + 1]
            ends = {"alpha": alpha, "sigma": sigma, "alpha_next": alpha_next, "sigma_next": sigma_next}
            eps = sigma * x / (0.3 * alpha**2 + sigma**2)
            step = fd.guided_step(x, eps, **ends, q=0.4, state=state)
            x = step.sample
        return x, state

    def test_saved_and_restored(self) -> None:
        start = torch.randn(4, 2, 30, generator=torch.Generator().manual_seed(0))
        whole, state = self.loop(range(8), start, fd.GuidanceState.fresh(start))
        half, kept = self.loop(range(3), start, fd.GuidanceState.fresh(start))
        again = fd.GuidanceState.from_state_dict(kept.state_dict())
        rest, ended = self.loop(range(3, 8), half, again)
        assert torch.equal(rest, whole)
        assert torch.equal(ended.memory, state.memory)
        assert torch.equal(ended.commanded - ended.realised, ended.residual)
        assert (ended.limited == 0).all()

    def test_rows_move_between_batches(self) -> None:
        start = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
        whole, _ = self.loop(range(8), start, fd.GuidanceState.fresh(start))
        half, kept = self.loop(range(3), start, fd.GuidanceState.fresh(start))
        pieces = [kept.select(torch.tensor([2])), kept.select(torch.tensor([0, 1]))]
        joined = fd.GuidanceState.cat(pieces, half)
        rest, _ = self.loop(range(3, 8), half[[2, 0, 1]], joined)
        assert torch.equal(rest, whole[[2, 0, 1]])
        fresh = fd.GuidanceState.cat([kept, fd.GuidanceState.fresh(start)], start)
        assert fresh.sample is not None
        assert fresh.memory[4:].eq(0).all()

    def test_reset_rows_begin_anew(self) -> None:
        start = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
        half, kept = self.loop(range(3), start, fd.GuidanceState.fresh(start))
        reset = kept.reset(torch.tensor([True, False, False]))
        alone, _ = self.loop(range(3, 8), half[:1], fd.GuidanceState.fresh(half[:1]))
        kept_on, _ = self.loop(range(3, 8), half, kept)
        mixed, _ = self.loop(range(3, 8), half, reset)
        assert torch.equal(mixed[0], alone[0])
        assert torch.equal(mixed[1:], kept_on[1:])
        assert kept.reset().memory.eq(0).all()

    def test_a_step_in_place_keeps_the_state(self) -> None:
        start = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
        ends = {"alpha": 0.3, "sigma": 0.9, "alpha_next": 0.4, "sigma_next": 0.85}
        x, state = start.clone(), fd.GuidanceState.fresh(start)
        step = fd.guided_step(x, start, **ends, q=0.4, state=state, out=x)
        assert step.sample.data_ptr() == x.data_ptr()
        assert state.sample is not None
        assert torch.equal(state.sample, start)

    def test_both_ways_report_the_flags_of_the_loop(self) -> None:
        x = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
        path = levels(3)
        _, state = self.loop(range(1), x, fd.GuidanceState.fresh(x))
        ends = {"alpha": path[2][0], "sigma": path[2][1], "alpha_next": 0.99, "sigma_next": 0.1}
        kept = fd.GuidanceState.from_state_dict(state.state_dict())
        report = torch.empty(2, 4)
        fd.guide_prediction(x, x, **ends, shift=1e6, state=state, report=report)
        step = fd.guided_step(x, x, **ends, shift=1e6, state=kept)
        assert report[:, 3].tolist() == [rules.FLAG_STALE_STATE | rules.FLAG_LIMITED] * 2
        assert torch.equal(step.flags, report[:, 3].long())

    def test_prediction_then_step_is_the_step(self) -> None:
        x = torch.randn(3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        path = levels(4)
        one, two = fd.GuidanceState.fresh(x), fd.GuidanceState.fresh(x)
        for (alpha, sigma), (alpha_next, sigma_next) in pairwise(path):
            eps = sigma * x / (0.3 * alpha**2 + sigma**2)
            ends = {"alpha_next": alpha_next, "sigma_next": sigma_next}
            guided = fd.guide_prediction(eps, x, alpha=alpha, sigma=sigma, q=0.4, state=one, **ends)
            step = fd.guided_step(x, eps, alpha=alpha, sigma=sigma, **ends, q=0.4, state=two)
            plain = fd.guided_step(x, guided, alpha=alpha, sigma=sigma, **ends)
            torch.testing.assert_close(plain.sample, step.sample, rtol=1e-12, atol=1e-12)
            x = step.sample
        assert torch.equal(one.memory, two.memory)

    def test_derivatives_and_compilation(self) -> None:
        """Gradients and tangents pass through the loop's eta; a compiled step gives what the eager one gives."""
        x = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        path = levels(3)

        def two_steps(start: Tensor) -> Tensor:
            state, moved = fd.GuidanceState.fresh(start), start
            for (alpha, sigma), (alpha_next, sigma_next) in pairwise(path):
                eps = sigma * moved / (0.3 * alpha**2 + sigma**2)
                ends = {"alpha": alpha, "sigma": sigma, "alpha_next": alpha_next, "sigma_next": sigma_next}
                moved = fd.guided_step(moved, eps, **ends, q=0.4, state=state).sample
            return moved

        assert torch.autograd.gradcheck(two_steps, x.clone().requires_grad_())
        direction = torch.ones_like(x)
        tangent = torch.func.jvp(two_steps, (x,), (direction,))[1]
        step = 1e-6
        numeric = (two_steps(x + step * direction) - two_steps(x - step * direction)) / (2 * step)
        torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.compile(two_steps, fullgraph=True)(x), two_steps(x), rtol=1e-10, atol=1e-12)


ENDS = {"alpha": 0.3, "sigma": 0.9, "alpha_next": 0.4, "sigma_next": 0.85}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": 3}, TypeError, "state must be a fastdensity.GuidanceState, got int 3"),
        (
            {"state": fd.GuidanceState.fresh(torch.zeros(2, 5))},
            ValueError,
            r"state must be of this batch, .* \(3, 17\)",
        ),
        ({"alpha_next": 0.3, "sigma_next": 0.9}, ValueError, "must lead from noise to data"),
        ({"alpha_next": 0.2, "sigma_next": 0.95}, ValueError, "must lead from noise to data"),
        ({"gain": 0.1}, ValueError, "gain cannot be given with state"),
    ],
)
def test_bad_arguments_of_a_tracked_step(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.zeros(3, 5)
    with pytest.raises(error, match=message):
        fd.guided_step(x, x, **{**ENDS, "state": fd.GuidanceState.fresh(x), **change})


def test_bad_states() -> None:
    x = torch.zeros(3, 5)
    state = fd.GuidanceState.fresh(x)
    with pytest.raises(ValueError, match="alpha_next and sigma_next must be given with state"):
        fd.guide_prediction(x, x, alpha=0.3, sigma=0.9, state=state)
    with pytest.raises(ValueError, match="scheme must be one of direct, predictor, corrector, got str 'both'"):
        fd.guide_prediction(x, x, **ENDS, state=state, scheme="both")
    moved = fd.GuidanceState(torch.zeros(3, 4), torch.zeros(3, 4), state.memory)
    with pytest.raises(ValueError, match=r"state.sample must have the shape of sample, \(3, 5\)"):
        fd.guide_prediction(x, x, **ENDS, state=moved)
    with pytest.raises(ValueError, match="neither"):
        fd.guide_prediction(x, x, **ENDS, state=fd.GuidanceState(x, None, state.memory))
    with pytest.raises(TypeError, match=r"state\.memory must be float64"):
        fd.guide_prediction(x, x, **ENDS, state=fd.GuidanceState(None, None, state.memory.float()))
    with pytest.raises(TypeError, match="saved must be what"):
        fd.GuidanceState.from_state_dict({})
    with pytest.raises(ValueError, match="another version"):
        fd.GuidanceState.from_state_dict({"memory": torch.zeros(3, 4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="states must not be empty"):
        fd.GuidanceState.cat([], x)
    with pytest.raises(TypeError, match="rows must be a bool tensor"):
        state.reset(torch.tensor([1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows must have shape \(3,\)"):
        state.reset(torch.tensor([True]))
