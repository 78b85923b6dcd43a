"""What a network predicts, turned into what a sampler needs, for every prediction type and back.

All go through the one table in `fastdensity.rules`. With x = alpha x0 + sigma eps and score = -eps / sigma each
prediction is a linear combination of x and eps; nothing is divided by alpha or sigma where the quantity asked for
exists without (x0 from a velocity at alpha = 0, eps from a velocity at sigma = 0).

Shared arguments: prediction, eps and x are (B, *) on one device; alpha, sigma numbers or (B,); prediction_type one of
`fastdensity.rules.PREDICTION_TYPES` or an alias ("eps", "x0", "v", "flow", ...); sigma_data is used by "edm" alone.
Results have x's dtype and are computed in float32, or in float64 if either tensor is float64.
All raise TypeError or ValueError on a wrong type, shape or device and on an unknown prediction type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity.boundary import check_like, check_number, check_state, describe

Number = float | Tensor


def check_prediction_type(name: Any) -> str:
    """The canonical name of a prediction type; ValueError, listing those known, on any other."""
    known = rules.PREDICTION_TYPE_ALIASES.get(name, name) if isinstance(name, str) else name
    if known not in rules.PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(rules.PREDICTION_TYPES)}, got {describe(name)}")
    return known


def to_epsilon(
    prediction: Tensor,
    x: Tensor,
    alpha: Number,
    sigma: Number,
    prediction_type: str = "epsilon",
    sigma_data: float = 0.5,
) -> Tensor:
    """The predicted noise eps (B, *). "sample" has none at sigma = 0: ValueError for numbers, inf or NaN in tensors."""
    kind, (values, state), path = _checked(prediction, x, alpha, sigma, prediction_type, sigma_data)
    _refuse_zero(kind == "sample", "sigma", path[1], "the noise")
    along_x, along_p, scale = rules.direction(kind, *path)
    return (scale * (along_x * state + along_p * values)).to(x.dtype)


def to_score(
    prediction: Tensor,
    x: Tensor,
    alpha: Number,
    sigma: Number,
    prediction_type: str = "epsilon",
    sigma_data: float = 0.5,
) -> Tensor:
    """The score grad log p(x) = -eps / sigma (B, *). None exists at sigma = 0: ValueError for a number, as above."""
    kind, (values, state), path = _checked(prediction, x, alpha, sigma, prediction_type, sigma_data)
    if kind == "score":
        return prediction.to(x.dtype)
    _refuse_zero(True, "sigma", path[1], "the score")
    along_x, along_p, scale = rules.direction(kind, *path)
    return (-scale / path[1] * (along_x * state + along_p * values)).to(x.dtype)


def to_sample(
    prediction: Tensor,
    x: Tensor,
    alpha: Number,
    sigma: Number,
    prediction_type: str = "epsilon",
    sigma_data: float = 0.5,
) -> Tensor:
    """The predicted clean sample x0 (B, *). "epsilon" and "score" have none at alpha = 0: ValueError for a number."""
    kind, (values, state), path = _checked(prediction, x, alpha, sigma, prediction_type, sigma_data)
    if kind == "sample":
        return prediction.to(x.dtype)
    _refuse_zero(kind in ("epsilon", "score"), "alpha", path[0], "the clean sample")
    # x0 is the step of the flow to alpha = 1, sigma = 0
    alpha, sigma, scale_data, edm_norm = path
    out_x, out_p, out_direction = rules.step_base(kind, alpha, sigma, 1.0, 0.0, scale_data, edm_norm)
    along_x, along_p, _ = rules.direction(kind, *path)
    out_x, out_p = out_x + out_direction * along_x, out_p + out_direction * along_p
    return (out_x * state + out_p * values).to(x.dtype)


def from_epsilon(
    eps: Tensor,
    x: Tensor,
    alpha: Number,
    sigma: Number,
    prediction_type: str = "epsilon",
    sigma_data: float = 0.5,
) -> Tensor:
    """What a network of the given type predicts where the noise is eps: the inverse of `to_epsilon` (B, *).

    At alpha = 0 the noise determines no other prediction but the score; at sigma = 0 neither score nor sample are
    made of it: ValueError for numbers, inf or NaN in a tensor.
    """
    kind, (values, state), path = _checked(eps, x, alpha, sigma, prediction_type, sigma_data)
    _refuse_zero(kind not in ("epsilon", "score"), "alpha", path[0], f"the prediction {kind!r}")
    _refuse_zero(kind in ("score", "sample"), "sigma", path[1], f"the prediction {kind!r}")
    along_x, along_p, scale = rules.direction(kind, *path)
    return ((values / scale - along_x * state) / along_p).to(x.dtype)


def compose(
    sample: Tensor, eps: Tensor, alpha: Number, sigma: Number, prediction_type: str, sigma_data: float
) -> Tensor:
    """The prediction of the given type from both x0 and eps (B, *), which is well conditioned at either end."""
    alpha, sigma = _broadcast(alpha, eps), _broadcast(sigma, eps)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return sample
    if prediction_type == "v_prediction":
        return alpha * eps - sigma * sample
    if prediction_type == "velocity":
        return eps - sample
    if prediction_type == "velocity_to_data":
        return sample - eps
    if prediction_type == "score":
        return -eps / sigma
    return (sigma * sample - alpha * sigma_data**2 * eps) / (sigma_data * _edm_norm(alpha, sigma, sigma_data))


def direction_coefficients(kind: str, alpha: Number, sigma: Number, sigma_data: float) -> tuple[Number, Number]:
    """(c_x, c_p) with eps = c_x x + c_p prediction; numbers, or (B,)."""
    along_x, along_p, scale = rules.direction(kind, alpha, sigma, sigma_data, _edm_norm(alpha, sigma, sigma_data))
    return scale * along_x, scale * along_p


def _checked(
    prediction: Any, x: Any, alpha: Any, sigma: Any, prediction_type: Any, sigma_data: Any
) -> tuple[str, tuple[Tensor, Tensor], tuple[Number, Number, float, Number]]:
    """(kind, (prediction, x) in the computation's dtype, (alpha, sigma, sigma_data, edm_norm) to multiply with)."""
    check_state("x", x)
    check_like("prediction", prediction, x, "x")
    kind = check_prediction_type(prediction_type)
    scale_data = check_number("sigma_data", sigma_data, x, 0.0, math.inf, True)
    if isinstance(scale_data, Tensor):
        raise TypeError(f"sigma_data must be a number, got {describe(sigma_data)}")
    dtype = torch.float64 if torch.float64 in (x.dtype, prediction.dtype) else torch.float32
    alpha = _broadcast(check_number("alpha", alpha, x, 0.0), x)
    sigma = _broadcast(check_number("sigma", sigma, x, 0.0), x)
    if isinstance(alpha, float) and isinstance(sigma, float) and alpha == 0.0 and sigma == 0.0:
        raise ValueError("alpha and sigma cannot both be 0")
    return kind, (prediction.to(dtype), x.to(dtype)), (alpha, sigma, scale_data, _edm_norm(alpha, sigma, scale_data))


def _broadcast(number: Number, x: Tensor) -> Number:
    """A number per row in a shape that multiplies (B, *)."""
    return number.reshape(-1, *[1] * (x.dim() - 1)) if isinstance(number, Tensor) else number


def _edm_norm(alpha: Number, sigma: Number, sigma_data: float) -> Number:
    if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
        return torch.sqrt(torch.as_tensor(sigma * sigma + (alpha * sigma_data) ** 2))
    return math.hypot(sigma, alpha * sigma_data)


def _refuse_zero(applies: bool, name: str, value: Number, wanted: str) -> None:
    if applies and isinstance(value, float) and value == 0.0:
        raise ValueError(f"{name} must be positive here: at {name} = 0 the prediction does not determine {wanted}")
