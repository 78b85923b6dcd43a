"""A local Gaussian whose spectrum is fitted to two evaluations, in Triton: the twin of `reference.track_model`.

A program handles one row, so everything here is a float64 scalar; a `Gain` is the tuple (constant, linear, square).
Constants never meet `tl.where` as they are, since Triton makes float32 of them there (see `pick`), and stand to the
right of an operator, where its interpreter takes them for numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.reference import track_model as reference

NODE_0, NODE_1, NODE_2, NODE_3 = (tl.constexpr(node) for node in reference.NODES)
WEIGHT_0, WEIGHT_1, WEIGHT_2, WEIGHT_3 = (tl.constexpr(weight) for weight in reference.WEIGHTS)
NARROW = tl.constexpr(reference.NARROW)
NARROWEST = tl.constexpr(reference.NARROWEST)
WIDEST = tl.constexpr(reference.WIDEST)
HALVINGS = tl.constexpr(reference.HALVINGS)
EDGE = tl.constexpr(reference.EDGE)
NEARLY_ONE = tl.constexpr(1.0 - reference.EDGE)


@triton.jit
def pick(which, value, OTHER: tl.constexpr):
    """The value, or a constant in the place of one that a row does not have."""
    return tl.where(which, value, tl.full((), OTHER, tl.float64))


@triton.jit
def at_least(number, LOW: tl.constexpr):
    """The larger one; NaN stays NaN."""
    return tl.where(number < LOW, tl.full((), LOW, tl.float64), number)


@triton.jit
def clamp(number, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Between the two; NaN stays NaN."""
    return tl.where(number > HIGH, tl.full((), HIGH, tl.float64), at_least(number, LOW))


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
def _larger(left, right):
    return tl.where(left < right, right, left)


@triton.jit
def _smaller(left, right):
    return tl.where(left < right, left, right)


@triton.jit
def gain_at(by, slope):
    """What a slope gains."""
    constant, linear, square = by
    return constant + slope * (linear + slope * square)


@triton.jit
def solved(by, wanted):
    """The slope nearest to 1 that gains what is wanted; where none does, the one that comes nearest to it."""
    constant, linear, square = by
    missing = constant + linear + square - wanted
    rise = linear + square * 2.0
    determinant = rise * rise - square * missing * 4.0
    solvable = determinant > 0.0
    root = tl.sqrt(pick(solvable, determinant, 1.0))
    down = rise + tl.where(rise < 0.0, -root, root)
    usable = solvable & (tl.abs(down) > 0.0)
    nearest = pick((solvable == 0) & (square != 0.0), -rise / pick(square != 0.0, square * 2.0, 1.0), 0.0)
    return tl.where(usable, missing * -2.0 / pick(usable, down, 1.0), nearest) + 1.0


@triton.jit
def add_gain(total, share, one, per_eta, rest):
    """The total and the gain `one` of a share of ||eps||^2 whose slope is per_eta eta + rest."""
    constant, linear, square = total
    return (
        constant + share * gain_at(one, rest),
        linear + share * per_eta * (one[1] + rest * one[2] * 2.0),
        square + share * per_eta * per_eta * one[2],
    )


@triton.jit
def _one_of(index, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, FOURTH: tl.constexpr):
    early = tl.where(index == 0, tl.full((), FIRST, tl.float64), tl.full((), SECOND, tl.float64))
    late = tl.where(index == 2, tl.full((), THIRD, tl.float64), tl.full((), FOURTH, tl.float64))
    return tl.where(index < 2, early, late)


@triton.jit
def node(index):
    """Of the four of a quadrature; loops over them stay loops, since unrolled ones want too many registers."""
    return _one_of(index, NODE_0, NODE_1, NODE_2, NODE_3)


@triton.jit
def weight(index):
    """Of the same."""
    return _one_of(index, WEIGHT_0, WEIGHT_1, WEIGHT_2, WEIGHT_3)


@triton.jit
def gain(variance, kappa, kappa_end):
    """Of the straight step from kappa to kappa_end < kappa in a Gaussian of this variance."""
    h = tl.log(kappa / kappa_end)
    constant = tl.full((), 0.0, tl.float64)
    linear = constant
    square = constant
    for index in tl.range(0, 4, loop_unroll_factor=1):
        here = kappa * tl.exp(-h * node(index))
        answer = here / (variance + here * here)
        a, b = answer * (variance + kappa * kappa) / kappa, answer * (here - kappa)
        share = weight(index)
        constant -= a * a * share
        linear += (a - a * b * 2.0) * share
        square += (b - b * b) * share
    return h * constant, h * linear, h * square


