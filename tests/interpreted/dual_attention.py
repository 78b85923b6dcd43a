"""The Triton attention and softmax kernels in Triton's interpreter; run by tests/test_dual_attention_triton.py.

bfloat16 is multiplied in float32 there (the interpreter would multiply bit patterns) and truncated, not rounded, when
stored: its tolerance has that ulp.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import MASKS, assert_as_good_as_eager, by_func_jvp, random_problem

from fastdensity._backend import use
from fastdensity.ops.dual_attention import dual_attention
from fastdensity.ops.dual_softmax import dual_softmax
from fastdensity.reference.dual_softmax import dual_softmax as softmax_reference
from fastdensity.triton_kernels import dual_attention as launcher
from fastdensity.triton_kernels.dual_softmax import launch_triton as launch_softmax

DUALS = [duals for duals in itertools.product((True, False), repeat=3) if any(duals)]


def attend(problem):
    with use("triton"):
        return dual_attention(*problem.arguments)


@pytest.mark.parametrize("duals", DUALS, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_is_func_jvp_of_attention(mask, duals):
    for causal in (False, True):
        problem = random_problem(1, 1, 1, 18, 17, 5, 3, tangents=1, duals=duals, mask=mask, causal=causal)
        assert (attend(problem) - by_func_jvp(problem)).abs().max() < 1e-12


@pytest.mark.parametrize(("dtype", "length", "keys"), [(torch.float32, 34, 20), (torch.float16, 70, 66)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_precision(mask, dtype, length, keys):
    for causal, tangents, width in ((False, 1, 16), (True, 3, 20)):
        problem = random_problem(
            1, 2, 1, length, keys, width, 16, tangents=tangents, mask=mask, causal=causal, dtype=dtype
        )
        assert_as_good_as_eager(problem, attend(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 40, 72, 130])
def test_widths(width, dtype):
    problem = random_problem(1, 1, 1, 5, 40, width, 136 - width, tangents=1, dtype=dtype)
    assert_as_good_as_eager(problem, attend(problem))


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("tangents", [1, 2, 3])
def test_groups_of_tangents(monkeypatch, tangents, modern):
    monkeypatch.setattr(launcher, "_is_modern", lambda device: modern)
    problem = random_problem(1, 2, 2, 66, 130, 16, 16, tangents=tangents, dtype=torch.float16)
    out = attend(problem)
    assert_as_good_as_eager(problem, out)
    firsts = [x[:2] for x in (problem.query, problem.key, problem.value)]
    first = attend(replace(problem, query=firsts[0], key=firsts[1], value=firsts[2]))
    torch.testing.assert_close(out[:2], first, rtol=2e-3, atol=2e-3)


def test_bfloat16():
    problem = random_problem(1, 2, 1, 20, 40, 16, 16, dtype=torch.bfloat16)
    want = by_func_jvp(problem.to(torch.float64))
    error = (attend(problem).double() - want).norm() / want.norm()
    assert error < 2**-8


def test_an_offset_of_all_values_leaves_the_tangents():
    """h and r are rounded alike: tO = h V - r O does not see what V has in common."""
    problem = random_problem(1, 1, 1, 20, 70, 16, 16, duals=(True, False, False), dtype=torch.float16)
    shifted = replace(problem, value=problem.value + 64)
    assert_as_good_as_eager(shifted, attend(shifted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides_alignment_and_batch(dtype):
    problem = random_problem(3, 2, 2, 20, 20, 16, 16, dtype=dtype)
    expected = attend(problem)
    query = torch.empty(3, 3, 20, 2, 17, dtype=dtype)[..., 1:].transpose(2, 3)
    query.copy_(problem.query)
    value = problem.value.mT.contiguous().mT
    assert torch.equal(attend(replace(problem, query=query, value=value)), expected)
    single = [x[:, 1:2] for x in (problem.query, problem.key, problem.value)]
    alone = attend(replace(problem, query=single[0], key=single[1], value=single[2]))
    assert torch.equal(alone, expected[:, 1:2])


def test_rows_that_attend_to_nothing_are_zero():
    problem = random_problem(1, 2, 2, 20, 40, mask="none", dtype=torch.float32)
    nothing = replace(problem, mask=torch.zeros(20, 40, dtype=torch.bool))
    assert not attend(nothing).any()
    late = torch.zeros(20, 40, dtype=torch.bool)
    late[:, 33:] = True  # the first block of keys is hidden as a whole
    assert_as_good_as_eager(replace(problem, mask=late), attend(replace(problem, mask=late)))


@pytest.mark.parametrize("sizes", [{}, {"whole_row": 0, "tile": 16}], ids=["whole", "long"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_softmax(dtype, sizes):
    for columns in (1, 5, 37):
        x = (3 * torch.randn(3, 2, columns)).to(dtype)
        out = torch.empty_like(x)
        launch_softmax(x, out, **sizes)
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(out, softmax_reference(x), rtol=tolerance, atol=tolerance)


def test_softmax_of_special_rows():
    x = torch.randn(2, 4, 20)
    x[0, 0] = -torch.inf
    x[0, 1, 3] = torch.nan
    x[0, 2, ::2] = -torch.inf
    with use("triton"):
        out = dual_softmax(x)
    torch.testing.assert_close(out, softmax_reference(x), equal_nan=True)
