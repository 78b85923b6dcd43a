"""The ends of a trace graph: linear layers with probes made inside.

stacked = dual_linear_probe(x, W, b, ...)         # [act(x W^T + b); act' * (z_k W^T)], z never in memory
y, forms = dual_linear_trace([h; t], W, b, ...)   # h W^T + b and z_k . (t_k W^T): neither z nor t_k W^T in memory
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.ops.dual_operator import define
from fastdensity.reference import trace_linear as reference
from fastdensity.reference.probe import MOST_PROBES
from fastdensity.reference.trace_linear import DISTRIBUTIONS


def _empty_stack(
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
    sizes = reference.probed_shape(x, weight, bias, activation, sample_ids, count, columns)
    return torch.empty(sizes, dtype=x.dtype, device=x.device)


def _empty_forms(
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
    planes, rows, columns = reference.traced_shape(stacked, weight, bias, sample_ids)
    value = torch.empty((rows, columns), dtype=stacked.dtype, device=stacked.device)
    return value, torch.empty((planes - 1, rows), dtype=torch.float64, device=stacked.device)


_probe = define(
    "dual_linear_probe",
    "Tensor x, Tensor weight, Tensor? bias, str activation, SymInt seed, Tensor sample_ids, SymInt step, SymInt first, "
    "SymInt count, SymInt columns, str distribution, SymInt stream",
    reference.dual_linear_probe,
    _empty_stack,
    room="trace_linear",
)
_trace = define(
    "dual_linear_trace",
    "Tensor stacked, Tensor weight, Tensor? bias, SymInt seed, Tensor sample_ids, SymInt step, SymInt first, "
    "str distribution, SymInt stream",
    reference.dual_linear_trace,
    _empty_forms,
    room="trace_linear",
    results=2,
)


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
    """A linear layer whose tangents are those of probes: act(x W^T + b) and act'(x W^T + b) * ([z_k, 0] W^T).

    Args:
        x: (B, C), the value; its first `columns` inputs are those that the probes move, the others have no tangent.
        weight, bias, activation: as in `fastdensity.ops.dual_linear`.
        seed, sample_ids, step, first, count, columns, stream: the probes, as in `fastdensity.ops.probe.make_probes`;
            1 <= columns <= C.
        distribution: "rademacher", "normal" or "hadamard".

    Returns:
        The dual (1 + count, B, N), for geglu (1 + count, B, N / 2), contiguous.

    Raises:
        ValueError: an unknown activation or distribution, or shapes that do not fit together.
        TypeError: a weight or bias of another dtype than x.
    """
    _check(distribution, first, count)
    key = (seed, sample_ids, step, first, count, columns, distribution, stream)
    stacked: Tensor = _probe(x, weight, bias, activation, *key)
    return stacked


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
    """h W^T + b, and z_k . (t_k W^T), a number a sample and probe, where a linear layer is a network's last.

    Args:
        stacked: the dual (1 + K, B, C) of the layer's input; tangent k goes with probe first + k.
        weight, bias: plain, (N, C) and (N,) or None; a probe has N >= 1 elements.
        seed, sample_ids, step, first, stream: the probes, as in `fastdensity.ops.probe.make_probes`.
        distribution: "rademacher", "normal" or "hadamard".

    Returns:
        The value (B, N) and the forms (K, B) in float64, which are linear in the tangents and in `weight`.

    Raises:
        ValueError, TypeError: as `dual_linear_probe`.
    """
    _check(distribution, first, stacked.shape[0] - 1)
    value, forms = _trace(stacked, weight, bias, seed, sample_ids, step, first, distribution, stream)
    return value, forms


def _check(distribution: str, first: int, count: int) -> None:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if first < 0 or count < 1 or first + count > MOST_PROBES:
        raise ValueError(f"probes must be in [0, {MOST_PROBES - 1}], at least one, got {first} to {first + count - 1}")
