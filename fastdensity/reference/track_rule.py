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

# Gauss-Legendre on (0, 1)
NODES = (0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970263)
WEIGHTS = (0.17392742256872693, 0.32607257743127307, 0.32607257743127307, 0.17392742256872693)
TINY_STEP = 1e-9  # in l: moves shorter than this go by the limit of the formulas
SAME_PLACE = 1e-4  # relative: did the last step arrive where this call is?
LEAST_COSINE = 0.05
FASTEST_FALL, FASTEST_RISE = -3.0, 1.0  # of ln ||eps||^2 per unit of l, where it is extrapolated
SHORTEST, LONGEST = 0.5, 2.0  # what guidance may make of the distance to the local mode in one step
NEAREST = 0.1  # of the typical distance: nearer to the mode no push goes

COEFFICIENTS = ("alpha_next", "sigma_next", "repair", "cfg_scale", "noise_scale", "carry")  # finite, of any sign

Numbers = dict[str, Tensor]
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
    measured = _measure(now, before, known)
    deficit = measured["commanded"] - measured["realised"]
    h, h_last, rate = now["h"], now["h_last"], now["rate"]
    long = known & (h_last > TINY_STEP)
    trend = torch.where(long, (rate - before["rate"]) / torch.where(long, h_last, 1.0), zero)
    commanded = h * rate + 0.5 * h * h * trend
    ahead = long & (before["noisy"] == 0) & (now["turn"] > 0) & (scheme == "direct")
    ahead = ahead & (now["noise_scale"] == 0)
    along_eps, along_state = _one_step_move(now)
    base, slope = _predict(now, ahead, known, along_eps, along_state)
    wanted = commanded + deficit
    # the last step is taken with the error in mind that its like had, since nothing comes after to mend it
    again = ahead & (now["final"] != 0) & (before["steps"] > 2)
    error = torch.where(again, measured["miss"] * (h / torch.where(long, h_last, 1.0)) ** 2, zero)
    usable = guided & (slope.abs() > 0)
    eta = torch.where(usable, (wanted - error - base) / torch.where(usable, slope, 1.0), 1.0)
    eta = eta + torch.where(usable, now["repair"] / now["square"], 0.0)
    response = _response(now, before, long)
    bounded, limited = _limit(eta, -torch.expm1(-h), response, now["square"] / columns)
    expected = torch.where(limited, base + slope * bounded + error, wanted)
    eta = torch.where(guided, bounded, 1.0)
    limited = limited & guided
    flags = flags | limited.to(torch.int64) * rules.FLAG_LIMITED
    after = {
        "steps": torch.where(guided, torch.where(known, before["steps"], zero) + 1, zero),
        **{name: torch.where(guided, now[name], zero) for name in ("alpha", "sigma", "alpha_end", "sigma_end", "rate")},
        "sq_norm": torch.where(guided, now["square"], zero),
        "eta": torch.where(guided, eta, zero),
        "noisy": torch.where(guided & (now["noise_scale"] > 0), 1.0, 0.0).double(),
        "drift_eps": torch.where(guided, eta * along_eps, zero),
        "drift_state": torch.where(guided, along_state, zero),
        "commanded_next": torch.where(guided, commanded, zero),
        "realised_next": torch.where(guided, expected, zero),
        "length": torch.where(guided & known, h_last, zero),
        "mismatch": torch.where(guided, measured["mismatch"], zero),
        "skew": torch.where(guided, measured["skew"], zero),
        "response": response,
        "commanded": measured["commanded"],
        "realised": measured["realised"],
        "limited": before["limited"] + limited.double(),
    }
    return after, (eta - 1.0, deficit, flags)


def _measure(now: Numbers, before: Numbers, known: Tensor) -> Numbers:
    """The books with the step that has just ended, whose right end is now known.

    The trapezoid rule over nodes, each with the slope of the step on its own side. Within a run the errors of both
    sides of a node cancel; at its end a half of the last slope's lag is left, and steps of unequal length leave
    theirs: `mismatch` and `skew` put both right. Noise bends no smooth path: it is taken to come at the step's end,
    orthogonal to what eps was there before, so that half of noise.eps is what it did, and |eps - last eps|^2 is its
    share of ||eps||^2.
    """
    zero = torch.zeros_like(now["rate"])
    h, square, square_last = now["h_last"], now["square"], now["square_last"]
    long = known & (h > TINY_STEP)
    safe_h = torch.where(long, h, 1.0)
    per_kappa = torch.where(long, h / torch.where(long, now["kappa"] - now["kappa_last"], 1.0), -1.0 / now["kappa"])
    noisy = before["noisy"] != 0
    move, move_last = now["move"], now["move_last"]
    drift = before["drift_eps"] * now["turn"] + before["drift_state"] * (now["state"] - move)
    drift_last = before["drift_eps"] * square_last + before["drift_state"] * (now["state_last"] - move_last)
    drift, drift_last = torch.where(noisy, drift, move), torch.where(noisy, drift_last, move_last)
    share = torch.where(noisy, square - 2.0 * now["turn"] + square_last, zero)
    gain = 0.5 * per_kappa * (drift + drift_last) - 0.5 * h * (square + square_last - share)
    gain = gain - 0.5 * (move + move_last - drift - drift_last) / now["kappa"]
    smooth = long & ~noisy
    mismatch = torch.where(smooth, now["square"] + now["rate"] - per_kappa * move / safe_h, zero)
    earlier = before["length"]
    second = smooth & (earlier > TINY_STEP)
    uneven = (h * h - earlier * earlier) / torch.where(second, earlier, 1.0)
    skew = before["skew"] - torch.where(second, 0.5 * uneven * before["mismatch"], zero)
    skew = torch.where(smooth, skew, zero)
    lag = 0.5 * (skew + 0.5 * h * mismatch)
    lag_before = torch.where(known, 0.5 * (before["skew"] + 0.5 * earlier * before["mismatch"]), zero)
    gain = gain + lag - lag_before
    # what the step was commanded, with the rate of its right end; unknown ends are believed as expected
    commanded = torch.where(known, 0.5 * h * (before["rate"] + now["rate"]), before["commanded_next"])
    realised = torch.where(known, gain, before["realised_next"])
    return {
        "commanded": before["commanded"] + commanded,
        "realised": before["realised"] + realised,
        "miss": torch.where(known, gain - before["realised_next"], zero),
        "mismatch": mismatch,
        "skew": skew,
    }


