"""Guided drift, guided prediction, guided step: one pass over the rows of a batch each.

With `rows_prior.scale_prior` they are one kernel family (docs/architecture.md, "Rows"): the Gram matrix of a few
row vectors, a few numbers per row from it, a linear combination. Formulas: Karczewski, Heinonen and Garg, "Devil is
in the Details" (ICML 2025, arXiv 2502.05807), written [DG] below.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastdensity.boundary import check_integer, check_like, check_number, check_sample_ids, check_state
from fastdensity.conversions import check_prediction_type
from fastdensity.ops.rows_operator import run
from fastdensity.ops.rows_result import StepResult
from fastdensity.ops.state import GuidanceState
from fastdensity.ops.track import check_loop, track
from fastdensity.reference.rows import NoiseKey, Parameter


def guided_drift(
    x: Tensor,
    u: Tensor,
    score: Tensor,
    div: float | Tensor,
    b: float | Tensor,
    *,
    dt: float | Tensor | None = None,
    out: Tensor | None = None,
    report: Tensor | None = None,
) -> Tensor:
    """The smallest change of the drift u that makes log p change at rate b: w = u + (div u + b) s / ||s||^2.

    [DG] section 4. With `dt` the Euler step x + dt w is returned instead of w, in the same pass.

    Args:
        x: state (B, *). u: drift of the flow (B, *). score: grad log p(x) (B, *).
        div: divergence of u, (B,) or a number, in 1 per unit of time. b: wanted d log p/dt, nats per unit of time.
        dt: step, (B,) or a number, may be negative. out: written if given; may be x itself.
        report: (B, 4) float32 (float64 for float64 rows), receives (gain, ||s||^2, nats added, flags) per row.

    Returns:
        w in u's dtype, or x + dt w in x's. A row with zero or non-finite ||s||, or non-finite div + b, is left
        unguided and flagged in `report`; NaN and infinity in a vector stay in their elements. No row touches another.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_state("x", x)
    check_like("u", u, x, "x")
    check_like("score", score, x, "x")
    step = 1.0 if dt is None else check_number("dt", dt, x)
    parameters = (check_number("div", div, x), check_number("b", b, x), step)
    operands = (None if dt is None else x, u, None, score)
    name = "u" if dt is None else "x"
    return run("drift", "epsilon", operands, parameters, None, out, report, name)[0]


def _check_push(q: Any, shift: Any, gain: Any, sample: Tensor) -> tuple[Parameter, Parameter, Parameter]:
    return (
        check_number("q", q, sample, 0.0, 1.0, True),
        check_number("shift", shift, sample),
        check_number("gain", gain, sample),
    )


def _check_sigma_data(sigma_data: Any, sample: Tensor) -> Parameter:
    if isinstance(sigma_data, Tensor):
        raise TypeError("sigma_data must be one positive number: it belongs to the network, not to a row")
    return check_number("sigma_data", sigma_data, sample, 0.0, math.inf, True)


def _check_cfg(uncond: Tensor | None, cfg_scale: float | Tensor, sample: Tensor) -> Parameter:
    if uncond is not None:
        check_like("uncond", uncond, sample, "sample")
    scale = check_number("cfg_scale", cfg_scale, sample)
    if uncond is None and not (isinstance(scale, float) and scale == 1.0):
        raise ValueError("cfg_scale needs the unconditional prediction: pass uncond, or leave cfg_scale at 1")
    return scale


