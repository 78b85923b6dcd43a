"""The CUDA row kernels without a GPU: csrc/rows_cuda.cu, compiled for the CPU, against the float64 reference.

The emulation's blocks are small, so that a few thousand elements are a long row. What it cannot show: the GPU's own
instructions and memory. tests/test_rows_gpu.py looks at those.
"""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import library as emulation
from cuda_emulation.library import LARGE_BLOCK, ONE_TILE_CHUNKS, SMALL_BLOCK
from rows_cases import Problem, all_problems, assert_as_good_as_eager, random_problem

from fastdensity import rules

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A row in one warp, in a few, in a block of twice as many elements a thread, in chunks.
COLUMNS = (1, 36, 777, SMALL_BLOCK + 4, LARGE_BLOCK + 2)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    found = emulation.build(tmp_path_factory.mktemp("cuda_emulation"))
    if found is None:
        pytest.skip("needs g++")
    return found


def select_rows(problem: Problem, index) -> Problem:
    """The problem of some rows of the batch, its numbers untouched."""
    key = problem.noise_key
    return Problem(
        problem.rule,
        problem.kind,
        tuple(None if operand is None else operand[index] for operand in problem.operands),
        tuple(p[index] if isinstance(p, torch.Tensor) else p for p in problem.parameters),
        None if key is None else (key[0], key[1][index], key[2]),
    )


def a_few_problems(**options) -> list[Problem]:
    """One of every way through the kernels: each rule, each number of operands, each source of noise."""
    return [
        random_problem("drift", **options),
        random_problem("radius", **options),
        random_problem("prediction", "velocity", cfg=True, **options),
        random_problem("step", "epsilon", **options),
        random_problem("step", "sample", cfg=True, noise="drawn", **options),
        random_problem("step", "v_prediction", noise="given", **options),
    ]


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_rule(library, columns):
    for problem in all_problems(rows=2, columns=columns):
        out, report, launches = emulation.launch(library, problem)
        assert launches == (2 if columns > LARGE_BLOCK else 1)
        assert_as_good_as_eager(problem, out, report)


@pytest.mark.parametrize("columns", [LARGE_BLOCK, ONE_TILE_CHUNKS, ONE_TILE_CHUNKS + 260])
def test_full_blocks_and_chunks_of_several_tiles(library, columns):
    for problem in a_few_problems(rows=2, columns=columns):
        out, report, _ = emulation.launch(library, problem)
        assert_as_good_as_eager(problem, out, report)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [130, 1025, 4100])