def _one_step_move(now: Numbers) -> tuple[Tensor, Tensor]:
    """(u, v): a step without memory moves y = x / alpha by u eta eps + v y."""
    one = torch.ones_like(now["rate"])
    alpha = torch.where(now["alpha"] > 0, now["alpha"], one)
    end = torch.where(now["alpha_end"] > 0, now["alpha_end"], one)
    return (now["sigma_next"] - now["alpha_next"] * (now["sigma"] / alpha)) / end, now["alpha_next"] / end - 1.0


def _predict(now: Numbers, ahead: Tensor, known: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(base, slope): the step ahead gives base + slope eta nats over -div u.

    Along it eps goes on turning and shrinking as it did in the last step: ln ||eps|| linear, the angle's square
    growing with the square of l, in the plane of eps and the last eps. Its means over l are a eps + c last_eps.
    """
    zero, one = torch.zeros_like(now["rate"]), torch.ones_like(now["rate"])
    h, square, turn = now["h"], now["square"], now["turn"]
    h_last = torch.where(ahead, now["h_last"], one)
    square_last = torch.where(ahead, now["square_last"], one)
    fall = (torch.log(torch.where(ahead, square, one) / square_last) / h_last).clamp(FASTEST_FALL, FASTEST_RISE)
    cosine = torch.where(ahead, turn, one) / torch.sqrt(torch.where(ahead, square, one) * square_last)
    log_cosine = torch.log(cosine.clamp(LEAST_COSINE, 1.0))
    along, across, mean_square = zero, zero, zero
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        size = torch.exp(0.5 * fall * (node * h))
        cos = torch.exp(log_cosine * (node * h / h_last) ** 2)
        along = along + weight * size * cos
        sine = 1.0 - cos * cos  # squared; a root at 0 has no derivative
        across = across + weight * size * torch.where(sine > 0, torch.sqrt(torch.where(sine > 0, sine, one)), zero)
        mean_square = mean_square + weight * size * size
    normal = square_last - turn * turn / square  # of (turn / square) eps - last_eps, squared
    turns = ahead & (normal > 1e-12 * square_last)
    lean = torch.where(turns, across * torch.sqrt(square / torch.where(turns, normal, one)), zero)
    along = torch.where(ahead, along, one)
    mean_square = torch.where(ahead, mean_square, one) * square
    a, c = along + lean * turn / square, -lean
    # the step's move of y is u eta eps + v y - w (last move + kappa_last eta_last last_eps)
    step, carry = now["kappa_end"] - now["kappa"], torch.where(known, now["carry"], zero)
    u, w = u * (1.0 + carry), step * carry / now["kappa"]
    per_kappa = h / torch.where(step != 0, step, one)
    last = a * turn + c * now["square_last"]
    rest = v * (a * now["state"] + c * now["state_last"])
    rest = rest - w * (a * now["move"] + c * now["move_last"] + now["kappa_last"] * now["eta_last"] * last)
    return per_kappa * rest - h * mean_square, per_kappa * u * along * square


def _response(now: Numbers, before: Numbers, long: Tensor) -> Tensor:
    """kappa^2 / (v + kappa^2) of the Gaussian, of variance v, that would have changed eps along itself like this.

    Between 0 (eps hardly answers to a move along it) and 1 (it answers as pure noise does). The last value is kept
    where the move was such that every v would do.
    """
    kappa, last, turn = now["kappa"], now["kappa_last"], now["turn"]
    numerator = now["square"] * kappa - turn * kappa * kappa / last
    denominator = now["move"] + turn * (last * last - kappa * kappa) / last
    telling = long & (before["noisy"] == 0) & (denominator > 0.25 * turn * (last - kappa)) & (turn > 0)
    found = numerator / torch.where(telling, denominator, 1.0)
    kept = torch.where(before["steps"] > 0, before["response"], 1.0)
    return torch.where(telling, found, kept).clamp(1e-3, 1.0)


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
    h, square, square_last, turn = (now[name] for name in ("h_last", "square", "square_last", "turn"))
    guided = guided & (square + turn > 0) & (h > TINY_STEP)
    both = torch.where(guided, square + turn, torch.ones_like(square))
    first = now["eta_last"] * (square_last + turn)
    deficit = before["commanded"] - before["realised"]
    wanted = before["commanded_next"] + deficit
    rate = wanted / torch.where(guided, h, 1.0)
    eta = (2.0 * (2.0 * rate + square_last + square) - first) / both
    response = before["response"].clamp(1e-3, 1.0)
    bounded, limited = _limit(eta, -torch.expm1(-h), response, square / columns)
    limited = limited & guided
    reached = h * (0.25 * (first + bounded * both) - 0.5 * (square_last + square))
    after = dict(before)
    after["realised_next"] = torch.where(guided, torch.where(limited, reached, wanted), before["realised_next"])
    after["limited"] = before["limited"] + limited.double()
    flags = flags | limited.to(torch.int64) * rules.FLAG_LIMITED
    eta_minus_one = torch.where(guided, bounded - 1.0, torch.zeros_like(eta))
    return after, (eta_minus_one, deficit, flags)
