#include "rows_simd.h"

#include <cstring>
#include <limits>

#include "clones.h"
#include "float16.h"
#include "philox.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace fastdensity::simd {
namespace {

template <typename Real>
INLINE void load_body(const void* source, int dtype, std::int64_t offset, std::int64_t count, Real* target) {
  if (dtype == 0) {
    const float* values = static_cast<const float*>(source) + offset;
    for (std::int64_t i = 0; i < count; ++i) target[i] = static_cast<Real>(values[i]);
  } else if (dtype == 1) {
    const double* values = static_cast<const double*>(source) + offset;
    for (std::int64_t i = 0; i < count; ++i) target[i] = static_cast<Real>(values[i]);
  } else if (dtype == 2) {
    const std::uint16_t* values = static_cast<const std::uint16_t*>(source) + offset;
    for (std::int64_t i = 0; i < count; ++i) target[i] = static_cast<Real>(widen_bfloat16(values[i]));
  } else {
    const std::uint16_t* values = static_cast<const std::uint16_t*>(source) + offset;
    for (std::int64_t i = 0; i < count; ++i) target[i] = static_cast<Real>(widen_float16(values[i]));
  }
}

template <typename Real>
INLINE void store_body(const Real* source, void* target, int dtype, std::int64_t offset, std::int64_t count) {
  if (dtype == 0) {
    float* values = static_cast<float*>(target) + offset;
    for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(source[i]);
  } else if (dtype == 1) {
    double* values = static_cast<double*>(target) + offset;
    for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(source[i]);
  } else if (dtype == 2) {
    std::uint16_t* values = static_cast<std::uint16_t*>(target) + offset;
    for (std::int64_t i = 0; i < count; ++i)
      values[i] = static_cast<std::uint16_t>(narrow_bfloat16(static_cast<float>(source[i])));
  } else {
    std::uint16_t* values = static_cast<std::uint16_t*>(target) + offset;
    for (std::int64_t i = 0; i < count; ++i)
      values[i] = static_cast<std::uint16_t>(narrow_float16(static_cast<float>(source[i])));
  }
}

constexpr int kLanes = 64;

// A tree: sixteen short chains side by side, not one of 64 dependent additions.
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
INLINE double dot_body(const Real* left, const Real* right, std::int64_t count) {
  Real lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += left[i + lane] * right[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += left[i] * right[i];
  return sum_of_lanes(lanes);
}

// Not dot(values, values): the compiler cannot know that both pointers are one, and would load twice.
template <typename Real>
INLINE double sum_of_squares_body(const Real* values, std::int64_t count) {
  Real lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += values[i] * values[i];
  return sum_of_lanes(lanes);
}

INLINE std::uint32_t magnitude(float value) { return bits_of_float(value) & 0x7FFFFFFFu; }

INLINE std::uint64_t magnitude(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits & 0x7FFFFFFFFFFFFFFFull;
}

// Infinities and NaNs have the largest magnitudes of all when read as integers, whose maximum a compiler may reorder:
// looking for them costs two integer instructions and needs no floating-point liberty.
#define FOR_EACH(expression)                                 \
  _Pragma("GCC ivdep") for (std::int64_t i = 0; i < count; ++i) { \
    const Real value = expression;                           \
    const auto size = magnitude(value);                      \
    largest = size > largest ? size : largest;               \
    out[i] = value;                                          \
  }

template <typename Real>
INLINE bool combine_body(const Terms<Real>& t, std::int64_t count, Real* out) {
  const Real *a = t.vector[0], *b = t.vector[1], *c = t.vector[2], *d = t.vector[3];
  const Real wa = t.weight[0], wb = t.weight[1], wc = t.weight[2], wd = t.weight[3];
  decltype(magnitude(wa)) largest = 0;
  switch (t.count) {
    case 1: FOR_EACH(wa * a[i]) break;
    case 2: FOR_EACH(wb * b[i] + wa * a[i]) break;
    case 3: FOR_EACH(wc * c[i] + (wb * b[i] + wa * a[i])) break;
    default: FOR_EACH(wd * d[i] + (wc * c[i] + (wb * b[i] + wa * a[i])))
  }
  return largest < magnitude(std::numeric_limits<Real>::infinity());
}
#undef FOR_EACH

// Writes past the cache.
void stream(const float* source, float* target, std::int64_t count) {
  std::int64_t i = 0;
#if defined(__x86_64__)
  for (; i + 4 <= count; i += 4) _mm_stream_ps(target + i, _mm_loadu_ps(source + i));
  _mm_sfence();
#endif
  for (; i < count; ++i) target[i] = source[i];
}

template <typename Real>
INLINE void classifier_free_body(const Real* uncond, const Real* cond, Real scale, std::int64_t count, Real* out) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) out[i] = uncond[i] + scale * (cond[i] - uncond[i]);
}

// The elements of one Philox counter each; the tail goes through a buffer of four.
template <typename Real>
INLINE void noise_body(std::uint64_t seed, std::uint32_t id, std::uint32_t step, std::int64_t offset,
                       std::int64_t count, Real* out) {
  const std::uint32_t first = static_cast<std::uint32_t>(offset / 4);
  const std::int64_t blocks = count / 4;
#pragma GCC ivdep
  for (std::int64_t block = 0; block < blocks; ++block)
    noise_block(seed, id, step, first + static_cast<std::uint32_t>(block), out + 4 * block);
  if (count % 4) {
    Real tail[4];
    noise_block(seed, id, step, first + static_cast<std::uint32_t>(blocks), tail);
    for (std::int64_t i = 0; i < count % 4; ++i) out[4 * blocks + i] = tail[i];
  }
}

}  // namespace

#define DEFINE_FOR(Real)                                                                                        \
  CLONES void load(const void* source, int dtype, std::int64_t offset, std::int64_t count, Real* target) {      \
    load_body(source, dtype, offset, count, target);                                                            \
  }                                                                                                             \
  CLONES void store(const Real* source, void* target, int dtype, std::int64_t offset, std::int64_t count) {     \
    store_body(source, target, dtype, offset, count);                                                           \
  }                                                                                                             \
  CLONES double dot(const Real* left, const Real* right, std::int64_t count) { return dot_body(left, right, count); } \
  CLONES double sum_of_squares(const Real* values, std::int64_t count) { return sum_of_squares_body(values, count); }  \
  CLONES bool combine(const Terms<Real>& terms, std::int64_t count, Real* out) {                                \
    return combine_body(terms, count, out);                                                                     \
  }                                                                                                             \
  CLONES void classifier_free(const Real* uncond, const Real* cond, Real scale, std::int64_t count, Real* out) { \
    classifier_free_body(uncond, cond, scale, count, out);                                                      \
  }                                                                                                             \
  CLONES void noise(std::uint64_t seed, std::uint32_t sample_id, std::uint32_t step, std::int64_t offset,       \
                    std::int64_t count, Real* out) {                                                            \
    noise_body(seed, sample_id, step, offset, count, out);                                                      \
  }
DEFINE_FOR(float)
DEFINE_FOR(double)

void triad(const float* a, const float* b, const float* c, float s, float t, std::int64_t count, float* out,
           bool streaming) {
  float buffer[kChunk];
  for (std::int64_t begin = 0; begin < count; begin += kChunk) {
    const std::int64_t size = count - begin < kChunk ? count - begin : kChunk;
    Terms<float> terms;
    terms.add(t, c + begin);
    terms.add(s, b + begin);
    terms.add(1.0f, a + begin);
    combine(terms, size, streaming ? buffer : out + begin);
    if (streaming) stream(buffer, out + begin, size);
  }
}

}  // namespace fastdensity::simd
