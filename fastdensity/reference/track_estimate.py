"""What the closed loop makes of `track_model`: the step that ended measured, the step ahead predicted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdensity.reference.track_model import (
    EDGE,
    WEIGHTS,
    Fit,
    Gain,
    band,
    band_variances,
    gain,
    sum_of_gains,
    two_variances,
)

TINY_STEP = 1e-9  # in l: moves shorter than this go by the limit of the formulas
LEAST_RESPONSE = 1e-3
LEAST_TYPICAL, LEAST_QUIET = 0.1, 0.05

Numbers = dict[str, Tensor]


def without_noise(now: Numbers, before: Numbers) -> tuple[Numbers, Tensor]:
    """(the products that the last step has but for the noise at its end, nats over -div u that the noise brought).

    Noise n turns eps by its answer to n, H n, and log p gains -n.(eps before + eps after) / (2 kappa), where the eps
    before it is taken to be parallel to the last eps. |H n|^2 is the answer to a move along eps, over kappa, of n.H n.
    """
    square, kappa = now["square"], now["kappa"]
    drift = before["drift_eps"] * now["turn"] + before["drift_state"] * (now["state"] - now["move"])
    drift_last = before["drift_eps"] * now["square_last"]
    drift_last = drift_last + before["drift_state"] * (now["state_last"] - now["move_last"])
    noisy = before["noise"] > 0
    answer = kept_response(now, before) / kappa
    across = now["move_last"] - drift_last  # n.last_eps
    along, after = across * now["turn"] / now["square_last"], now["move"] - drift  # n.eps before and after
    quiet = torch.maximum(square - answer * (after + along), LEAST_QUIET * square)
    products = {
        **now,
        "square": torch.where(noisy, quiet, square),
        "turn": torch.where(noisy, now["turn"] - answer * across, now["turn"]),
        "move": torch.where(noisy, drift, now["move"]),
        "move_last": torch.where(noisy, drift_last, now["move_last"]),
    }
    return products, torch.where(noisy, -0.5 * (after + along) / kappa, 0.0)


def _typical(columns: int, gained: Tensor) -> Tensor:
    """What ||eps||^2 would be of pure noise: every nat of log p beyond the flow's shortens the way to the mode."""
    return (columns - 2.0 * gained).clamp_min(LEAST_TYPICAL * columns)


def fit(now: Numbers, before: Numbers, smooth: Tensor) -> Fit:
    """Two variances that explain the step that ended; where it was not smooth, those of some step."""
    kappa, kappa_last = torch.where(smooth, now["kappa"], 1.0), torch.where(smooth, now["kappa_last"], 1.1)
    square_last, turn, move, move_last = (
        torch.where(smooth, now[name] / now["square"], other)
        for name, other in (("square_last", 1.1), ("turn", 1.0), ("move", -0.1), ("move_last", -0.1))
    )
    return two_variances(square_last, turn, move, move_last, kappa, kappa_last, kept_variance(now, before))


def kept_variance(now: Numbers, before: Numbers) -> Tensor:
    """The one variance that would answer to a move along eps as was found at the last call; 0, pure noise, if fresh."""
    answer = torch.where(before["steps"] > 0, before["response"], 1.0).clamp(LEAST_RESPONSE, 1.0)
    return now["kappa_last"] * now["kappa_last"] * (1.0 / answer - 1.0)


def kept_response(now: Numbers, before: Numbers) -> Tensor:
    """How much eps answers to a move along itself if nothing but kappa has changed since; pure noise wholly, with 1."""
    squared = now["kappa"] * now["kappa"]
    return (squared / (kept_variance(now, before) + squared)).clamp(LEAST_RESPONSE, 1.0)


def response(now: Numbers, before: Numbers, smooth: Tensor, found: Fit) -> Tensor:
    """The same, now: the mean of kappa^2 / (v + kappa^2); what it was where the last step does not tell."""
    squared, total = now["kappa"] * now["kappa"], torch.zeros_like(now["kappa"])
    for part in found.parts:
        total = total + part.share * squared / (part.variance + squared)
    return torch.where(smooth, total, kept_response(now, before)).clamp(LEAST_RESPONSE, 1.0)


def measure(
    now: Numbers, before: Numbers, known: Tensor, smooth: Tensor, found: Fit, taken: Tensor
) -> tuple[Tensor, Tensor]:
    """(commanded, realised) with the step that has just ended, whose right end is now known.

    Along a smooth step eps is that of two variances, along any other one it goes by the trapezoid rule; what noise took
    at its end comes on top. Unknown steps are believed as expected.
    """
    gained = torch.where(smooth, _gain_of_fit(now, found), _gain_by_trapezoid(now, known)) + taken
    commanded = torch.where(known, 0.5 * now["h_last"] * (before["rate"] + now["rate"]), before["commanded_next"])
    realised = torch.where(known, gained, before["realised_next"])
    return before["commanded"] + commanded, before["realised"] + realised


