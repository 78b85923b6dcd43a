"""The few numbers per row between the two passes over it, in float64: from sums to the coefficients of the vectors.

The twin of `fastdensity.reference.rows`; the table of prediction types is `fastdensity.rules` itself, compiled.
A program handles one row, so everything here is scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fastdensity import rules

# Floats travel as float64 bit patterns in an int64. Triton would type a small integer (the pattern of 0.0) as int32
# and compile another kernel for it; xor with a pattern that no number has (a signalling NaN) keeps all of them long.
BIT_PATTERN_KEY = tl.constexpr(0x7FF4000000000000)

NON_FINITE = tl.constexpr(rules.FLAG_NON_FINITE)
ZERO_SCORE = tl.constexpr(rules.FLAG_ZERO_SCORE)
ENDPOINT = tl.constexpr(rules.FLAG_ENDPOINT)
BAD_PARAMETER = tl.constexpr(rules.FLAG_BAD_PARAMETER)


def _shared(function: Callable[..., Any]) -> Any:
    """A function of the rule table as kernels call it. Triton's interpreter calls it as it is: plain arithmetic."""
    compiled = triton.jit(function)
    return compiled if isinstance(compiled, triton.JITFunction) else function


_direction = _shared(rules.direction)
_step_base = _shared(rules.step_base)


@triton.jit
def row_number(number, row, INDEX: tl.constexpr, PER_ROW: tl.constexpr):
    """A parameter of this row in float64: bits of a float, or a pointer to one number (one per row if bit INDEX).

    A float64 is the number itself, already found.
    """
    if number.dtype == tl.float64:
        return number
    elif number.dtype.is_ptr():
        return tl.load(number + row * ((PER_ROW >> INDEX) & 1)).to(tl.float64)
    else:
        return (number ^ BIT_PATTERN_KEY).to(tl.float64, bitcast=True)


@triton.jit
def _is_finite(number):
    return tl.abs(number) < float("inf")


@triton.jit
def _flag(condition, BIT: tl.constexpr):
    return tl.where(condition, BIT, 0).to(tl.int32)


@triton.jit
def _norm_flags(sq_norm):
    return _flag(sq_norm == 0.0, ZERO_SCORE) | _flag(_is_finite(sq_norm) == 0, NON_FINITE)


@triton.jit
def _not_finite_flag(number):
    return _flag(_is_finite(number) == 0, BAD_PARAMETER)


@triton.jit
def _end_flags(end):
    return _flag(end == 0.0, ENDPOINT) | _flag(((end >= 0.0) & _is_finite(end)) == 0, BAD_PARAMETER)


@triton.jit
def _divide(numerator, denominator, allowed):
    return tl.where(allowed, numerator, 0.0) / tl.where(allowed, denominator, 1.0)


@triton.jit
def _choose(region, CENTRAL: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr):
    tail = tl.where(region == 1, tl.full((), NEAR, tl.float64), tl.full((), FAR, tl.float64))
    return tl.where(region == 0, tl.full((), CENTRAL, tl.float64), tail)


