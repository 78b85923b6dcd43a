"""What the closed loop decides for a row, from a handful of inner products: measure, command, predict, limit.

Everything is float64 and elementwise over the rows. csrc/track_rule.h and triton_kernels/track_rule.py are its twins.
docs/few-steps.md derives it and says what else was tried.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity.reference import track_estimate as estimate
from fastdensity.reference.track_estimate import TINY_STEP, Numbers

SAME_PLACE = 1e-4  # relative: did the last step arrive where this call is?
SHORTEST, LONGEST = 0.5, 2.0  # what guidance may make of the distance to the local mode in one step
NEAREST = 0.1  # of the typical distance: nearer to the mode no push goes

COEFFICIENTS = ("alpha_next", "sigma_next", "cfg_scale", "noise_scale", "carry")  # finite, of any sign

Decision = tuple[Tensor, Tensor, Tensor]  # eta - 1, commanded - realised, flags


class Gram(NamedTuple):
    """Inner products, (B,) each: of eps, the last eps, the move of y = x / alpha since then, and y itself."""

    square: Tensor  # eps.eps
    turn: Tensor  # eps.last_eps
    move: Tensor  # move.eps
    move_last: Tensor  # move.last_eps
    state: Tensor  # y.eps
    state_last: Tensor  # y.last_eps


def decide(scheme: str, columns: int, now: Numbers, before: Numbers, gram: Gram) -> tuple[Numbers, Tensor]:
    """(memory after, report): see `fastdensity.reference.track`."""
    rate = now["shift"] + math.sqrt(2.0 * columns) * torch.special.ndtri(now["q"])
    flags = _problems(scheme, now, rate, gram)
    started = before["steps"] > 0
    here = (now["alpha"] > 0) & (now["sigma"] > 0) & (gram.square > 0) & rate.isfinite()
    here = here & (now["alpha"] * now["sigma"] * gram.square * now["cfg_scale"]).isfinite()
    arrived = _arrived(now, before) & (gram.turn + gram.move + gram.move_last + gram.state_last).isfinite()
    flags = flags | (started & here & ~arrived).to(torch.int64) * rules.FLAG_STALE_STATE
    known = started & arrived & here
    guided = (flags & ~rules.FLAG_STALE_STATE) == 0
    numbers = _safe_numbers(now, before, gram, known, guided, here, rate)
    if scheme == "corrector":
        after, report = _correct(columns, numbers, before, flags, guided & known)
    else:
        after, report = _advance(scheme, columns, numbers, before, flags, known, guided)
    eta_minus_one, deficit, flags = report
    return after, torch.stack([eta_minus_one, gram.square, deficit, flags.double()], dim=1)


def _problems(scheme: str, now: Numbers, rate: Tensor, gram: Gram) -> Tensor:
    """Why a row cannot be guided, as bits."""
    flags = torch.zeros_like(rate, dtype=torch.int64)
    for name in ("alpha", "sigma", "alpha_end", "sigma_end"):
        end = now[name]
        flags = flags | (end == 0).to(torch.int64) * rules.FLAG_ENDPOINT
        flags = flags | (~((end >= 0) & end.isfinite())).to(torch.int64) * rules.FLAG_BAD_PARAMETER
    bad = ~((now["q"] > 0) & (now["q"] < 1)) | ~(now["noise_scale"] >= 0)
    bad = bad | ~rate.isfinite()
    if scheme != "corrector":  # there the step is already over
        bad = bad | ~(now["alpha"] * now["sigma_end"] < now["sigma"] * now["alpha_end"])
    for name in COEFFICIENTS:
        bad = bad | ~now[name].isfinite()
    flags = flags | bad.to(torch.int64) * rules.FLAG_BAD_PARAMETER
    flags = flags | (gram.square == 0).to(torch.int64) * rules.FLAG_ZERO_SCORE
    return flags | (~gram.square.isfinite()).to(torch.int64) * rules.FLAG_NON_FINITE


def _arrived(now: Numbers, before: Numbers) -> Tensor:
    """Is this the place the last step was to reach? Else the memory is of another schedule, or of another run."""
    here, wanted = now["sigma"] * before["alpha_end"], now["alpha"] * before["sigma_end"]
    return (here - wanted).abs() <= SAME_PLACE * wanted.abs()


def _safe_numbers(
    now: Numbers, before: Numbers, gram: Gram, known: Tensor, guided: Tensor, here: Tensor, rate: Tensor
) -> Numbers:
    """Logarithms and quotients of numbers that exist; 1 or 0 in the place of what a row does not have."""
    one = torch.ones_like(rate)

    def pick(which: Tensor, value: Tensor, other: Tensor = one) -> Tensor:
        return torch.where(which, value, other)

    kappa = pick(here, now["sigma"]) / pick(here, now["alpha"])
    kappa_last = pick(known, before["sigma"]) / pick(known, before["alpha"])
    kappa_end = pick(guided, now["sigma_end"]) / pick(guided, now["alpha_end"])
    zero = torch.zeros_like(rate)
    return {
        **now,
        "rate": pick(here, rate, zero),
        "kappa": kappa,
        "kappa_last": kappa_last,
        "kappa_end": kappa_end,
        "h": torch.log(kappa / kappa_end),
        "h_last": pick(known, torch.log(kappa_last / kappa), zero),
        "square": pick(here, gram.square),
        "square_last": pick(known, before["sq_norm"]),
        "turn": pick(known, gram.turn, zero),
        "move": pick(known, gram.move, zero),
        "move_last": pick(known, gram.move_last, zero),
        "state": pick(here, gram.state, zero),
        "state_last": pick(known, gram.state_last, zero),
        "eta_last": pick(known, before["eta"]),
    }


def _advance(
    scheme: str, columns: int, now: Numbers, before: Numbers, flags: Tensor, known: Tensor, guided: Tensor
) -> tuple[Numbers, Decision]:
    """Measures the step that ended, decides on the one ahead."""
    zero = torch.zeros_like(now["rate"])
    h, h_last, rate, square = now["h"], now["h_last"], now["rate"], now["square"]
    long = known & (h_last > TINY_STEP)
    quiet, taken = estimate.without_noise(now, before)
    smooth = long & (quiet["turn"] > 0)
    found = estimate.fit(quiet, before, smooth)
    answers = estimate.response(now, before, smooth, found)
    commanded, realised = estimate.measure(quiet, before, known, smooth, found, taken)
    deficit = commanded - realised
    trend = torch.where(long, (rate - before["rate"]) / torch.where(long, h_last, 1.0), zero)
    commanded_next = h * rate + 0.5 * h * h * trend
    ahead = smooth & (scheme == "direct")
    expected = estimate.predict(columns, now, commanded, answers, found, ahead, known)
    eta = expected.solved(commanded_next + deficit)
    bounded, limited = _limit(eta, -torch.expm1(-h), answers, square / columns)
    limited, eta = limited & guided, torch.where(guided, bounded, 1.0)
    flags = flags | limited.to(torch.int64) * rules.FLAG_LIMITED
    along_eps, along_state = estimate.one_step_move(now)
    after = {
        "steps": torch.where(guided, torch.where(known, before["steps"], zero) + 1, zero),
        **{name: torch.where(guided, now[name], zero) for name in ("alpha", "sigma", "alpha_end", "sigma_end", "rate")},
        "sq_norm": torch.where(guided, square, zero),
        "eta": torch.where(guided, eta, zero),
        "noise": torch.where(guided, estimate.noise_over_state(now), zero),
        "drift_eps": torch.where(guided, eta * along_eps, zero),
        "drift_state": torch.where(guided, along_state, zero),
        "commanded_next": torch.where(guided, commanded_next, zero),
        "realised_next": torch.where(guided, expected.at(eta), zero),
        "response": answers,
        "commanded": commanded,
        "realised": realised,
        "limited": before["limited"] + limited.double(),
    }
    return after, (eta - 1.0, deficit, flags)


def _limit(eta: Tensor, stride: Tensor, response: Tensor, mean_square: Tensor) -> tuple[Tensor, Tensor]:
    """(eta in its bounds, was it outside?). A step scales the distance to the local mode by 1 - eta stride response.

    Guidance may leave no less than SHORTEST times what the plain flow leaves of that distance, make no more than
    LONGEST times the distance of it, and not push where less than NEAREST times the typical distance is left.
    """
    reach = (stride * response).clamp_min(1e-12)
    distance = torch.sqrt(mean_square / response).clamp_min(1e-12)
    shortest = (NEAREST / distance).clamp(SHORTEST, 1.0)
    most = (1.0 - shortest * (1.0 - reach)) / reach
    least = (1.0 - LONGEST) / reach
    bounded = torch.minimum(torch.maximum(eta, least), most)
    return bounded, bounded != eta


def _correct(columns: int, now: Numbers, before: Numbers, flags: Tensor, guided: Tensor) -> tuple[Numbers, Decision]:
    """Heun's second evaluation: eta such that the mean of both directions gives what the step is to give.

    The memory stays that of the step's beginning, where the whole step will be measured from.
    """
    h, turn = now["h_last"], now["turn"]
    guided = guided & (turn > 0) & (h > TINY_STEP)
    deficit = before["commanded"] - before["realised"]
    expected = estimate.predict_both(now, before, guided)
    eta = expected.solved(before["commanded_next"] + deficit)
    # the bounds are those of the mean direction, in units of eps at the step's beginning
    share = torch.where(guided, turn / now["square_last"], 1.0)
    mean, limited = _limit(
        0.5 * (now["eta_last"] + share * eta),
        -torch.expm1(-h),
        estimate.kept_response(now, before),
        now["square_last"] / columns,
    )
    bounded = torch.where(limited, (2.0 * mean - now["eta_last"]) / share, eta)
    limited = limited & guided
    after = dict(before)
    after["realised_next"] = torch.where(guided, expected.at(bounded), before["realised_next"])
    after["limited"] = before["limited"] + limited.double()
    flags = flags | limited.to(torch.int64) * rules.FLAG_LIMITED
    eta_minus_one = torch.where(guided, bounded - 1.0, torch.zeros_like(eta))
    return after, (eta_minus_one, deficit, flags)
