#include "dual_norm_simd.h"

#include <cmath>

#include "float16.h"

// Clones hold no OpenMP region: GCC cannot clone one. CMakeLists.txt finds out whether the compiler can clone at all.
#if defined(__x86_64__) && !defined(FASTDENSITY_NO_CLONES)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace fastdensity::simd {
namespace {

// Independent lanes, so that the compiler may vectorise without reordering and the error stays that of a tree.
constexpr int kLanes = 64;

template <typename Real>
INLINE double sum_of_lanes(const Real* lanes) {
  double sums[16];
  for (int lane = 0; lane < 16; ++lane)
    sums[lane] = (static_cast<double>(lanes[lane]) + static_cast<double>(lanes[lane + 16])) +
                 (static_cast<double>(lanes[lane + 32]) + static_cast<double>(lanes[lane + 48]));
  for (int width = 8; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

template <typename Real>
INLINE double sum_body(const Real* values, std::int64_t count) {
  Real lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += values[i];
  return sum_of_lanes(lanes);
}

template <typename Real>
INLINE TwoSums centred_sums_body(const Real* values, Real pivot, std::int64_t count) {
  Real sums[kLanes] = {}, squares[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real d = values[i + lane] - pivot;
      sums[lane] += d, squares[lane] += d * d;
    }
  for (int lane = 0; i < count; ++i, ++lane) {
    const Real d = values[i] - pivot;
    sums[lane] += d, squares[lane] += d * d;
  }
  return {sum_of_lanes(sums), sum_of_lanes(squares)};
}

template <typename Real>
INLINE TwoSums tangent_sums_body(const Real* tangent, const Real* n, Real pivot, std::int64_t count) {
  Real sums[kLanes] = {}, along[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real d = tangent[i + lane] - pivot;
      sums[lane] += d, along[lane] += n[i + lane] * d;
    }
  for (int lane = 0; i < count; ++i, ++lane) {
    const Real d = tangent[i] - pivot;
    sums[lane] += d, along[lane] += n[i] * d;
  }
  return {sum_of_lanes(sums), sum_of_lanes(along)};
}

template <typename Real>
INLINE void normalise_body(const Real* x, Normal<Real> normal, std::int64_t count, Real* n) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) n[i] = ((x[i] - normal.pivot) - normal.correction) * normal.scale;
}

template <typename Real>
INLINE void norm_value_body(const Real* x, Normal<Real> normal, const Real* scale, const Real* shift,
                            std::int64_t count, Real* n, Real* gain, Real* y) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const Real value = ((x[i] - normal.pivot) - normal.correction) * normal.scale;
    n[i] = value, gain[i] = normal.scale * scale[i];
    y[i] = value * scale[i] + shift[i];
  }
}

template <typename Real>
INLINE void norm_tangent_body(const Real* tangent, const Real* n, const Real* gain, Projection<Real> projection,
                              std::int64_t count, Real* out) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i)
    out[i] = (((tangent[i] - projection.pivot) - projection.mean) - n[i] * projection.along) * gain[i];
}

// e^x for x <= 0, within 2 ulp, 0 where the result is subnormal. x = k ln 2 + r with |r| <= ln(2) / 2, ln 2 in two
// parts, the first of 14 bits; e^r = 1 + r + r^2 q(r), q interpolating at the Chebyshev points (error 1e-8).
INLINE float exp_of_negative(float x) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const float shifted = x * 1.44269502f + rounder;
  const float k = shifted - rounder;
  const float r = (x - k * 0.693115234f) - k * 3.19461833e-5f;
  float q = 1.39262131e-3f;
  q = q * r + 8.36320315e-3f;
  q = q * r + 4.16665561e-2f;
  q = q * r + 1.66665763e-1f;
  q = q * r + 0.5f;
  const float power = float_of_bits((bits_of_float(shifted) + 127u) << 23);
  return x < -87.33f ? 0.0f : (1.0f + (r + (r * r) * q)) * power;
}

INLINE double exp_of_negative(double x) { return std::exp(x); }

template <typename Real>
INLINE void silu_with_slope_body(std::int64_t count, Real* y, Real* gain) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const Real value = y[i];
    const Real small = exp_of_negative(-std::abs(value));
    const Real inverse = Real(1) / (Real(1) + small);
    // 1 - sigmoid is the other branch, not a difference
    const Real gate = value < 0 ? small * inverse : inverse, rest = value < 0 ? inverse : small * inverse;
    y[i] = value * gate;
    gain[i] *= gate * (Real(1) + value * rest);
  }
}

template <typename Real>
INLINE void join_affine_body(const Real* weight, const Real* bias, const Real* multiplier, const Real* addend,
                             std::int64_t count, Real* scale, Real* shift) {
  for (std::int64_t i = 0; i < count; ++i) scale[i] = weight ? weight[i] : Real(1);
  for (std::int64_t i = 0; i < count; ++i) shift[i] = bias ? bias[i] : Real(0);
  if (multiplier)
    for (std::int64_t i = 0; i < count; ++i) scale[i] *= multiplier[i], shift[i] *= multiplier[i];
  if (addend)
    for (std::int64_t i = 0; i < count; ++i) shift[i] += addend[i];
}

}  // namespace

#define DEFINE_FOR(Real)                                                                                             \
  CLONES double sum(const Real* values, std::int64_t count) { return sum_body(values, count); }                      \
  CLONES TwoSums centred_sums(const Real* values, Real pivot, std::int64_t count) {                                  \
    return centred_sums_body(values, pivot, count);                                                                  \
  }                                                                                                                  \
  CLONES TwoSums tangent_sums(const Real* tangent, const Real* n, Real pivot, std::int64_t count) {                  \
    return tangent_sums_body(tangent, n, pivot, count);                                                              \
  }                                                                                                                  \
  CLONES void normalise(const Real* x, Normal<Real> normal, std::int64_t count, Real* n) {                           \
    normalise_body(x, normal, count, n);                                                                             \
  }                                                                                                                  \
  CLONES void norm_value(const Real* x, Normal<Real> normal, const Real* scale, const Real* shift,                   \
                         std::int64_t count, Real* n, Real* gain, Real* y) {                                         \
    norm_value_body(x, normal, scale, shift, count, n, gain, y);                                                     \
  }                                                                                                                  \
  CLONES void silu_with_slope(std::int64_t count, Real* y, Real* gain) { silu_with_slope_body(count, y, gain); }     \
  CLONES void norm_tangent(const Real* tangent, const Real* n, const Real* gain, Projection<Real> projection,        \
                           std::int64_t count, Real* out) {                                                          \
    norm_tangent_body(tangent, n, gain, projection, count, out);                                                     \
  }                                                                                                                  \
  CLONES void join_affine(const Real* weight, const Real* bias, const Real* multiplier, const Real* addend,          \
                          std::int64_t count, Real* scale, Real* shift) {                                            \
    join_affine_body(weight, bias, multiplier, addend, count, scale, shift);                                         \
  }
DEFINE_FOR(float)
DEFINE_FOR(double)

}  // namespace fastdensity::simd
