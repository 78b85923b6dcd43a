"""The Triton row kernels in Triton's interpreter; run by tests/test_rows_triton.py with TRITON_INTERPRET=1.

The interpreter truncates where a GPU rounds to bfloat16; the tolerance of `assert_as_good_as_eager` holds that ulp.
A program of it takes about 20 ms, so shapes are small and the limits between the regimes are lowered instead.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from rows_cases import Problem, all_problems, assert_as_good_as_eager, number_forms, random_problem

import fastdensity as fd
from fastdensity import rules
from fastdensity._backend import use
from fastdensity.reference.philox import normals
from fastdensity.reference.rows import compute_dtype, launch_torch
from fastdensity.triton_kernels.rows import launch_triton
from fastdensity.triton_kernels.rows_scalars import quantile_of_normal

WHOLE: dict[str, int] = {}
# 300 columns make three tiles in two chunks, the first of two tiles
SPLIT = {"whole_row_bytes": 0, "tile_bytes": 512, "most_chunks": 2}
REGIMES = pytest.mark.parametrize("sizes", [WHOLE, SPLIT], ids=["whole", "split"])
# what makes a row special, and the value
SPECIAL = (
    ("element", math.nan), ("element", -math.inf), ("score", 0.0), ("alpha", 0.0), ("sigma", 0.0), ("sigma_next", 0.0),
    ("alpha_next", -1.0), ("q", 0.0), ("q", 1.0), ("q", math.nan), ("shift", math.inf), ("noise_scale", math.nan),
)  # fmt: skip


def launch(problem, sizes=WHOLE, out=None, launcher=launch_triton):
    if out is None:
        out = torch.empty_like(problem.like, memory_format=torch.contiguous_format)
    report = torch.empty((out.shape[0], 4), dtype=compute_dtype(problem.operands))
    launcher(problem.rule, problem.kind, problem.operands, problem.parameters, problem.noise_key, out, report, **sizes)
    return out, report


def guided_problems(**options):
    """Both rules that guide, every prediction type once, the options of classifier-free guidance and noise in turn."""
    for number, kind in enumerate(rules.PREDICTION_TYPES):
        noise = ("drawn", "given", "none")[number % 3]
        yield random_problem("step", kind, cfg=number % 2 == 0, noise=noise, **options)
        yield random_problem("prediction", kind, cfg=number % 2 == 1, **options)


def with_parameters(problem, **changes):
    names = {"drift": rules.DRIFT_PARAMETERS, "radius": rules.RADIUS_PARAMETERS}.get(
        problem.rule, rules.STEP_PARAMETERS
    )
    changed = tuple(changes.get(name, value) for name, value in zip(names, problem.parameters, strict=True))
    return Problem(problem.rule, problem.kind, problem.operands, changed, problem.noise_key)


def with_operands(problem, make):
    operands = tuple(None if operand is None else make(operand) for operand in problem.operands)
    return Problem(problem.rule, problem.kind, operands, problem.parameters, problem.noise_key)


def row_of(problem, row):
    operands = tuple(None if operand is None else operand[row : row + 1].clone() for operand in problem.operands)
    parameters = tuple(p[row : row + 1] if isinstance(p, torch.Tensor) else p for p in problem.parameters)
    key = problem.noise_key
    key = None if key is None else (key[0], key[1][row : row + 1], key[2])
    return Problem(problem.rule, problem.kind, operands, parameters, key)


def test_every_rule_on_whole_rows():
    for problem in all_problems(rows=2, columns=37):
        assert_as_good_as_eager(problem, *launch(problem))


def test_every_rule_on_split_rows():
    problems = [random_problem(rule, rows=2, columns=300) for rule in ("drift", "radius")]
    for problem in (*problems, *guided_problems(rows=2, columns=300)):
        assert_as_good_as_eager(problem, *launch(problem, SPLIT))


@REGIMES
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 128, 132])
def test_lengths(sizes, columns):
    for problem in (
        random_problem("drift", rows=1, columns=columns),
        random_problem("step", "edm", rows=1, columns=columns, cfg=True, noise="drawn"),
    ):
        assert_as_good_as_eager(problem, *launch(problem, sizes))


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(dtype, state_dtype):
    options = {"dtype": dtype, "state_dtype": state_dtype, "rows": 1, "columns": 136}
    for problem, sizes in (
        (random_problem("drift", **options), WHOLE),
        (random_problem("prediction", "velocity", **options), WHOLE),
        (random_problem("step", "v_prediction", cfg=True, noise="drawn", **options), SPLIT),
    ):
        out, report = launch(problem, sizes)
        assert out.dtype == (dtype if problem.rule == "prediction" else state_dtype)
        assert_as_good_as_eager(problem, out, report)


def test_parameters_in_every_form():
    problem = random_problem("step", "sample", rows=3, columns=40, noise="given", per_row=False)
    forms = number_forms(3)
    for shift in range(len(forms)):
        made = tuple(forms[(i + shift) % len(forms)](value) for i, value in enumerate(problem.parameters))
        varied = Problem(problem.rule, problem.kind, problem.operands, made, None)
        assert_as_good_as_eager(varied, *launch(varied))


@REGIMES
@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_strides_and_alignment_change_no_bit(sizes, noise):
    problem = random_problem("step", "velocity", rows=2, columns=132, cfg=True, noise=noise)
    expected, expected_report = launch(problem, sizes)

    def spaced(gap, offset):
        def make(operand):
            memory = torch.full((2 * (132 + gap) + offset,), math.nan)
            view = memory[offset:].view(2, 132 + gap)[:, :132]
            view.copy_(operand)
            return view

        return make

    for gap, offset in ((4, 0), (1, 0), (0, 1)):
        out, report = launch(with_operands(problem, spaced(gap, offset)), sizes)
        assert torch.equal(out, expected)
        assert torch.equal(report, expected_report)
    memory = torch.full((2 * 132 + 1,), math.nan)
    launch(problem, sizes, memory[1:].view(2, 132))
    assert torch.equal(memory[1:].view(2, 132), expected)
    assert memory[0].isnan()
    in_place = with_operands(problem, torch.clone)
    assert torch.equal(launch(in_place, sizes, in_place.operands[0])[0], expected)
    shared = with_operands(problem, lambda operand: operand[:1].expand(2, 132))
    dense = with_operands(problem, lambda operand: operand[:1].repeat(2, 1))
    assert torch.equal(launch(shared, sizes)[0], launch(dense, sizes)[0])


@REGIMES
def test_a_row_does_not_see_its_batch(sizes):
    for problem in (
        random_problem("drift", rows=3, columns=133),
        random_problem("radius", rows=3, columns=260),
        random_problem("step", "edm", rows=3, columns=260, cfg=True, noise="drawn"),
    ):
        out, report = launch(problem, sizes)
        for row in range(3):
            one, one_report = launch(row_of(problem, row), sizes)
            assert torch.equal(one[0], out[row])
            assert torch.equal(one_report[0], report[row])


def spoiled(problem):
    """The same problem, each row but the first and the last made special in one of the ways of SPECIAL."""
    x, p, uncond, z = (None if operand is None else operand.clone() for operand in problem.operands)
    numbers = dict(zip(rules.STEP_PARAMETERS, (number.clone() for number in problem.parameters[:9]), strict=False))
    for row, (how, value) in enumerate(SPECIAL, start=1):
        if how in numbers:
            numbers[how][row] = value
        elif how == "element":
            p[row, 130] = value
        else:
            x[row] = p[row] = uncond[row] = 0.0
    return Problem(problem.rule, problem.kind, (x, p, uncond, z), (*numbers.values(), 0.5), problem.noise_key)


@REGIMES
def test_special_rows_are_flagged_and_touch_no_other(sizes):
    rows = len(SPECIAL) + 2
    problem = random_problem("step", "velocity", rows=rows, columns=132, cfg=True, noise="given")
    expected, expected_report = launch(problem, sizes)
    special = spoiled(problem)
    out, report = launch(special, sizes)
    assert torch.equal(out[:: rows - 1], expected[:: rows - 1])
    assert torch.equal(report[:: rows - 1], expected_report[:: rows - 1])
    wanted, wanted_report = launch(special, launcher=launch_torch)
    assert (report[1:-1, 3] != 0).all()
    assert torch.equal(report[:, 3], wanted_report[:, 3])
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(report, wanted_report, rtol=1e-5, atol=1e-5, equal_nan=True)


@REGIMES
def test_floats_out_of_range_are_flagged_too(sizes):
    problem = random_problem("prediction", rows=1, columns=130, per_row=False)
    for name, value in (("q", 0.0), ("q", 2.0), ("q", math.nan), ("gain", math.inf), ("sigma", -1.0)):
        bad = with_parameters(problem, **{name: value})
        out, report = launch(bad, sizes)
        assert report[0, 3] == rules.FLAG_BAD_PARAMETER
        assert torch.equal(out, problem.operands[1])


@REGIMES
@pytest.mark.parametrize("rule", ["drift", "radius"])
def test_zero_and_broken_rows_of_drift_and_radius(sizes, rule):
    problem = random_problem(rule, rows=4, columns=132)
    vectors = [operand for operand in problem.operands if operand is not None]
    vectors[-1][1] = 0.0
    vectors[-1][2, 5] = math.nan
    problem.parameters[0][3] = math.nan
    out, report = launch(problem, sizes)
    wanted, wanted_report = launch(problem, launcher=launch_torch)
    assert torch.equal(report[:, 3], wanted_report[:, 3])
    torch.testing.assert_close(out, wanted, equal_nan=True)
    torch.testing.assert_close(report, wanted_report, rtol=1e-5, atol=1e-6, equal_nan=True)


@REGIMES
def test_report_is_optional_and_operands_not_needed_are_not_read(sizes):
    problem = random_problem("prediction", "epsilon", rows=1, columns=132)
    expected, _ = launch(problem, sizes)
    broken_state = torch.full_like(problem.operands[0], math.nan)
    out = torch.empty_like(expected)
    operands = (broken_state, *problem.operands[1:3], broken_state)
    launch_triton(problem.rule, problem.kind, operands, problem.parameters, None, out, None, **sizes)
    assert torch.equal(out, expected)


def drawn(dtype, columns, sizes):
    """The kernel's own noise: a step of a zero state along a zero prediction adds nothing but noise."""
    zero = torch.zeros(3, columns, dtype=dtype)
    key = (2**62 + 5, torch.tensor([0, 2**32 - 1, 2**32 + 7]), 2**32 - 1)
    parameters = (1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 1.0, 1.0, 0.5)
    problem = Problem("step", "epsilon", (zero, zero, None, None), parameters, key)
    return launch(problem, sizes)[0], normals(*key, columns)


