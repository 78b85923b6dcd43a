"""Random ends of a trace, and how exact their results must be."""

from __future__ import annotations

import torch
from probe_cases import KEY, STREAM

from fastdensity.reference import trace_linear as reference

DISTRIBUTIONS = reference.DISTRIBUTIONS
SOME_IDS = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**40 + 3])


def ids_of(rows):
    """Ids with the extreme ones first."""
    return torch.cat([SOME_IDS, torch.arange(100, 100 + rows)])[:rows]


def key_of(rows, first=3):
    """(seed, sample ids, step, first)"""
    return (KEY[0], ids_of(rows), KEY[1], first)


def random_first(rows=5, inputs=24, outputs=16, dtype=torch.float32, bias=True):
    """x, weight, bias"""
    x = torch.randn(rows, inputs, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, dtype=torch.float64) / max(inputs, 1) ** 0.5
    offsets = torch.randn(outputs, dtype=torch.float64) if bias else None
    return x.to(dtype), weight.to(dtype), None if offsets is None else offsets.to(dtype)


def random_last(tangents=2, rows=5, inputs=24, outputs=16, dtype=torch.float32, bias=True):
    """stacked, weight, bias"""
    stacked = torch.randn(1 + tangents, rows, inputs, dtype=torch.float64)
    _, weight, offsets = random_first(1, inputs, outputs, dtype, bias)
    return stacked.to(dtype), weight, offsets


def wide(tensors):
    """The same numbers in float64."""
    return [None if tensor is None else tensor.double() for tensor in tensors]


def assert_first(result, problem, activation, count, columns, distribution, key):
    """Norm-wise against float64 on the probes of the dtype: twice the reference's error, or a few roundings."""
    x = problem[0]
    z = reference.make_probes(*key, count, columns, distribution, STREAM, x.dtype)
    padded = torch.nn.functional.pad(z, (0, x.shape[1] - columns))
    exact = reference.dual_linear(torch.cat([x[None], padded]).double(), *wide(problem[1:]), activation)
    other = reference.dual_linear_probe(*problem, activation, *key, count, columns, distribution, STREAM)
    assert result.shape == exact.shape
    assert result.dtype == x.dtype
    assert result.is_contiguous()
    slack = (16 if x.dtype is torch.float64 else 4) * torch.finfo(x.dtype).eps
    for mine, theirs, wanted in zip(result.double(), other.double(), exact, strict=True):
        assert (mine - wanted).norm() <= 2 * (theirs - wanted).norm() + slack * wanted.norm()


def assert_last(value, forms, problem, distribution, key):
    """Of each form the error in units of the products' norm, whose roundings are independent."""
    stacked, weight, _ = problem
    exact_value, exact = reference.dual_linear_trace(*wide(problem), *key, distribution, STREAM)
    eps = torch.finfo(stacked.dtype).eps
    assert value.dtype == stacked.dtype
    assert value.shape == exact_value.shape
    assert (value.double() - exact_value).norm() <= 4 * eps * exact_value.norm()
    assert forms.dtype == torch.float64
    assert forms.shape == exact.shape
    terms = stacked[1:].double().norm(dim=-1) * weight.double().norm()
    assert ((forms - exact).abs() <= 4 * eps * terms).all(), ((forms - exact).abs() / (eps * terms)).max()
