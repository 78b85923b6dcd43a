"""The row kernels on a GPU, CUDA and Triton: against float64, and what only a device shows (graphs, memory)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from rows_cases import Problem, all_problems, assert_as_good_as_eager, random_problem
from torch import Tensor

import fastdensity as fd
from fastdensity import rules
from fastdensity._backend import report as backend_report
from fastdensity._backend import use
from fastdensity.ops.rows_operator import _launch
from fastdensity.reference.philox import STREAM_NOISE, _box_muller, philox

pytestmark = pytest.mark.gpu
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PATH = {"alpha": 0.8, "sigma": 0.6, "alpha_next": 0.9, "sigma_next": 0.4}


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    works, why = backend_report()[request.param]
    if not works:
        pytest.skip(why)
    with use(request.param):
        yield request.param


def launch(problem: Problem, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    result, report = _launch(
        problem.rule, problem.kind, problem.operands, problem.parameters, problem.noise_key, out, True, problem.like
    )
    assert report is not None
    return result, report


def some_problems(**options):
    """One of each rule; for steps, noise that is drawn."""
    return (
        random_problem("drift", device="cuda", **options),
        random_problem("radius", device="cuda", **options),
        random_problem("prediction", "velocity", cfg=True, device="cuda", **options),
        random_problem("step", "edm", cfg=True, noise="drawn", device="cuda", **options),
    )


@pytest.mark.parametrize("per_row", [True, False])
def test_every_rule_is_as_good_as_eager(per_row):
    for problem in all_problems(rows=3, columns=1000, per_row=per_row, device="cuda"):
        assert_as_good_as_eager(problem, *launch(problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, state_dtype):
    for problem in some_problems(rows=2, columns=500, dtype=dtype, state_dtype=state_dtype)[::3]:
        assert_as_good_as_eager(problem, *launch(problem))


@pytest.mark.parametrize("columns", [1, 37, 8_190, 20_004, 20_001])
def test_lengths(columns):
    for problem in some_problems(rows=3, columns=columns):
        assert_as_good_as_eager(problem, *launch(problem))


@pytest.mark.parametrize(("rows", "columns"), [(64, 16_384), (3, 196_608)])
def test_large_shapes(rows, columns):
    for problem in (
        random_problem("drift", rows=rows, columns=columns, device="cuda"),
        random_problem("step", "edm", rows, columns, cfg=True, device="cuda"),
        random_problem("step", "edm", rows, columns, cfg=True, noise="drawn", device="cuda"),
        random_problem("step", "v_prediction", rows, columns, torch.bfloat16, torch.float32, cfg=True, device="cuda"),
    ):
        assert_as_good_as_eager(problem, *launch(problem))


def row_of(problem: Problem, row: int) -> Problem:
    key = problem.noise_key
    return Problem(
        problem.rule,
        problem.kind,
        tuple(None if operand is None else operand[row : row + 1].clone() for operand in problem.operands),
        tuple(p[row : row + 1] if isinstance(p, Tensor) else p for p in problem.parameters),
        None if key is None else (key[0], key[1][row : row + 1], key[2]),
    )


@pytest.mark.parametrize("columns", [37, 4_096, 20_004])
def test_a_row_does_not_see_its_batch(columns):
    for problem in some_problems(rows=5, columns=columns):
        out, report = launch(problem)
        for row in (0, 3):
            one, one_report = launch(row_of(problem, row))
            assert torch.equal(one[0], out[row])
            assert torch.equal(one_report[0], report[row])


@pytest.mark.parametrize("columns", [1_000, 20_004])
@pytest.mark.parametrize(("gap", "offset"), [(4, 0), (1, 0), (0, 1)])
def test_strides_and_alignment(columns, gap, offset, backend):
    problem = random_problem("step", "velocity", 3, columns, cfg=True, noise="given", device="cuda")
    expected, expected_report = launch(problem)

    def spaced(operand):
        memory = torch.full((3 * (columns + gap) + offset,), torch.nan, device="cuda")
        view = memory[offset:].view(3, columns + gap)[:, :columns]
        return view.copy_(operand)

    operands = tuple(None if operand is None else spaced(operand) for operand in problem.operands)
    moved = Problem(problem.rule, problem.kind, operands, problem.parameters)
    memory = torch.full((3 * columns + offset,), torch.nan, device="cuda")
    out, report = launch(moved, memory[offset:].view(3, columns))
    if backend == "triton":  # its order of addition follows from the length alone
        assert torch.equal(out, expected)
        assert torch.equal(report, expected_report)
    assert_as_good_as_eager(moved, out, report)
    assert memory[:offset].isnan().all()
    assert torch.equal(launch(problem, problem.operands[0])[0], expected)  # in place; last, since it overwrites


@pytest.mark.parametrize("columns", [500, 20_004])
def test_special_rows_are_flagged_and_touch_no_other(columns):
    problem = random_problem("step", "velocity", 5, columns, noise="given", device="cuda")
    parameters = tuple(p.clone() if isinstance(p, Tensor) else p for p in problem.parameters)
    problem = Problem(problem.rule, problem.kind, tuple(problem.operands), parameters)
    expected, _ = launch(problem)
    x, p = problem.operands[0], problem.operands[1]
    p[1, -1] = torch.nan
    x[2], p[2] = 0.0, 0.0
    parameters[rules.STEP_PARAMETERS.index("q")][3] = 1.5
    out, report = launch(problem)
    assert torch.equal(out[[0, 4]], expected[[0, 4]])
    wanted = [0, rules.FLAG_NON_FINITE, rules.FLAG_ZERO_SCORE, rules.FLAG_BAD_PARAMETER, 0]
    assert report[:, 3].tolist() == wanted
    eager, _ = problem.eager()
    torch.testing.assert_close(out, eager, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("columns", [4_096, 20_004])
def test_steps_are_captured_in_a_graph(columns):
    x, p = torch.randn(4, columns, device="cuda"), torch.randn(4, columns, device="cuda")
    q = torch.tensor([0.3, 0.4, 0.5, 0.6], device="cuda")

    def step():
        return fd.guided_step(x, p, **PATH, q=q, prediction_type="v", noise_scale=0.1, seed=7)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.normal_()
    p.normal_()
    p[2, 5] = torch.nan
    q.copy_(torch.tensor([0.7, 0.2, 0.5, 2.0]))
    for _ in range(2):  # flags must not pile up from one replay to the next
        graph.replay()
        fresh = step()
        assert torch.equal(captured.sample[[0, 1, 3]], fresh.sample[[0, 1, 3]])
        assert torch.equal(captured.flags, fresh.flags)
        p[2, 5] = 0.0
    assert captured.flags.tolist() == [0, 0, 0, rules.FLAG_BAD_PARAMETER]


@pytest.mark.parametrize("columns", [4_096, 20_004])
def test_nothing_waits_for_the_device(columns):
    x, p = torch.randn(4, columns, device="cuda"), torch.randn(4, columns, device="cuda")
    numbers = torch.full((4,), 0.4, device="cuda")

    def everything():
        fd.guided_step(x, p, **PATH, q=numbers, uncond=x, cfg_scale=3.0, noise_scale=numbers, seed=7)
        fd.guide_prediction(p, x, alpha=0.8, sigma=numbers, q=0.4, prediction_type="flow")
        fd.guided_drift(x, p, p, numbers, 1.0, dt=0.1)
        fd.scale_prior(x, radius=numbers)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def noise_at(seed: int, sample_id: int, step: int, first: int, count: int) -> Tensor:
    """Elements first .. first + count - 1 of a row's noise; both multiples of 4."""
    block = torch.arange(first // 4, (first + count) // 4)
    counter = (block, *(torch.full_like(block, word) for word in (STREAM_NOISE, step, sample_id)))
    words = philox(counter, seed)
    return torch.stack([*_box_muller(*words[:2]), *_box_muller(*words[2:])], dim=-1).flatten()


def test_a_row_of_more_than_two_to_the_31_elements():
    columns = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free device memory")
    x = torch.empty(1, columns, dtype=torch.bfloat16, device="cuda").normal_()
    p = torch.empty_like(x).normal_()
    result = fd.guided_step(x, p, **PATH, q=0.4)
    sq_norm = sum(float(part.double().square().sum()) for part in p[0].split(2**27))
    assert float(result.sq_norm) == pytest.approx(sq_norm, rel=1e-5)
    eta = float(result.eta)
    for place in (slice(0, 64), slice(2**31 - 32, columns)):
        state, noise = x[0, place].double(), p[0, place].double()
        wanted = 0.9 * (state - 0.6 * eta * noise) / 0.8 + 0.4 * eta * noise
        torch.testing.assert_close(result.sample[0, place].double(), wanted, rtol=2**-7, atol=1e-3)
    x.zero_()
    p.zero_()
    drawn = fd.guided_step(x, p, **PATH, noise_scale=1.0, seed=3, sample_ids=torch.tensor([9], device="cuda"), out=x)
    first = 2**31 - 64
    wanted = noise_at(3, 9, 0, first, 68)
    torch.testing.assert_close(drawn.sample[0, first : first + 68].double().cpu(), wanted, rtol=2**-7, atol=1e-3)
