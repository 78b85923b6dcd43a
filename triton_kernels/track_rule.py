"""What the closed loop decides for a row, in Triton: the twin, function by function, of `reference.track_rule`.

A program handles one row, so everything here is a float64 scalar, flags int32. What the reference keeps in dictionaries
is in tuples here, read by the constants below: `now[ALPHA]`, `before[LAST_ALPHA]`. Constants never meet `tl.where` as
they are, since Triton makes float32 of them there (see `_pick`), and stand to the right of an operator, where its
interpreter takes them for numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity import rules
from fastdensity.reference import track_rule as reference
from fastdensity.reference.track import MEMORY, PARAMETERS
from fastdensity.triton_kernels.rows_scalars import (
    BAD_PARAMETER,
    NON_FINITE,
    ZERO_SCORE,
    _end_flags,
    _flag,
    _is_finite,
    _not_finite_flag,
)

LIMITED = tl.constexpr(rules.FLAG_LIMITED)
STALE_STATE = tl.constexpr(rules.FLAG_STALE_STATE)

NODES = tuple(tl.constexpr(node) for node in reference.NODES)
WEIGHTS = tuple(tl.constexpr(weight) for weight in reference.WEIGHTS)
NODE_0, NODE_1, NODE_2, NODE_3 = NODES
WEIGHT_0, WEIGHT_1, WEIGHT_2, WEIGHT_3 = WEIGHTS
TINY_STEP = tl.constexpr(reference.TINY_STEP)
SAME_PLACE = tl.constexpr(reference.SAME_PLACE)
LEAST_COSINE = tl.constexpr(reference.LEAST_COSINE)
FASTEST_FALL = tl.constexpr(reference.FASTEST_FALL)
FASTEST_RISE = tl.constexpr(reference.FASTEST_RISE)
SHORTEST = tl.constexpr(reference.SHORTEST)
LONGEST = tl.constexpr(reference.LONGEST)
NEAREST = tl.constexpr(reference.NEAREST)

# Where a number is in `now`: the parameters of a call, then what `_safe_numbers` finds.
(
    ALPHA, SIGMA, ALPHA_NEXT, SIGMA_NEXT, ALPHA_END, SIGMA_END, Q, SHIFT, REPAIR, CFG_SCALE, NOISE_SCALE, SIGMA_DATA,
    CARRY, FINAL,
    RATE, KAPPA, KAPPA_LAST, KAPPA_END, H, H_LAST, SQUARE, SQUARE_LAST, TURN, MOVE, MOVE_LAST, STATE, STATE_LAST,
    ETA_LAST,
) = (tl.constexpr(index) for index in range(len(PARAMETERS) + 14))  # fmt: skip

# Where it is in `before`, in the order of `MEMORY`.
(
    LAST_STEPS, LAST_ALPHA, LAST_SIGMA, LAST_ALPHA_END, LAST_SIGMA_END, LAST_SQ_NORM, LAST_RATE, LAST_ETA, LAST_NOISY,
    LAST_DRIFT_EPS, LAST_DRIFT_STATE, LAST_COMMANDED_NEXT, LAST_REALISED_NEXT, LAST_LENGTH, LAST_MISMATCH, LAST_SKEW,
    LAST_RESPONSE, LAST_COMMANDED, LAST_REALISED, LAST_LIMITED,
) = (tl.constexpr(index) for index in range(len(MEMORY)))  # fmt: skip


@triton.jit
def _pick(which, value, OTHER: tl.constexpr):
    """The value, or a constant in the place of one that a row does not have."""
    return tl.where(which, value, tl.full((), OTHER, tl.float64))


@triton.jit
def _at_least(number, LOW: tl.constexpr):
    return tl.where(number < LOW, tl.full((), LOW, tl.float64), number)


@triton.jit
def _clamp(number, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Between the two; NaN stays NaN."""
    return tl.where(number > HIGH, tl.full((), HIGH, tl.float64), _at_least(number, LOW))


