"""Jacobian-vector products as a user of plain torch would take them: the rivals of the jvp benchmark.

They need help to work at all. scaled_dot_product_attention has a forward derivative only in its MATH backend, and
group_norm's derivative takes a view of its input as it comes, which fails for inputs that are not dense: it is given
dense ones. Dynamo cannot take a jvp through group_norm at all; compiled rivals get it written out in plain operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.jvp_cases import Case, Function

Result = tuple[Tensor, Tensor | list[Tensor]]
Rival = Callable[[], Result]
NOTE = (
    "rivals run scaled_dot_product_attention's MATH backend; group norms get inputs made contiguous in eager rivals, "
    "and are written out in plain operators in compiled ones"
)


def _dense_group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    return functional.group_norm(x.contiguous(), self.num_groups, self.weight, self.bias, self.eps)


def _plain_group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0], self.num_groups, -1)
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * torch.rsqrt((rows * rows).mean(-1, keepdim=True) + self.eps)
    channels = (-1, *(1,) * (x.dim() - 2))
    if not self.affine:
        return rows.reshape(x.shape)
    return rows.reshape(x.shape) * self.weight.view(channels) + self.bias.view(channels)


@contextmanager
def helped(compiled: bool = False) -> Iterator[None]:
    """Where torch.func.jvp works on attention and group norms."""
    forward = _plain_group_norm if compiled else _dense_group_norm
    with sdpa_kernel(SDPBackend.MATH), mock.patch.object(nn.GroupNorm, "forward", forward):
        yield


def one_jvp(fn: Function, primals: tuple[Tensor, ...], vector: Tensor) -> tuple[Tensor, Tensor]:
    x, *rest = primals
    found: Any = torch.func.jvp(lambda x: fn(x, *rest), (x,), (vector,))
    return found[0], found[1]


def mapped_jvp(fn: Function, primals: tuple[Tensor, ...], vectors: Tensor) -> tuple[Tensor, Tensor]:
    x, *rest = primals

    def along(vector: Tensor) -> Any:
        return torch.func.jvp(lambda x: fn(x, *rest), (x,), (vector,))

    options: Any = {"out_dims": (None, 0)}  # None: the value is one for all; torch's annotation does not know it
    value, tangents = torch.func.vmap(along, **options)(vectors)
    return value, tangents


def rivals(case: Case, vectors: Tensor, compiled: bool) -> dict[str, Rival]:
    """Each takes the value and all K tangents; "per tangent" calls once for each of them, and keeps them apart."""
    fn, primals = case.fn, case.primals

    def single(primals: tuple[Tensor, ...], vector: Tensor) -> Any:
        return one_jvp(fn, primals, vector)

    def batched(primals: tuple[Tensor, ...], vectors: Tensor) -> Any:
        return mapped_jvp(fn, primals, vectors)

    def singly(one: Callable[..., Any], compiled: bool) -> Rival:
        def run() -> Result:
            with helped(compiled):
                found = [one(primals, vector) for vector in vectors]
            return found[0][0], [tangent for _, tangent in found]

        return run

    def together(mapped: Callable[..., Any], compiled: bool) -> Rival:
        def run() -> Result:
            with helped(compiled):
                return mapped(primals, vectors)

        return run

    found = {"func.jvp per tangent": singly(single, False), "vmap(jvp)": together(batched, False)}
    if compiled:
        found["compile(jvp) per tangent"] = singly(torch.compile(single, dynamic=False), True)
        found["compile(vmap(jvp))"] = together(torch.compile(batched, dynamic=False), True)
    return found


def exact(case: Case, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The first samples' value and tangents (K, *) by torch.func.jvp in float64."""
    fn, primals = case.double()
    with helped():
        found = [one_jvp(fn, primals, vector) for vector in vectors[:, : case.exact_rows].double()]
    return found[0][0], torch.stack([tangent for _, tangent in found])