@triton.jit
def quantile_of_normal(probability):
    """Inverse of the normal distribution in float64: Wichura 1988, algorithm AS 241, PPND16. Exactly 0 at 1/2.

    Its three regions differ in their coefficients. Those are chosen, not the results: float64 arithmetic is slow on
    many GPUs, and fewer registers are held.
    """
    distance = probability - 0.5
    central = tl.abs(distance) <= 0.425
    tail = tl.where(central, 0.25, tl.where(distance < 0.0, probability, 1.0 - probability))
    root = tl.sqrt(-tl.log(tail))
    region = tl.where(central, 0, tl.where(root <= 5.0, 1, 2))
    r = tl.where(central, 0.180625 - distance * distance, root - _choose(region, 0.0, 1.6, 5.0))
    top = _choose(region, 2509.0809287301226727, 7.7454501427834140764e-4, 2.01033439929228813265e-7)
    top = top * r + _choose(region, 33430.575583588128105, 0.0227238449892691845833, 2.71155556874348757815e-5)
    top = top * r + _choose(region, 67265.770927008700853, 0.24178072517745061177, 0.0012426609473880784386)
    top = top * r + _choose(region, 45921.953931549871457, 1.27045825245236838258, 0.026532189526576123093)
    top = top * r + _choose(region, 13731.693765509461125, 3.64784832476320460504, 0.29656057182850489123)
    top = top * r + _choose(region, 1971.5909503065514427, 5.7694972214606914055, 1.7848265399172913358)
    top = top * r + _choose(region, 133.14166789178437745, 4.6303378461565452959, 5.4637849111641143699)
    top = top * r + _choose(region, 3.387132872796366608, 1.42343711074968357734, 6.6579046435011037772)
    bottom = _choose(region, 5226.495278852854561, 1.05075007164441684324e-9, 2.04426310338993978564e-15)
    bottom = bottom * r + _choose(region, 28729.085735721942674, 5.475938084995344946e-4, 1.4215117583164458887e-7)
    bottom = bottom * r + _choose(region, 39307.89580009271061, 0.0151986665636164571966, 1.8463183175100546818e-5)
    bottom = bottom * r + _choose(region, 21213.794301586595867, 0.14810397642748007459, 7.868691311456132591e-4)
    bottom = bottom * r + _choose(region, 5394.1960214247511077, 0.68976733498510000455, 0.0148753612908506148525)
    bottom = bottom * r + _choose(region, 687.1870074920579083, 1.6763848301838038494, 0.13692988092273580531)
    bottom = bottom * r + _choose(region, 42.313330701600911252, 2.05319162663775882187, 0.59983220655588793769)
    quotient = top / (bottom * r + 1.0)
    return tl.where(central, quotient * distance, tl.where(distance < 0.0, -quotient, quotient))


@triton.jit
def path(numbers, row, KIND: tl.constexpr, PER_ROW: tl.constexpr):
    """(alpha, sigma, sigma_data, edm_norm) of this row."""
    alpha = row_number(numbers[0], row, 0, PER_ROW)
    sigma = row_number(numbers[1], row, 1, PER_ROW)
    sigma_data = row_number(numbers[9], row, 9, PER_ROW)
    edm_norm = tl.sqrt(sigma * sigma + (alpha * sigma_data) * (alpha * sigma_data))
    return alpha, sigma, sigma_data, edm_norm


@triton.jit
def direction(numbers, row, KIND: tl.constexpr, PER_ROW: tl.constexpr):
    """(along_x, along_p, scale) of `fastdensity.rules.direction` in float64."""
    alpha, sigma, sigma_data, edm_norm = path(numbers, row, KIND, PER_ROW)
    along_x, along_p, scale = _direction(KIND, alpha, sigma, sigma_data, edm_norm)
    one = tl.full((), 1.0, tl.float64)
    return along_x * one, along_p * one, scale * one


@triton.jit
def quantile_term(q, row, columns, INDEX: tl.constexpr, PER_ROW: tl.constexpr):
    """sqrt(2 D) ndtri(q), NaN for q outside (0, 1). Of a float q the host has made this number already."""
    number = row_number(q, row, INDEX, PER_ROW)
    if q.dtype.is_ptr():
        inside = (number > 0.0) & (number < 1.0)
        term = tl.sqrt(2.0 * columns.to(tl.float64)) * quantile_of_normal(tl.where(inside, number, 0.5))
        return tl.where(inside, term, float("nan"))
    else:
        return number


@triton.jit
def _drift_coefficients(numbers, row, norm, PER_ROW: tl.constexpr):
    div = row_number(numbers[0], row, 0, PER_ROW)
    b = row_number(numbers[1], row, 1, PER_ROW)
    dt = row_number(numbers[2], row, 2, PER_ROW)
    flags = _norm_flags(norm) | _not_finite_flag(div + b)
    gain = _divide(div + b, norm, flags == 0)
    return 1.0, dt, 0.0, 0.0, dt * gain, gain, norm, gain * norm * dt, flags


