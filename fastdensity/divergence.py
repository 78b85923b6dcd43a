"""The divergence of a function on a batch: exact, or by random probes (Hutchinson 1990; Skilling 1989).

Probes are Rademacher vectors whose signs are bits of Philox words keyed by (seed, sample id, step, probe): they are
independent of the batch and of how it was cut. Two streams never share a word, so that what steers a sample can be
checked with probes it has not seen: an estimate's error in the drift cancels against the same error in log p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdensity.boundary import check_integer, check_sample_ids, check_state, describe
from fastdensity.reference.probe import STREAM_MEASURE as STREAM_MEASURE
from fastdensity.reference.probe import STREAM_STEER as STREAM_STEER
from fastdensity.reference.probe import rademacher as rademacher
from fastdensity.sums import pairwise_sum, row_dot, row_sum

METHODS = ("exact", "hutchinson")
TANGENT_ELEMENTS = 1 << 20  # of tangents that are pushed through a function at once


@dataclass(frozen=True, slots=True)
class DivergenceMethod:
    """How a divergence is found; `num_matvecs` is the number of probes, `seed` None means the caller's seed."""

    method: str = "hutchinson"
    num_matvecs: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        """ValueError or TypeError on a field out of range."""
        if self.method not in METHODS:
            raise ValueError(f"method of divergence must be one of {', '.join(METHODS)}, got {describe(self.method)}")
        check_integer("num_matvecs", self.num_matvecs, 1, 2**24 - 1)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, 2**63 - 1)

    @staticmethod
    def parse(divergence: Any, default: str) -> DivergenceMethod:
        """A method by name, by a dict of this class's fields, or the default for None."""
        if divergence is None:
            return DivergenceMethod(default)
        if isinstance(divergence, DivergenceMethod):
            return divergence
        if isinstance(divergence, str):
            return DivergenceMethod(divergence)
        if not isinstance(divergence, dict):
            raise TypeError(f"divergence must be None, a method's name or a dict, got {describe(divergence)}")
        known = tuple(DivergenceMethod.__slots__)
        unknown = [key for key in divergence if key not in known]
        if unknown:
            raise ValueError(f"divergence takes the keys {', '.join(known)}, got {', '.join(map(repr, unknown))}")
        return DivergenceMethod(**divergence)


def estimate_divergence(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    method: str = "exact",
    num_matvecs: int = 1,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    step: int = 0,
    stream: int = STREAM_MEASURE,
) -> tuple[Tensor, Tensor, Tensor]:
    """fn(x), its divergence and the standard error of that.

    Args:
        fn: (B, *) -> (B, *), rows independent of each other. x: (B, *).
        method: "exact", all D basis vectors; or "hutchinson", the mean of z.(J z) over `num_matvecs` probes z.
        seed, sample_ids, step, stream: the key of the probes; sample_ids int64 (B,), default 0 .. B-1.

    Returns:
        value (B, *) in fn's dtype; div (B,) and std_err (B,) in float64. std_err is 0 for "exact"; for probes their
        sample standard deviation over sqrt(num_matvecs), which one probe does not have: NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range; fn returned no tensor of x's shape.
    """
    check_state("x", x)
    how = DivergenceMethod(method, num_matvecs, check_integer("seed", seed, 0, 2**63 - 1))
    ids = check_sample_ids(sample_ids, x)
    if how.method == "exact":
        return _exact(fn, x)
    return _hutchinson(fn, x, num_matvecs, lambda probe: rademacher(seed, ids, step, probe, x, stream))


def directional_derivatives(fn: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """fn(x) (B, *) and J v (K, B, *) for each of `vectors` (K, B, *), by forward mode; fn(x) is computed once.

    Right under torch.no_grad. Attention runs on the implementation of torch's that has a forward derivative.
    """

    def checked(at: Tensor) -> Tensor:
        return _checked_value(fn(at), at)

    def push(vector: Tensor) -> tuple[Tensor, Tensor]:
        value, product = torch.func.jvp(checked, (x,), (vector,))[:2]
        return value, product

    x = x.contiguous()  # a dual number needs memory of its own, which an expanded row has not
    with sdpa_kernel(SDPBackend.MATH):
        if vectors.shape[0] == 1:
            value, product = push(vectors[0])
            return value, product[None]
        return torch.func.vmap(push, out_dims=(None, 0))(vectors)  # type: ignore[arg-type]


def _hutchinson(
    fn: Callable[[Tensor], Tensor], x: Tensor, count: int, probe: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(fn(x), mean of z.(J z), its standard error) over `count` probes, a bounded number of them at a time."""
    value, forms = x, list[Tensor]()
    for numbers in torch.split(torch.arange(count), _tangents_at_once(x)):
        probes = torch.stack([probe(int(number)) for number in numbers])
        value, products = directional_derivatives(fn, x, probes)
        forms.extend(row_dot(z, product) for z, product in zip(probes, products, strict=True))
    stacked = torch.stack(forms)
    mean = pairwise_sum(stacked, 0) / count
    if count == 1:
        return value, mean, torch.full_like(mean, math.nan)
    variance = pairwise_sum((stacked - mean) ** 2, 0) / (count - 1)
    return value, mean, torch.sqrt(variance / count)


def _exact(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(fn(x), sum of d fn_i / d x_i over all i, 0), a bounded number of basis vectors at a time."""
    columns = x.shape[1:].numel()
    zero = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return _checked_value(fn(x), x), zero, zero
    value, diagonal = x, []
    for numbers in torch.split(torch.arange(columns, device=x.device), _tangents_at_once(x)):
        count = numbers.shape[0]
        basis = torch.zeros(count, columns, dtype=x.dtype, device=x.device).scatter_(1, numbers[:, None], 1.0)
        vectors = basis.reshape(count, 1, *x.shape[1:]).expand(-1, *x.shape)
        value, products = directional_derivatives(fn, x, vectors)
        index = numbers[:, None, None].expand(-1, x.shape[0], 1)
        diagonal.append(products.flatten(2).gather(2, index).squeeze(2))
    return value, row_sum(torch.cat(diagonal).T), zero


def _tangents_at_once(x: Tensor) -> int:
    return max(1, TANGENT_ELEMENTS // max(1, x.numel()))


def _checked_value(value: Any, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != x.shape:
        raise ValueError(f"fn(x) must return a tensor of x's shape {tuple(x.shape)}, got {describe(value)}")
    return value
