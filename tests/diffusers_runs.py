"""Runs of diffusers' schedulers on a network that is perfect for data N(0, 0.25): log p of every sample is known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

VARIANCE, SHAPE = 0.25, (8, 4, 16, 16)
DIMENSION = math.prod(SHAPE[1:])
Level = tuple[float, float]

CLOSED: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddim, v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction", set_alpha_to_one=False),
    "ddim, sample": lambda: DDIMScheduler(clip_sample=False, prediction_type="sample", set_alpha_to_one=False),
    "euler": lambda: EulerDiscreteScheduler(use_karras_sigmas=True),
    "euler, linear": EulerDiscreteScheduler,
    "euler, v": lambda: EulerDiscreteScheduler(use_karras_sigmas=True, prediction_type="v_prediction"),
    "heun": lambda: HeunDiscreteScheduler(use_karras_sigmas=True),
    "dpm++ 2m": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm++ 2m, flow": lambda: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "dpm++ single": lambda: DPMSolverSinglestepScheduler(use_karras_sigmas=True),
    "unipc": lambda: UniPCMultistepScheduler(use_karras_sigmas=True),
    "edm euler": EDMEulerScheduler,
    "edm euler, v": lambda: EDMEulerScheduler(prediction_type="v_prediction"),
    "edm dpm++": EDMDPMSolverMultistepScheduler,
    "flow euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "euler ancestral": EulerAncestralDiscreteScheduler,
    "flow heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "dpm 2m": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm++ sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "dpm++ 3m": lambda: DPMSolverMultistepScheduler(solver_order=3),
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),
    "pndm, runge-kutta": PNDMScheduler,
    "ddim, clipped": DDIMScheduler,
}


@dataclass
class Run:
    """The last sample, and (alpha, sigma) with the state at each call of the network."""

    sample: Tensor
    calls: list[tuple[Level, Tensor]]


def level_of(scheduler: Any, timestep: Any) -> Level:
    """(alpha, sigma) of the state that goes into `step`."""
    name = type(scheduler).__name__
    if name in ("DDIMScheduler", "PNDMScheduler"):
        product = float(scheduler.alphas_cumprod[int(timestep)])
        return math.sqrt(product), math.sqrt(1.0 - product)
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    sigma = float(scheduler.sigmas[scheduler.step_index])
    if name.startswith("FlowMatch") or getattr(scheduler.config, "use_flow_sigmas", False):
        return 1.0 - sigma, sigma
    if name.startswith(("Euler", "Heun", "EDM")):
        return 1.0, sigma
    norm = math.hypot(1.0, sigma)
    return 1.0 / norm, sigma / norm


def network(scheduler: Any, x: Tensor, level: Level) -> Tensor:
    """What it predicts, in the scheduler's parameterisation."""
    alpha, sigma = level
    eps = sigma * x / (VARIANCE * alpha**2 + sigma**2)
    data = VARIANCE * alpha * x / (VARIANCE * alpha**2 + sigma**2)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if type(scheduler).__name__.startswith("EDM"):
        own = scheduler.config.sigma_data
        skip, scale = own**2 / (sigma**2 + own**2), sigma * own / math.hypot(sigma, own)
        return (data - skip * x) / (-scale if kind == "v_prediction" else scale)
    if kind == "v_prediction":
        norm = math.hypot(alpha, sigma)  # it lives on the variance preserving path
        return (alpha * eps - sigma * data) / norm
    return {"epsilon": eps, "sample": data, "flow_prediction": eps - data}[kind]


def run(scheduler: Any, steps: int, dtype: torch.dtype = torch.float32) -> Run:
    """A whole run from the same latents and noise."""
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * float(
        getattr(scheduler, "init_noise_sigma", 1.0)
    )
    x, generator, calls = x.to(dtype), torch.Generator().manual_seed(1), []
    for timestep in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        level = level_of(scheduler, timestep)
        calls.append((level, x))
        drawn = {"generator": generator} if "generator" in scheduler_parameters(scheduler) else {}
        x = scheduler.step(network(scheduler, x.float(), level).to(dtype), timestep, x, **drawn).prev_sample
    return Run(x, calls)


def scheduler_parameters(scheduler: Any) -> set[str]:
    return set(inspect.signature(scheduler.step).parameters)


def realised_over_commanded(found: Run, q: float) -> float:
    """Of log p, between the first and the last call with a density, against the exact flow and what q commands."""
    inside = [call for call in found.calls if call[0][0] > 1e-6 and call[0][1] > 0]
    (first, begin), (last, end) = inside[0], inside[-1]
    variances = [VARIANCE * level[0] ** 2 + level[1] ** 2 for level in (first, last)]
    flow = begin.double() ** 2 / variances[0]
    gained = 0.5 * (flow - end.double() ** 2 / variances[1]).flatten(1).sum(dim=1).mean()
    steps = math.log(first[1] / first[0]) - math.log(last[1] / last[0])
    return float(gained) / (math.sqrt(2.0 * DIMENSION) * NormalDist().inv_cdf(q) * steps)
