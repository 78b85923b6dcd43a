"""The closed loop of density guidance: what a step really did to log p is measured at the next one, and fed back.

Plain guidance is exact in the limit of short steps only. `docs/few-steps.md` derives the loop; the contract of its
kernels is `fastdensity.reference.track`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdensity._backend import launcher
from fastdensity.boundary import DERIVATIVE, OPERATOR, check_like, check_number, describe, route
from fastdensity.ops.state import GuidanceState
from fastdensity.reference import track as reference
from fastdensity.reference.rows import Parameter, compute_dtype, flatten
from fastdensity.reference.track import MEMORY, PARAMETERS, Operands

DEFAULTS: dict[str, Parameter] = {
    "q": 0.5, "shift": 0.0, "repair": 0.0, "cfg_scale": 1.0, "noise_scale": 0.0, "sigma_data": 0.5, "carry": 0.0,
    "final": 0.0,
}  # fmt: skip


def track(
    state: GuidanceState,
    sample: Tensor,
    prediction: Tensor,
    uncond: Tensor | None,
    kind: str,
    scheme: str,
    parameters: dict[str, Parameter],
) -> Tensor:
    """(B, 4) float64: eta - 1, ||eps||^2, nats commanded less nats realised so far, flags; brings `state` up to date.

    Arguments are checked already, but for the state: `scheme` and `parameters` (those without a default must be
    given) are explained in `fastdensity.reference.track`, `kind` is a canonical prediction type. With the scheme
    "corrector" the state keeps the vectors of the step's beginning.

    Raises:
        TypeError, ValueError: the state is none, or was made for another batch.
    """
    check_guidance_state(state, sample)
    given = DEFAULTS | parameters
    ordered = tuple(given[name] for name in PARAMETERS)
    operands: Operands = (sample, prediction, uncond, state.sample, state.eps)
    eps, report, memory = run(kind, scheme, operands, ordered, state.memory)
    if scheme != "corrector":
        state.sample, state.eps = sample, eps
    state.memory = memory
    return report


def check_loop(
    scheme: Any, carry: Any, final: Any, place: tuple[Parameter, ...], ends: tuple[Parameter, ...], gain: Any,
    sample: Tensor,
) -> dict[str, Parameter]:  # fmt: skip
    """What `track` wants to know of a step, checked: `place` and `ends` are (alpha, sigma) before and after it.

    Raises:
        TypeError, ValueError: a step that does not lead from noise to data, a gain beside the loop's own.
    """
    if scheme not in reference.SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(reference.SCHEMES)}, got {describe(scheme)}")
    if not isinstance(final, bool):
        raise TypeError(f"final must be True or False, got {describe(final)}")
    if isinstance(gain, Tensor) or gain != 0.0:
        raise ValueError("gain cannot be given with state: the closed loop chooses eta itself, from q and shift")
    carry = check_number("carry", carry, sample, 0.0)
    alpha, sigma, alpha_next, sigma_next = (*place, *ends)
    plain = not any(isinstance(number, Tensor) for number in (alpha, sigma, alpha_next, sigma_next))
    if plain and scheme != "corrector" and not alpha * sigma_next < alpha_next * sigma:
        raise ValueError(
            "a step with state must lead from noise to data, sigma_next / alpha_next < sigma / alpha; got "
            f"alpha = {alpha}, sigma = {sigma}, alpha_next = {alpha_next}, sigma_next = {sigma_next}"
        )
    return {
        "alpha": alpha,
        "sigma": sigma,
        "alpha_next": alpha_next,
        "sigma_next": sigma_next,
        "alpha_end": alpha_next,
        "sigma_end": sigma_next,
        "carry": carry,
        "final": float(final),
    }


def check_guidance_state(state: Any, sample: Tensor) -> None:
    """TypeError or ValueError unless `state` fits rows like these."""
    if not isinstance(state, GuidanceState):
        raise TypeError(f"state must be a fastdensity.GuidanceState, got {describe(state)}")
    expected = (sample.shape[0], len(MEMORY))
    if state.memory.shape != expected or state.memory.device != sample.device:
        raise ValueError(
            f"state must be of this batch, with a memory of shape {expected} on {sample.device}, "
            f"got {describe(state.memory)}; GuidanceState.fresh(sample) begins a new one"
        )
    if state.memory.dtype is not torch.float64:
        raise TypeError(f"state.memory must be float64, got {describe(state.memory)}")
    if (state.sample is None) != (state.eps is None):
        raise ValueError("state must hold both the last sample and the last eps, or neither")
    for name, vector in (("state.sample", state.sample), ("state.eps", state.eps)):
        if vector is not None:
            check_like(name, vector, sample, "sample")


def run(
    kind: str, scheme: str, operands: Operands, parameters: tuple[Parameter, ...], memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(eps, report, memory): by a kernel; by the reference where torch wants a derivative or has to see operators."""
    sample = operands[0]
    if torch.compiler.is_compiling() or route((*operands, *parameters, memory)) in (DERIVATIVE, OPERATOR):
        eps, report, after = reference.track(kind, scheme, flatten(operands), parameters, memory)
        return eps.reshape(sample.shape), report, after
    dense: Any = tuple(None if operand is None else operand.resolve_neg().contiguous() for operand in operands)
    eps = torch.empty(sample.shape, dtype=compute_dtype(operands[:4]), device=sample.device)
    report = torch.empty((sample.shape[0], 4), dtype=torch.float64, device=sample.device)
    after = torch.empty_like(memory, memory_format=torch.contiguous_format)
    if sample.numel() == 0:
        return eps, report.zero_(), memory.clone()
    launch = launcher("track", "cpu" if sample.is_cpu else sample.device.type)
    launch(kind, scheme, dense, parameters, memory.contiguous(), eps, report, after)
    return eps, report, after
