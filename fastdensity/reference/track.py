"""The closed loop of density guidance in torch: what every `track` kernel must compute.

One contract for all implementations, `track(kind, scheme, operands, parameters, memory) -> (eps, report, memory)`,
and in the same pass, if it is wanted, the step or the prediction that the decision leads to (`follow`):

    operands     (sample x, prediction p, uncond, last x, last eps), rows (B, D); the last three may be absent
    parameters   `PARAMETERS`, numbers or (B,); memory (B, len(MEMORY)) float64 of the row's last call, 0 when fresh
    eps          the unguided predicted noise (B, D), which the next call wants as `last eps`
    report       (B, 4) float64: eta - 1, ||eps||^2, commanded - realised so far, flags

Notation of docs/few-steps.md: y = x / alpha, kappa = sigma / alpha, l = ln(alpha / sigma), and over -div u a move of y
adds integral(-eps.dy / kappa - ||eps||^2 dl) to log p. All of a row's decisions are in `reference.track_rule`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity.reference.rows import (
    NoiseKey,
    Parameter,
    combined_prediction,
    compute_dtype,
    dot,
    flatten,
    per_row,
    rows,
    scaled,
)
from fastdensity.reference.track_rule import Gram, decide

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

# How the caller uses the prediction. direct: one evaluation a step. predictor, corrector: Heun's two.
SCHEMES = ("direct", "predictor", "corrector")

PARAMETERS = (
    "alpha",
    "sigma",
    "alpha_next",  # the step is alpha_next x0 + sigma_next eps ...
    "sigma_next",
    "alpha_end",  # ... and arrives at this point of the path: another one for Euler's method in lam
    "sigma_end",
    "q",
    "shift",  # with q the commanded rate, sqrt(2 D) ndtri(q) + shift, nats per unit of l over -div u
    "cfg_scale",
    "noise_scale",
    "sigma_data",
    "carry",  # a multistep solver's h / (2 h_last), the weight of its last evaluation; 0 for one-step solvers
)

MEMORY = (
    "steps",  # calls since the row began; 0: nothing is known
    "alpha",  # where the last call was
    "sigma",
    "alpha_end",  # where its step was to arrive
    "sigma_end",
    "sq_norm",  # ||eps||^2 there
    "rate",  # commanded there
    "eta",
    "noise",  # variance that the step added to y, beside drift_eps eps + drift_state y
    "drift_eps",
    "drift_state",
    "commanded_next",  # of the step under way: commanded, and what was expected of it
    "realised_next",
    "response",  # how ||eps|| answers to a move along eps, 0 .. 1
    "commanded",  # of the steps that are over
    "realised",
    "limited",  # steps in which eta was bounded
)


def track(
    kind: str, scheme: str, operands: Operands, parameters: tuple[Parameter, ...], memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract above; operands of any float dtype, sums and eps in float64 if one is float64, else float32."""
    x, prediction, uncond, last_x, last_eps = operands
    dtype = compute_dtype((x, prediction, uncond, last_x))
    numbers = {name: per_row(value, x) for name, value in zip(PARAMETERS, parameters, strict=True)}
    before = dict(zip(MEMORY, memory.double().unbind(dim=1), strict=True))
    x, prediction = x.to(dtype), prediction.to(dtype)
    prediction = combined_prediction(prediction, None if uncond is None else uncond.to(dtype), numbers["cfg_scale"])
    alpha, sigma, sigma_data = numbers["alpha"], numbers["sigma"], numbers["sigma_data"]
    edm_norm = torch.sqrt(sigma * sigma + (alpha * sigma_data) ** 2)
    along_x, along_p, scale = rules.direction(kind, alpha, sigma, sigma_data, edm_norm)
    # the scale outside: x - alpha p cancels, and is to be rounded once
    eps = scaled(scale, scaled(along_x, x) + scaled(along_p, prediction))
    fresh = before["steps"] == 0
    gram = _gram(x, eps, last_x, last_eps, alpha, before["alpha"], fresh)
    after, report = decide(scheme, x.shape[1], numbers, before, gram)
    return eps, report, torch.stack([after[name] for name in MEMORY], dim=1)


