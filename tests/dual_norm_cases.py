"""The norms of dual tensors: the plain functions that they are duals of, cases, and the tolerance of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdensity.ops import dual_norm as ops
from fastdensity.reference import dual_norm as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """An op's name, its dual input and the arguments after it."""

    name: str
    x: Tensor
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        given = "".join("01"[isinstance(argument, Tensor)] for argument in self.arguments)
        return f"{self.name}-{'x'.join(map(str, self.x.shape))}-{given}"

    def to(self, dtype: torch.dtype) -> Case:
        """Floating tensors in another dtype."""
        moved = (argument.to(dtype) if isinstance(argument, Tensor) else argument for argument in self.arguments)
        return Case(self.name, self.x.to(dtype), tuple(moved))

    def op(self) -> Tensor:
        return getattr(ops, self.name)(self.x, *self.arguments)

    def reference(self) -> Tensor:
        return getattr(reference, self.name)(self.x, *self.arguments)

    def launch(self, launcher: Callable[..., None], **sizes: int) -> Tensor:
        out = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        launcher(self.x, *self.arguments, out, **sizes)
        return out

    def plain(self, value: Tensor) -> Tensor:
        """The function of a plain tensor whose dual the op is."""
        return PLAIN[self.name](value, *self.arguments)

    def eager(self) -> Tensor:
        """torch's own forward mode, tangent by tangent."""
        duals = [torch.func.jvp(self.plain, (self.x[0],), (tangent,)) for tangent in self.x[1:]]
        return torch.stack([duals[0][0], *(tangent for _, tangent in duals)])


def _modulate(y: Tensor, size: int, multiplier: Tensor | None, addend: Tensor | None) -> Tensor:
    shape = y.shape
    y = y.reshape(-1, size)
    if multiplier is not None:
        m = multiplier.reshape(-1, size)
        y = y * m.repeat_interleave(y.shape[0] // m.shape[0], 0)
    if addend is not None:
        a = addend.reshape(-1, size)
        y = y + a.repeat_interleave(y.shape[0] // a.shape[0], 0)
    return y.reshape(shape)


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)


def plain_layer_norm(x, size, weight, bias, eps, multiplier, addend):
    y = functional.layer_norm(x.reshape(-1, size), (size,), _vector(weight), _vector(bias), eps)
    return _modulate(y.reshape(x.shape), size, multiplier, addend)


def plain_rms_norm(x, size, weight, eps, multiplier, addend):
    y = functional.rms_norm(x.reshape(-1, size), (size,), _vector(weight), eps)
    return _modulate(y.reshape(x.shape), size, multiplier, addend)


def plain_group_norm(x, groups, weight, bias, eps, activation):
    y = functional.group_norm(x, groups, weight, bias, eps)
    return functional.silu(y) if activation == "silu" else y


PLAIN = {"dual_layer_norm": plain_layer_norm, "dual_rms_norm": plain_rms_norm, "dual_group_norm": plain_group_norm}


def random(*shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return mean + scale * torch.randn(*shape, dtype=torch.float64)


def layer(planes, shape, size, affine=True, rows=None, rms=False, eps=1e-5) -> Case:
    """A row norm of a dual (planes, *shape); `rows` of modulation, the addend as the half of a larger tensor."""
    weight = random(size, mean=1) if affine else None
    multiplier = None if rows is None else random(rows, size, mean=1)
    addend = None if rows is None else random(rows, 2 * size)[:, size:]
    x = random(planes, *shape, mean=0.3)
    if rms:
        return Case("dual_rms_norm", x, (size, weight, eps, multiplier, addend))
    return Case("dual_layer_norm", x, (size, weight, random(size) if affine else None, eps, multiplier, addend))


def group(planes, shape, groups, affine=True, activation="silu", eps=1e-5) -> Case:
    """A group norm of a dual (planes, *shape)."""
    weight, bias = (random(shape[1], mean=1), random(shape[1])) if affine else (None, None)
    x = random(planes, *shape, mean=0.3, scale=2.0)
    return Case("dual_group_norm", x, (groups, weight, bias, eps, activation))


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def assert_as_good_as_eager(case: Case, got: Tensor, extra: float = 2.0) -> None:
    """Twice eager's error against float64, plus `extra` units in the last place of the dtype."""
    assert got.shape == case.x.shape
    assert got.dtype == case.x.dtype
    assert got.is_contiguous()
    wanted, eager = case.to(torch.float64).reference(), case.eager()
    for plane in range(case.x.shape[0]):
        error = distance(eager[plane], wanted[plane])
        error = 0.0 if math.isnan(error) else error  # float16: eager cubes r, which overflows
        assert distance(got[plane], wanted[plane]) < 2 * error + extra * torch.finfo(case.x.dtype).eps