def _gain_of_fit(now: Numbers, found: Fit) -> Tensor:
    total = torch.zeros_like(now["square"])
    for part in found.parts:
        one = gain(part.variance, found.kappa_last, found.kappa)
        total = total + part.share * part.before * part.before * one.at(part.move / part.before)
    return now["square"] * total


def _gain_by_trapezoid(now: Numbers, known: Tensor) -> Tensor:
    h = now["h_last"]
    long = known & (h > TINY_STEP)
    per_kappa = torch.where(long, h / torch.where(long, now["kappa"] - now["kappa_last"], 1.0), -1.0 / now["kappa"])
    return 0.5 * per_kappa * (now["move"] + now["move_last"]) - 0.5 * h * (now["square"] + now["square_last"])


def one_step_move(now: Numbers) -> tuple[Tensor, Tensor]:
    """(u, v): a step without memory moves y = x / alpha by u eta eps + v y."""
    one = torch.ones_like(now["rate"])
    alpha = torch.where(now["alpha"] > 0, now["alpha"], one)
    end = torch.where(now["alpha_end"] > 0, now["alpha_end"], one)
    return (now["sigma_next"] - now["alpha_next"] * (now["sigma"] / alpha)) / end, now["alpha_next"] / end - 1.0


def noise_over_state(now: Numbers) -> Tensor:
    """Variance of the noise of a step ahead, as it is in y = x / alpha."""
    end = torch.where(now["alpha_end"] > 0, now["alpha_end"], 1.0)
    return (now["noise_scale"] / end) ** 2


def predict(
    columns: int, now: Numbers, commanded: Tensor, answers: Tensor, found: Fit, ahead: Tensor, known: Tensor
) -> Gain:
    """What the step ahead gains with eta.

    How much of what pure noise would have is left in ||eps||^2, and how much eps answers (`answers`) to a move along
    itself, say which band of variances is there. The step moves y by u eta eps + v y - w (last move + kappa_last
    eta_last last_eps); the noise at its end takes half of what it would take of pure noise, times what is left then.
    Where little is known, eps is taken to stay what it is.
    """
    square, kappa, h = now["square"], now["kappa"], now["h"]
    typical = _typical(columns, commanded)
    fall = (1.0 - answers).clamp(EDGE, 1.0 - EDGE)
    left = torch.minimum(torch.where(ahead, square / typical, 0.5), 1.0 - fall).clamp_min(EDGE)
    here, end = torch.where(ahead, kappa, 1.0), torch.where(ahead, now["kappa_end"], 0.9)
    step, carry = now["kappa_end"] - kappa, torch.where(known, now["carry"], 0.0)
    safe = torch.where(step != 0, step, 1.0)
    u, v = one_step_move(now)
    w, per_eta = step * carry / kappa, u * (1.0 + carry) / safe
    steering = now["kappa_last"] * now["eta_last"]
    variances = band_variances(*band(left, fall), here)
    # y in units of eps is (v + kappa^2) / kappa, but for where the data have their mean
    mean = now["state"] / square - sum(share * (variance + here * here) for variance, share in variances) / here

    def parts() -> Iterator[tuple[Tensor, Gain, Tensor, Tensor]]:
        for variance, share in variances:
            before = found.before(variance)
            moved = (found.kappa - found.kappa_last) * (found.offset + found.bend * before)
            state = (variance + here * here) / here + mean
            yield share, gain(variance, here, end), per_eta, (v * state - w * (moved + steering * before)) / safe

    by = sum_of_gains(parts())
    rest = (v * now["state"] - w * (now["move"] + steering * now["turn"])) / square / safe
    remains = sum(weight * end * end / (v + end * end) for (v, _), weight in zip(variances, WEIGHTS, strict=True))
    remains = torch.where(ahead, remains, (square / typical).clamp_max(1.0))
    taken = 0.5 * columns * noise_over_state(now) / (now["kappa_end"] * now["kappa_end"]) * remains
    return Gain(
        square * torch.where(ahead, by.constant, h * (rest - 1.0)) - taken,
        square * torch.where(ahead, by.linear, h * per_eta),
        square * torch.where(ahead, by.square, 0.0),
    )


def predict_both(now: Numbers, before: Numbers, guided: Tensor) -> Gain:
    """What a step along the mean of two directions gains with eta at its end, where it is now (Heun's method)."""
    found, half = fit(now, before, guided), 0.5 * now["eta_last"]
    by = sum_of_gains(
        (
            part.share * part.before * part.before,
            gain(part.variance, found.kappa_last, found.kappa),
            0.5 / part.before,
            half,
        )
        for part in found.parts
    )
    return Gain(*(now["square"] * number for number in by))