@triton.jit
def shortening(h):
    """1 - exp(-h) = -expm1(-h), h >= 0: Taylor's series where the difference would lose digits. Within 4 ulp."""
    total = h * (1.0 / 16.0)
    total = (1.0 - total) * h * (1.0 / 15.0)
    total = (1.0 - total) * h * (1.0 / 14.0)
    total = (1.0 - total) * h * (1.0 / 13.0)
    total = (1.0 - total) * h * (1.0 / 12.0)
    total = (1.0 - total) * h * (1.0 / 11.0)
    total = (1.0 - total) * h * (1.0 / 10.0)
    total = (1.0 - total) * h * (1.0 / 9.0)
    total = (1.0 - total) * h * (1.0 / 8.0)
    total = (1.0 - total) * h * (1.0 / 7.0)
    total = (1.0 - total) * h * (1.0 / 6.0)
    total = (1.0 - total) * h * (1.0 / 5.0)
    total = (1.0 - total) * h * (1.0 / 4.0)
    total = (1.0 - total) * h * (1.0 / 3.0)
    total = (1.0 - total) * h * 0.5
    return tl.where(h < 0.5, (1.0 - total) * h, 1.0 - tl.exp(-h))


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
    flags |= _not_finite_flag(now[ALPHA_NEXT]) | _not_finite_flag(now[SIGMA_NEXT]) | _not_finite_flag(now[REPAIR])
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
    kappa = _pick(here, now[SIGMA], 1.0) / _pick(here, now[ALPHA], 1.0)
    kappa_last = _pick(known, before[LAST_SIGMA], 1.0) / _pick(known, before[LAST_ALPHA], 1.0)
    kappa_end = _pick(guided, now[SIGMA_END], 1.0) / _pick(guided, now[ALPHA_END], 1.0)
    return (
        _pick(here, rate, 0.0),
        kappa,
        kappa_last,
        kappa_end,
        tl.log(kappa / kappa_end),
        _pick(known, tl.log(kappa_last / kappa), 0.0),
        _pick(here, square, 1.0),
        _pick(known, before[LAST_SQ_NORM], 1.0),
        _pick(known, turn, 0.0),
        _pick(known, move, 0.0),
        _pick(known, move_last, 0.0),
        _pick(here, state, 0.0),
        _pick(known, state_last, 0.0),
        _pick(known, before[LAST_ETA], 1.0),
    )


@triton.jit
def _advance(now, before, flags, known, guided, columns, SCHEME: tl.constexpr):
    """Measures the step that ended, decides on the one ahead."""
    measured_commanded, measured_realised, miss, mismatch, skew = _measure(now, before, known)
    deficit = measured_commanded - measured_realised
    h, h_last, rate = now[H], now[H_LAST], now[RATE]
    long = known & (h_last > TINY_STEP)
    safe_h_last = _pick(long, h_last, 1.0)
    trend = _pick(long, (rate - before[LAST_RATE]) / safe_h_last, 0.0)
    commanded = h * rate + 0.5 * h * h * trend
    ahead = long & (before[LAST_NOISY] == 0.0) & (now[TURN] > 0.0) & (now[NOISE_SCALE] == 0.0)
    along_eps, along_state = _one_step_move(now)
    base, slope = _predict(now, ahead, known, along_eps, along_state, SCHEME)
    wanted = commanded + deficit
    # the last step is taken with the error in mind that its like had, since nothing comes after to mend it
    error = tl.full((), 0.0, tl.float64)
    if SCHEME == "direct":
        again = ahead & (now[FINAL] != 0.0) & (before[LAST_STEPS] > 2.0)
        error = _pick(again, miss * (h / safe_h_last) * (h / safe_h_last), 0.0)
    usable = guided & (tl.abs(slope) > 0.0)
    eta = _pick(usable, (wanted - error - base) / _pick(usable, slope, 1.0), 1.0)
    eta += _pick(usable, now[REPAIR] / now[SQUARE], 0.0)
    response = _response(now, before, long)
    bounded, limited = _limit(eta, shortening(h), response, now[SQUARE] / columns)
    expected = tl.where(limited, base + slope * bounded + error, wanted)
    eta = _pick(guided, bounded, 1.0)
    limited = limited & guided
    after = (
        _pick(guided, _pick(known, before[LAST_STEPS], 0.0) + 1.0, 0.0),
        _pick(guided, now[ALPHA], 0.0),
        _pick(guided, now[SIGMA], 0.0),
        _pick(guided, now[ALPHA_END], 0.0),
        _pick(guided, now[SIGMA_END], 0.0),
        _pick(guided, now[SQUARE], 0.0),
        _pick(guided, rate, 0.0),
        _pick(guided, eta, 0.0),
        (guided & (now[NOISE_SCALE] > 0.0)).to(tl.float64),
        _pick(guided, eta * along_eps, 0.0),
        _pick(guided, along_state, 0.0),
        _pick(guided, commanded, 0.0),
        _pick(guided, expected, 0.0),
        _pick(guided & known, h_last, 0.0),
        _pick(guided, mismatch, 0.0),
        _pick(guided, skew, 0.0),
        response,
        measured_commanded,
        measured_realised,
        before[LAST_LIMITED] + limited.to(tl.float64),
    )
    return after, (eta - 1.0, now[SQUARE], deficit, flags | _flag(limited, LIMITED))


