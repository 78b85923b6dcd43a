"""Chains of elementwise dual operations in Triton's interpreter; run by tests/test_dual_chain_triton.py.

The interpreter truncates where a GPU rounds to bfloat16; the tolerance of `assert_as_good_as_eager` holds that ulp.
"""

from __future__ import annotations

import pytest
import torch
from dual_chain_cases import (
    POSITIVE,
    assert_as_good_as_eager,
    one_step_program,
    random_inputs,
    random_program,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdensity._backend import use
from fastdensity.chain_program import STEPS, result_shape
from fastdensity.ops.dual_chain import dual_chain
from fastdensity.reference.dual_chain import dual_chain as reference
from fastdensity.triton_kernels.dual_chain import launch_triton

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SMALL = {"tile_bytes": 256}  # several tiles of rows and of columns


def launch(inputs, is_dual, program, **sizes):
    out = torch.empty(result_shape(inputs, is_dual), dtype=inputs[0].dtype)
    launch_triton(inputs, is_dual, program, out, **sizes)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_every_step_in_every_dtype(name, dtype):
    arity = STEPS[name][0]
    inputs = random_inputs([(3, 37)] * arity, [True] * arity, dtype=dtype)
    if name in POSITIVE:
        inputs[-1][0] = inputs[-1][0].abs() + 0.3
    program, is_dual = one_step_program(name), [True] * arity
    assert_as_good_as_eager(launch(inputs, is_dual, program), inputs, is_dual, program)


@pytest.mark.parametrize("is_dual", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_plain_operands(name, is_dual):
    inputs = random_inputs([(4, 30), (30,)], is_dual)
    program = f"square 1;shift 2 0.5;{name} 0 3"
    assert_as_good_as_eager(launch(inputs, is_dual, program), inputs, is_dual, program)


def test_strides_and_broadcasts_over_several_tiles():
    base = random_inputs([(6, 4, 9)], [True])[0]
    projection = random_inputs([(5, 140)], [True])[0]
    cases = [
        ([base.transpose(1, 3), base.transpose(1, 3).contiguous()], "mul 0 1;silu 2"),
        ([base[:, :, ::2, 1:], base[:, 1:2, :2, 3:4]], "add 0 1;tanh 2"),
        (list(projection.chunk(2, -1)), "gelu 1;mul 0 2"),
        ([base, base[:, :, :1, :1]], "sub 0 1;gelu_tanh 2"),
        ([base[:, :1, :1, :1], base], "mul 0 1"),
    ]
    for inputs, program in cases:
        for sizes in ({}, SMALL):
            assert_as_good_as_eager(launch(inputs, [True, True], program, **sizes), inputs, [True, True], program)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.lists(st.sampled_from([1, 2, 3, 5]), max_size=4),
    flags=st.integers(1, 7),
    steps=st.integers(1, 6),
    data=st.data(),
)
def test_random_programs_over_random_broadcasts(seed, shape, flags, steps, data):
    torch.manual_seed(seed)
    is_dual = [bool(flags >> i & 1) for i in range(3)]
    shapes = []
    for _ in range(3):
        kept = shape[data.draw(st.integers(0, len(shape))) :]
        shapes.append(tuple(1 if data.draw(st.booleans()) else size for size in kept))
    program = random_program(seed, 3, is_dual, steps)
    inputs = random_inputs(shapes, is_dual, dtype=torch.float64)
    wanted = reference(inputs, is_dual, program)
    torch.testing.assert_close(launch(inputs, is_dual, program), wanted, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_the_result_may_lie_where_the_first_input_lay():
    for program in ("silu 0", "mul 0 0", "add 0 1;exp 2", "div 1 0"):
        inputs = random_inputs([(5, 20), (20,)], [True, False])
        wanted = launch(inputs, [True, False], program)
        launch_triton(inputs, [True, False], program, inputs[0])
        assert torch.equal(inputs[0], wanted)


def test_a_row_depends_on_no_other_row():
    inputs = random_inputs([(7, 50), (50,)], [True, False])
    program, is_dual = "add 0 1;silu 2;mul 3 0", [True, False]
    whole = launch(inputs, is_dual, program, **SMALL)
    alone = launch([inputs[0][:, 3:4], inputs[1]], is_dual, program, **SMALL)
    assert torch.equal(alone[:, 0], whole[:, 3])


def test_small_arguments_keep_their_digits():
    for dtype in (torch.float32, torch.float64):
        x = torch.logspace(-12, 1, 60, dtype=dtype)
        for name in ("tanh", "softplus"):
            stacked = torch.stack([-x if name == "softplus" else x, torch.ones_like(x)])
            stacked[0] *= 3
            wanted = reference([stacked.double()], [True], f"{name} 0").to(dtype)
            tolerance = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(launch([stacked], [True], f"{name} 0"), wanted, rtol=tolerance, atol=0)


def test_relu_stops_infinite_tangents():
    stacked = torch.tensor([[-1.0, 0.0, 2.0], [float("inf"), float("nan"), float("inf")]])
    assert launch([stacked], [True], "relu 0").tolist() == [[0.0, 0.0, 2.0], [0.0, 0.0, float("inf")]]


def test_the_backend_reaches_the_kernel():
    inputs = random_inputs([(3, 8), (8,)], [True, False])
    program, is_dual = "add 0 1;softplus 2", [True, False]
    with use("triton"):
        result = dual_chain(inputs, is_dual, program)
    assert torch.equal(result, launch(inputs, is_dual, program))
