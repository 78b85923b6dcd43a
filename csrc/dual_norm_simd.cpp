#include "dual_norm_simd.h"

#include "clones.h"
#include "vector_math.h"

namespace fastdensity::simd {
namespace {

// Independent lanes, so that the compiler may vectorise without reordering and the error stays that of a tree. They
// are kept in registers: loops over lanes have constant lengths, and what is left of a chunk goes to the first ones.
constexpr int kLanes = 64, kTailLanes = 16;

template <typename Real>
struct alignas(64) Lanes {
  Real of[kLanes] = {};
};

template <typename Real>
INLINE double sum_of_lanes(const Lanes<Real>& lanes) {
  alignas(64) Real sums[kTailLanes];
  for (int lane = 0; lane < 16; ++lane)
    sums[lane] = (lanes.of[lane] + lanes.of[lane + 16]) + (lanes.of[lane + 32] + lanes.of[lane + 48]);
  alignas(64) double wide[8];
  for (int lane = 0; lane < 8; ++lane)
    wide[lane] = static_cast<double>(sums[lane]) + static_cast<double>(sums[lane + 8]);
  return ((wide[0] + wide[4]) + (wide[2] + wide[6])) + ((wide[1] + wide[5]) + (wide[3] + wide[7]));
}

// Runs `body(i, lane)` for all i < count, each lane in order.
template <typename Body>
INLINE void for_each_lane(std::int64_t count, const Body& body) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) body(i + lane, lane);
  for (; i + kTailLanes <= count; i += kTailLanes)
    for (int lane = 0; lane < kTailLanes; ++lane) body(i + lane, lane);
  for (int lane = 0; i < count; ++i, ++lane) body(i, lane);
}

template <typename Real>
INLINE double sum_body(const Real* values, std::int64_t count) {
  Lanes<Real> sums;
  for_each_lane(count, [&](std::int64_t i, int lane) __attribute__((always_inline)) { sums.of[lane] += values[i]; });
  return sum_of_lanes(sums);
}

template <typename Real>
INLINE TwoSums centred_sums_body(const Real* values, Real pivot, std::int64_t count) {
  Lanes<Real> sums, squares;
  for_each_lane(count, [&](std::int64_t i, int lane) __attribute__((always_inline)) {
    const Real d = values[i] - pivot;
    sums.of[lane] += d, squares.of[lane] += d * d;
  });
  return {sum_of_lanes(sums), sum_of_lanes(squares)};
}

template <typename Real>
INLINE TwoSums tangent_sums_body(const Real* tangent, const Real* n, Real pivot, std::int64_t count) {
  Lanes<Real> sums, along;
  for_each_lane(count, [&](std::int64_t i, int lane) __attribute__((always_inline)) {
    const Real d = tangent[i] - pivot;
    sums.of[lane] += d, along.of[lane] += n[i] * d;
  });
  return {sum_of_lanes(sums), sum_of_lanes(along)};
}

template <typename Real>
INLINE void norm_value_body(const Real* x, Normal<Real> normal, const Real* scale, const Real* shift,
                            std::int64_t count, Real* n, Real* y) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const Real value = ((x[i] - normal.pivot) - normal.correction) * normal.scale;
    n[i] = value;
    y[i] = value * scale[i] + shift[i];
  }
}

template <typename Real>
INLINE void norm_tangent_body(const Real* tangent, const Real* n, const Real* gain, Projection<Real> p,
                              std::int64_t count, Real* out) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i)
    out[i] = ((((tangent[i] - p.pivot) - p.mean) - n[i] * p.along) * p.scale) * gain[i];
}

template <typename Real>
INLINE void silu_with_slope_body(const Real* scale, std::int64_t count, Real* y, Real* gain) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const Real value = y[i];
    const Logistic<Real> gate = logistic(value);
    y[i] = value * gate.value;
    gain[i] = scale[i] * (gate.value + value * gate.slope);
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
  CLONES void norm_value(const Real* x, Normal<Real> normal, const Real* scale, const Real* shift,                   \
                         std::int64_t count, Real* n, Real* y) {                                                     \
    norm_value_body(x, normal, scale, shift, count, n, y);                                                           \
  }                                                                                                                  \
  CLONES void silu_with_slope(const Real* scale, std::int64_t count, Real* y, Real* gain) {                          \
    silu_with_slope_body(scale, count, y, gain);                                                                     \
  }                                                                                                                  \
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