@triton.jit
def _measure(now, before, known):
    """(commanded, realised, miss, mismatch, skew): the books with the step that has just ended."""
    h, square, square_last = now[H_LAST], now[SQUARE], now[SQUARE_LAST]
    long = known & (h > TINY_STEP)
    safe_h = _pick(long, h, 1.0)
    per_kappa = tl.where(long, h / _pick(long, now[KAPPA] - now[KAPPA_LAST], 1.0), -1.0 / now[KAPPA])
    noisy = before[LAST_NOISY] != 0.0
    move, move_last = now[MOVE], now[MOVE_LAST]
    drift = before[LAST_DRIFT_EPS] * now[TURN] + before[LAST_DRIFT_STATE] * (now[STATE] - move)
    drift_last = before[LAST_DRIFT_EPS] * square_last + before[LAST_DRIFT_STATE] * (now[STATE_LAST] - move_last)
    drift, drift_last = tl.where(noisy, drift, move), tl.where(noisy, drift_last, move_last)
    share = _pick(noisy, square - 2.0 * now[TURN] + square_last, 0.0)
    gain = 0.5 * per_kappa * (drift + drift_last) - 0.5 * h * (square + square_last - share)
    gain -= 0.5 * (move + move_last - drift - drift_last) / now[KAPPA]
    smooth = long & (noisy == 0)
    mismatch = _pick(smooth, square + now[RATE] - per_kappa * move / safe_h, 0.0)
    earlier = before[LAST_LENGTH]
    second = smooth & (earlier > TINY_STEP)
    uneven = (h * h - earlier * earlier) / _pick(second, earlier, 1.0)
    skew = before[LAST_SKEW] - _pick(second, 0.5 * uneven * before[LAST_MISMATCH], 0.0)
    skew = _pick(smooth, skew, 0.0)
    lag = 0.5 * (skew + 0.5 * h * mismatch)
    gain += lag - _pick(known, 0.5 * (before[LAST_SKEW] + 0.5 * earlier * before[LAST_MISMATCH]), 0.0)
    commanded = tl.where(known, 0.5 * h * (before[LAST_RATE] + now[RATE]), before[LAST_COMMANDED_NEXT])
    realised = tl.where(known, gain, before[LAST_REALISED_NEXT])
    return (
        before[LAST_COMMANDED] + commanded,
        before[LAST_REALISED] + realised,
        _pick(known, gain - before[LAST_REALISED_NEXT], 0.0),
        mismatch,
        skew,
    )


@triton.jit
def _node(means, fall, log_cosine, h, relative_h, NODE: tl.constexpr, WEIGHT: tl.constexpr):
    """(along, across, mean square) with one node of the quadrature more."""
    along, across, mean_square = means
    size = tl.exp(0.5 * fall * (h * NODE))
    cos = tl.exp(log_cosine * (relative_h * NODE) * (relative_h * NODE))
    along += size * cos * WEIGHT
    across += size * tl.sqrt(_at_least(1.0 - cos * cos, 0.0)) * WEIGHT
    return along, across, mean_square + size * size * WEIGHT


@triton.jit
def _extrapolate(now, ahead):
    """(along, lean, mean square / square): eps along the step ahead, as it turned and shrank in the last one."""
    h, square, turn = now[H], _pick(ahead, now[SQUARE], 1.0), _pick(ahead, now[TURN], 1.0)
    h_last, square_last = _pick(ahead, now[H_LAST], 1.0), _pick(ahead, now[SQUARE_LAST], 1.0)
    fall = _clamp(tl.log(square / square_last) / h_last, FASTEST_FALL, FASTEST_RISE)
    log_cosine = tl.log(_clamp(turn / tl.sqrt(square * square_last), LEAST_COSINE, 1.0))
    zero = tl.full((), 0.0, tl.float64)
    means = _node((zero, zero, zero), fall, log_cosine, h, h / h_last, NODE_0, WEIGHT_0)
    means = _node(means, fall, log_cosine, h, h / h_last, NODE_1, WEIGHT_1)
    means = _node(means, fall, log_cosine, h, h / h_last, NODE_2, WEIGHT_2)
    along, across, mean_square = _node(means, fall, log_cosine, h, h / h_last, NODE_3, WEIGHT_3)
    normal = square_last - turn * turn / square  # of (turn / square) eps - last_eps, squared
    turns = ahead & (normal > 1e-12 * square_last)
    lean = _pick(turns, across * tl.sqrt(square / _pick(turns, normal, 1.0)), 0.0)
    return _pick(ahead, along, 1.0), lean, _pick(ahead, mean_square, 1.0)


@triton.jit
def _one_step_move(now):
    """(u, v): a step without memory moves y = x / alpha by u eta eps + v y."""
    alpha, end = _pick(now[ALPHA] > 0.0, now[ALPHA], 1.0), _pick(now[ALPHA_END] > 0.0, now[ALPHA_END], 1.0)
    return (now[SIGMA_NEXT] - now[ALPHA_NEXT] * (now[SIGMA] / alpha)) / end, now[ALPHA_NEXT] / end - 1.0


