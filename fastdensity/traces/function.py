"""The function whose divergence is wanted, and its derivatives: where `fd.jvp` enters the estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastdensity.boundary import describe
from fastdensity.jvp import jvp
from fastdensity.traces.key import ProbeKey

FORWARD_MODES = ("dual", "torch")


@dataclass(frozen=True, slots=True)
class Function:
    """fn(x, *args) of rows that are independent of each other.

    Attributes:
        fn: (B, *), args -> (B, *). args: a tensor whose first dimension is B belongs to the rows, row by row, also
            within tuples, lists and dicts; anything else is the same for all of them.
        forward: "dual", `fastdensity.jvp`; or "torch", torch.func.jvp, for functions that cannot be traced.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    forward: str = "dual"

    def rows(self, index: Tensor, batch: int) -> Function:
        """The same function of the rows `index` of a batch."""
        args = pytree.tree_map(lambda leaf: leaf[index] if _belongs_to_rows(leaf, batch) else leaf, self.args)
        return Function(self.fn, args, self.forward)

    def push(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """fn(x) (R, *) and J v (K, R, *) for each of `vectors` (K, R, *)."""
        if self.forward == "dual":
            value, products = jvp(self.fn, (x, *self.args), vectors)
            return checked_value(value, x), products
        return self._push_by_torch(x, vectors)

    def forms(
        self, x: Tensor, key: ProbeKey, first: int, count: int, distribution: str
    ) -> tuple[Tensor, Tensor] | None:
        """fn(x) (R, *) and z.(J z) (count, R) in float64, by layers that make their probes themselves.

        None where neither the first nor the last layer of fn can.
        """
        if self.forward != "dual":
            return None
        from fastdensity.dual.trace_graph import trace_forms

        where = (key.seed, key.sample_ids, key.step, first, count, distribution, key.stream)
        return trace_forms(self.fn, (x, *self.args), where)

    def _push_by_torch(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        def along(vector: Tensor) -> tuple[Tensor, Tensor]:
            value, product = torch.func.jvp(lambda at: checked_value(self.fn(at, *self.args), at), (x,), (vector,))[:2]
            return value, product

        x = x.contiguous()  # a dual number needs memory of its own, which an expanded row has not
        with sdpa_kernel(SDPBackend.MATH):  # the one implementation of attention that has a forward derivative
            if vectors.shape[0] == 1:
                value, product = along(vectors[0])
                return value, product[None]
            return torch.func.vmap(along, out_dims=(None, 0))(vectors)  # type: ignore[arg-type]


def _belongs_to_rows(arg: Any, batch: int) -> bool:
    return isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == batch


def checked_value(value: Any, x: Tensor) -> Tensor:
    """fn's result; ValueError unless it is a real tensor of x's shape, for only then is its Jacobian square."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise ValueError(f"fn(x) must return floating numbers, it returned {describe(value)}")
    if not isinstance(value, Tensor) or value.shape != x.shape:
        sizes = ", ".join(map(str, x.shape[1:]))
        raise ValueError(
            f"fn(x) must return a tensor of x's shape, (B, {sizes}), or its Jacobian is not square; "
            f"for B = {x.shape[0]} it returned {describe(value)}"
        )
    return value
