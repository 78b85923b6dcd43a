"""Problems for dual attention, and torch's own attention under func.jvp to hold the results against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MASKS = ("none", "bool", "add", "keys", "rows")


@dataclass(frozen=True)
class Problem:
    """The arguments of dual_attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    duals: tuple[bool, bool, bool] = (True, True, True)
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 0.3

    @property
    def arguments(self):
        return (self.query, self.key, self.value, *self.duals, self.mask, self.causal, self.scale)

    def to(self, dtype):
        mask = self.mask
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype)
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype), mask=mask)

    @property
    def tangents(self):
        tensors = (self.query, self.key, self.value)
        return next(tensor for tensor, dual in zip(tensors, self.duals, strict=True) if dual).shape[0] - 1


def random_mask(kind, batch, heads, length, keys):
    """One of MASKS; query 0 of the first sample or head attends to nothing, where a mask has rows at all."""
    if kind == "bool":
        mask = torch.rand(batch, 1, length, keys) > 0.3
        mask[0, 0, 0] = False
        return mask
    if kind == "add":
        mask = torch.randn(heads, length, keys, dtype=torch.float64)
        mask[0, 0] = -math.inf
        mask[0, -1, 1::2] = -math.inf
        return mask
    if kind == "keys":  # padding, expanded as some callers do
        mask = torch.rand(batch, 1, 1, keys) > 0.4
        return mask.expand(batch, heads, length, keys)
    if kind == "rows":
        return torch.rand(batch, heads, length, 1) > 0.5
    return None


def random_problem(
    batch=2, heads=2, key_heads=2, length=5, keys=7, width=8, value_width=6, tangents=2, duals=(True, True, True),
    mask="none", causal=False, dtype=torch.float64,
):  # fmt: skip
    shapes = (
        (batch, heads, length, width),
        (batch, key_heads, keys, width),
        (batch, key_heads, keys, value_width),
    )
    query, key, value = (
        torch.randn((1 + tangents, *shape) if dual else shape, dtype=torch.float64)
        for shape, dual in zip(shapes, duals, strict=True)
    )
    chosen = random_mask(mask, batch, heads, length, keys)
    return Problem(query, key, value, duals, chosen, causal).to(dtype)


def torch_attention(problem):
    """A function of plain (query, key, value), in torch's own words, that has forward mode."""
    mask, causal = problem.mask, problem.causal
    if causal and mask is not None:  # torch takes one or the other
        allowed = torch.ones(problem.query.shape[-2], problem.key.shape[-2], dtype=torch.bool).tril()
        mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -math.inf)
        causal = False
    gqa = problem.query.shape[-3] != problem.key.shape[-3]

    def attention(query, key, value):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=problem.scale, enable_gqa=gqa
            )

    return attention


def by_func_jvp(problem):
    """(1 + K, B, H, L, Ev) from K calls of torch.func.jvp; what is plain has zero tangents."""
    tensors = (problem.query, problem.key, problem.value)
    primals = tuple(x[0] if dual else x for x, dual in zip(tensors, problem.duals, strict=True))
    results = []
    for k in range(1, 1 + problem.tangents):
        pairs = zip(tensors, problem.duals, strict=True)
        vectors = tuple(x[k] if dual else torch.zeros_like(x) for x, dual in pairs)
        value, tangent = torch.func.jvp(torch_attention(problem), primals, vectors)
        results = results or [value]
        results.append(tangent)
    return torch.stack(results)


def assert_as_good_as_eager(problem, out):
    """Each plane's error, norm-wise against float64, is at most twice that of func.jvp in the problem's dtype."""
    assert out.dtype == problem.query.dtype
    assert out.isfinite().all()
    exact, eager = by_func_jvp(problem.to(torch.float64)), by_func_jvp(problem)
    eps = torch.finfo(out.dtype).eps
    for got, rival, want in zip(out.double(), eager.double(), exact, strict=True):
        error, allowed = (
            (got - want).norm(),
            2 * (rival - want).norm() + 4 * eps * want.norm() / math.sqrt(want.numel()),
        )
        assert error <= allowed, (float(error), float(allowed))
