"""Normals made in registers: Philox4x32-10 and Box-Muller, the twin of `fastdensity.reference.philox`.

The integers are the reference's bit for bit. Its float64 normals are met to 4 ulp in float32: the arguments of the
logarithm and of the sine are reduced exactly, on integers, and Cephes' polynomials (Moshier) do the rest, so that
neither tl.log nor tl.sin, which are approximations on some targets, is asked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdensity.reference.philox import STREAM_NOISE

NOISE_STREAM = tl.constexpr(STREAM_NOISE)


@triton.jit
def _log_uniform(word):
    """log((word + 1/2) / 2^32) of uint32 words, in float32."""
    # word + 1/2 = high + low, both exact
    high = (word & 0xFFFFFF00).to(tl.float32)
    low = (word & 0xFF).to(tl.float32) + 0.5
    # exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)); 0x3F3504F3 is sqrt(1/2)
    exponent = ((high + low).to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    # mantissa - 1, rounded once: near a uniform of 1 it keeps all digits
    y = (high * scale - 1.0) + low * scale
    polynomial = 7.0376836292e-2 * y - 1.1514610310e-1
    polynomial = polynomial * y + 1.1676998740e-1
    polynomial = polynomial * y - 1.2420140846e-1
    polynomial = polynomial * y + 1.4249322787e-1
    polynomial = polynomial * y - 1.6668057665e-1
    polynomial = polynomial * y + 2.0000714765e-1
    polynomial = polynomial * y - 2.4999993993e-1
    polynomial = polynomial * y + 3.3333331174e-1
    square = y * y
    turns = (exponent - 32).to(tl.float32)
    value = (polynomial * y * square + turns * -2.12194440e-4) - 0.5 * square
    # log 2 = 0.693359375 - 2.12194440e-4; the first part times an exponent is exact
    return (value + y) + turns * 0.693359375


@triton.jit
def _sine_cosine(angle):
    """sin and cos on [-pi/4, pi/4] in float32."""
    square = angle * angle
    sine = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    return angle + angle * (square * sine), (cosine * square * square - 0.5 * square) + 1.0


@triton.jit
def _sine_cosine_double(angle):
    """sin and cos on [-pi/4, pi/4] in float64; fdlibm's __kernel_sin and __kernel_cos."""
    z = angle * angle
    sine = (1.58969099521155010221e-10 * z - 2.50507602534068634195e-08) * z + 2.75573137070700676789e-06
    sine = ((sine * z - 1.98412698298579493134e-04) * z + 8.33333333332248946124e-03) * z - 1.66666666666666324348e-01
    cosine = (-1.13596475577881948265e-11 * z + 2.08757232129817482790e-09) * z - 2.75573143513906633035e-07
    cosine = ((cosine * z + 2.48015872894767294178e-05) * z - 1.38888888888741095749e-03) * z
    cosine = (cosine + 4.16666666666666019037e-02) * z * z
    return angle + angle * (z * sine), (cosine - 0.5 * z) + 1.0


@triton.jit
def _box_muller(radius_word, angle_word, DTYPE: tl.constexpr):
    """Two normals from two words, in DTYPE."""
    # the angle in turns is (angle_word + 1/2) / 2^32, reduced to an eighth of a turn on integers
    quarter = ((angle_word >> 29) + 1) >> 1
    offset = (angle_word - (quarter << 30)).to(tl.int32, bitcast=True)
    if DTYPE == tl.float64:  # noqa: SIM300
        angle = (offset.to(tl.float64) + 0.5) * 1.4629180792671596e-9  # pi 2^-31
        # a uniform has 33 bits: exact in float64, also next to 1
        radius = tl.sqrt(-2.0 * tl.log((radius_word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
        sine, cosine = _sine_cosine_double(angle)
    else:
        # high has 22 bits and pi = 3 + 0.14...: high times 3 is exact, the angle is rounded once
        high = (offset & -256).to(tl.float32)
        low = (offset & 255).to(tl.float32) + 0.5
        angle = high * 1.3969838619232178e-9 + (high * 6.593421734394185e-11 + low * 1.4629180792671596e-9)
        radius = tl.sqrt_rn(-2.0 * _log_uniform(radius_word))
        sine, cosine = _sine_cosine(angle)
    swap = (quarter & 1) == 1
    radius = tl.where((quarter & 2) == 2, -radius, radius)
    return radius * tl.where(swap, -sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def normals_of(seed, sample_id, step, number, first, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """COUNT standard normals in DTYPE: the elements first .. first + COUNT - 1 of a row of stream `number`.

    `first` and COUNT are multiples of 4: one counter gives four consecutive elements.
    """
    block = (tl.arange(0, COUNT // 4) + first // 4).to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed, block, number.to(tl.uint32), step.to(tl.uint32), sample_id.to(tl.uint32)
    )
    normal_0, normal_1 = _box_muller(word_0, word_1, DTYPE)
    normal_2, normal_3 = _box_muller(word_2, word_3, DTYPE)
    return tl.interleave(tl.interleave(normal_0, normal_2), tl.interleave(normal_1, normal_3))


@triton.jit
def normals(seed, sample_id, step, first, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """The normals of a step's noise, as `normals_of`."""
    return normals_of(seed, sample_id, step, tl.full((), NOISE_STREAM, tl.uint32), first, COUNT, DTYPE)
