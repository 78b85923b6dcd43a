// The inner loops of dual_norm_cpu.cpp: plain loops over one chunk of a row, compiled for several instruction sets.
#pragma once

#include <cstdint>

namespace fastdensity::simd {

constexpr std::int64_t kNormChunk = 2048;  // elements of a row handled at a time: the buffers stay in the L1/L2 cache

struct TwoSums {
  double first = 0, second = 0;
};

// How a row is normalised: n = ((x - pivot) - correction) * scale. pivot is the mean rounded to Real, correction what
// the rounding took away: a large mean costs no digits of n.
template <typename Real>
struct Normal {
  Real pivot = 0, correction = 0, scale = 1;
};

// ty = (((t - pivot) - mean) - n * along) * gain, with mean that of t - pivot
template <typename Real>
struct Projection {
  Real pivot = 0, mean = 0, along = 0;
};

#define FASTDENSITY_DECLARE(Real)                                                                                    \
  double sum(const Real* values, std::int64_t count);                                                                \
  /* sums of d and of d^2, d = values - pivot */                                                                     \
  TwoSums centred_sums(const Real* values, Real pivot, std::int64_t count);                                          \
  /* sums of d and of n d, d = tangent - pivot */                                                                    \
  TwoSums tangent_sums(const Real* tangent, const Real* n, Real pivot, std::int64_t count);                          \
  void normalise(const Real* x, Normal<Real> normal, std::int64_t count, Real* n);                                   \
  /* n as above, gain = normal.scale * scale, y = n * scale + shift; scale and shift are elementwise */              \
  void norm_value(const Real* x, Normal<Real> normal, const Real* scale, const Real* shift, std::int64_t count,      \
                  Real* n, Real* gain, Real* y);                                                                     \
  /* in place: gain *= silu'(y), y = silu(y) */                                                                      \
  void silu_with_slope(std::int64_t count, Real* y, Real* gain);                                                     \
  void norm_tangent(const Real* tangent, const Real* n, const Real* gain, Projection<Real> projection,               \
                    std::int64_t count, Real* out);                                                                  \
  /* scale = weight * multiplier, shift = bias * multiplier + addend; what is null counts as 1 or 0 */               \
  void join_affine(const Real* weight, const Real* bias, const Real* multiplier, const Real* addend,                 \
                   std::int64_t count, Real* scale, Real* shift);

FASTDENSITY_DECLARE(float)
FASTDENSITY_DECLARE(double)
#undef FASTDENSITY_DECLARE

}  // namespace fastdensity::simd
