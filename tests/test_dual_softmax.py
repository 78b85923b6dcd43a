"""dual_softmax against torch.softmax under func.jvp: values, dtypes, strides, and every way it may be called."""

from __future__ import annotations

import math

import pytest
import torch

from fastdensity._backend import use
from fastdensity.ops.dual_softmax import dual_softmax
from fastdensity.reference import dual_softmax as reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def by_func_jvp(x):
    results = [torch.softmax(x[0], -1)]
    for tangent in x[1:]:
        results.append(torch.func.jvp(lambda value: torch.softmax(value, -1), (x[0],), (tangent,))[1])
    return torch.stack(results)


def assert_as_good_as_eager(x, out):
    assert out.dtype == x.dtype
    exact, eager = by_func_jvp(x.double()), by_func_jvp(x)
    eps = torch.finfo(x.dtype).eps
    for got, rival, want in zip(out.double(), eager.double(), exact, strict=True):
        assert (got - want).norm() <= 2 * (rival - want).norm() + eps * want.norm() / math.sqrt(want.numel())


@pytest.mark.parametrize("shape", [(2, 1), (2, 3, 5), (4, 2, 64), (2, 3, 1, 129), (3, 5000)])
def test_is_func_jvp_of_softmax(shape):
    x = 3 * torch.randn(shape, dtype=torch.float64)
    want = by_func_jvp(x)
    torch.testing.assert_close(dual_softmax(x), want, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(reference.dual_softmax(x), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 200, 4099])
def test_precision(dtype, columns):
    x = (4 * torch.randn(3, 6, columns)).to(dtype)
    assert_as_good_as_eager(x, dual_softmax(x))


def test_exponential_is_accurate_over_its_whole_range():
    """A row (x, 0) has the sigmoid of x first."""
    x = torch.linspace(-86.5, 0, 100_001)
    rows = torch.stack([x, torch.zeros_like(x)], -1)[None].repeat(2, 1, 1)
    want = torch.sigmoid(x.double())
    error = (dual_softmax(rows)[0, :, 0].double() - want).abs() / want
    assert error.max() < 3 * 2**-24 * 1.5
    far = torch.tensor([[[-200.0, 0.0], [-1e30, 0.0], [-math.inf, 0.0]]]).repeat(2, 1, 1)
    assert torch.equal(dual_softmax(far)[0, :, 0], torch.zeros(3))


@DTYPES
def test_special_values_are_those_of_torch(dtype):
    rows = torch.randn(2, 5, 70).to(dtype)
    rows[0, 0] = -math.inf
    rows[0, 1, 3] = math.nan
    rows[0, 2, 60] = math.inf
    rows[0, 3, ::2] = -math.inf
    out, want = dual_softmax(rows), by_func_jvp(rows)
    assert torch.equal(out.isnan(), want.isnan())
    torch.testing.assert_close(out, want, equal_nan=True, rtol=0.02, atol=1e-3)


def test_nan_of_any_payload_spoils_its_row():
    rows = torch.zeros(2, 3, 40)
    rows[0, :, 3] = torch.tensor([0x7FC00001, 0x7FC001FF, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert dual_softmax(rows).isnan().all()


def test_any_strides_and_a_row_on_its_own():
    x = torch.randn(65, 4, 3).permute(2, 1, 0)
    out = dual_softmax(x)
    assert out.is_contiguous()
    assert torch.equal(out, dual_softmax(x.contiguous()))
    assert torch.equal(out[:, 2:3], dual_softmax(x[:, 2:3]))
    assert torch.equal(out[:2], dual_softmax(x[:2]))
    assert torch.equal(dual_softmax(torch._neg_view(x)), dual_softmax(-x))


def test_threads_change_no_bit():
    x = torch.randn(2, 64, 700)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = dual_softmax(x)
        torch.set_num_threads(3)
        assert torch.equal(dual_softmax(x), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 4), (3, 4, 0), (1, 5), (1, 3, 0)])
def test_empty_and_no_tangents(shape):
    x = torch.randn(shape)
    torch.testing.assert_close(dual_softmax(x), torch.softmax(x, -1))


def test_one_dimension_is_too_few():
    with pytest.raises(ValueError, match="x must be a dual"):
        dual_softmax(torch.randn(3))


def test_derivatives_of_it():
    x, direction = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    out, tangent = torch.func.jvp(dual_softmax, (x,), (direction,))
    want, want_tangent = torch.func.jvp(by_func_jvp, (x,), (direction,))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(tangent, want_tangent)
    batch = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(dual_softmax)(batch), torch.stack([dual_softmax(one) for one in batch]))
    assert torch.autograd.gradcheck(dual_softmax, (x.requires_grad_(),), check_forward_ad=True)


def test_in_graphs():
    x = torch.randn(3, 4, 9)
    torch.testing.assert_close(torch.compile(dual_softmax, fullgraph=True, backend="aot_eager")(x), dual_softmax(x))
    torch.library.opcheck(torch.ops.fastdensity.dual_softmax, (x,))
    torch.library.opcheck(torch.ops.fastdensity.dual_softmax, (x.clone().requires_grad_(),))


def test_the_torch_backend_agrees():
    x = torch.randn(2, 4, 9)
    with use("torch"):
        want = dual_softmax(x)
    torch.testing.assert_close(dual_softmax(x), want)