def guide_prediction(
    prediction: Tensor,
    sample: Tensor,
    *,
    alpha: float | Tensor,
    sigma: float | Tensor,
    q: float | Tensor = 0.5,
    shift: float | Tensor = 0.0,
    gain: float | Tensor = 0.0,
    prediction_type: str = "epsilon",
    uncond: Tensor | None = None,
    cfg_scale: float | Tensor = 1.0,
    sigma_data: float = 0.5,
    out: Tensor | None = None,
    report: Tensor | None = None,
    state: GuidanceState | None = None,
    alpha_next: float | Tensor | None = None,
    sigma_next: float | Tensor | None = None,
    scheme: str = "direct",
    carry: float | Tensor = 0.0,
) -> Tensor:
    """The network output whose predicted noise is eta times larger: density guidance before any solver.

    eta = 1 + gain + (sqrt(2 D) ndtri(q) + shift) / ||eps||^2, [DG] eq. 23; q > 1/2 raises the density (smoother
    samples), q < 1/2 lowers it (more detail). The result converts back to the same parameterisation, so any
    solver for the flow x = alpha x0 + sigma eps takes it in place of the plain output.

    Args:
        prediction: the network's output (B, *), conditional if `uncond` is given. sample: its input x (B, *).
        alpha, sigma: the path at x, numbers or (B,), >= 0. q: in (0, 1). shift: further nats per d ln(alpha/sigma)
            (2 (div u + b) makes d log p / d lam = b, see `fastdensity.DensityGuidance`). gain: added to eta.
        prediction_type: one of `fastdensity.rules.PREDICTION_TYPES`. sigma_data: EDM only.
        uncond, cfg_scale: classifier-free guidance uncond + cfg_scale (prediction - uncond), before the density's.
        out: written if given. report: (B, 4) float32 (float64 for float64 rows), receives (eta - 1, ||eps||^2, 0,
            flags).
        state: closes the loop (docs/few-steps.md): eta makes up for what earlier steps missed, and the state is
            brought up to date. Wants the path after the step, alpha_next and sigma_next. scheme: "direct" for one
            evaluation a step, "predictor" and "corrector" for Heun's two. carry: h / (2 h_last) of a two-step method
            like DPM++(2M), steps measured in ln(alpha / sigma); 0 for others.

    Returns:
        (B, *) in the prediction's dtype. Rows at alpha = 0 or sigma = 0, with ||eps|| = 0, or with numbers that
        are out of range inside a tensor pass through unguided and are flagged.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, or a Python number out of range.
    """
    check_state("sample", sample)
    check_like("prediction", prediction, sample, "sample")
    kind = check_prediction_type(prediction_type)
    place = (check_number("alpha", alpha, sample, 0.0), check_number("sigma", sigma, sample, 0.0))
    push = _check_push(q, shift, gain, sample)
    scale, data = _check_cfg(uncond, cfg_scale, sample), _check_sigma_data(sigma_data, sample)
    operands = (sample, prediction, uncond, None)
    if state is not None:
        if alpha_next is None or sigma_next is None:
            raise ValueError("alpha_next and sigma_next must be given with state: where the step is going to end")
        ends = (
            check_number("alpha_next", alpha_next, sample, 0.0),
            check_number("sigma_next", sigma_next, sample, 0.0),
        )
        loop = check_loop(scheme, carry, place, ends, push[2], sample)
        loop |= {"q": push[0], "shift": push[1], "cfg_scale": scale, "sigma_data": data}
        return track("prediction", kind, scheme, state, operands, loop, None, out, report)[0]
    parameters = (*place, 1.0, 1.0, *push, scale, 0.0, data)
    return run("prediction", kind, operands, parameters, None, out, report, "prediction")[0]