def test_mixed_dtypes(library, dtype, state_dtype, columns):
    for problem in a_few_problems(rows=2, columns=columns, dtype=dtype, state_dtype=state_dtype):
        out, report, _ = emulation.launch(library, problem)
        assert_as_good_as_eager(problem, out, report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_types_are_converted_exactly(library, dtype):
    """Every pattern of the 16-bit types, and numbers halfway between two, against torch's own conversion."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves = torch.cat([patterns.view(torch.float16).float(), patterns.view(torch.bfloat16).float()])
    halves = halves[halves.isfinite()]
    values = torch.cat([halves, torch.nextafter(halves, torch.tensor(9e9)), (halves[1:] + halves[:-1]) / 2])
    values = values[: len(values) // 4000 * 4000].view(-1, 4000)
    state = torch.zeros_like(values, dtype=dtype)
    for read in (values, values.to(torch.bfloat16), values.to(torch.float16)):
        problem = Problem("drift", "epsilon", (state, read, None, torch.ones_like(values)), (0.0, 0.0, 1.0))
        out, _, _ = emulation.launch(library, problem)
        expected = (read.float() + 0.0).to(dtype)
        assert torch.equal(out.nan_to_num(1.25), expected.nan_to_num(1.25))


@pytest.mark.parametrize("columns", [40, 1030, 4104])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_wherever_rows_lie_the_bits_are_the_same(library, columns, dtype):
    """Padded and unaligned rows, odd strides between rows, an output among the inputs; nothing around is touched."""
    for problem in a_few_problems(rows=3, columns=columns, dtype=dtype):
        expected, expected_report, _ = emulation.launch(library, problem)
        for stride, offset in ((columns + 8, 0), (columns + 8, 3), (columns + 3, 4)):

            def moved(vector, stride=stride, offset=offset):
                memory = torch.full((3 * stride + offset,), float("nan"), dtype=vector.dtype)
                view = memory[offset:].as_strided((3, columns), (stride, 1))
                return memory, view.copy_(vector)

            operands = tuple(None if operand is None else moved(operand)[1] for operand in problem.operands)
            memory, out = moved(torch.full_like(expected, 7.0))
            elsewhere = Problem(problem.rule, problem.kind, operands, problem.parameters, problem.noise_key)
            _, report, _ = emulation.launch(library, elsewhere, out)
            assert torch.equal(out, expected)
            assert torch.equal(report, expected_report)
            assert int(memory.isnan().sum()) == len(memory) - out.numel()


@pytest.mark.parametrize("columns", [40, 1025, 4100])
def test_in_place(library, columns):
    for problem in a_few_problems(rows=2, columns=columns):
        expected, _, _ = emulation.launch(library, problem)
        copies = tuple(None if operand is None else operand.clone() for operand in problem.operands)
        again = Problem(problem.rule, problem.kind, copies, problem.parameters, problem.noise_key)
        out, _, _ = emulation.launch(library, again, again.like)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("columns", [5, 300, 2000, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_sees_neither_its_batch_nor_the_order_of_blocks(library, columns, dtype):
    """More rows than a grid may have here, and rows planned on the device beside rows planned on the host."""
    for problem in a_few_problems(rows=9, columns=columns, dtype=dtype):
        out, report, _ = emulation.launch(library, problem, order=1)
        again, report_again, _ = emulation.launch(library, problem, order=2)
        assert torch.equal(again, out)
        assert torch.equal(report_again, report)
        for row in (0, 8):
            alone = select_rows(problem, slice(row, row + 1))
            numbers = tuple(float(p[0]) if isinstance(p, torch.Tensor) else p for p in alone.parameters)
            for parameters in (alone.parameters, numbers):
                one = Problem(alone.rule, alone.kind, alone.operands, parameters, alone.noise_key)
                single, single_report, _ = emulation.launch(library, one)
                assert torch.equal(single[0], out[row])
                assert torch.equal(single_report[0], report[row])


def test_float32_parameters_and_one_for_all_rows(library):
    problem = random_problem("step", "velocity", rows=3, columns=50)
    narrow = tuple(p.float() if isinstance(p, torch.Tensor) else p for p in problem.parameters)
    narrow = (narrow[0][:1], *narrow[1:])
    wide = tuple(p.double() if isinstance(p, torch.Tensor) else p for p in narrow)
    wide = (wide[0].expand(3).contiguous(), *wide[1:])
    first = Problem("step", "velocity", problem.operands, narrow)
    second = Problem("step", "velocity", problem.operands, wide)
    assert torch.equal(emulation.launch(library, first)[0], emulation.launch(library, second)[0])


def spoil(problem: Problem, row: int, how: str) -> Problem:
    """The problem with one row that cannot be guided."""
    operands = [None if operand is None else operand.clone() for operand in problem.operands]
    parameters = [p.clone() if isinstance(p, torch.Tensor) else p for p in problem.parameters]
    numbers = {
        "alpha": (0, 0.0),
        "sigma_next": (3, 0.0),
        "negative": (1, -0.5),
        "q": (4, 1.0),
        "gain": (6, float("inf")),
    }
    if how in numbers:
        position, value = numbers[how]
        parameters[position][row] = value
    else:
        value = {"nan": float("nan"), "infinite": float("inf"), "zero": 0.0, "huge": 3e30}[how]
        for operand in operands:
            if operand is not None:
                operand[row, slice(None) if how in ("zero", "huge") else -1] = value
    return Problem(problem.rule, problem.kind, tuple(operands), tuple(parameters), problem.noise_key)


@pytest.mark.parametrize("how", ["nan", "infinite", "zero", "huge", "alpha", "sigma_next", "negative", "q", "gain"])
@pytest.mark.parametrize("columns", [60, 1500, 4500])
def test_a_spoilt_row_is_flagged_and_alone(library, how, columns):
    for kind in rules.PREDICTION_TYPES:
        noise = {"epsilon": "drawn", "velocity": "given"}.get(kind, "none")
        problem = random_problem("step", kind, rows=3, columns=columns, noise=noise, cfg=kind == "edm")
        expected, expected_report, _ = emulation.launch(library, problem)
        spoilt = spoil(problem, 1, how)
        out, report, _ = emulation.launch(library, spoilt)
        assert torch.equal(out[::2], expected[::2])
        assert torch.equal(report[::2], expected_report[::2])
        reference, reference_report = spoilt.eager()
        assert report[1, 3] == reference_report[1, 3]
        assert report[1, 3] > 0
        assert torch.equal(out[1].isfinite(), reference[1].isfinite())
        assert report[1, 0] == 0


@pytest.mark.parametrize("columns", [60, 4500])
def test_an_infinite_state_is_reported_although_the_score_is_finite(library, columns):
    """The flag covers the output: a broken x does not reach the norm of the score."""
    for rule, kind in (("drift", "epsilon"), ("step", "epsilon")):
        problem = random_problem(rule, kind, rows=2, columns=columns)
        problem.operands[0][1, columns // 2] = float("inf")
        _, report, _ = emulation.launch(library, problem)
        assert report[:, 3].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("columns", [60, 4500])
def test_operands_that_the_rule_table_leaves_out_are_not_read(library, columns):
    for rule, kind, ignored in (("prediction", "epsilon", 0), ("prediction", "score", 0)):
        problem = random_problem(rule, kind, rows=2, columns=columns)
        expected, _, _ = emulation.launch(library, problem)
        problem.operands[ignored].fill_(float("nan"))
        out, report, _ = emulation.launch(library, problem)
        assert torch.equal(out, expected)
        assert not report[:, 3].any()


@pytest.mark.parametrize("columns", [60, 4500])
def test_without_a_report(library, columns):
    problem = random_problem("step", rows=2, columns=columns)
    out, report, _ = emulation.launch(library, problem, report=False)
    assert torch.equal(out, emulation.launch(library, problem)[0])
    assert report.isnan().all()


def test_a_drift_without_a_state(library):
    problem = random_problem("drift", rows=2, columns=70)
    operands = (None, *problem.operands[1:])
    bare = Problem("drift", "epsilon", operands, problem.parameters)
    out = torch.full((2, 70), float("nan"))
    _, report, _ = emulation.launch(library, bare, out)
    assert_as_good_as_eager(bare, out, report)
