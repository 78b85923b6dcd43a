"""The closed loop's kernel: eps and six inner products of a row, tile after tile, then the row's decision and its step.

    track_rows      one program per row: every operand is read once for the decision; those of the step once more, from
                    the cache if the row fits there

The twin of `fastdensity.reference.track`. All vectors are dense; `vectors`, the row's length, counts groups of VECTOR
elements as in `rows_kernels`. A tile is summed in the arithmetic's dtype, tiles in float64 in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.reference.track import MEMORY
from fastdensity.triton_kernels.integers import wide
from fastdensity.triton_kernels.philox import normals
from fastdensity.triton_kernels.rows_kernels import (
    _combine,
    _load,
    _mask,
    _non_finite,
    _scale,
    _store,
    _store_numbers,
    _tile,
)
from fastdensity.triton_kernels.rows_scalars import _direction, coefficients, quantile_term, row_number
from fastdensity.triton_kernels.track_estimate import (
    ALPHA,
    ALPHA_NEXT,
    CFG_SCALE,
    LAST_ALPHA,
    NOISE_SCALE,
    SHIFT,
    SIGMA,
    SIGMA_DATA,
    SIGMA_NEXT,
    Q,
)
from fastdensity.triton_kernels.track_model import pick
from fastdensity.triton_kernels.track_rule import decide

REMEMBERED = tl.constexpr(len(MEMORY))
COMPILED = ("RULE", "KIND", "MIXED", "NOISE", "SCHEME", "PER_ROW", "DTYPE", "VECTOR", "TILE")


def _kernel(function):
    """`triton.jit` that specialises on no runtime value."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name not in COMPILED])


@triton.jit
def _parameters(numbers, row, PER_ROW: tl.constexpr):
    """The parameters of a row in float64, in the order of `PARAMETERS`."""
    return (
        row_number(numbers[0], row, 0, PER_ROW),
        row_number(numbers[1], row, 1, PER_ROW),
        row_number(numbers[2], row, 2, PER_ROW),
        row_number(numbers[3], row, 3, PER_ROW),
        row_number(numbers[4], row, 4, PER_ROW),
        row_number(numbers[5], row, 5, PER_ROW),
        row_number(numbers[6], row, 6, PER_ROW),
        row_number(numbers[7], row, 7, PER_ROW),
        row_number(numbers[8], row, 8, PER_ROW),
        row_number(numbers[9], row, 9, PER_ROW),
        row_number(numbers[10], row, 10, PER_ROW),
        row_number(numbers[11], row, 11, PER_ROW),
    )


@triton.jit
def _remembered(memory, row):
    """The memory of a row, in the order of `MEMORY`."""
    at = memory + row * REMEMBERED
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9), tl.load(at + 10), tl.load(at + 11),
        tl.load(at + 12), tl.load(at + 13), tl.load(at + 14), tl.load(at + 15), tl.load(at + 16),
    )  # fmt: skip


@triton.jit
def _eps_coefficients(now, KIND: tl.constexpr):
    """(along_x, along_p, scale) of `fastdensity.rules.direction` in float64."""
    alpha, sigma, sigma_data = now[ALPHA], now[SIGMA], now[SIGMA_DATA]
    edm_norm = tl.sqrt(sigma * sigma + (alpha * sigma_data) * (alpha * sigma_data))
    along_x, along_p, scale = _direction(KIND, alpha, sigma, sigma_data, edm_norm)
    one = tl.full((), 1.0, tl.float64)
    return along_x * one, along_p * one, scale * one


