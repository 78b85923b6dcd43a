// The inner loops of dual_norm_cpu.cpp: plain loops over one chunk of a row, compiled for several instruction sets.
#pragma once

#include <cstdint>

namespace fastdensity::simd {

constexpr std::int64_t kNormChunk = 2048;  // elements summed in the arithmetic's own type

struct TwoSums {
  double first = 0, second = 0;
};

// How a row is normalised: n = ((x - pivot) - correction) * scale. pivot is the mean rounded to Real, correction what
// the rounding took away: a large mean costs no digits of n.
template <typename Real>
struct Normal {
  Real pivot = 0, correction = 0, scale = 1;
};

// ty = (((t - pivot) - mean) - n * along) * scale * gain: mean is that of t - pivot, along that of n (t - pivot)
template <typename Real>
struct Projection {
  Real pivot = 0, mean = 0, along = 0, scale = 1;
};

#define FASTDENSITY_DECLARE(Real)                                                                                    \
  double sum(const Real* values, std::int64_t count);                                                                \
  /* sums of d and of d^2, d = values - pivot */                                                                     \
  TwoSums centred_sums(const Real* values, Real pivot, std::int64_t count);                                          \
  /* sums of d and of n d, d = tangent - pivot */                                                                    \
  TwoSums tangent_sums(const Real* tangent, const Real* n, Real pivot, std::int64_t count);                          \
  /* y = n * scale + shift, all elementwise */                                                                       \
  void norm_value(const Real* x, Normal<Real> normal, const Real* scale, const Real* shift, std::int64_t count,      \
                  Real* n, Real* y);                                                                                 \
  /* gain = scale * silu'(y), then y = silu(y) in place */                                                           \
  void silu_with_slope(const Real* scale, std::int64_t count, Real* y, Real* gain);                                  \
  void norm_tangent(const Real* tangent, const Real* n, const Real* gain, Projection<Real> projection,               \
                    std::int64_t count, Real* out);                                                                  \
  /* scale = weight * multiplier, shift = bias * multiplier + addend; what is null counts as 1 or 0 */               \
  void join_affine(const Real* weight, const Real* bias, const Real* multiplier, const Real* addend,                 \
                   std::int64_t count, Real* scale, Real* shift);

FASTDENSITY_DECLARE(float)
FASTDENSITY_DECLARE(double)
#undef FASTDENSITY_DECLARE

}  // namespace fastdensity::simd
