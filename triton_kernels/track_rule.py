"""What the closed loop decides for a row, in Triton: the twin, function by function, of `reference.track_rule`.

A program handles one row, so everything here is a float64 scalar, flags int32; see `track_model` for what Triton
makes of constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity import rules
from fastdensity.reference import track_rule as reference
from fastdensity.triton_kernels.rows_scalars import (
    BAD_PARAMETER,
    NON_FINITE,
    ZERO_SCORE,
    _end_flags,
    _flag,
    _is_finite,
    _not_finite_flag,
)
from fastdensity.triton_kernels.track_estimate import (
    ALPHA,
    ALPHA_END,
    ALPHA_NEXT,
    CARRY,
    CFG_SCALE,
    ETA_LAST,
    H_LAST,
    LAST_ALPHA,
    LAST_ALPHA_END,
    LAST_COMMANDED,
    LAST_COMMANDED_NEXT,
    LAST_DRIFT_EPS,
    LAST_DRIFT_STATE,
    LAST_ETA,
    LAST_LIMITED,
    LAST_NOISE,
    LAST_RATE,
    LAST_REALISED,
    LAST_REALISED_NEXT,
    LAST_RESPONSE,
    LAST_SIGMA,
    LAST_SIGMA_END,
    LAST_SQ_NORM,
    LAST_STEPS,
    NOISE_SCALE,
    RATE,
    SIGMA,
    SIGMA_END,
    SIGMA_NEXT,
    SQUARE,
    SQUARE_LAST,
    TINY_STEP,
    TURN,
    H,
    fit,
    kept_response,
    measure,
    noise_over_state,
    one_step_move,
    predict,
    predict_both,
    response,
    without_noise,
)
from fastdensity.triton_kernels.track_model import at_least, clamp, gain_at, pick, shortening, solved

LIMITED = tl.constexpr(rules.FLAG_LIMITED)
STALE_STATE = tl.constexpr(rules.FLAG_STALE_STATE)
SAME_PLACE = tl.constexpr(reference.SAME_PLACE)
SHORTEST = tl.constexpr(reference.SHORTEST)
LONGEST = tl.constexpr(reference.LONGEST)
NEAREST = tl.constexpr(reference.NEAREST)


@triton.jit
def decide(now, before, gram, rate, columns, SCHEME: tl.constexpr):
    """(memory after, report) of a row, two tuples; `columns` in float64. `now[Q]` is not read, it is in `rate`.

    The rate is NaN for q outside (0, 1), which flags the row.
    """
    flags = _problems(now, rate, gram[0], SCHEME)
    started = before[LAST_STEPS] > 0.0
    here = (now[ALPHA] > 0.0) & (now[SIGMA] > 0.0) & (gram[0] > 0.0) & _is_finite(rate)
    here = here & _is_finite(now[ALPHA] * now[SIGMA] * gram[0] * now[CFG_SCALE])
    arrived = _arrived(now, before) & _is_finite(gram[1] + gram[2] + gram[3] + gram[5])
    guided = flags == 0
    flags |= _flag(started & here & (arrived == 0), STALE_STATE)
    known = started & arrived & here
    numbers = now + _safe_numbers(now, before, gram, known, guided, here, rate)
    if SCHEME == "corrector":
        return _correct(numbers, before, flags, guided & known, columns)
    else:
        return _advance(numbers, before, flags, known, guided, columns, SCHEME)


@triton.jit
def _problems(now, rate, square, SCHEME: tl.constexpr):
    """Why a row cannot be guided, as bits."""
    flags = _end_flags(now[ALPHA]) | _end_flags(now[SIGMA]) | _end_flags(now[ALPHA_END]) | _end_flags(now[SIGMA_END])
    flags |= _not_finite_flag(rate) | _flag((now[NOISE_SCALE] >= 0.0) == 0, BAD_PARAMETER)
    if SCHEME != "corrector":  # there the step is already over
        forward = now[ALPHA] * now[SIGMA_END] < now[SIGMA] * now[ALPHA_END]
        flags |= _flag(forward == 0, BAD_PARAMETER)
    flags |= _not_finite_flag(now[ALPHA_NEXT]) | _not_finite_flag(now[SIGMA_NEXT])
    flags |= _not_finite_flag(now[CFG_SCALE]) | _not_finite_flag(now[NOISE_SCALE]) | _not_finite_flag(now[CARRY])
    return flags | _flag(square == 0.0, ZERO_SCORE) | _flag(_is_finite(square) == 0, NON_FINITE)


@triton.jit
def _arrived(now, before):
    """Is this the place the last step was to reach?"""
    here, wanted = now[SIGMA] * before[LAST_ALPHA_END], now[ALPHA] * before[LAST_SIGMA_END]
    return tl.abs(here - wanted) <= tl.abs(wanted) * SAME_PLACE


@triton.jit
def _safe_numbers(now, before, gram, known, guided, here, rate):
    """What follows the parameters in `now`: numbers that exist, and 1 or 0 for what a row does not have."""
    square, turn, move, move_last, state, state_last = gram
    kappa = pick(here, now[SIGMA], 1.0) / pick(here, now[ALPHA], 1.0)
    kappa_last = pick(known, before[LAST_SIGMA], 1.0) / pick(known, before[LAST_ALPHA], 1.0)
    kappa_end = pick(guided, now[SIGMA_END], 1.0) / pick(guided, now[ALPHA_END], 1.0)
    return (
        pick(here, rate, 0.0),
        kappa,
        kappa_last,
        kappa_end,
        tl.log(kappa / kappa_end),
        pick(known, tl.log(kappa_last / kappa), 0.0),
        pick(here, square, 1.0),
        pick(known, before[LAST_SQ_NORM], 1.0),
        pick(known, turn, 0.0),
        pick(known, move, 0.0),
        pick(known, move_last, 0.0),
        pick(here, state, 0.0),
        pick(known, state_last, 0.0),
        pick(known, before[LAST_ETA], 1.0),
    )


@triton.jit
def _advance(now, before, flags, known, guided, columns, SCHEME: tl.constexpr):
    """Measures the step that ended, decides on the one ahead."""
    h, h_last, rate, square = now[H], now[H_LAST], now[RATE], now[SQUARE]
    long = known & (h_last > TINY_STEP)
    products, brought = without_noise(now, before)
    smooth = long & (products[1] > 0.0)
    found = fit(now, products, before)
    answers = response(now, before, smooth, found)
    commanded, realised = measure(now, products, before, known, smooth, found, brought)
    deficit = commanded - realised
    trend = pick(long, (rate - before[LAST_RATE]) / pick(long, h_last, 1.0), 0.0)
    commanded_next = h * rate + 0.5 * h * h * trend
    expected = predict(columns, now, commanded, answers, found, smooth, known, SCHEME)
    eta = solved(expected, commanded_next + deficit)
    bounded, limited = _limit(eta, shortening(h), answers, square / columns)
    eta = pick(guided, bounded, 1.0)
    limited = limited & guided
    along_eps, along_state = one_step_move(now)
    after = (
        pick(guided, pick(known, before[LAST_STEPS], 0.0) + 1.0, 0.0),
        pick(guided, now[ALPHA], 0.0),
        pick(guided, now[SIGMA], 0.0),
        pick(guided, now[ALPHA_END], 0.0),
        pick(guided, now[SIGMA_END], 0.0),
        pick(guided, square, 0.0),
        pick(guided, rate, 0.0),
        pick(guided, eta, 0.0),
        pick(guided, noise_over_state(now), 0.0),
        pick(guided, eta * along_eps, 0.0),
        pick(guided, along_state, 0.0),
        pick(guided, commanded_next, 0.0),
        pick(guided, gain_at(expected, eta), 0.0),
        answers,
        commanded,
        realised,
        before[LAST_LIMITED] + limited.to(tl.float64),
    )
    return after, (eta - 1.0, square, deficit, flags | _flag(limited, LIMITED))


@triton.jit
def _limit(eta, stride, response, mean_square):
    """(eta in its bounds, was it outside?)."""
    reach = at_least(stride * response, 1e-12)
    distance = at_least(tl.sqrt(mean_square / response), 1e-12)
    shortest = clamp(tl.full((), NEAREST, tl.float64) / distance, SHORTEST, 1.0)
    most = (1.0 - shortest * (1.0 - reach)) / reach
    least = tl.full((), 1.0 - LONGEST, tl.float64) / reach
    bounded = tl.where(eta < least, least, eta)
    bounded = tl.where(bounded > most, most, bounded)
    return bounded, bounded != eta


@triton.jit
def _correct(now, before, flags, guided, columns):
    """Heun's second evaluation: eta such that the mean of both directions gives what the step is to give."""
    h, turn = now[H_LAST], now[TURN]
    guided = guided & (turn > 0.0) & (h > TINY_STEP)
    deficit = before[LAST_COMMANDED] - before[LAST_REALISED]
    expected = predict_both(now, before)
    eta = solved(expected, before[LAST_COMMANDED_NEXT] + deficit)
    # the bounds are those of the mean direction, in units of eps at the step's beginning
    share = pick(guided, turn / now[SQUARE_LAST], 1.0)
    mean = 0.5 * (now[ETA_LAST] + share * eta)
    kept, limited = _limit(mean, shortening(h), kept_response(now, before), now[SQUARE_LAST] / columns)
    bounded = tl.where(limited, (2.0 * kept - now[ETA_LAST]) / share, eta)
    limited = limited & guided
    after = (
        before[LAST_STEPS],
        before[LAST_ALPHA],
        before[LAST_SIGMA],
        before[LAST_ALPHA_END],
        before[LAST_SIGMA_END],
        before[LAST_SQ_NORM],
        before[LAST_RATE],
        before[LAST_ETA],
        before[LAST_NOISE],
        before[LAST_DRIFT_EPS],
        before[LAST_DRIFT_STATE],
        before[LAST_COMMANDED_NEXT],
        tl.where(guided, gain_at(expected, bounded), before[LAST_REALISED_NEXT]),
        before[LAST_RESPONSE],
        before[LAST_COMMANDED],
        before[LAST_REALISED],
        before[LAST_LIMITED] + limited.to(tl.float64),
    )
    eta_minus_one = pick(guided, bounded - 1.0, 0.0)
    return after, (eta_minus_one, now[SQUARE], deficit, flags | _flag(limited, LIMITED))