@triton.jit
def two_variances(square_last, turn, move, move_last, kappa, kappa_last, usual):
    """(low part, high part, (mean, offset, bend)) that explain a step; a part is (share, before, move, variance)."""
    step = kappa - kappa_last
    spread = at_least(square_last - turn * turn, 0.0)
    mean_move, per_move_last = move / step, move_last / step
    infinite = kappa_last / kappa
    narrow = (infinite - 1.0) * NARROW
    plain = mean_move / turn
    told = spread > narrow * narrow
    bend = tl.where(told, (per_move_last - turn * mean_move) / pick(told, spread, 1.0), plain)
    bend = _smaller(_larger(bend, -tl.abs(plain)), tl.abs(plain) * 3.0)
    offset, rise = mean_move - bend * turn, kappa_last + step * bend
    none = tl.where(rise > 0.0, (kappa - step * offset) / pick(rise > 0.0, rise, 1.0), infinite)
    telling = tl.abs(infinite - none) > narrow
    share, low, high = _two_points(turn, spread, _smaller(none, infinite), _larger(none, infinite))
    edge = tl.where(none < infinite, tl.full((), EDGE, tl.float64), tl.full((), -EDGE, tl.float64))
    low_part = _part(share, low, offset, bend, kappa, kappa_last, step, edge, telling, usual)
    high_part = _part(1.0 - share, high, offset, bend, kappa, kappa_last, step, edge, telling, usual)
    return low_part, high_part, (turn, offset, bend)


@triton.jit
def _part(share, before, offset, bend, kappa, kappa_last, step, edge, telling, usual):
    moved = offset + bend * before
    left = 1.0 - kappa * before / kappa_last
    left = tl.where(tl.abs(left) > EDGE, left, edge)
    variance = at_least(kappa * (kappa_last * before + step * moved - kappa) / left, 0.0)
    return share, before, moved, tl.where(telling, variance, usual)


@triton.jit
def _two_points(mean, spread, least, most):
    """(weight of the low point, low, high) with this mean and variance, within bounds."""
    below, above = mean - least, most - mean
    inside = (below > EDGE) & (above > EDGE)
    below, above = pick(inside, below, 1.0), pick(inside, above, 1.0)
    root = tl.sqrt(spread)
    share, low, high = tl.full((), 0.5, tl.float64), mean - root, mean + root
    bound = inside & (root > below)
    share = tl.where(bound, spread / (below * below + spread), share)
    low, high = tl.where(bound, least, low), tl.where(bound, mean + spread / below, high)
    beyond = inside & (high > most)
    share = tl.where(beyond, above * above / (above * above + spread), share)
    low, high = tl.where(beyond, mean - spread / above, low), tl.where(beyond, most, high)
    both = beyond & (low < least)
    share = tl.where(both, above / (above + below), share)
    low = tl.where(both, least, low)
    return share, tl.where(inside, low, mean), tl.where(inside, high, mean)


@triton.jit
def before_of(variance, line, kappa, kappa_last):
    """eps at the beginning of the step that ended, in units of eps at its end; `line` is (mean, offset, bend)."""
    mean, offset, bend = line
    step = kappa - kappa_last
    top = variance + kappa * (kappa - step * offset)
    bottom = kappa * (kappa_last + step * bend) + variance * kappa / kappa_last
    return tl.where(bottom > 0.0, top / pick(bottom > 0.0, bottom, 1.0), mean)


@triton.jit
def _excess(answer, fall, width):
    """(r_1 - r_2 - fall answer width, its derivative)."""
    whole, part, rest = shortening(width), shortening(answer * width), shortening((1.0 - answer) * width)
    first = part / whole
    bend = (answer * (1.0 - part) * whole - part * (1.0 - whole)) / (whole * whole)
    slope = bend * rest + first * (1.0 - answer) * (1.0 - rest) - fall * answer
    return first * rest - fall * answer * width, slope


@triton.jit
def band(answer, fall):
    """(lowest, width) in ln(v / kappa^2) of the variances that explain how large ||eps||^2 is and how fast it falls."""
    low, high = tl.full((), NARROWEST, tl.float64), tl.full((), WIDEST, tl.float64)
    for _ in range(HALVINGS):
        middle = tl.sqrt(low * high)
        excess, _slope = _excess(answer, fall, middle)
        too_wide = excess < 0.0
        low, high = tl.where(too_wide, low, middle), tl.where(too_wide, middle, high)
    width = tl.sqrt(low * high)
    excess, slope = _excess(answer, fall, width)
    width = clamp(width - excess / pick(slope != 0.0, slope, 1.0), NARROWEST, WIDEST)
    first = clamp(shortening(answer * width) / shortening(width), EDGE, NEARLY_ONE)
    return tl.log(1.0 - first) - tl.log(first), width
