"""Products with the Jacobians of a block of rows: all that an estimator of the trace may ask for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastdensity.ops.probe import OrthogonalProbes, make_probes, probe_forms
from fastdensity.sums import row_dot, row_sum
from fastdensity.traces.function import Function
from fastdensity.traces.key import ProbeKey


class Products(Protocol):
    """R rows, each with a Jacobian J (n x n) of its own and probes of its own."""

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]  # of one sample; its product is `columns`
    tangents: int  # products that are best taken at a time

    def probes(self, first: int, count: int, distribution: str) -> Tensor:
        """Probes first .. first + count - 1, (count, R, n)."""

    def apply(self, vectors: Tensor) -> Tensor:
        """J v for each of (K, R, n)."""

    def forms(self, first: int, count: int, distribution: str) -> Tensor:
        """z.(J z) for the same probes, (count, R) in float64."""


class JacobianProducts:
    """`Products` of fn at x (R, *), less `identity` times the identity; a bounded number of tangents at a time.

    Attributes:
        value: fn(x), after the first product. offset: added to the number of every probe. valid: the rows that are
            there for themselves; the others are copies of the first.
    """

    def __init__(
        self,
        function: Function,
        x: Tensor,
        key: ProbeKey,
        tangents: int,
        identity: Tensor | None,
        offset: int = 0,
        valid: int | None = None,
    ) -> None:
        """identity: (R,) float64, or None for 0."""
        self.function, self.x, self.key, self.tangents, self.identity = function, x, key, tangents, identity
        self.offset = offset
        self.shape = tuple(x.shape[1:])
        self.rows, self.columns = x.shape[0], x.shape[1:].numel()
        self.dtype, self.device = x.dtype, x.device
        self.value: Tensor | None = None
        self.valid = self.rows if valid is None else valid
        self._orthogonal = OrthogonalProbes(key.seed, key.sample_ids[: self.valid], key.step, self.columns, key.stream)

    def probes(self, first: int, count: int, distribution: str) -> Tensor:
        """See `Products`."""
        key, begin = self.key, first + self.offset
        if distribution == "orthogonal":  # made for rows, not for the copies that fill a block up
            made = self._orthogonal.take(begin, count, self.dtype)
            return torch.cat([made, made[:, :1].expand(-1, self.rows - self.valid, -1)], 1)
        return make_probes(
            key.seed, key.sample_ids, key.step, begin, count, self.columns, distribution, key.stream, self.dtype
        )

    def apply(self, vectors: Tensor) -> Tensor:
        """See `Products`."""
        parts = [self._push(part) for part in torch.split(vectors, self.tangents)]
        products = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.identity is not None:  # in float64: a rounded identity is not what is added to the trace
            products = products.double() - self.identity[:, None] * vectors
        return products.to(self.dtype)  # under autocast, say, fn's own is another; vectors made of these must fit x

    def forms(self, first: int, count: int, distribution: str) -> Tensor:
        """See `Products`. Probes are made where they enter and again where they meet their products, in registers or a
        block at a time, if the ends of fn allow it (`fastdensity.dual.trace_graph`); else in chunks.
        """
        forms = torch.empty(count, self.rows, dtype=torch.float64, device=self.device)  # see exact_trace
        for begin in range(first, first + count, self.tangents):
            number = min(self.tangents, first + count - begin)
            found = self.function.forms(self.x, self.key, begin + self.offset, number, distribution)
            if found is None:
                part = self._forms_of_made(begin, number, distribution)
            else:
                self._keep(found[0])
                part = found[1]
            if self.identity is not None:
                part = part - self.identity * self._squares(begin, number, distribution)
            forms[begin - first : begin - first + number] = part
        return forms

    def _forms_of_made(self, begin: int, number: int, distribution: str) -> Tensor:
        """The forms of probes in memory."""
        probes = self.probes(begin, number, distribution)
        products = self._push(probes)
        if distribution == "orthogonal":
            return _dots(probes, products)
        key = self.key
        where = (key.seed, key.sample_ids, key.step, begin + self.offset)
        return probe_forms(products, *where, distribution, key.stream)

    def _squares(self, begin: int, number: int, distribution: str) -> Tensor | int:
        """z.z of probes; signs have the same everywhere."""
        if distribution in ("rademacher", "hadamard"):
            return self.columns
        probes = self.probes(begin, number, distribution)
        return _dots(probes, probes)

    def diagonal(self, first: int, count: int) -> Tensor:
        """J_ii for i = first .. first + count - 1, (count, R), by products with basis vectors."""
        numbers = torch.arange(first, first + count, device=self.device)
        basis = torch.zeros(count, self.columns, dtype=self.dtype, device=self.device)
        basis.scatter_(1, numbers[:, None], 1.0)
        products = self._push(basis[:, None].expand(count, self.rows, self.columns))
        return products.gather(2, numbers[:, None, None].expand(count, self.rows, 1)).squeeze(2)

    def _push(self, vectors: Tensor) -> Tensor:
        value, products = self.function.push(self.x, vectors.reshape(-1, *self.x.shape))
        self._keep(value)
        return products.reshape(vectors.shape)

    def _keep(self, value: Tensor) -> None:
        if self.value is None:
            self.value = value.clone()  # it is the first of the planes, and would keep the memory of all


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """a.b in float64 over the last dimension of (K, R, n)."""
    return row_dot(a.flatten(0, 1), b.flatten(0, 1)).reshape(a.shape[:2])


def exact_trace(products: JacobianProducts) -> Tensor:
    """The trace (R,) in float64, by one product per element."""
    # small results kept between the large ones of calls would have the C library spread over ever more memory
    elements: Tensor | None = None
    for first in range(0, products.columns, products.tangents):
        count = min(products.tangents, products.columns - first)
        part = products.diagonal(first, count)
        if elements is None:
            elements = part.new_empty(products.columns, products.rows)
        elements[first : first + count] = part
    assert elements is not None
    return row_sum(elements.T)
