"""Pieces that are recognised as one layer, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdensity as fd


class Norm(nn.Module):
    """A root-mean-square norm in one of the spellings that are about."""

    def __init__(self, spelling: Callable[[Tensor, Tensor | None], Tensor], dtype: torch.dtype, affine: bool) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.rand(8, dtype=dtype) + 0.5) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x.sin(), self.weight) * 2


def diffusers_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    if weight is None:
        return x
    return (x.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else x) * weight


def transformers_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    dtype = x.dtype
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h.to(dtype) if weight is None else weight * h.to(dtype)


def llama_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    h = x.float()
    h = (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-6)).type_as(x)
    return h if weight is None else h * weight


def by_torch(fn: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return fn(x), torch.stack([torch.func.jvp(fn, (x,), (vector,))[1] for vector in vectors])


def assert_near(fn: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        got = fd.jvp(fn, (x,), vectors)
    for ours, theirs in zip(got, by_torch(fn, x, vectors), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).double().norm() <= tolerance * theirs.double().norm()


def operators(fn: Callable[[Tensor], Tensor], x: Tensor) -> set[str]:
    return {row.operator.removeprefix("aten.") for row in fd.explain(fn, (x,)).rows}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", [diffusers_norm, transformers_norm, llama_norm])
def test_rms_norms(spelling: Callable[[Tensor, Tensor | None], Tensor], dtype: torch.dtype, affine: bool) -> None:
    model = Norm(spelling, dtype, affine)
    x, vectors = torch.randn(3, 4, 8).to(dtype), torch.randn(2, 3, 4, 8).to(dtype)
    assert_near(model, x, vectors, 1e-6 if dtype is torch.float32 else 0.02)
    widens = (
        spelling is diffusers_norm and not affine and dtype is torch.bfloat16
    )  # bfloat16 in, float32 out: another one
    assert ("rms_norm" in operators(model, x)) == (not widens)
    assert ("rsqrt" in operators(model, x)) == widens


def uses_the_factor_again(x: Tensor) -> Tensor:
    factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * factor + factor


def divides_by_another(x: Tensor) -> Tensor:
    return x.cos() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def averages_elsewhere(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def another_power(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("fn", [uses_the_factor_again, divides_by_another, averages_elsewhere, another_power])
def test_what_only_looks_like_a_norm(fn: Callable[[Tensor], Tensor]) -> None:
    x, vectors = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    assert_near(fn, x, vectors, 1e-12)
    assert "rms_norm" not in operators(fn, x)


def test_a_float64_norm_that_is_computed_in_float32_stays_so() -> None:
    model = Norm(diffusers_norm, torch.float64, True)
    x, vectors = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    assert_near(model, x, vectors, 1e-6)
    assert "rsqrt" in operators(model, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Identity()])
def test_batch_norm_goes_into_the_convolution(activation: nn.Module, bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=bias), nn.BatchNorm2d(4, affine=bias), activation)
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model.double().eval()
    x, vectors = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(3, 2, 3, 6, 6, dtype=torch.float64)
    assert_near(model, x, vectors, 1e-12)
    assert {row.treatment for row in fd.explain(model, (x,)).rows if "batch_norm" in row.operator} != {"batch_norm"}
    norm.running_var.mul_(3)  # the statistics are read at every call
    assert_near(model, x, vectors, 1e-12)


def test_batch_norm_behind_a_shared_convolution() -> None:
    convolution, norm = nn.Conv2d(3, 3, 1).double(), nn.BatchNorm2d(3).double().eval()
    norm.running_var.uniform_(0.5, 2)

    def fn(x: Tensor) -> Tensor:
        h = convolution(x)
        return norm(h) + h

    x, vectors = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    assert_near(fn, x, vectors, 1e-12)
    assert any(row.treatment == "batch_norm" for row in fd.explain(fn, (x,)).rows)


@pytest.mark.parametrize(
    "fn",
    [F.mish, lambda x: F.softplus(x, 2.0), lambda x: F.softplus(x * 30, 0.5, 20)],
    ids=["mish", "softplus", "softplus past its threshold"],
)
def test_activations_that_are_chains(fn: Callable[[Tensor], Tensor]) -> None:
    x, vectors = 3 * torch.randn(3, 50, dtype=torch.float64), torch.randn(2, 3, 50, dtype=torch.float64)
    assert_near(fn, x, vectors, 1e-12)
    assert not fd.explain(fn, (x,)).fallbacks


def test_factors_of_one_vanish() -> None:
    x = torch.randn(3, 4)
    assert operators(lambda x: (x / 1.0 * 1).sin(), x) == {"sin"}
    assert operators(lambda x: (x / 2).sin(), x) == {"div.Tensor", "sin"}
    whole = torch.arange(4)
    assert fd.jvp(lambda x: x + whole / 1, (x,), x[None])[0].dtype == torch.float32