def _gram(
    x: Tensor, eps: Tensor, last_x: Tensor | None, last_eps: Tensor | None, alpha: Tensor, last_alpha: Tensor,
    fresh: Tensor,
) -> Gram:  # fmt: skip
    """The products that a decision needs; what a fresh row has as its last vectors is never looked at."""
    zero = torch.zeros_like(alpha)
    square, state = dot(eps, eps), dot(x, eps) / alpha
    if last_x is None or last_eps is None:
        return Gram(square, zero, zero, zero, state, zero)
    shown = fresh[:, None]
    last = last_eps.to(eps.dtype).masked_fill(shown, 0.0)
    before = last_x.to(eps.dtype).masked_fill(shown, 0.0)
    safe = torch.where(fresh, torch.ones_like(alpha), last_alpha)
    move = scaled(1.0 / alpha, x) - scaled(1.0 / safe, before)
    return Gram(square, dot(eps, last), dot(move, eps), dot(move, last), state, dot(x, last) / alpha)


class Step(NamedTuple):
    """What is to be made of the rows with the eta decided on, and where it is written."""

    rule: str  # "step" or "prediction", as in `fastdensity.reference.rows`
    noise: Tensor | None  # (B, D), or made by noise_key
    noise_key: NoiseKey | None
    out: Tensor  # (B, D)
    report: Tensor  # (B, 4), that of the rows; its flags are the loop's, too


def step_parameters(parameters: tuple[Parameter, ...], gain: Parameter, has_noise: bool) -> tuple[Parameter, ...]:
    """Those of `fastdensity.reference.rows` for a step whose eta - 1 is `gain`."""
    alpha, sigma, alpha_next, sigma_next, *_ = parameters
    cfg_scale, noise_scale, sigma_data = (
        parameters[PARAMETERS.index(name)] for name in ("cfg_scale", "noise_scale", "sigma_data")
    )
    spread = noise_scale if has_noise else 0.0
    return alpha, sigma, alpha_next, sigma_next, 0.5, 0.0, gain, cfg_scale, spread, sigma_data


def follow(
    rule: str, kind: str, operands: Operands, noise: Tensor | None, noise_key: NoiseKey | None,
    parameters: tuple[Parameter, ...], decided: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, report) of the rows, guided as the loop's report `decided` (B, 4) says."""
    numbers = step_parameters(parameters, decided[:, 0], noise is not None or noise_key is not None)
    out, report = rows(rule, kind, (*operands[:3], noise), numbers, noise_key)
    return out, with_flags(report, decided)


def with_flags(report: Tensor, decided: Tensor) -> Tensor:
    """A step's report (B, 4) with the flags of the loop's, too."""
    flags = report[:, 3].to(torch.int64) | decided[:, 3].to(torch.int64)
    return torch.cat([report[:, :3], flags.to(report.dtype)[:, None]], dim=1)


def launch_torch(
    kind: str, scheme: str, operands: Operands, parameters: tuple[Parameter, ...], memory: Tensor,
    eps: Tensor, report: Tensor, memory_out: Tensor, step: Step | None = None,
) -> None:  # fmt: skip
    """The reference as a backend."""
    flat = flatten(operands)
    found = track(kind, scheme, flat, parameters, memory)
    if step is not None:
        noise = flatten((step.noise,))[0]
        made = follow(step.rule, kind, flat, noise, step.noise_key, parameters, found[1])
        for target, value in zip((step.out, step.report), made, strict=True):
            target.copy_(value.view_as(target))
    for target, value in zip((eps, report, memory_out), found, strict=True):
        target.copy_(value.view_as(target))
