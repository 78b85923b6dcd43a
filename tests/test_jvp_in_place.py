"""Networks that overwrite their own intermediates: right, or refused where a view would see it; never wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastdensity as fd


def chain(x: Tensor) -> Tensor:
    h = x * 2
    g = h + 1
    h.relu_()
    h += g
    k = h.relu_()
    return k + h


def assigned(x: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    h[:, 0] = x[:, 1]
    h[:, 1] = x[:, 0] ** 2
    h += x
    return h


def slices(x: Tensor) -> Tensor:
    h = x.clone()
    h[0].sub_(x[1])
    h[:, 1:3].mul_(x[:, 1:3])
    return h.add_(1).relu_()


def used_twice(x: Tensor) -> Tensor:
    h = torch.relu_(x.sin())
    return h * 3 + h.square()


def half(x: Tensor) -> Tensor:
    left, right = (x * 2).chunk(2, -1)
    left.mul_(right)
    return left


def through_a_view(x: Tensor) -> Tensor:
    h = torch.relu_(x * 2)
    h.view(-1).mul_(2)
    return h


def slice_then_whole(x: Tensor) -> Tensor:
    h = x * 2
    s = h[0]
    s.mul_(2)
    h.mul_(3)
    return s + h


def view_before(x: Tensor) -> Tensor:
    h = x * 2
    v = h.view(-1)
    h.relu_()
    return v.reshape(x.shape) * x


def view_of_result(x: Tensor) -> Tensor:
    h = (x * 2).relu_()
    v = h.t()
    h.mul_(x)
    return v


def halves(x: Tensor) -> Tensor:
    h = x * 2
    left, right = h.chunk(2, -1)
    left.mul_(right)
    return h


def same_slice_twice(x: Tensor) -> Tensor:
    h = x * 2
    v, w = h[0], h[0]
    v.mul_(3)
    return w + v


def diagonal(x: Tensor) -> Tensor:
    h = x.T @ x
    h.fill_diagonal_(2)
    tall = torch.cat([h, h, h])
    return tall.fill_diagonal_(0, wrap=True) * h.sum()


def powers(x: Tensor) -> Tensor:
    h = x.exp()
    return h.pow_(x).float_power_(x)


RIGHT = [chain, assigned, slices, used_twice, half, diagonal, powers]
RIGHT_OR_REFUSED = [through_a_view, slice_then_whole, view_before, view_of_result, halves, same_slice_twice]


def by_torch(fn: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    return fn(x), torch.stack([torch.func.jvp(fn, (x,), (vector,))[1] for vector in vectors])


@pytest.mark.parametrize("fn", [*RIGHT, *RIGHT_OR_REFUSED])
def test_in_place_operations(fn: Callable[[Tensor], Tensor]) -> None:
    x, vectors = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    wanted = by_torch(fn, x, vectors)
    try:
        got = fd.jvp(fn, (x,), vectors)
    except ValueError as error:
        refused = "overwrites memory that is read later" in str(error) and "test_jvp_in_place.py" in str(error)
        if fn in RIGHT or not refused:
            raise
        return
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_memory_given_as_out() -> None:
    def given(x: Tensor) -> Tensor:
        h, narrow = torch.empty(2, 4, dtype=torch.float64), torch.empty(2, 4)
        torch.sin(x, out=h)
        torch.add(x, x, alpha=2, out=narrow[:])
        return torch.mul(h, x, out=h) + narrow

    def returned(x: Tensor) -> Tensor:
        return x.sin() * x + (3 * x).float()

    x, vectors = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    for ours, theirs in zip(fd.jvp(given, (x,), vectors), by_torch(returned, x, vectors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "draw",
    [
        lambda h: h.normal_(2, 3),
        lambda h: h.bernoulli_(),
        lambda h: h.bernoulli_(0.25),
        lambda h: h.uniform_(1, 2),
        lambda h: h.exponential_(),
        lambda h: h.log_normal_(),
    ],
)
def test_memory_filled_with_random_numbers(draw: Callable[[Tensor], Tensor]) -> None:
    def fn(x: Tensor) -> Tensor:
        return x * draw(torch.empty(2, 4, dtype=torch.float64)) + draw(x.clone())

    x, vectors = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    for _ in range(2):
        torch.manual_seed(1)
        out, tangents = fd.jvp(fn, (x,), vectors)
        torch.manual_seed(1)
        torch.testing.assert_close(out, fn(x))
        torch.manual_seed(1)
        torch.testing.assert_close(tangents, vectors * draw(torch.empty(2, 4, dtype=torch.float64)))
