"""Linear layers on duals in Triton's interpreter; run by tests/test_dual_linear_triton.py.

The interpreter truncates where a GPU rounds to bfloat16; the tolerance of `assert_as_good_as_eager` holds that ulp.
"""

from __future__ import annotations

import pytest
import torch
from dual_linear_cases import assert_as_good_as_eager, random_problem

from fastdensity._backend import use
from fastdensity.ops.dual_linear import dual_linear
from fastdensity.reference.dual_linear import ACTIVATIONS, result_shape
from fastdensity.triton_kernels.dual_linear import launch_triton

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def launch(x, weight, bias, activation):
    out = torch.empty(result_shape(x, weight, bias, activation), dtype=x.dtype)
    launch_triton(x, weight, bias, activation, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_every_dtype(activation, dtype):
    for tangents, bias in ((1, True), (2, False)):
        problem = random_problem(tangents, (5,), 40, 26, dtype, bias)
        assert_as_good_as_eager(launch(*problem, activation), *problem, activation)


@pytest.mark.parametrize("activation", ["silu", "geglu"])
@pytest.mark.parametrize("tangents", [1, 2, 3, 4, 5, 8])
def test_tangents_beyond_the_group(activation, tangents):
    problem = random_problem(tangents, (3, 2), 20, 12)
    assert_as_good_as_eager(launch(*problem, activation), *problem, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "geglu"])
def test_several_tiles_with_ragged_edges(activation, dtype):
    problem = random_problem(1, (70,), 129, 2 * 67, dtype)
    assert_as_good_as_eager(launch(*problem, activation), *problem, activation)


def test_more_row_tiles_than_a_strip():
    problem = random_problem(1, (64 * 9 + 1,), 8, 40)
    assert_as_good_as_eager(launch(*problem, "relu"), *problem, "relu")


def test_strided_inputs():
    x, weight, bias = random_problem(2, (6, 8), 20, 12)
    strided = (x.transpose(1, 2), weight.t().contiguous().t(), torch.stack([bias] * 2, -1)[:, 1])
    assert torch.equal(launch(*strided, "silu"), launch(*(tensor.contiguous() for tensor in strided), "silu"))


def test_no_inputs():
    bias = torch.randn(6)
    result = launch(torch.zeros(2, 4, 0), torch.zeros(6, 0), bias, "tanh")
    torch.testing.assert_close(result, torch.stack([bias.tanh(), torch.zeros(6)])[:, None].expand(2, 4, 6))


def test_a_row_depends_on_no_other_row():
    x, weight, bias = random_problem(2, (70,), 40, 30)
    whole = launch(x, weight, bias, "geglu")
    assert torch.equal(launch(x[:, 66:67], weight, bias, "geglu")[:, 0], whole[:, 66])


def test_the_backend_reaches_the_kernel():
    problem = random_problem(2)
    with use("triton"):
        result = dual_linear(*problem, "softplus")
    assert torch.equal(result, launch(*problem, "softplus"))