@triton.jit
def _radius_coefficients(numbers, row, norm, PER_ROW: tl.constexpr):
    radius = row_number(numbers[0], row, 0, PER_ROW)
    flags = _norm_flags(norm) | _flag(((radius >= 0.0) & _is_finite(radius)) == 0, BAD_PARAMETER)
    allowed = flags == 0
    factor = tl.where(allowed, radius, 1.0) / tl.sqrt(tl.where(allowed, norm, 1.0))
    zero = tl.full((), 0.0, tl.float64)
    return 0.0, 0.0, factor, 0.0, 0.0, factor - 1.0, norm, zero, flags


@triton.jit
def _guided_coefficients(
    numbers, row, norm, overlap, columns, RULE: tl.constexpr, KIND: tl.constexpr, PER_ROW: tl.constexpr
):
    alpha, sigma, sigma_data, edm_norm = path(numbers, row, KIND, PER_ROW)
    along_x, along_p, scale = direction(numbers, row, KIND, PER_ROW)
    total = row_number(numbers[5], row, 5, PER_ROW) + quantile_term(numbers[4], row, columns, 4, PER_ROW)
    gain = row_number(numbers[6], row, 6, PER_ROW)
    noise_scale = row_number(numbers[8], row, 8, PER_ROW)
    flags = _norm_flags(norm) | _end_flags(alpha) | _end_flags(sigma) | _not_finite_flag(total)
    flags |= _not_finite_flag(gain) | _not_finite_flag(noise_scale) | _flag(noise_scale < 0.0, BAD_PARAMETER)
    flags |= _not_finite_flag(row_number(numbers[7], row, 7, PER_ROW))
    sq_norm = norm * scale * scale
    if RULE == "prediction":
        guided = flags == 0
        eta_minus_one = tl.where(guided, gain, 0.0) + _divide(total, sq_norm, guided)
        pushed = _divide(eta_minus_one, along_p, guided)
        zero = tl.full((), 0.0, tl.float64)
        return 0.0, 1.0, pushed * along_x, pushed * along_p, 0.0, eta_minus_one, sq_norm, zero, flags
    else:
        alpha_next = row_number(numbers[2], row, 2, PER_ROW)
        sigma_next = row_number(numbers[3], row, 3, PER_ROW)
        flags |= _end_flags(alpha_next) | _end_flags(sigma_next)
        guided = flags == 0
        eta_minus_one = tl.where(guided, gain, 0.0) + _divide(total, sq_norm, guided)
        out_x, out_p, out_direction = _step_base(KIND, alpha, sigma, alpha_next, sigma_next, sigma_data, edm_norm)
        one = tl.full((), 1.0, tl.float64)
        # d x' / d eta along eps, zero on rows left unguided (where alpha or sigma may be 0)
        reach = _divide((sigma_next * alpha - alpha_next * sigma) * scale, alpha, guided)
        weight = out_direction + reach * eta_minus_one
        weight -= noise_scale * _divide(overlap, norm, (norm > 0.0) & _is_finite(norm))
        log_ratio = tl.log(tl.where(guided, alpha_next * sigma, 1.0))
        log_ratio -= tl.log(tl.where(guided, sigma_next * alpha, 1.0))
        dlogp = eta_minus_one * tl.where(guided, sq_norm, 1.0) * log_ratio
        base_0, base_1, c_0, c_1 = out_x * one, out_p * one, weight * along_x, weight * along_p
        return base_0, base_1, c_0, c_1, noise_scale, eta_minus_one, sq_norm, dlogp, flags


@triton.jit
def coefficients(numbers, row, norm, overlap, columns, RULE: tl.constexpr, KIND: tl.constexpr, PER_ROW: tl.constexpr):
    """From ||d||^2 and d.z of a row to the coefficients of its vectors and to its report.

    Returns (base_0, base_1, c_0, c_1, c_2, eta - 1, ||eps||^2, nats, flags), float64 scalars but flags int32, for
    out = base_0 v0 + base_1 v1 + (c_0 v0 + c_1 v1) + c_2 v2. The direction d is not among the vectors, its share
    goes to c_0 and c_1: a row in registers is three vectors, not four.
    """
    if RULE == "drift":
        return _drift_coefficients(numbers, row, norm, PER_ROW)
    elif RULE == "radius":
        return _radius_coefficients(numbers, row, norm, PER_ROW)
    else:
        return _guided_coefficients(numbers, row, norm, overlap, columns, RULE, KIND, PER_ROW)
