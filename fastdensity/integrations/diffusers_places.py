"""Where a diffusers scheduler is when its `step` is called, and where it takes x = alpha x0 + sigma eps.

One function per family of schedulers, read off diffusers' own `step` (version 0.42). Numbers are Python's, made from
the scheduler's tables: nothing waits for a device. Formulas: Karras et al. 2022 (sigmas), Song et al. 2021 (DDIM),
Lu et al. 2022 (DPM-Solver++), Liu et al. 2022 (PNDM).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastdensity.integrations.tables import Tables

Level = tuple[float, float]  # alpha, sigma


@dataclass(frozen=True, slots=True)
class Place:
    """One call of `step`.

    here, end: (alpha, sigma) of the state given, and of the level it is taken to. kind: prediction type. step_to: the
    deterministic part of the step, if it is not `end`. noise: standard deviation of what is added. scheme, carry: see
    `fastdensity.reference.track`; "open" where no loop is closed. rescale: the state times this is what `here` and
    `kind` are about. negated: the network's sign.
    """

    here: Level
    end: Level
    kind: str
    step_to: Level | None = None
    noise: float = 0.0
    scheme: str = "direct"
    carry: float = 0.0
    rescale: float = 1.0
    negated: bool = False
    sigma_data: float = 0.5


def _ve(sigma: float) -> Level:
    return 1.0, sigma


def _vp(sigma: float) -> Level:
    """The variance preserving path's level of the same sigma / alpha."""
    norm = math.hypot(1.0, sigma)
    return 1.0 / norm, sigma / norm


def _flow(sigma: float) -> Level:
    return 1.0 - sigma, sigma


def _level_of_product(product: float) -> Level:
    """Of alpha^2."""
    return math.sqrt(product), math.sqrt(max(1.0 - product, 0.0))


def _step_index(scheduler: Any, timestep: Any) -> int:
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return int(scheduler.step_index)


def _prediction(scheduler: Any) -> str:
    name = scheduler.config.prediction_type
    return {"flow_prediction": "velocity", "original_sample": "sample"}.get(name, name)


