"""The ends of a trace graph: linear layers with probes made inside.

    stack = dual_linear_probe(x, W, b, ...)        # [act(x W^T + b); act' * (z_k W^T)], z never in memory
    forms = dual_linear_trace(tangents, W, ...)    # z_k . (t_k W^T), neither z nor the product in memory
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
    tangents: Tensor,
    weight: Tensor,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    distribution: str,
    stream: int,
) -> Tensor:
    sizes = reference.traced_shape(tangents, weight, sample_ids)
    return torch.empty(sizes, dtype=torch.float64, device=tangents.device)


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
    "Tensor tangents, Tensor weight, SymInt seed, Tensor sample_ids, SymInt step, SymInt first, str distribution, "
    "SymInt stream",
    reference.dual_linear_trace,
    _empty_forms,
    room="trace_linear",
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
    return _probe(
        x, weight, bias, activation, seed, sample_ids, step, first, count, columns, distribution, stream
    )


def dual_linear_trace(
    tangents: Tensor,
    weight: Tensor,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    distribution: str,
    stream: int,
) -> Tensor:
    """z_k . (t_k W^T), a number a sample and probe, where a linear layer is a network's last.

    Args:
        tangents: (K, B, C), those of the layer's input; tangents[k] goes with probe first + k.
        weight: plain, (N, C); a probe has N elements. The layer's bias has no part in a tangent.
        seed, sample_ids, step, first, stream: the probes, as in `fastdensity.ops.probe.make_probes`.
        distribution: "rademacher", "normal" or "hadamard".

    Returns:
        (K, B) in float64. Linear in `tangents` and in `weight`, and differentiable by them in both modes.

    Raises:
        ValueError, TypeError: as `dual_linear_probe`.
    """
    _check(distribution, first, tangents.shape[0])
    return _trace(tangents, weight, seed, sample_ids, step, first, distribution, stream)


def _check(distribution: str, first: int, count: int) -> None:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if first < 0 or count < 1 or first + count > MOST_PROBES:
        raise ValueError(f"probes must be in [0, {MOST_PROBES - 1}], at least one, got {first} to {first + count - 1}")
