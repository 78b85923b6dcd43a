"""What the closed loop makes of `track_model`, in Triton: the twin of `reference.track_estimate`.

What the reference keeps in dictionaries is in tuples here, read by the constants below: `now[ALPHA]`,
`before[LAST_ALPHA]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.reference import track_estimate as reference
from fastdensity.reference.track import MEMORY, PARAMETERS
from fastdensity.triton_kernels.track_model import (
    EDGE,
    NEARLY_ONE,
    add_gain,
    at_least,
    band,
    before_of,
    clamp,
    gain,
    gain_at,
    node,
    pick,
    two_variances,
    weight,
)

TINY_STEP = tl.constexpr(reference.TINY_STEP)
LEAST_RESPONSE = tl.constexpr(reference.LEAST_RESPONSE)
LEAST_TYPICAL = tl.constexpr(reference.LEAST_TYPICAL)
LEAST_QUIET = tl.constexpr(reference.LEAST_QUIET)

# Where a number is in `now`: the parameters of a call, then what `_safe_numbers` finds.
(
    ALPHA, SIGMA, ALPHA_NEXT, SIGMA_NEXT, ALPHA_END, SIGMA_END, Q, SHIFT, CFG_SCALE, NOISE_SCALE, SIGMA_DATA,
    CARRY,
    RATE, KAPPA, KAPPA_LAST, KAPPA_END, H, H_LAST, SQUARE, SQUARE_LAST, TURN, MOVE, MOVE_LAST, STATE, STATE_LAST,
    ETA_LAST,
) = (tl.constexpr(index) for index in range(len(PARAMETERS) + 14))  # fmt: skip

# Where it is in `before`, in the order of `MEMORY`.
(
    LAST_STEPS, LAST_ALPHA, LAST_SIGMA, LAST_ALPHA_END, LAST_SIGMA_END, LAST_SQ_NORM, LAST_RATE, LAST_ETA, LAST_NOISE,
    LAST_DRIFT_EPS, LAST_DRIFT_STATE, LAST_COMMANDED_NEXT, LAST_REALISED_NEXT, LAST_RESPONSE, LAST_COMMANDED,
    LAST_REALISED, LAST_LIMITED,
) = (tl.constexpr(index) for index in range(len(MEMORY)))  # fmt: skip


@triton.jit
def without_noise(now, before):
    """(the products that the last step has but for the noise at its end, nats over -div u that the noise brought)."""
    square, kappa = now[SQUARE], now[KAPPA]
    drift = before[LAST_DRIFT_EPS] * now[TURN] + before[LAST_DRIFT_STATE] * (now[STATE] - now[MOVE])
    drift_last = before[LAST_DRIFT_EPS] * now[SQUARE_LAST]
    drift_last += before[LAST_DRIFT_STATE] * (now[STATE_LAST] - now[MOVE_LAST])
    noisy = before[LAST_NOISE] > 0.0
    answer = kept_response(now, before) / kappa
    across = now[MOVE_LAST] - drift_last
    along, after = across * now[TURN] / now[SQUARE_LAST], now[MOVE] - drift
    quiet = square - answer * (after + along)
    least = square * LEAST_QUIET
    quiet = tl.where(quiet < least, least, quiet)
    products = (
        tl.where(noisy, quiet, square),
        tl.where(noisy, now[TURN] - answer * across, now[TURN]),
        tl.where(noisy, drift, now[MOVE]),
        tl.where(noisy, drift_last, now[MOVE_LAST]),
    )
    return products, pick(noisy, (after + along) * -0.5 / kappa, 0.0)


@triton.jit
def fit(now, products, before):
    """Two variances that explain the step that ended, and its line; of no use where it was not smooth."""
    square, turn, move, move_last = products
    return two_variances(
        now[SQUARE_LAST] / square, turn / square, move / square, move_last / square, now[KAPPA], now[KAPPA_LAST],
        kept_variance(now, before),
    )  # fmt: skip


@triton.jit
def kept_variance(now, before):
    """The one variance that would answer to a move along eps as was found at the last call; 0 if fresh."""
    answer = clamp(pick(before[LAST_STEPS] > 0.0, before[LAST_RESPONSE], 1.0), LEAST_RESPONSE, 1.0)
    return now[KAPPA_LAST] * now[KAPPA_LAST] * (1.0 / answer - 1.0)


@triton.jit
def kept_response(now, before):
    """How much eps answers to a move along itself if nothing but kappa has changed since."""
    squared = now[KAPPA] * now[KAPPA]
    return clamp(squared / (kept_variance(now, before) + squared), LEAST_RESPONSE, 1.0)


@triton.jit
def response(now, before, smooth, found):
    """The same, now; what it was where the last step does not tell."""
    low, high, _ = found
    squared = now[KAPPA] * now[KAPPA]
    total = low[0] * squared / (low[3] + squared) + high[0] * squared / (high[3] + squared)
    return clamp(tl.where(smooth, total, kept_response(now, before)), LEAST_RESPONSE, 1.0)


@triton.jit
def measure(now, products, before, known, smooth, found, brought):
    """(commanded, realised) with the step that has just ended."""
    gained = tl.where(smooth, _gain_of_fit(now, products[0], found), _gain_by_trapezoid(now, products, known)) + brought
    commanded = tl.where(known, 0.5 * now[H_LAST] * (before[LAST_RATE] + now[RATE]), before[LAST_COMMANDED_NEXT])
    realised = tl.where(known, gained, before[LAST_REALISED_NEXT])
    return before[LAST_COMMANDED] + commanded, before[LAST_REALISED] + realised


@triton.jit
def _gain_of_part(now, part):
    share, before, moved, variance = part
    return share * before * before * gain_at(gain(variance, now[KAPPA_LAST], now[KAPPA]), moved / before)


@triton.jit
def _gain_of_fit(now, square, found):
    return square * (_gain_of_part(now, found[0]) + _gain_of_part(now, found[1]))


@triton.jit
def _gain_by_trapezoid(now, products, known):
    h = now[H_LAST]
    square, _, move, move_last = products
    long = known & (h > TINY_STEP)
    per_kappa = tl.where(long, h / pick(long, now[KAPPA] - now[KAPPA_LAST], 1.0), -1.0 / now[KAPPA])
    return 0.5 * per_kappa * (move + move_last) - 0.5 * h * (square + now[SQUARE_LAST])


@triton.jit
def noise_over_state(now):
    """Variance of the noise of a step ahead, as it is in y = x / alpha."""
    noise = now[NOISE_SCALE] / pick(now[ALPHA_END] > 0.0, now[ALPHA_END], 1.0)
    return noise * noise


@triton.jit
def one_step_move(now):
    """(u, v): a step without memory moves y = x / alpha by u eta eps + v y."""
    alpha, end = pick(now[ALPHA] > 0.0, now[ALPHA], 1.0), pick(now[ALPHA_END] > 0.0, now[ALPHA_END], 1.0)
    return (now[SIGMA_NEXT] - now[ALPHA_NEXT] * (now[SIGMA] / alpha)) / end, now[ALPHA_NEXT] / end - 1.0


@triton.jit
def _variance(kappa, lowest, width, index):
    return kappa * kappa * tl.exp(lowest + width * node(index))


@triton.jit
def predict(columns, now, commanded, answers, found, ahead, known, SCHEME: tl.constexpr):
    """What the step ahead gains with eta."""
    square, kappa, h = now[SQUARE], now[KAPPA], now[H]
    step, carry = now[KAPPA_END] - kappa, pick(known, now[CARRY], 0.0)
    safe = pick(step != 0.0, step, 1.0)
    u, v = one_step_move(now)
    w, per_eta = step * carry / kappa, u * (1.0 + carry) / safe
    rest = (v * now[STATE] - w * (now[MOVE] + now[KAPPA_LAST] * now[ETA_LAST] * now[TURN])) / square / safe
    constant, linear, bend = h * (rest - 1.0), h * per_eta, tl.full((), 0.0, tl.float64)
    typical = columns - commanded * 2.0
    least = columns * LEAST_TYPICAL
    typical = tl.where(typical < least, least, typical)
    remains = square / typical
    remains = pick(remains < 1.0, remains, 1.0)
    if SCHEME == "direct":
        fall = clamp(1.0 - answers, EDGE, NEARLY_ONE)
        left = pick(ahead, square / typical, 0.5)
        left = at_least(tl.where(left < 1.0 - fall, left, 1.0 - fall), EDGE)
        lowest, width = band(left, fall)
        end = tl.where(ahead, now[KAPPA_END], kappa * 0.9)
        _, _, line = found
        zero = tl.full((), 0.0, tl.float64)
        weights = zero
        states = zero
        for index in tl.range(0, 4, loop_unroll_factor=1):
            variance = _variance(kappa, lowest, width, index)
            share = weight(index) / (variance + kappa * kappa)
            weights += share
            states += share * (variance + kappa * kappa) / kappa
        mean = now[STATE] / square - states / weights
        steering = now[KAPPA_LAST] * now[ETA_LAST]
        band_constant = zero
        band_linear = zero
        band_square = zero
        left_then = zero
        for index in tl.range(0, 4, loop_unroll_factor=1):
            variance = _variance(kappa, lowest, width, index)
            share = weight(index) / (variance + kappa * kappa) / weights
            before = before_of(variance, line, kappa, now[KAPPA_LAST])
            moved = (kappa - now[KAPPA_LAST]) * (line[1] + line[2] * before)
            state = (variance + kappa * kappa) / kappa + mean
            slope = (v * state - w * (moved + steering * before)) / safe
            one = gain(variance, kappa, end)
            band_constant, band_linear, band_square = add_gain(
                (band_constant, band_linear, band_square), share, one, per_eta, slope
            )
            left_then += weight(index) * end * end / (variance + end * end)
        by = (band_constant, band_linear, band_square)
        constant, linear = tl.where(ahead, by[0], constant), tl.where(ahead, by[1], linear)
        bend, remains = tl.where(ahead, by[2], bend), tl.where(ahead, left_then, remains)
    taken = 0.5 * columns * noise_over_state(now) / (now[KAPPA_END] * now[KAPPA_END]) * remains
    return square * constant - taken, square * linear, square * bend


@triton.jit
def _add_of_part(total, now, part):
    share, before, _, variance = part
    one = gain(variance, now[KAPPA_LAST], now[KAPPA])
    return add_gain(total, share * before * before, one, 0.5 / before, 0.5 * now[ETA_LAST])


@triton.jit
def predict_both(now, before):
    """What a step along the mean of two directions gains with eta at its end (Heun's method)."""
    low, high, _ = fit(now, (now[SQUARE], now[TURN], now[MOVE], now[MOVE_LAST]), before)
    zero = tl.full((), 0.0, tl.float64)
    constant, linear, square = _add_of_part(_add_of_part((zero, zero, zero), now, low), now, high)
    return now[SQUARE] * constant, now[SQUARE] * linear, now[SQUARE] * square
