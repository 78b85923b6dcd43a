// What follows a dual convolution, in place: z = y_0 + bias, y_0 = f(z), y_k = f'(z) y_k.
//
// fastdensity/reference/dual_conv.py is the contract. The block of a part, (planes, pixels), is walked in chunks of the
// flat block, so that small planes cost no more than large ones; a chunk of the value is read once and serves all tangents.
#include <algorithm>
#include <cmath>

#include "float16.h"
#include "ops.h"
#include "rows_simd.h"

#if defined(__x86_64__) && !defined(FASTDENSITY_NO_CLONES)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace fastdensity {
namespace {

constexpr std::int64_t kChunk = 1024;  // elements: two buffers of them stay in the L1 cache
constexpr std::int64_t kSerialElements = 16384;
enum Activation { kNone = 0, kRelu = 1, kSilu = 2 };

// exp of x <= 0 or NaN, within 2 ulp: 2^n times a polynomial in the rest, |rest| <= ln 2 / 2 (Cody and Waite's
// reduction, Taylor's coefficients up to 7!). Below -87.3 it is held at the smallest normal number.
INLINE float exp_of(float x) {
  const float held = x < -87.3f ? -87.3f : x;  // NaN stays
  const float shifted = held * 1.442695041f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const float count = shifted - 12582912.0f;
  const float rest = (held - count * 0.693359375f) - count * -2.12194440e-4f;
  float sum = 1.98412698e-4f;
  sum = sum * rest + 1.38888889e-3f;
  sum = sum * rest + 8.33333333e-3f;
  sum = sum * rest + 4.16666667e-2f;
  sum = sum * rest + 1.66666667e-1f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  return sum * float_of_bits((bits_of_float(shifted) + 127u) << 23);  // the low bits of shifted hold count
}

INLINE double exp_of(double x) { return std::exp(x); }

template <typename Real>
INLINE void activate_body(int activation, Real* value, Real* slope, std::int64_t count) {
  if (activation == kRelu) {
    for (std::int64_t i = 0; i < count; ++i) {
      slope[i] = value[i] <= Real(0) ? Real(0) : Real(1);
      value[i] = value[i] <= Real(0) ? Real(0) : value[i];
    }
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const Real z = value[i];
    const Real small = exp_of(z > Real(0) ? -z : z);
    const Real near_one = Real(1) / (Real(1) + small), near_zero = small * near_one;
    const Real sigmoid = z > Real(0) ? near_one : near_zero, other = z > Real(0) ? near_zero : near_one;
    value[i] = z * sigmoid;
    slope[i] = sigmoid + value[i] * other;
  }
}

// relu selects, so that an infinite tangent behind a dead unit is zero as it is in torch
template <typename Real>
INLINE void scale_body(bool select, const Real* slope, Real* tangent, std::int64_t count) {
  if (select)
    for (std::int64_t i = 0; i < count; ++i) tangent[i] = slope[i] == Real(0) ? Real(0) : tangent[i];
  else
    for (std::int64_t i = 0; i < count; ++i) tangent[i] *= slope[i];
}

#define DEFINE_FOR(Real)                                                                     \
  CLONES void activate(int activation, Real* value, Real* slope, std::int64_t count) {       \
    activate_body(activation, value, slope, count);                                          \
  }                                                                                          \
  CLONES void scale(bool select, const Real* slope, Real* tangent, std::int64_t count) {     \
    scale_body(select, slope, tangent, count);                                               \
  }                                                                                          \
  CLONES void add(Real number, Real* values, std::int64_t count) {                           \
    for (std::int64_t i = 0; i < count; ++i) values[i] += number;                            \
  }
DEFINE_FOR(float)
DEFINE_FOR(double)

template <typename Real>
class Epilogue {
 public:
  explicit Epilogue(const DualConvCall& call) : call_(call), dtype_(static_cast<int>(call.dtype)) {}

  // Elements [begin, begin + count) of every part.
  void chunk(std::int64_t begin, std::int64_t count) const {
    alignas(64) Real value[kChunk], slope[kChunk], tangent[kChunk];
    simd::load(call_.out, dtype_, begin, count, value);
    if (call_.bias) add_bias(begin, count, value);
    if (call_.activation != kNone) {
      // whole vectors only: an element's bits must not depend on where its chunk ends
      const std::int64_t whole = (count + 15) / 16 * 16;
      std::fill(value + count, value + whole, Real(0));
      activate(call_.activation, value, slope, whole);
    }
    simd::store(value, call_.out, dtype_, begin, count);
    if (call_.activation == kNone) return;
    const std::int64_t part_size = call_.planes * call_.pixels;
    for (std::int64_t part = 1; part < call_.parts; ++part) {
      const std::int64_t first = part * part_size + begin;
      simd::load(call_.out, dtype_, first, count, tangent);
      scale(call_.activation == kRelu, slope, tangent, count);
      simd::store(tangent, call_.out, dtype_, first, count);
    }
  }

 private:
  void add_bias(std::int64_t begin, std::int64_t count, Real* value) const {
    std::int64_t plane = begin / call_.pixels, end = (plane + 1) * call_.pixels - begin;
    for (std::int64_t i = 0; i < count; ++plane, i = end, end += call_.pixels) {
      Real number;
      simd::load(call_.bias, dtype_, plane % call_.channels, 1, &number);
      add(number, value + i, std::min(end, count) - i);
    }
  }

  const DualConvCall& call_;
  const int dtype_;
};

template <typename Real>
void run(const DualConvCall& call, int threads) {
  const Epilogue<Real> epilogue(call);
  const std::int64_t size = call.planes * call.pixels, chunks = (size + kChunk - 1) / kChunk;
  if (threads <= 1 || size * call.parts <= kSerialElements) {
    for (std::int64_t i = 0; i < chunks; ++i) epilogue.chunk(i * kChunk, std::min(kChunk, size - i * kChunk));
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < chunks; ++i) epilogue.chunk(i * kChunk, std::min(kChunk, size - i * kChunk));
}

}  // namespace

void dual_conv_cpu(const DualConvCall& call, int threads) {
  call.dtype == DataType::float64 ? run<double>(call, threads) : run<float>(call, threads);
}

}  // namespace fastdensity