@pytest.mark.parametrize(("columns", "sizes"), [(1, WHOLE), (7, WHOLE), (8_191, WHOLE), (523, SPLIT)])
def test_noise_is_the_reference_stream(columns, sizes):
    doubles, expected = drawn(torch.float64, columns, sizes)
    torch.testing.assert_close(doubles, expected, rtol=1e-14, atol=1e-15)
    floats, _ = drawn(torch.float32, columns, sizes)
    ulp = torch.nextafter(expected.float().abs(), torch.tensor(torch.inf)) - expected.float().abs()
    assert ((floats.double() - expected.float().double()).abs() / ulp).max() <= 4


@triton.jit
def quantiles(out, probabilities, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, quantile_of_normal(tl.load(probabilities + at)))


def test_quantile_of_the_normal_distribution():
    p = torch.cat([torch.logspace(-300, -0.302, 4095, dtype=torch.float64), torch.rand(4096, dtype=torch.float64)])
    p = torch.cat([p, torch.tensor([0.5], dtype=torch.float64)])
    out = torch.empty_like(p)
    quantiles[(1,)](out, p, p.numel())
    torch.testing.assert_close(out, torch.special.ndtri(p), rtol=2e-14, atol=2e-16)
    assert out[-1] == 0.0


def test_public_functions_run_on_triton():
    x, p = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    path = {"alpha": 0.8, "sigma": 0.6, "alpha_next": 0.9, "sigma_next": 0.4}

    def results():
        return (
            fd.guided_step(x, p, **path, q=0.4, noise_scale=0.1, seed=3, prediction_type="v").sample,
            fd.guide_prediction(p, x, alpha=0.8, sigma=0.6, q=torch.tensor([0.3, 0.6])),
            fd.guided_drift(x, p, p, 1.0, torch.tensor([0.5, 0.6]), dt=0.1),
            fd.scale_prior(x, radius=2.0),
        )

    with use("torch"):
        expected = results()
    with use("triton"):
        for got, wanted in zip(results(), expected, strict=True):
            torch.testing.assert_close(got, wanted)
