"""Torch references of the two ends of a trace: a first layer that is fed probes, and a last one that meets them again.

Neither op's contract has a tensor of probes in it: a kernel makes them a tile at a time, with the bits of
`fastdensity.reference.probe.make_probes`, in the layer's dtype at the first end, in the arithmetic's own at the last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastdensity.boundary import describe
from fastdensity.reference.dual_linear import dual_linear, result_shape
from fastdensity.reference.probe import make_probes, probe_forms

DISTRIBUTIONS = ("rademacher", "normal", "hadamard")  # the sphere's probes need their norm, another pass over them


def probed_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, sample_ids: Tensor, count: int, columns: int
) -> tuple[int, ...]:
    """(1 + K, B, N), or N / 2 for geglu; ValueError or TypeError where the arguments do not fit together."""
    if x.dim() != 2 or x.shape[0] != sample_ids.shape[0]:
        raise ValueError(f"x must be (B, C) with B = {sample_ids.shape[0]} sample ids, got {describe(x)}")
    if not 1 <= columns <= x.shape[1]:
        raise ValueError(f"columns must be in [1, {x.shape[1]}], the inputs of the layer, got {columns}")
    return result_shape(x.expand(1 + count, *x.shape), weight, bias, activation)


def traced_shape(stacked: Tensor, weight: Tensor, bias: Tensor | None, sample_ids: Tensor) -> tuple[int, ...]:
    """(1 + K, B, N) of the layer's result; ValueError or TypeError where the arguments do not fit together."""
    if stacked.dim() != 3 or stacked.shape[1] != sample_ids.shape[0]:
        wanted = f"(1 + K, B, C) with B = {sample_ids.shape[0]} sample ids"
        raise ValueError(f"stacked must be {wanted}, got {describe(stacked)}")
    sizes = result_shape(stacked, weight, bias, "none")
    if sizes[2] == 0:
        raise ValueError("weight must have a row for each element of a probe, got none")
    return sizes


def dual_linear_probe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
) -> Tensor:
    """(1 + K, B, N) in torch; the arguments are those of `fastdensity.ops.trace_linear`."""
    probes = make_probes(seed, sample_ids, step, first, count, columns, distribution, stream, x.dtype)
    padded = functional.pad(probes, (0, x.shape[1] - columns))
    return dual_linear(torch.cat([x.unsqueeze(0), padded]), weight, bias, activation)


def dual_linear_trace(
    stacked: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    distribution: str,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """(B, N), and (K, B) in float64, in torch; the arguments are those of `fastdensity.ops.trace_linear`."""
    traced_shape(stacked, weight, bias, sample_ids)
    value = functional.linear(stacked[0], weight, bias)
    products = functional.linear(stacked[1:], weight)
    return value, probe_forms(products, seed, sample_ids, step, first, distribution, stream)


def dual_linear_probe_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    out: Tensor,
) -> None:
    """Compute into `out`, of any device."""
    key = (seed, sample_ids, step, first, count, columns, distribution, stream)
    out.copy_(dual_linear_probe(x, weight, bias, activation, *key))


def dual_linear_trace_torch(
    stacked: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    distribution: str,
    stream: int,
    value: Tensor,
    forms: Tensor,
) -> None:
    """Compute into `value` and `forms`, of any device."""
    results = dual_linear_trace(stacked, weight, bias, seed, sample_ids, step, first, distribution, stream)
    value.copy_(results[0])
    forms.copy_(results[1])
