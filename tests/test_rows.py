"""The rows kernels of the CPU and the public functions over them, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_cases import Problem, all_problems, assert_as_good_as_eager, random_problem

import fastdensity as fd
from fastdensity import rules
from fastdensity._backend import use
from fastdensity.ops.rows_operator import _launch
from fastdensity.ops.rows_prior import chi_quantile

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    with use(request.param):
        yield request.param


def launch(problem: Problem, out=None):
    return _launch(
        problem.rule, problem.kind, problem.operands, problem.parameters, problem.noise_key, out, True, problem.like
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (4, 24), (2, 2051), (1, 36_001)])
def test_every_rule_is_as_good_as_eager(dtype, rows, columns):
    for problem in all_problems(rows=rows, columns=columns, dtype=dtype):
        assert_as_good_as_eager(problem, *launch(problem))


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_row", [True, False])
def test_mixed_dtypes(state_dtype, per_row, backend):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for problem in all_problems(dtype=dtype, state_dtype=state_dtype, per_row=per_row):
            out, report = launch(problem)
            assert out.dtype == (dtype if problem.rule == "prediction" else state_dtype)
            assert_as_good_as_eager(problem, out, report)


def test_half_precision_conversions_are_exact():
    """Every 16-bit pattern there is, and rounding to nearest even on the way back."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        halves = patterns.view(dtype)[None]
        finite = halves.isfinite()
        wide = fd.guided_drift(torch.zeros_like(halves, dtype=torch.float32), halves, halves, 0.0, 0.0, dt=1.0)
        assert torch.equal(wide[finite], halves.float()[finite])
        values = torch.cat([halves.float()[finite], torch.nextafter(halves.float()[finite], torch.tensor(9e9))])[None]
        values = torch.cat([values, (values[:, :-1] + values[:, 1:]) / 2], dim=1)
        values = values[values.to(dtype).isfinite()][None]
        zero = torch.zeros_like(values, dtype=dtype)
        assert torch.equal(fd.guided_drift(zero, values, values, 0.0, 0.0, dt=1.0), values.to(dtype) + zero)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 5000),
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(["drift", "prediction", "step", "radius"]),
    kind=st.sampled_from(rules.PREDICTION_TYPES),
    noise=st.sampled_from(["none", "given", "drawn"]),
)
def test_a_row_does_not_see_its_batch(rows, columns, seed, rule, kind, noise):
    noise = noise if rule == "step" else "none"
    problem = random_problem(rule, kind, rows, columns, noise=noise, seed=seed, per_row=True)
    out, report = launch(problem)
    row = seed % rows
    alone = Problem(
        rule,
        kind,
        tuple(None if operand is None else operand[row : row + 1] for operand in problem.operands),
        tuple(p[row : row + 1] if isinstance(p, torch.Tensor) else p for p in problem.parameters),
        None if problem.noise_key is None else (problem.noise_key[0], problem.noise_key[1][row : row + 1], 5),
    )
    one, one_report = launch(alone)
    assert torch.equal(one[0], out[row])
    assert torch.equal(one_report[0], report[row])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads):
    problem = random_problem("step", rows=3, columns=30_000, noise="drawn")
    expected = launch(problem)[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(launch(problem)[0], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [64, 2_100_000])
@pytest.mark.parametrize("offset", [0, 1])
def test_out_in_place_and_unaligned(columns, offset):
    """Neither the alignment of `out` nor working in place changes a bit, in short rows and in long ones."""
    problem = random_problem("step", rows=3, columns=columns, per_row=True)
    expected, _ = launch(problem)
    memory = torch.full((3 * columns + 1,), float("nan"))
    out = memory[offset : offset + 3 * columns].view(3, columns)
    launch(problem, out)
    assert torch.equal(out, expected)
    assert memory.isnan().sum() == 1
    x = problem.operands[0].clone()
    again = Problem(problem.rule, problem.kind, (x, *problem.operands[1:]), problem.parameters)
    launch(again, x)
    assert torch.equal(x, expected)


def test_strided_rows_and_copies(backend):
    """Sliced batches are read in place, transposed and negative views are made dense: the numbers are the same."""
    wide = torch.randn(8, 3, 40)
    x, u, s = wide[::2], wide[1::2], torch.randn(4, 40, 3).transpose(1, 2)
    plain = fd.guided_drift(x.clone(), u.clone(), s.clone(), 1.0, 2.0, dt=0.1)
    assert torch.equal(fd.guided_drift(x, u, s, 1.0, 2.0, dt=0.1), plain)
    expanded = torch.randn(1, 3, 40).expand(4, 3, 40)
    assert torch.equal(
        fd.guided_drift(x, expanded, s, 1.0, 2.0, dt=0.1), fd.guided_drift(x, expanded.clone(), s, 1.0, 2.0, dt=0.1)
    )
    complex_view = torch.randn(4, 3, 40, dtype=torch.complex64).conj().imag
    assert complex_view.is_neg()
    assert torch.equal(
        fd.guided_drift(x, u, complex_view, 1.0, 2.0), fd.guided_drift(x, u, complex_view.clone(), 1.0, 2.0)
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0, 3, 8, 8)])
def test_empty_batches(shape, backend):
    empty = torch.zeros(shape)
    assert fd.guided_drift(empty, empty, empty, 1.0, 1.0, dt=0.1).shape == shape
    result = fd.guided_step(empty, empty, alpha=0.5, sigma=0.5, alpha_next=0.6, sigma_next=0.4, q=0.4)
    assert result.sample.shape == shape
    assert result.eta.shape == (shape[0],)
    assert fd.scale_prior(empty).shape == shape


