"""Linear layers on duals: the reference, the CPU path, and every transform of torch."""

from __future__ import annotations

import pytest
import torch
from dual_linear_cases import assert_as_good_as_eager, eager, plain_torch, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdensity._backend import use
from fastdensity.ops.dual_linear import dual_linear
from fastdensity.reference.dual_linear import ACTIVATIONS
from fastdensity.reference.dual_linear import dual_linear as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_forward_mode_differentiation(activation, bias):
    problem = random_problem(2, (3, 4), dtype=torch.float64, bias=bias)
    torch.testing.assert_close(reference(*problem, activation), eager(*problem, activation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_every_dtype(activation, bias, dtype):
    problem = random_problem(3, (2, 7), 40, 26, dtype, bias)
    assert_as_good_as_eager(dual_linear(*problem, activation), *problem, activation)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), tangents=st.integers(1, 4), rows=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.integers(1, 9), outputs=st.integers(1, 5), bias=st.booleans(), activation=st.sampled_from(ACTIVATIONS),
)  # fmt: skip
def test_random_shapes(seed, tangents, rows, inputs, outputs, bias, activation):
    torch.manual_seed(seed)
    problem = random_problem(tangents, tuple(rows), inputs, 2 * outputs, torch.float64, bias)
    torch.testing.assert_close(dual_linear(*problem, activation), reference(*problem, activation))


@pytest.mark.parametrize("activation", ["none", "silu", "geglu"])
def test_strided_inputs(activation):
    x, weight, bias = random_problem(2, (6, 8), 20, 12)
    strided = (x.transpose(1, 2), torch.stack([weight] * 2, -1)[..., 0], torch.stack([bias] * 2, -1)[:, 1])
    dense = tuple(tensor.contiguous() for tensor in strided)
    torch.testing.assert_close(dual_linear(*strided, activation), dual_linear(*dense, activation))
    assert_as_good_as_eager(dual_linear(*strided, activation), *dense, activation)


def test_the_bias_reaches_no_tangent():
    x, weight, bias = random_problem(2, inputs=8)
    assert torch.equal(dual_linear(x, weight, bias)[1:], dual_linear(x, weight)[1:])
    torch.testing.assert_close(dual_linear(x, weight, bias)[0], dual_linear(x, weight)[0] + bias)


def test_inputs_are_left_alone():
    problem = random_problem(2)
    copies = [tensor.clone() for tensor in problem]
    for activation in ACTIVATIONS:
        dual_linear(*problem, activation)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(problem, copies, strict=True))


def test_the_number_of_threads_changes_no_epilogue():
    problem = random_problem(1, (64,), 8, 1024)
    threads = torch.get_num_threads()
    whole = dual_linear(*problem, "gelu")
    try:
        torch.set_num_threads(3)
        torch.testing.assert_close(dual_linear(*problem, "gelu"), whole, rtol=1e-6, atol=1e-6)
    finally:
        torch.set_num_threads(threads)


def test_empty_tensors():
    _, weight, bias = random_problem(inputs=8, outputs=6)
    assert dual_linear(torch.zeros(3, 0, 8), weight, bias, "silu").shape == (3, 0, 6)
    nothing = dual_linear(torch.zeros(2, 4, 0), torch.zeros(6, 0), bias, "tanh")
    torch.testing.assert_close(nothing, torch.stack([bias.tanh(), torch.zeros(6)])[:, None].expand(2, 4, 6))


# torch's transforms


def test_nested_forward_mode():
    x, weight, bias = random_problem(1, dtype=torch.float64)
    v, w = x[1], torch.randn_like(x[0])

    def dual(z):
        return dual_linear(torch.stack([z, v]), weight, bias, "geglu")[1]

    def plain(z):
        return torch.func.jvp(lambda y: plain_torch(y, weight, bias, "geglu"), (z,), (v,))[1]

    for mine, theirs in zip(torch.func.jvp(dual, (x[0],), (w,)), torch.func.jvp(plain, (x[0],), (w,)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_vmap():
    batch = torch.stack([random_problem(2)[0] for _ in range(3)])
    _, weight, bias = random_problem(2)
    result = torch.vmap(lambda x: dual_linear(x, weight, bias, "silu"))(batch)
    torch.testing.assert_close(result, torch.stack([dual_linear(x, weight, bias, "silu") for x in batch]))


@pytest.mark.parametrize("activation", ["none", "softplus", "geglu"])
def test_backward(activation):
    problem = [tensor.requires_grad_() for tensor in random_problem(2, (2,), 3, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: dual_linear(*tensors, activation), problem)


def test_weights_that_require_a_gradient_do_not_stop_a_call_without_one():
    problem = random_problem(2)
    wanted = dual_linear(*problem, "silu")
    problem[1].requires_grad_()
    with torch.no_grad():
        assert torch.equal(dual_linear(*problem, "silu"), wanted)


@pytest.mark.parametrize("activation", ["none", "silu", "geglu"])
def test_compiled_whole(activation):
    problem = random_problem(2)
    call = torch.compile(lambda *tensors: dual_linear(*tensors, activation) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(*problem), dual_linear(*problem, activation) * 2)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("activation", ["none", "geglu"])
def test_operator_is_a_good_citizen(activation):
    torch.library.opcheck(torch.ops.fastdensity.dual_linear.default, (*random_problem(2), activation))


def test_torch_backend_agrees():
    problem = random_problem(2)
    with use("torch"):
        wanted = dual_linear(*problem, "geglu")
    torch.testing.assert_close(dual_linear(*problem, "geglu"), wanted)


def test_wrong_arguments_are_named():
    x, weight, bias = random_problem(outputs=6)
    for arguments, error, words in (
        ((x, weight, bias, "swish"), ValueError, "activation must be one of"),
        ((x[0, 0], weight, bias, "none"), ValueError, "x must be a dual"),
        ((x[:1], weight, bias, "none"), ValueError, "x must be a dual"),
        ((x, weight.t(), bias, "none"), ValueError, r"weight must have shape \(N, 24\)"),
        ((x, weight, bias[:3], "none"), ValueError, r"bias must have shape \(6,\)"),
        ((x, weight[:5], bias[:5], "geglu"), ValueError, "even number"),
        ((x, weight.double(), bias, "none"), TypeError, "weight and bias"),
        ((x, weight, bias.double(), "none"), TypeError, "weight and bias"),
    ):
        with pytest.raises(error, match=words):
            dual_linear(*arguments)


@pytest.mark.parametrize("activation", ["none", "silu", "geglu"])
@pytest.mark.parametrize("rows", [255, 256, 700])
def test_both_matrix_products_of_torch_are_right(rows, activation):
    """Few and many rows take different libraries; so do transposed weights, and torch.backends.mkldnn switched off."""
    x, weight, bias = torch.randn(2, rows // 2, 24), torch.randn(32, 24), torch.randn(32)
    wanted = reference(x.double(), weight.double(), bias.double(), activation)
    for factor in (weight, weight.t().contiguous().t()):
        got = dual_linear(x, factor, bias, activation)
        assert (got - wanted).norm() < 1e-6 * wanted.norm()
    with torch.backends.mkldnn.flags(enabled=False):
        got = dual_linear(x.transpose(1, 2).contiguous().transpose(1, 2), weight, None, activation)
    wanted = reference(x.double(), weight.double(), None, activation)
    assert (got - wanted).norm() < 1e-6 * wanted.norm()
