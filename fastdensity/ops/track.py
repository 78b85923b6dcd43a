"""The closed loop of density guidance: what a step really did to log p is measured at the next one, and fed back.

Plain guidance is exact in the limit of short steps only. `docs/few-steps.md` derives the loop; the contract of its
kernels is `fastdensity.reference.track`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastdensity._backend import launcher
from fastdensity.boundary import DERIVATIVE, OPERATOR, check_like, check_number, describe
from fastdensity.ops.rows_operator import mark_written, new_result, prepare
from fastdensity.ops.rows_operator import run as run_rows
from fastdensity.ops.state import GuidanceState
from fastdensity.reference import rows
from fastdensity.reference import track as reference
from fastdensity.reference.rows import Parameter, compute_dtype, flatten
from fastdensity.reference.track import MEMORY, PARAMETERS, Operands

DEFAULTS: dict[str, Parameter] = {
    "q": 0.5, "shift": 0.0, "cfg_scale": 1.0, "noise_scale": 0.0, "sigma_data": 0.5, "carry": 0.0,
}  # fmt: skip


def track(
    rule: str,
    kind: str,
    scheme: str,
    state: GuidanceState,
    operands: rows.Operands,
    parameters: dict[str, Parameter],
    noise_key: rows.NoiseKey | None = None,
    out: Tensor | None = None,
    report: Tensor | Literal[True] | None = True,
) -> tuple[Tensor, Tensor | None]:
    """(out, report) of the rows family's rule "step" or "prediction" with the eta that closes the loop, in one pass.

    `state` is brought up to date. Arguments are checked already, but for the state and for what is written: `scheme`
    and `parameters` (those without a default must be given) are explained in `fastdensity.reference.track`, `kind` is
    a canonical prediction type, operands are those of `fastdensity.reference.rows`. With the scheme "corrector" the
    state keeps the vectors of the step's beginning. The flags of `report` are the loop's and the step's.

    Raises:
        TypeError, ValueError: the state is none, or was made for another batch; as `rows_operator.run`.
    """
    sample, prediction, uncond, noise = operands
    assert sample is not None
    assert prediction is not None
    check_guidance_state(state, sample)
    given = DEFAULTS | parameters
    numbers = tuple(given[name] for name in PARAMETERS)
    looked_at: Operands = (sample, prediction, uncond, state.sample, state.eps)
    everything = (*looked_at, noise, *numbers, state.memory, None if noise_key is None else noise_key[1])
    like = sample if rule == "step" else prediction
    how = prepare(like, operands, everything, out, report, "sample" if rule == "step" else "prediction")
    kept = sample if out is None else sample.clone()  # the state keeps it, and out may be its memory
    if how in (DERIVATIVE, OPERATOR):
        eps, decided, memory = reference.track(kind, scheme, flatten(looked_at), numbers, state.memory)
        then = reference.step_parameters(numbers, decided[:, 0], noise is not None or noise_key is not None)
        made, found = run_rows(rule, kind, operands, then, noise_key, out, report, "sample")
        if found is not None:
            flagged = reference.with_flags(found, decided)
            found = found.copy_(flagged) if isinstance(report, Tensor) else flagged
        eps = eps.reshape(sample.shape)
    else:
        made = new_result(like) if out is None else out
        dtype = compute_dtype((sample, prediction, uncond, noise))
        found = sample.new_empty((sample.shape[0], 4), dtype=dtype) if report is True or report is None else report
        step = reference.Step(rule, noise, noise_key, made, found)
        eps, _, memory = run(kind, scheme, looked_at, numbers, state.memory, step)
        mark_written(out, report if isinstance(report, Tensor) else None)
    if scheme != "corrector":
        state.sample, state.eps = kept, eps
    state.memory = memory
    return made, found


def check_loop(
    scheme: Any, carry: Any, place: tuple[Parameter, ...], ends: tuple[Parameter, ...], gain: Any,
    sample: Tensor,
) -> dict[str, Parameter]:  # fmt: skip
    """What `track` wants to know of a step, checked: `place` and `ends` are (alpha, sigma) before and after it.

    Raises:
        TypeError, ValueError: a step that does not lead from noise to data, a gain beside the loop's own.
    """
    if scheme not in reference.SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(reference.SCHEMES)}, got {describe(scheme)}")
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
    kind: str, scheme: str, operands: Operands, parameters: tuple[Parameter, ...], memory: Tensor,
    step: reference.Step | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(eps, report, memory) by a kernel, which writes `step`, too; all of it plain tensors, see `track`."""
    sample = operands[0]
    dense: Any = tuple(None if operand is None else operand.resolve_neg().contiguous() for operand in operands)
    noise = None
    if step is not None and step.noise is not None:
        noise = step.noise.resolve_neg().contiguous()
        step = step._replace(noise=noise)
    eps = torch.empty(sample.shape, dtype=compute_dtype((*operands[:4], noise)), device=sample.device)
    report = torch.empty((sample.shape[0], 4), dtype=torch.float64, device=sample.device)
    after = torch.empty_like(memory, memory_format=torch.contiguous_format)
    if sample.numel() == 0:
        if step is not None:
            step.report.zero_()
        return eps, report.zero_(), memory.clone()
    launch = launcher("track", "cpu" if sample.is_cpu else sample.device.type)
    launch(kind, scheme, dense, parameters, memory.contiguous(), eps, report, after, step)
    return eps, report, after