def _euler(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    """EulerDiscrete and EulerAncestral: x = x0 + sigma eps; v lives on x / sqrt(1 + sigma^2)."""
    index, sigmas = _step_index(scheduler, timestep), tables.numbers(scheduler.sigmas)
    sigma, target = sigmas[index], sigmas[index + 1]
    noise, reached = 0.0, target
    if "s_churn" in arguments:
        noise = _churn(arguments, sigma, len(sigmas))
    elif type(scheduler).__name__.startswith("EulerAncestral"):
        noise = math.sqrt(max(target**2 * (sigma**2 - target**2), 0.0)) / sigma
        reached = math.sqrt(max(target**2 - noise**2, 0.0))
    kind = _prediction(scheduler)
    if kind != "v_prediction":
        return Place(_ve(sigma), _ve(target), kind, _ve(reached), noise)
    norm = math.hypot(1.0, sigma)
    return Place(_vp(sigma), _ve(target), kind, _ve(reached), noise, rescale=1.0 / norm)


def _churn(arguments: dict[str, Any], sigma: float, count: int) -> float:
    """Standard deviation of what Karras et al.'s algorithm 2 adds before the step."""
    if not arguments["s_churn"] or not arguments["s_tmin"] <= sigma <= arguments["s_tmax"]:
        return 0.0
    gamma = min(arguments["s_churn"] / (count - 1), math.sqrt(2.0) - 1.0)
    return float(arguments["s_noise"]) * sigma * math.sqrt((1.0 + gamma) ** 2 - 1.0)


def _edm_euler(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    index, sigmas = _step_index(scheduler, timestep), tables.numbers(scheduler.sigmas)
    noise = _churn(arguments, sigmas[index], len(sigmas))
    return _edm(scheduler, sigmas[index], sigmas[index + 1], noise=noise)


def _edm(scheduler: Any, sigma: float, target: float, **others: Any) -> Place:
    """Raw outputs of an EDM network; diffusers' v_prediction is the same with the other sign."""
    negated = scheduler.config.prediction_type == "v_prediction"
    data = float(scheduler.config.sigma_data)
    return Place(_ve(sigma), _ve(target), "edm", negated=negated, sigma_data=data, **others)


def _heun(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    """HeunDiscrete: two calls a step, the second one at the level that the first one went to."""
    index, sigmas = _step_index(scheduler, timestep), tables.numbers(scheduler.sigmas)
    kind, level = _prediction(scheduler), _vp if _prediction(scheduler) == "v_prediction" else _ve
    if not scheduler.state_in_first_order:
        sigma = sigmas[index]
        return Place(level(sigma), _ve(sigma), kind, scheme="corrector", rescale=level(sigma)[0])
    sigma, target = sigmas[index], sigmas[index + 1]
    scheme = "predictor" if target > 0 else "direct"
    return Place(level(sigma), _ve(target), kind, scheme=scheme, rescale=level(sigma)[0])


def _flow_euler(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    if arguments.get("per_token_timesteps") is not None:
        raise ValueError("per_token_timesteps has no density guidance: a sample is at one level of noise or at many")
    index, sigmas = _step_index(scheduler, timestep), tables.numbers(scheduler.sigmas)
    sigma, target = sigmas[index], sigmas[index + 1]
    if scheduler.config.stochastic_sampling:  # x0 with new noise
        return Place(_flow(sigma), _flow(target), "velocity", (1.0 - target, 0.0), target)
    return Place(_flow(sigma), _flow(target), "velocity")


def _flow_heun(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    index, sigmas = _step_index(scheduler, timestep), tables.numbers(scheduler.sigmas)
    if not scheduler.state_in_first_order:
        return Place(_flow(sigmas[index]), _flow(sigmas[index]), "velocity", scheme="corrector")
    scheme = "predictor" if sigmas[index + 1] > 0 else "direct"
    return Place(_flow(sigmas[index]), _flow(sigmas[index + 1]), "velocity", scheme=scheme)


def _ddim(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    here, end = (_ddpm_level(scheduler, int(timestep) - n * stride, tables) for n in range(2))
    noise = 0.0
    if arguments["eta"]:
        share = (end[1] / here[1]) ** 2 * (1.0 - (here[0] / end[0]) ** 2)
        noise = float(arguments["eta"]) * math.sqrt(max(share, 0.0))
    step_to = (end[0], math.sqrt(max(end[1] ** 2 - noise**2, 0.0)))
    return Place(here, end, _prediction(scheduler), step_to, noise)


def _ddpm_level(scheduler: Any, timestep: int, tables: Tables) -> Level:
    """Of a training timestep; before the first one, that of the data."""
    if timestep < 0:
        return _level_of_product(float(scheduler.final_alpha_cumprod))
    return _level_of_product(tables.numbers(scheduler.alphas_cumprod)[timestep])


def _pndm(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    """Pseudo linear multistep: it extrapolates from predictions of up to four calls, over which no loop is closed."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    here, end = (_ddpm_level(scheduler, int(timestep) - n * stride, tables) for n in range(2))
    return Place(here, end, _prediction(scheduler), scheme="open")


def _dpm_solver(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    """DPMSolverMultistep and Singlestep, UniPC: sigmas of a VP path or of a rectified flow."""
    index, sigmas = _step_index(scheduler, timestep), tables.numbers(scheduler.sigmas)
    level = _flow if getattr(scheduler.config, "use_flow_sigmas", False) else _vp
    here, end = level(sigmas[index]), level(sigmas[index + 1])
    step_to, noise = _sde_step(scheduler, here, end)
    carry = _carry(scheduler, index, sigmas, level)
    return Place(here, end, _prediction(scheduler), step_to, noise, _scheme(scheduler), carry)


def _edm_dpm_solver(scheduler: Any, timestep: Any, arguments: dict[str, Any], tables: Tables) -> Place:
    index, sigmas = _step_index(scheduler, timestep), tables.numbers(scheduler.sigmas)
    step_to, noise = _sde_step(scheduler, _ve(sigmas[index]), _ve(sigmas[index + 1]))
    carry = _carry(scheduler, index, sigmas, _ve)
    return _edm(
        scheduler,
        sigmas[index],
        sigmas[index + 1],
        step_to=step_to,
        noise=noise,
        scheme=_scheme(scheduler),
        carry=carry,
    )


def _sde_step(scheduler: Any, here: Level, end: Level) -> tuple[Level, float]:
    """(deterministic part, noise) of one step of first order."""
    algorithm = getattr(scheduler.config, "algorithm_type", "")
    if algorithm != "sde-dpmsolver++" or not (end[1] > 0 and here[0] > 0):
        return end, 0.0
    shrink = (end[1] * here[0]) / (end[0] * here[1])  # e^-h
    return (end[0], end[1] * shrink), end[1] * math.sqrt(max(1.0 - shrink**2, 0.0))


def _scheme(scheduler: Any) -> str:
    """The loop is closed where a step is of first order, or extrapolates the data without noise."""
    algorithm, order = getattr(scheduler.config, "algorithm_type", "dpmsolver++"), scheduler.config.solver_order
    return "direct" if order == 1 or algorithm == "dpmsolver++" else "open"


def _carry(scheduler: Any, index: int, sigmas: list[float], level: Callable[[float], Level]) -> float:
    """h / (2 h_last) where the data prediction is extrapolated linearly, else 0."""
    if "Multistep" not in type(scheduler).__name__ or scheduler.lower_order_nums < 1 or index < 1:
        return 0.0
    if scheduler.config.solver_order == 1 or not getattr(scheduler.config, "predict_x0", True):
        return 0.0
    last, here, end = (level(sigma) for sigma in sigmas[index - 1 : index + 2])
    if not (last[0] > 0 and here[0] > 0 and end[1] > 0):
        return 0.0
    lengths = [math.log((one[1] * two[0]) / (one[0] * two[1])) for one, two in ((last, here), (here, end))]
    return lengths[1] / (2.0 * lengths[0]) if lengths[0] > 0 else 0.0


PlaceOf = Callable[[Any, Any, dict[str, Any], Tables], Place]
PLACES: dict[str, PlaceOf] = {
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler,
    "HeunDiscreteScheduler": _heun,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "DPMSolverSinglestepScheduler": _dpm_solver,
    "UniPCMultistepScheduler": _dpm_solver,
    "EDMEulerScheduler": _edm_euler,
    "EDMDPMSolverMultistepScheduler": _edm_dpm_solver,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchHeunDiscreteScheduler": _flow_heun,
    "PNDMScheduler": _pndm,
}