def guided_step(
    sample: Tensor,
    prediction: Tensor,
    *,
    alpha: float | Tensor,
    sigma: float | Tensor,
    alpha_next: float | Tensor,
    sigma_next: float | Tensor,
    q: float | Tensor = 0.5,
    shift: float | Tensor = 0.0,
    gain: float | Tensor = 0.0,
    prediction_type: str = "epsilon",
    uncond: Tensor | None = None,
    cfg_scale: float | Tensor = 1.0,
    sigma_data: float = 0.5,
    noise: Tensor | None = None,
    noise_scale: float | Tensor = 0.0,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    step: int = 0,
    out: Tensor | None = None,
    state: GuidanceState | None = None,
) -> StepResult:
    """One guided step of the flow, from (alpha, sigma) to (alpha_next, sigma_next), in one pass.

    The step is DDIM's (Song et al. 2021): alpha' x0 + sigma' eps, Euler in sigma / alpha; for a rectified flow it
    is Euler in time. Guidance replaces eps by eta eps as in `guide_prediction`. With `noise_scale` the part of
    standard normal noise that is orthogonal to the score is added, noise_scale (z - eps (eps.z) / ||eps||^2):
    it leaves log p alone to first order ([DG] eq. 25).

    Args:
        sample: x (B, *). prediction, prediction_type, uncond, cfg_scale, sigma_data, q, shift, gain, alpha, sigma:
            as in `guide_prediction`. alpha_next, sigma_next: the path after the step, numbers or (B,), >= 0.
        noise: standard normals (B, *); or seed: a non-negative int < 2^63, and the noise is made inside the kernel
            by Philox4x32-10 from (seed, sample id, step, element). sample_ids: int64 (B,), default 0 .. B-1,
            taken modulo 2^32. step: which step of the trajectory this is, part of the key.
        noise_scale: standard deviation of the noise, a number or (B,), in units of the sample.
        out: (B, *) like `sample`; written if given, may be `sample`.
        state: closes the loop (docs/few-steps.md): what the last step missed is made up for in this one, and the
            state is brought up to date.

    Returns:
        StepResult with .sample (B, *) in the sample's dtype, .eta, .sq_norm, .dlogp, .flags (B,). A row with
        alpha, sigma, alpha_next or sigma_next = 0 takes the unguided step and is flagged.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, or a Python number out of range; also the plain
            step that does not exist (epsilon or score at alpha = 0, sample at sigma = 0).
    """
    check_state("sample", sample)
    check_like("prediction", prediction, sample, "sample")
    kind = check_prediction_type(prediction_type)
    ends = (
        check_number("alpha", alpha, sample, 0.0),
        check_number("sigma", sigma, sample, 0.0),
        check_number("alpha_next", alpha_next, sample, 0.0),
        check_number("sigma_next", sigma_next, sample, 0.0),
    )
    _check_step_exists(kind, *ends[:2])
    noise_key = _check_noise(noise, noise_scale, seed, sample_ids, step, sample)
    push = _check_push(q, shift, gain, sample)
    scale, data = _check_cfg(uncond, cfg_scale, sample), _check_sigma_data(sigma_data, sample)
    spread = check_number("noise_scale", noise_scale, sample, 0.0)
    operands = (sample, prediction, uncond, noise)
    if state is not None:
        loop = check_loop("direct", 0.0, ends[:2], ends[2:], push[2], sample)
        loop |= {"q": push[0], "shift": push[1], "cfg_scale": scale, "noise_scale": spread, "sigma_data": data}
        result, report = track("step", kind, "direct", state, operands, loop, noise_key, out)
    else:
        parameters = (*ends, *push, scale, spread, data)
        result, report = run("step", kind, operands, parameters, noise_key, out, True, "sample")
    assert report is not None
    return StepResult(result, report)


def _check_step_exists(kind: str, alpha: Parameter, sigma: Parameter) -> None:
    """x0 cannot be told from pure noise's eps, nor eps from clean data's x0: there is no such step."""
    if kind in ("epsilon", "score") and isinstance(alpha, float) and alpha == 0.0:
        raise ValueError(f"alpha must be positive for prediction_type {kind!r}: at alpha = 0 it does not determine x0")
    if kind == "sample" and isinstance(sigma, float) and sigma == 0.0:
        raise ValueError("sigma must be positive for prediction_type 'sample': at sigma = 0 it does not determine eps")
    if isinstance(alpha, float) and isinstance(sigma, float) and alpha == 0.0 and sigma == 0.0:
        raise ValueError("alpha and sigma cannot both be 0")


def _check_noise(
    noise: Any, noise_scale: Any, seed: Any, sample_ids: Any, step: Any, sample: Tensor
) -> NoiseKey | None:
    if noise is not None and seed is not None:
        raise ValueError("give either noise or seed to guided_step, not both")
    if noise is not None:
        check_like("noise", noise, sample, "sample")
        return None
    if seed is not None:
        seed = check_integer("seed", seed, 0, 2**63 - 1)
        return seed, check_sample_ids(sample_ids, sample), check_integer("step", step, 0, 2**32 - 1)
    if isinstance(noise_scale, Tensor) or noise_scale != 0:
        raise ValueError("noise_scale needs noise: pass noise (B, *), or seed to draw it")
    return None
