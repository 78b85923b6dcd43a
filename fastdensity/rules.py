"""The rule table: what a row kernel does with a network's output, as pure arithmetic.

A step of a density-guided sampler reads a few row vectors (the state x, a prediction p, noise z) and
writes one. Everything specific to a *prediction type* is two small functions of the path's alpha and sigma:

- `direction` says how the predicted noise is made, eps = scale * (along_x * x + along_p * p). One of the two
  coefficients is kept at 1 where possible, so that x - alpha * p is rounded once, not twice.
- `step_base` says how the unguided step to (alpha_next, sigma_next) is made,
  alpha_next * x0 + sigma_next * eps = out_x * x + out_p * p + out_direction * (along_x * x + along_p * p).

Both hold nothing but arithmetic and comparisons of strings, so the very same functions run on floats, on
tensors (`fastdensity.reference.rows`) and inside the Triton kernels (`fastdensity.triton_kernels.rows`).
`csrc/rules.h` is their C++ and CUDA twin; a test holds the two together number by number.
The conversions are those of Ho et al. 2020 (epsilon), Salimans & Ho 2022 (v), Lipman et al. 2023 (velocity) and Karras
et al. 2022 (EDM).
"""

from __future__ import annotations

from typing import Any

# What a kernel writes. The position in the tuple is the number that crosses into C++ and CUDA.
RULES = ("drift", "prediction", "step", "radius")

# What a network predicts, for x = alpha * x0 + sigma * eps.
PREDICTION_TYPES = (
    "epsilon",  # eps
    "sample",  # x0
    "v_prediction",  # alpha * eps - sigma * x0
    "velocity",  # eps - x0: rectified flow, time running from data to noise
    "velocity_to_data",  # x0 - eps: flow_matching and torchcfm, time running from noise to data
    "score",  # -eps / sigma
    "edm",  # F of Karras et al.: x0 = c_skip * x / alpha + c_out * F
)

PREDICTION_TYPE_ALIASES = {
    "eps": "epsilon",
    "noise": "epsilon",
    "x0": "sample",
    "x_0": "sample",
    "v": "v_prediction",
    "flow_prediction": "velocity",
    "flow": "velocity",
}

# The numbers a row may carry, one each or one for all rows, in the order in which kernels take them.
STEP_PARAMETERS = (
    "alpha",
    "sigma",
    "alpha_next",
    "sigma_next",
    "q",  # quantile: adds sqrt(2 D) ndtri(q) to `shift`
    "shift",  # eta - 1 = gain + shift / ||eps||^2
    "gain",
    "cfg_scale",
    "noise_scale",
    "sigma_data",  # EDM only
)
STEP_DEFAULTS = (1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.5)
DRIFT_PARAMETERS = ("div", "b", "dt")
RADIUS_PARAMETERS = ("radius",)

# What a row reports: columns of the (B, 4) report.
REPORT_COLUMNS = ("eta_minus_one", "sq_norm", "dlogp", "flags")

# Bits of the `flags` column. A flagged row is left unguided.
FLAG_NON_FINITE = 1  # the row holds NaN or infinity
FLAG_ZERO_SCORE = 2  # ||eps|| = 0: no direction to guide along
FLAG_ENDPOINT = 4  # alpha or sigma is 0 at an end of the step: log p diverges there
FLAG_BAD_PARAMETER = 8  # q outside (0, 1), a negative or non-finite alpha or sigma, ...
# These two do not stop guidance.
FLAG_LIMITED = 16  # the closed loop wanted an eta that one step cannot follow, and got a smaller one
FLAG_STALE_STATE = 32  # the guidance state was of another place of the path: the loop began anew


# mypy: disable-error-code="no-untyped-def"
def direction(kind, alpha, sigma, sigma_data, edm_norm) -> Any:
    """(along_x, along_p, scale) with eps = scale * (along_x * x + along_p * p).

    `edm_norm` is sqrt(sigma^2 + alpha^2 sigma_data^2), passed in because a square root is spelled
    differently in torch and in Triton.
    """
    if kind == "epsilon":
        return 0.0, 1.0, 1.0
    elif kind == "sample":
        return 1.0, -alpha, 1.0 / sigma
    elif kind == "v_prediction":
        return sigma, alpha, 1.0 / (alpha * alpha + sigma * sigma)
    elif kind == "velocity":
        return 1.0, alpha, 1.0 / (alpha + sigma)
    elif kind == "velocity_to_data":
        return 1.0, -alpha, 1.0 / (alpha + sigma)
    elif kind == "score":
        return 0.0, 1.0, -sigma
    else:  # edm
        return sigma, -alpha * sigma_data * edm_norm, 1.0 / (edm_norm * edm_norm)


def step_base(kind, alpha, sigma, alpha_next, sigma_next, sigma_data, edm_norm) -> Any:
    """(out_x, out_p, out_direction): the unguided step alpha_next * x0 + sigma_next * eps.

    For velocities, v and EDM nothing is divided by alpha or sigma alone: the step stays finite at both ends.
    """
    if kind == "epsilon":
        return alpha_next / alpha, 0.0, sigma_next - alpha_next * (sigma / alpha)
    elif kind == "sample":
        return 0.0, alpha_next, sigma_next / sigma
    elif kind == "v_prediction":
        norm = alpha * alpha + sigma * sigma
        return (
            (alpha_next * alpha + sigma_next * sigma) / norm,
            (sigma_next * alpha - alpha_next * sigma) / norm,
            0.0,
        )
    elif kind == "velocity":
        norm = alpha + sigma
        return (alpha_next + sigma_next) / norm, (sigma_next * alpha - alpha_next * sigma) / norm, 0.0
    elif kind == "velocity_to_data":
        norm = alpha + sigma
        return (alpha_next + sigma_next) / norm, (alpha_next * sigma - sigma_next * alpha) / norm, 0.0
    elif kind == "score":
        return alpha_next / alpha, 0.0, (sigma_next - alpha_next * (sigma / alpha)) * -sigma
    else:  # edm
        variance = sigma_data * sigma_data
        norm = edm_norm * edm_norm
        return (
            (alpha_next * alpha * variance + sigma_next * sigma) / norm,
            sigma_data * (alpha_next * sigma - sigma_next * alpha) / edm_norm,
            0.0,
        )
