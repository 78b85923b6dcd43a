"""Random linear layers on duals, the same in plain torch, and the tolerance of a kernel."""

from __future__ import annotations

import torch
from torch.nn import functional

from fastdensity.reference.dual_linear import dual_linear as reference


def plain_torch(x, weight, bias, activation):
    """The layer as anybody would write it; geglu as diffusers does."""
    y = functional.linear(x, weight, bias)
    if activation == "geglu":
        h, gate = y.chunk(2, dim=-1)
        return h * functional.gelu(gate)
    if activation == "gelu_tanh":
        return functional.gelu(y, approximate="tanh")
    return {"none": lambda z: z, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}.get(
        activation, getattr(functional, activation, None)
    )(y)


def eager(x, weight, bias, activation):
    """(1 + K, *, N) by torch.func.jvp, tangent by tangent, in the tensors' dtype."""
    pairs = [
        torch.func.jvp(lambda z: plain_torch(z, weight, bias, activation), (x[0],), (tangent,)) for tangent in x[1:]
    ]
    return torch.stack([pairs[0][0], *(tangent for _, tangent in pairs)])


def random_problem(tangents=1, rows=(5,), inputs=24, outputs=16, dtype=torch.float32, bias=True):
    x = torch.randn(1 + tangents, *rows, inputs, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, dtype=torch.float64) / max(inputs, 1) ** 0.5
    offsets = torch.randn(outputs, dtype=torch.float64) if bias else None
    return x.to(dtype), weight.to(dtype), None if offsets is None else offsets.to(dtype)


def assert_as_good_as_eager(result, x, weight, bias, activation):
    """Norm-wise against float64: at most twice eager's error at the same dtype, or two roundings."""
    exact = reference(x.double(), weight.double(), None if bias is None else bias.double(), activation)
    other = eager(x, weight, bias, activation)
    assert result.shape == exact.shape
    assert result.dtype == x.dtype
    assert result.is_contiguous()
    epsilon = torch.finfo(result.dtype).eps
    for mine, theirs, wanted in zip(result.double(), other.double(), exact, strict=True):
        assert (mine - wanted).norm() <= 2 * (theirs - wanted).norm() + 2 * epsilon * wanted.norm()
