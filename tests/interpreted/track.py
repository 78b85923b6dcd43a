"""The closed loop in Triton's interpreter; run by tests/test_track_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from rows_cases import number_forms
from track_runs import (
    FRESH_ROW,
    SDE_ROW,
    assert_as_good_as_eager,
    assert_step_as_good_as_eager,
    launch,
    launch_step,
    random_call,
)

from fastdensity import rules
from fastdensity.reference.track import MEMORY, PARAMETERS, SCHEMES, launch_torch
from fastdensity.triton_kernels import track_estimate
from fastdensity.triton_kernels.track import launch_triton
from fastdensity.triton_kernels.track_model import shortening

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE: dict[str, int] = {}
TILES = {"tile_bytes": 512}  # 300 floats make three tiles, 300 doubles five
REGIMES = pytest.mark.parametrize("sizes", [WHOLE, TILES], ids=["whole", "tiles"])
# what makes a row special, and the value
SPECIAL = (
    *(("x", math.nan), ("prediction", math.inf), ("uncond", math.nan), ("last x", math.nan), ("score", 0.0)),
    *(("alpha", 0.0), ("sigma", 0.0), ("alpha_end", 0.0), ("sigma_end", 0.0), ("sigma_end", 9.0), ("alpha", -1.0)),
    *(("sigma", math.nan), ("alpha_end", math.inf), ("q", 0.0), ("q", 1.0), ("q", math.nan), ("shift", math.inf)),
    *(("cfg_scale", math.inf), ("noise_scale", -0.1), ("carry", math.nan)),
    *(("alpha_next", math.inf), ("sigma_next", math.nan), ("steps", 0.0), ("memory", 1.001)),
)


def run(call, sizes=WHOLE, eps=None):
    return launch(call, launch_triton, eps, **sizes)


def same_bits(left, right):
    return all(torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) for one, other in zip(left, right, strict=True))


def test_the_numbers_of_a_row_are_where_the_reference_has_them():
    for names, prefix in ((PARAMETERS, ""), (MEMORY, "LAST_")):
        assert [getattr(track_estimate, prefix + name.upper()).value for name in names] == list(range(len(names)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", rules.PREDICTION_TYPES)
def test_every_prediction_type(kind, scheme):
    for cfg in (False, True):
        call = random_call(kind, scheme, columns=37, cfg=cfg)
        assert_as_good_as_eager(call, *run(call))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(4))
def test_memories_of_runs(scheme, seed):
    """Of one step and of several, in float64: every branch of the rule to its last digits."""
    for steps in (1, 2, 6):
        call = random_call("velocity", scheme, rows=6, columns=40, steps=steps, dtype=torch.float64, seed=seed)
        assert_as_good_as_eager(call, *run(call))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_rows_of_a_call_are_what_they_are_called(scheme):
    _, report, memory = random_call(scheme=scheme, columns=40).made()
    remembered = dict(zip(MEMORY, memory.unbind(dim=1), strict=True))
    corrects = scheme == "corrector"
    assert report[:, 3].tolist() == [0.0, 0.0, float(rules.FLAG_LIMITED), 0.0]
    assert report[:, 0].ne(0).tolist() == [True, True, True, not corrects]  # no step of a fresh row to be corrected
    assert remembered["steps"].tolist() == [5.0, 5.0, 5.0, 0.0] if corrects else [6.0, 6.0, 6.0, 1.0]
    assert remembered["noise"][SDE_ROW] > 0
    assert remembered["limited"].tolist() == [0.0, 0.0, 1.0 + corrects, 0.0]
    assert 0 < remembered["response"][0] < 1
    assert remembered["realised"][FRESH_ROW] == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_first_call_without_last_vectors(scheme):
    call = random_call("edm", scheme, columns=40, steps=0 if scheme != "corrector" else 1)
    call.memory.zero_()
    call.operands = (*call.operands[:3], None, None)
    assert_as_good_as_eager(call, *run(call))


@REGIMES
@pytest.mark.parametrize("columns", [1, 2, 3, 128, 132, 300])
def test_lengths(sizes, columns):
    for dtype in (torch.float32, torch.float64):
        call = random_call("sample", rows=2, columns=columns, dtype=dtype, cfg=True)
        assert_as_good_as_eager(call, *run(call, sizes))


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, state_dtype):
    call = random_call("v_prediction", rows=2, columns=136, dtype=dtype, state_dtype=state_dtype, cfg=True)
    assert_as_good_as_eager(call, *run(call, TILES))
    call = random_call("velocity_to_data", columns=50, dtype=dtype, state_dtype=state_dtype)
    assert_as_good_as_eager(call, *run(call))


@pytest.mark.parametrize(
    ("kind", "scheme", "sizes"),
    [
        *((kind, "direct", WHOLE) for kind in rules.PREDICTION_TYPES),
        ("edm", "direct", TILES),
        ("edm", "corrector", WHOLE),
    ],
)
def test_the_step_in_the_same_pass(kind, scheme, sizes):
    """Each rule and source of noise, after any decision."""
    rows, columns = 4, 132
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    key = (3, torch.arange(rows) * 7, 2)
    for rule, given in (("step", {}), ("step", {"noise": noise}), ("step", {"key": key}), ("prediction", {})):
        call = random_call(kind, scheme, rows, columns, cfg=rule == "step" and not given)
        found = launch_step(call, rule, launch_triton, **given, **sizes)
        assert_step_as_good_as_eager(call, rule, found, **given)


def test_the_step_in_mixed_dtypes_and_lengths():
    for dtype, state_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float64,) * 2):
        for columns in (1, 37, 136):
            call = random_call("v_prediction", rows=2, columns=columns, dtype=dtype, state_dtype=state_dtype)
            found = launch_step(call, "step", launch_triton, **TILES)
            assert_step_as_good_as_eager(call, "step", found)


@REGIMES
def test_the_step_of_special_rows_touches_no_other(sizes):
    rows = len(SPECIAL) + 2
    made = partial(random_call, "velocity", rows=rows, columns=132, cfg=True, dtype=torch.float64)
    call = spoiled(made())
    out, report, *_ = launch_step(call, "step", launch_triton, **sizes)
    expected, expected_report, *_ = launch_step(call, "step", launch_torch)
    for row in (0, rows - 1):
        alone = launch_step(made().row(row), "step", launch_triton, **sizes)
        assert torch.equal(alone[0][0], out[row])
    assert torch.equal(report[:, 3], expected_report[:, 3])
    finite = expected.isfinite().all(dim=1)
    assert torch.equal(out.isfinite().all(dim=1), finite)
    torch.testing.assert_close(out[finite], expected[finite])


def test_parameters_in_every_form():
    call = random_call("edm", rows=3, columns=40)
    values = [float(p[0]) if isinstance(p, torch.Tensor) else p for p in call.parameters]
    forms = number_forms(3)
    for shift in range(len(forms)):
        made = [forms[(i + shift) % len(forms)](value) for i, value in enumerate(values)]
        varied = call.with_parameters(**dict(zip(PARAMETERS, made, strict=True)))
        assert_as_good_as_eager(varied, *run(varied))


@REGIMES
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_does_not_see_its_batch(sizes, scheme):
    call = random_call("edm", scheme, columns=260, cfg=True)
    together = run(call, sizes)
    for row in range(4):
        assert same_bits(run(call.row(row), sizes), [result[row : row + 1] for result in together])


@REGIMES
def test_alignment_changes_no_bit(sizes):
    call = random_call("velocity", columns=132, cfg=True)
    expected = run(call, sizes)

    def moved(operand):
        memory = torch.full((operand.numel() + 1,), math.nan, dtype=operand.dtype)
        return memory[1:].view(operand.shape).copy_(operand)

    memory = torch.full((4 * 132 + 1,), math.nan)
    results = run(call.with_operands(moved), sizes, memory[1:].view(4, 132))
    assert same_bits(results, expected)
    assert memory[0].isnan()


def test_shapes_of_images():
    call = random_call("velocity", columns=48)
    expected = run(call)
    images = run(call.with_operands(lambda operand: operand.view(4, 3, 4, 4)))
    assert images[0].shape == (4, 3, 4, 4)
    assert same_bits([images[0].flatten(1), *images[1:]], expected)


def spoiled(call):
    """The same call, each row but the first and the last made special in one of the ways of SPECIAL."""
    operands = dict(zip(("x", "prediction", "uncond", "last x", "last eps"), call.operands, strict=True))
    numbers = dict(zip(PARAMETERS, call.parameters, strict=True))
    for row, (how, value) in enumerate(SPECIAL, start=1):
        if how in numbers:
            numbers[how][row] = value
        elif how in operands:
            operands[how][row, 77] = value
        elif how == "score":
            for name in ("x", "prediction", "uncond"):
                operands[name][row] = value
        elif how == "steps":
            call.memory[row] = value
            operands["last x"][row] = operands["last eps"][row] = math.nan
        else:  # of another place
            call.memory[row, MEMORY.index("sigma_end")] *= value
    return call


@REGIMES
@pytest.mark.parametrize("scheme", SCHEMES)
def test_special_rows_are_flagged_and_touch_no_other(sizes, scheme):
    def made():
        rows = len(SPECIAL) + 2
        return random_call("velocity", scheme, rows=rows, columns=132, cfg=True, dtype=torch.float64)

    call = spoiled(made())
    results = run(call, sizes)
    for row in (0, len(SPECIAL) + 1):
        assert same_bits([result[row : row + 1] for result in results], run(made().row(row), sizes))
    eps, report, memory = launch(call)
    assert torch.equal(results[1][:, 3], report[:, 3])
    by_name = {how: report[row, 3] for row, (how, _) in enumerate(SPECIAL, start=1)}
    assert by_name["score"] == rules.FLAG_ZERO_SCORE
    assert by_name["memory"] == rules.FLAG_STALE_STATE
    assert by_name["carry"] == rules.FLAG_BAD_PARAMETER
    assert by_name["steps"] == 0
    finite = eps.isfinite().all(dim=1)
    assert torch.equal(results[0].isfinite().all(dim=1), finite)
    torch.testing.assert_close(results[0][finite], eps[finite])
    found, expected = (torch.where(r.isfinite(), r, math.nan) for r in (results[1], report))  # inf - inf, or inf first
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(results[2], memory, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_floats_out_of_range_are_flagged_too():
    call = random_call(rows=1, columns=130)
    for name, value in (("q", 0.0), ("q", 2.0), ("q", math.nan), ("shift", math.inf), ("sigma", -1.0)):
        eps, report, memory = run(call.with_parameters(**{name: value}))
        assert int(report[0, 3]) & rules.FLAG_BAD_PARAMETER
        assert report[0, 0] == 0
        assert memory[0, 0] == 0
        assert torch.equal(eps, call.operands[1])


@triton.jit
def shortenings(out, h, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, shortening(tl.load(h + at)))


def test_how_much_a_step_shortens():
    h = torch.cat([torch.logspace(-300, 2.8, 8191, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    out = torch.empty_like(h)
    shortenings[(1,)](out, h, h.numel())
    torch.testing.assert_close(out, -torch.expm1(-h), rtol=1e-15, atol=0.0)