@triton.jit
def _predict(now, ahead, known, u, v, SCHEME: tl.constexpr):
    """(base, slope): the step ahead gives base + slope eta nats over -div u."""
    h, square, turn = now[H], now[SQUARE], now[TURN]
    if SCHEME == "direct":
        along, lean, mean = _extrapolate(now, ahead)
    else:
        along, mean = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
        lean = tl.full((), 0.0, tl.float64)
    a, c = along + lean * turn / square, -lean
    # the step's move of y is u eta eps + v y - w (last move + kappa_last eta_last last_eps)
    step, carry = now[KAPPA_END] - now[KAPPA], _pick(known, now[CARRY], 0.0)
    u, w = u * (1.0 + carry), step * carry / now[KAPPA]
    per_kappa = h / _pick(step != 0.0, step, 1.0)
    last = a * turn + c * now[SQUARE_LAST]
    rest = v * (a * now[STATE] + c * now[STATE_LAST])
    rest -= w * (a * now[MOVE] + c * now[MOVE_LAST] + now[KAPPA_LAST] * now[ETA_LAST] * last)
    return per_kappa * rest - h * (mean * square), per_kappa * u * along * square


@triton.jit
def _response(now, before, long):
    """kappa^2 / (v + kappa^2) of the Gaussian, of variance v, that would have changed eps along itself like this."""
    kappa, last, turn = now[KAPPA], now[KAPPA_LAST], now[TURN]
    numerator = now[SQUARE] * kappa - turn * kappa * kappa / last
    denominator = now[MOVE] + turn * (last * last - kappa * kappa) / last
    telling = long & (before[LAST_NOISY] == 0.0) & (denominator > 0.25 * turn * (last - kappa)) & (turn > 0.0)
    found = numerator / _pick(telling, denominator, 1.0)
    kept = _pick(before[LAST_STEPS] > 0.0, before[LAST_RESPONSE], 1.0)
    return _clamp(tl.where(telling, found, kept), 1e-3, 1.0)


@triton.jit
def _limit(eta, stride, response, mean_square):
    """(eta in its bounds, was it outside?)."""
    reach = _at_least(stride * response, 1e-12)
    distance = _at_least(tl.sqrt(mean_square / response), 1e-12)
    shortest = _clamp(tl.full((), NEAREST, tl.float64) / distance, SHORTEST, 1.0)
    most = (1.0 - shortest * (1.0 - reach)) / reach
    least = tl.full((), 1.0 - LONGEST, tl.float64) / reach
    bounded = tl.where(eta < least, least, eta)
    bounded = tl.where(bounded > most, most, bounded)
    return bounded, bounded != eta


@triton.jit
def _correct(now, before, flags, guided, columns):
    """Heun's second evaluation: eta such that the mean of both directions gives what the step is to give."""
    h, square, square_last, turn = now[H_LAST], now[SQUARE], now[SQUARE_LAST], now[TURN]
    guided = guided & (square + turn > 0.0) & (h > TINY_STEP)
    both = _pick(guided, square + turn, 1.0)
    first = now[ETA_LAST] * (square_last + turn)
    deficit = before[LAST_COMMANDED] - before[LAST_REALISED]
    wanted = before[LAST_COMMANDED_NEXT] + deficit
    rate = wanted / _pick(guided, h, 1.0)
    eta = (2.0 * (2.0 * rate + square_last + square) - first) / both
    response = _clamp(before[LAST_RESPONSE], 1e-3, 1.0)
    bounded, limited = _limit(eta, shortening(h), response, square / columns)
    limited = limited & guided
    reached = h * (0.25 * (first + bounded * both) - 0.5 * (square_last + square))
    realised_next = tl.where(guided, tl.where(limited, reached, wanted), before[LAST_REALISED_NEXT])
    after = (
        before[LAST_STEPS],
        before[LAST_ALPHA],
        before[LAST_SIGMA],
        before[LAST_ALPHA_END],
        before[LAST_SIGMA_END],
        before[LAST_SQ_NORM],
        before[LAST_RATE],
        before[LAST_ETA],
        before[LAST_NOISY],
        before[LAST_DRIFT_EPS],
        before[LAST_DRIFT_STATE],
        before[LAST_COMMANDED_NEXT],
        realised_next,
        before[LAST_LENGTH],
        before[LAST_MISMATCH],
        before[LAST_SKEW],
        before[LAST_RESPONSE],
        before[LAST_COMMANDED],
        before[LAST_REALISED],
        before[LAST_LIMITED] + limited.to(tl.float64),
    )
    eta_minus_one = _pick(guided, bounded - 1.0, 0.0)
    return after, (eta_minus_one, square, deficit, flags | _flag(limited, LIMITED))
