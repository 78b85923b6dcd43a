"""The closed loop's Triton kernel on a GPU: against float64, and what only a device shows (graphs, memory)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from track_runs import Call, assert_as_good_as_eager, assert_step_as_good_as_eager, launch, launch_step, random_call

from fastdensity import rules
from fastdensity.reference.track import MEMORY, PARAMETERS, SCHEMES

pytestmark = pytest.mark.gpu
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(call: Call, eps: Tensor | None = None) -> tuple[Tensor, ...]:
    pytest.importorskip("triton")
    from fastdensity.triton_kernels.track import launch_triton

    return launch(call, launch_triton, eps)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", rules.PREDICTION_TYPES)
def test_is_as_good_as_eager(kind, scheme):
    for cfg in (False, True):
        for dtype in (torch.float64, torch.float32):
            call = random_call(kind, scheme, columns=1000, cfg=cfg, dtype=dtype, device="cuda")
            assert_as_good_as_eager(call, *run(call))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_memories_of_runs(scheme, steps):
    for seed in range(4):
        call = random_call(
            "velocity", scheme, rows=6, columns=40, steps=steps, dtype=torch.float64, seed=seed, device="cuda"
        )
        assert_as_good_as_eager(call, *run(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, state_dtype):
    call = random_call("edm", columns=5000, dtype=dtype, state_dtype=state_dtype, cfg=True, device="cuda")
    assert_as_good_as_eager(call, *run(call))


@pytest.mark.parametrize("kind", rules.PREDICTION_TYPES)
def test_the_step_in_the_same_pass(kind):
    pytest.importorskip("triton")
    from fastdensity.triton_kernels.track import launch_triton

    rows, columns = 4, 5000
    noise = torch.randn(rows, columns, device="cuda")
    key = (3, torch.arange(rows, device="cuda") * 7, 2)
    for rule, given in (("step", {}), ("step", {"noise": noise}), ("step", {"key": key}), ("prediction", {})):
        for dtype in (torch.float32, torch.bfloat16):
            call = random_call(
                kind, "direct", rows, columns, cfg=rule == "step" and not given, dtype=dtype, device="cuda"
            )
            found = launch_step(call, rule, launch_triton, **given)
            assert_step_as_good_as_eager(call, rule, found, **given)


@pytest.mark.parametrize("columns", [1, 37, 2_048, 8_190, 20_004, 20_001, 196_608])
def test_lengths(columns):
    call = random_call("v_prediction", columns=columns, steps=2, device="cuda")
    assert_as_good_as_eager(call, *run(call))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("columns", [37, 4_096, 20_004])
def test_a_row_does_not_see_its_batch(columns, scheme):
    call = random_call("edm", scheme, columns=columns, cfg=True, device="cuda")
    together = run(call)
    for row in range(4):
        for alone, result in zip(run(call.row(row)), together, strict=True):
            assert torch.equal(alone[0], result[row])


@pytest.mark.parametrize("columns", [1_000, 20_004])
def test_alignment_changes_no_bit(columns):
    call = random_call("velocity", columns=columns, cfg=True, device="cuda")
    expected = run(call)

    def moved(operand):
        memory = torch.full((operand.numel() + 1,), torch.nan, dtype=operand.dtype, device="cuda")
        return memory[1:].view(operand.shape).copy_(operand)

    memory = torch.full((4 * columns + 1,), torch.nan, device="cuda")
    for got, wanted in zip(run(call.with_operands(moved), memory[1:].view(4, columns)), expected, strict=True):
        assert torch.equal(got, wanted)
    assert memory[0].isnan()


def test_special_rows_are_flagged_and_touch_no_other():
    def made():
        return random_call("velocity", rows=8, columns=20_004, device="cuda")

    expected, call = run(made()), made()
    x, prediction = call.operands[:2]
    prediction[1, -1] = torch.nan
    x[2], prediction[2] = 0.0, 0.0
    call.number("q")[4] = 1.5
    call.number("sigma_end")[5] = 0.0
    call.memory[6, MEMORY.index("alpha_end")] *= 0.5
    eps, report, memory = run(call)
    flags = [rules.FLAG_NON_FINITE, rules.FLAG_ZERO_SCORE, 0, rules.FLAG_BAD_PARAMETER, rules.FLAG_ENDPOINT]
    assert report[1:7, 3].tolist() == [*flags, rules.FLAG_STALE_STATE]
    for got, wanted in zip((eps, report, memory), expected, strict=True):
        assert torch.equal(got[[0, 3, 7]], wanted[[0, 3, 7]])
    _, exact_report, exact_memory = call.made(double=True)
    torch.testing.assert_close(report, exact_report, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(memory, exact_memory, rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("columns", [4_096, 20_004])
def test_calls_are_captured_in_a_graph_and_wait_for_nothing(columns):
    call, other = (random_call("edm", columns=columns, seed=seed, device="cuda") for seed in (0, 1))
    expected = run(other)
    numbers = [name for name in PARAMETERS if isinstance(call.number(name), Tensor)]
    run(call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, its in zip(call.operands, other.operands, strict=True):
        if mine is not None and its is not None:
            mine.copy_(its)
    for name in numbers:
        call.number(name).copy_(other.number(name))
    call.memory.copy_(other.memory)
    graph.replay()
    for got, wanted in zip(captured, expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_row_of_more_than_two_to_the_31_elements():
    columns = 2**31 + 256
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    x = torch.ones(1, columns, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = 2.0
    numbers = (0.6, 0.8, 0.8, 0.6, 0.8, 0.6, 0.5, 0.0, 1.0, 0.0, 0.5, 0.0)
    memory = torch.zeros(1, len(MEMORY), dtype=torch.float64, device="cuda")
    eps, report, _ = run(Call("epsilon", "direct", (x, x, None, None, None), numbers, memory))
    assert float(report[0, 1]) == columns + 3
    assert eps[0, -2:].tolist() == [1.0, 2.0]