@triton.jit
def _eps(
    x, prediction, uncond, cfg_scale, along_x, along_p, scale, row, vectors, first, mask,
    DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(state, eps) of one tile. The state counts for every prediction type: where it is NaN, eps is."""
    state = _load(x, row, vectors, first, mask, VECTOR, DTYPE, TILE)
    predicted = _load(prediction, row, vectors, first, mask, VECTOR, DTYPE, TILE)
    if uncond is not None:
        base = _load(uncond, row, vectors, first, mask, VECTOR, DTYPE, TILE)
        predicted = base + _scale(cfg_scale, predicted - base)
    return state, _scale(scale, _scale(along_x, state) + _scale(along_p, predicted))


@triton.jit
def _dot(left, right):
    return tl.sum(left * right).to(tl.float64)


@triton.jit
def _noise(
    noise, sample_ids, seed, step, row, vectors, first, mask,
    NOISE: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of the step's noise, made or read."""
    if NOISE == "drawn":
        return normals(seed, tl.load(sample_ids + row), step, first, TILE, DTYPE)
    else:
        return _load(noise, row, vectors, first, mask, VECTOR, DTYPE, TILE)


@triton.jit
def _take_step(
    out, step_report, x, prediction, uncond, noise, sample_ids, seed, step, now, eta_minus_one, loop_flags, square,
    overlap, row, vectors,
    RULE: tl.constexpr, KIND: tl.constexpr, MIXED: tl.constexpr, NOISE: tl.constexpr, DTYPE: tl.constexpr,
    VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The second pass over a row: `out` with the eta decided on, and its report. `square` and `overlap` are of eps."""
    zero = tl.full((), 0.0, tl.float64)
    spread = now[NOISE_SCALE] if NOISE != "none" else zero
    numbers = (
        now[ALPHA], now[SIGMA], now[ALPHA_NEXT], now[SIGMA_NEXT], zero, zero, eta_minus_one, now[CFG_SCALE], spread,
        now[SIGMA_DATA],
    )  # fmt: skip
    _, _, scale = _eps_coefficients(now, KIND)
    base_0, base_1, c_0, c_1, c_2, moved_eta, sq_norm, dlogp, flags = coefficients(
        numbers, row, square / (scale * scale), overlap / scale, wide(vectors * VECTOR), RULE, KIND, 0
    )
    flags |= loop_flags
    for tile in range(0, tl.cdiv(vectors, TILE // VECTOR)):
        first = wide(tile) * TILE
        mask = _mask(vectors, first, VECTOR, TILE)
        state, predicted, other = _tile(
            x, prediction, uncond, noise, vectors, vectors, vectors, vectors, sample_ids, seed, step, numbers, row,
            first, mask, NOISE, 0, DTYPE, VECTOR, TILE,
        )  # fmt: skip
        result = _combine(base_0, base_1, c_0, c_1, c_2, x, state, predicted, other, RULE, MIXED, NOISE)
        _store(out, row, vectors, first, result, mask, VECTOR, TILE)
        flags |= _non_finite(result)
    _store_numbers(step_report, row, moved_eta, sq_norm, dlogp)
    tl.store(step_report + row * 4 + 3, flags.to(DTYPE))


@_kernel
def track_rows(
    eps, report, memory_out, out, step_report, x, prediction, uncond, last_x, last_eps, noise, memory, sample_ids,
    seed: tl.int64, step: tl.int64, vectors,
    number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7, number_8, number_9,
    number_10, number_11,
    RULE: tl.constexpr, KIND: tl.constexpr, MIXED: tl.constexpr, NOISE: tl.constexpr, SCHEME: tl.constexpr,
    PER_ROW: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row per program, TILE elements at a time; RULE "none" only decides."""
    numbers = (
        number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7, number_8, number_9,
        number_10, number_11,
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    now = _parameters(numbers, row, PER_ROW)
    along_x, along_p, scale = _eps_coefficients(now, KIND)
    alpha = now[ALPHA]
    # what a fresh row has as its last vectors is never looked at
    fresh = tl.load(memory + row * REMEMBERED) == 0.0
    last_alpha = pick(fresh == 0, tl.load(memory + row * REMEMBERED + LAST_ALPHA), 1.0)
    last_vectors = tl.where(fresh, 0, vectors)
    square = tl.full((), 0.0, tl.float64)
    turn = square
    move = square
    move_last = square
    state = square
    state_last = square
    overlap = square
    for tile in range(0, tl.cdiv(vectors, TILE // VECTOR)):
        first = wide(tile) * TILE
        mask = _mask(vectors, first, VECTOR, TILE)
        sample, here = _eps(
            x, prediction, uncond, now[CFG_SCALE], along_x, along_p, scale, row, vectors, first, mask,
            DTYPE, VECTOR, TILE,
        )  # fmt: skip
        _store(eps, row, vectors, first, here, mask, VECTOR, TILE)
        square += _dot(here, here)
        state += _dot(sample, here)
        if last_x is not None:
            shown = _mask(last_vectors, first, VECTOR, TILE)
            last = _load(last_eps, row, vectors, first, shown, VECTOR, DTYPE, TILE)
            before = _load(last_x, row, vectors, first, shown, VECTOR, DTYPE, TILE)
            moved = _scale(1.0 / alpha, sample) - _scale(1.0 / last_alpha, before)
            turn += _dot(here, last)
            move += _dot(moved, here)
            move_last += _dot(moved, last)
            state_last += _dot(sample, last)
        if NOISE != "none":
            other = _noise(
                noise, sample_ids, seed, step, row, vectors, first, mask, NOISE, DTYPE, VECTOR, TILE
            )  # fmt: skip
            overlap += _dot(here, other)
    gram = (square, turn, move, move_last, state / alpha, state_last / alpha)
    columns = wide(vectors * VECTOR)
    rate = now[SHIFT] + quantile_term(numbers[Q], row, columns, 6, PER_ROW)
    after, (eta_minus_one, _, deficit, flags) = decide(
        now, _remembered(memory, row), gram, rate, columns.to(tl.float64), SCHEME
    )
    at = report + row * 4
    tl.store(at, eta_minus_one)
    tl.store(at + 1, square)
    tl.store(at + 2, deficit)
    tl.store(at + 3, flags.to(tl.float64))
    for index in tl.static_range(REMEMBERED):
        tl.store(memory_out + row * REMEMBERED + index, after[index])
    if RULE != "none":
        _take_step(
            out, step_report, x, prediction, uncond, noise, sample_ids, seed, step, now, eta_minus_one, flags, square,
            overlap, row, vectors, RULE, KIND, MIXED, NOISE, DTYPE, VECTOR, TILE,
        )  # fmt: skip
