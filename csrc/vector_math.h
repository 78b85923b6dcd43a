// Functions that a compiler vectorises a loop over: no branch, no library call, always inlined.
//
// float: polynomials fitted for this file (minimax in the relative error, at most 4e-8). double: the C library, element
// by element. Small arguments, infinities and NaN behave as in torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "clones.h"
#include "float16.h"

namespace fastdensity {

// e^r for |r| <= ln(2)/2.
INLINE float reduced_exponential(float r) {
  float p = 0.00138142216f;
  p = p * r + 0.0083688987f;
  p = p * r + 0.0416684057f;
  p = p * r + 0.166665191f;
  p = p * r + 0.499999934f;
  return p * (r * r) + r + 1.0f;
}

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: added to x, it leaves the nearest integer in the low bits

// e^x = 2^k e^r. Half of k at a time: the result may be subnormal or infinite.
INLINE float exponential(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const float shifted = x * 1.44269504f + kRounding, k = shifted - kRounding;
  const float p = reduced_exponential((x - k * 0.693145752f) - k * 1.42860677e-6f);
  const std::int32_t exponent = static_cast<std::int32_t>(bits_of_float(shifted)) - 0x4B400000;
  const std::int32_t half = exponent >> 1, rest = exponent - half;
  return p * float_of_bits(static_cast<std::uint32_t>(half + 127) << 23) *
         float_of_bits(static_cast<std::uint32_t>(rest + 127) << 23);
}

// e^x for x <= 0, and 0 where that is no normal number. A product with the power, not a sum in the exponent's bits: NaN
// of any payload stays NaN.
INLINE float decay(float x) {
  const float shifted = x * 1.44269504f + kRounding, k = shifted - kRounding;
  const float p = reduced_exponential((x - k * 0.693145752f) - k * 1.42860677e-6f);
  return x < -87.33f ? 0.0f : p * float_of_bits((bits_of_float(shifted) + 127u) << 23);
}

// The odd series 2 atanh(s) = 2 s + s^3 (...), for |s| < 0.172.
INLINE float logarithm(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const float scaled = subnormal ? x * 16777216.0f : x;
  const std::uint32_t bits = bits_of_float(scaled);
  const std::int32_t k = static_cast<std::int32_t>(bits - 0x3F3504F3u) >> 23;  // the mantissa in [sqrt(1/2), sqrt(2))
  const float m = float_of_bits(bits - (static_cast<std::uint32_t>(k) << 23));
  const float s = (m - 1.0f) / (m + 1.0f), u = s * s;
  const float p = ((0.298721534f * u + 0.39977527f) * u + 0.666667765f) * u * s + 2.0f * s;
  const float exponent = static_cast<float>(k) - (subnormal ? 24.0f : 0.0f);
  float y = exponent * 0.693145752f + (exponent * 1.42860677e-6f + p);
  y = x < INFINITY ? y : x;                       // infinity, NaN
  y = x == 0.0f ? -INFINITY : y;
  return x < 0.0f ? NAN : y;
}

// log(1 + e) for e in [0, 1].
INLINE float log_one_plus(float e) {
  const float s = e / (2.0f + e), u = s * s;
  float p = 0.243009335f;
  p = p * u + 0.214276583f;
  p = p * u + 0.286168847f;
  p = p * u + 0.399988778f;
  p = p * u + 0.666666756f;
  return p * u * s + 2.0f * s;
}

// The normal distribution's mass beyond z >= 0, given gauss = exp(-z^2 / 2).
INLINE float upper_tail(float z, float gauss) {
  const float t = 1.0f / (1.0f + 0.35f * z);
  float p = -0.029157886f;
  p = p * t + 0.144030919f;
  p = p * t - 0.255839003f;
  p = p * t + 0.159319694f;
  p = p * t - 0.0232123521f;
  p = p * t + 0.105552502f;
  p = p * t + 0.119821288f;
  p = p * t + 0.139863515f;
  p = p * t + 0.139621307f;
  return gauss * (p * t);
}

INLINE float small_tanh(float x) {  // |x| < 0.625
  const float u = x * x;
  float p = -0.005717045f;
  p = p * u + 0.0206505872f;
  p = p * u - 0.0537434981f;
  p = p * u + 0.133314913f;
  p = p * u - 0.333332839f;
  return p * u * x + x;
}

INLINE double exponential(double x) { return std::exp(x); }
INLINE double decay(double x) { return std::exp(x); }
INLINE double logarithm(double x) { return std::log(x); }
INLINE double log_one_plus(double e) { return std::log1p(e); }
INLINE double upper_tail(double z, double) { return 0.5 * std::erfc(z * 0.70710678118654752); }
INLINE double small_tanh(double x) { return std::tanh(x); }

template <typename Real>
INLINE Real magnitude_of(Real x) {
  return std::fabs(x);
}

// 1 / (1 + e^-x), its complement, and their product, which is its derivative: none of them by a subtraction.
template <typename Real>
struct Logistic {
  Real value, complement, slope;
};

template <typename Real>
INLINE Logistic<Real> logistic(Real x) {
  const Real e = decay(-magnitude_of(x));
  const Real large = Real(1) / (Real(1) + e), small = e * large;
  const bool positive = x >= Real(0);
  return {positive ? large : small, positive ? small : large, large * small};
}

// Sine and cosine of float arguments below kReducible: in double, less the nearest multiple of pi / 2, by their series.
constexpr float kReducible = 1e6f;

struct Circle {
  float sine, cosine;
};

INLINE Circle circle(float x) {
  const double shifted = static_cast<double>(x) * 0.63661977236758134 + 6755399441055744.0;  // 1.5 * 2^52
  const double k = shifted - 6755399441055744.0;
  const double r = static_cast<double>(x) - k * 1.5707963267948966, u = r * r;
  const double s = r + r * u * (-1.0 / 6 + u * (1.0 / 120 + u * (-1.0 / 5040 + u * (1.0 / 362880))));
  const double c = 1.0 + u * (-0.5 + u * (1.0 / 24 + u * (-1.0 / 720 + u * (1.0 / 40320 - u * (1.0 / 3628800)))));
  const float sine = static_cast<float>(s), cosine = static_cast<float>(c);
  const std::int32_t quadrant = static_cast<std::int32_t>(k);
  const float along = quadrant & 1 ? cosine : sine, across = quadrant & 1 ? sine : cosine;
  return {quadrant & 2 ? -along : along, (quadrant + 1) & 2 ? -across : across};
}

}  // namespace fastdensity