def test_half_quantile_is_bit_identical_to_no_guidance(backend):
    x, p = torch.randn(5, 300), torch.randn(5, 300)
    for kind in rules.PREDICTION_TYPES:
        options = {"alpha": 0.6, "sigma": 0.7, "prediction_type": kind}
        assert torch.equal(fd.guide_prediction(p, x, q=0.5, **options), p)
        ends = {"alpha_next": 0.8, "sigma_next": 0.5}
        result = fd.guided_step(x, p, **ends, **options)
        assert torch.equal(result.eta_minus_one, torch.zeros(5))


def test_guided_drift_meets_its_target(backend):
    """d log p / dt = -div u + (w - u).s is b, whatever u, s and div: the point of the formula."""
    x, u, s = (torch.randn(6, 3, 10, dtype=torch.float64) for _ in range(3))
    div, b = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    w = fd.guided_drift(x, u, s, div, b)
    rate = -div + ((w - u) * s).flatten(1).sum(1)
    torch.testing.assert_close(rate, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fd.guided_drift(x, u, s, div, b, dt=0.3), x + 0.3 * w, rtol=1e-13, atol=1e-14)


def test_noise_is_orthogonal_to_the_score(backend):
    x, eps = torch.randn(4, 500, dtype=torch.float64), torch.randn(4, 500, dtype=torch.float64)
    ends = {"alpha": 0.6, "sigma": 0.8, "alpha_next": 0.7, "sigma_next": 0.7}
    still = fd.guided_step(x, eps, **ends).sample
    noisy = fd.guided_step(x, eps, **ends, seed=3, noise_scale=0.25).sample
    assert ((noisy - still) * eps).sum(1).abs().max() < 1e-12
    assert 0.2 < (noisy - still).std() < 0.3


def test_guided_prediction_then_plain_step_is_the_guided_step(backend):
    x, p, uncond = (torch.randn(4, 60, dtype=torch.float64) for _ in range(3))
    ends = {"alpha": 0.6, "sigma": 0.7, "alpha_next": 0.8, "sigma_next": 0.5}
    for kind in rules.PREDICTION_TYPES:
        here = {"alpha": 0.6, "sigma": 0.7, "prediction_type": kind, "uncond": uncond, "cfg_scale": 3.0}
        guided = fd.guide_prediction(p, x, q=0.3, **here)
        two = fd.guided_step(x, guided, **ends, prediction_type=kind).sample
        one = fd.guided_step(x, p, q=0.3, **ends, prediction_type=kind, uncond=uncond, cfg_scale=3.0).sample
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


def test_scale_prior(backend):
    latents = torch.randn(4, 3, 16, dtype=torch.float64)
    latents[2] = 0
    radii = fd.scale_prior(latents, radius=torch.tensor([1.0, 2.0, 3.0, 4.0])).flatten(1).norm(dim=1)
    torch.testing.assert_close(radii, torch.tensor([1.0, 2.0, 0.0, 4.0], dtype=torch.float64))
    median = fd.scale_prior(latents, quantile=0.5, sigma=2.0).flatten(1).norm(dim=1)[0]
    assert median == pytest.approx(2.0 * chi_quantile(0.5, 48), rel=1e-14)


@pytest.mark.parametrize("degrees", [1, 2, 24, 3072, 10**6])
def test_chi_quantile_against_scipy(degrees):
    chi = pytest.importorskip("scipy.stats").chi
    for p in (1e-300, 1e-30, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1 - 1e-15):
        assert chi_quantile(p, degrees) == pytest.approx(chi.ppf(p, degrees), rel=1e-10)


def test_a_row_beyond_two_to_the_31():
    """One row of 2^31 + 5 elements in bfloat16: offsets are 64 bits wide, sums keep their digits."""
    columns = 2**31 + 5
    eps = torch.ones(1, columns, dtype=torch.bfloat16)
    eps[0, -1] = 3.0
    report = torch.empty(1, 4)
    guided = fd.guide_prediction(eps, eps, alpha=1.0, sigma=1.0, shift=float(columns + 8), out=eps, report=report)
    assert guided.data_ptr() == eps.data_ptr()
    assert float(report[0, 1]) == pytest.approx(columns + 8, rel=1e-7)
    assert float(guided[0, 0]) == 2.0
    assert float(guided[0, -1]) == 6.0
    assert float(guided[0, 2**31 - 1]) == 2.0
