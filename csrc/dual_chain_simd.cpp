#include "dual_chain_simd.h"

#include "clones.h"
#include "dual_chain_math.h"
#include "float16.h"

namespace fastdensity::chain {
namespace {

template <typename Function, typename Real>
INLINE void map(const Real* x, Real constant, Real* value, Real* slope, std::int64_t count) {
  if (slope) {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) {
      const Sloped<Real> result = Function::at(x[i], constant);
      value[i] = result.value;
      slope[i] = result.slope;
    }
  } else {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) value[i] = Function::at(x[i], constant).value;
  }
}

// False where one is larger, infinite or NaN.
INLINE bool all_reducible(const float* x, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t magnitude = bits_of_float(x[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < bits_of_float(kReducible);
}

// Large angles are done again one by one, so that an element's result depends on no other.
template <typename Small, typename General>
INLINE void map_angles(const float* x, float* value, float* slope, std::int64_t count) {
  map<Small>(x, 0.0f, value, slope, count);
  if (all_reducible(x, count)) return;
  for (std::int64_t i = 0; i < count; ++i) {
    if (all_reducible(x + i, 1)) continue;
    const Sloped<float> result = General::at(x[i], 0.0f);
    value[i] = result.value;
    if (slope) slope[i] = result.slope;
  }
}

template <typename Small, typename General>
INLINE void map_angles(const double* x, double* value, double* slope, std::int64_t count) {
  map<General>(x, 0.0, value, slope, count);
}

#define EACH(expression)                                                                        \
  do {                                                                                          \
    _Pragma("GCC ivdep") for (std::int64_t i = 0; i < count; ++i) value[i] = expression;        \
    return;                                                                                     \
  } while (false)

template <typename Real>
INLINE void run_step_body(int operation, const Real* left, const Real* right, Real constant, Real* value,
                                Real* slope, std::int64_t count) {
  switch (operation) {
    case add: EACH(left[i] + right[i]);
    case subtract: EACH(left[i] - right[i]);
    case multiply: EACH(left[i] * right[i]);
    case divide: EACH(left[i] / right[i]);
    case scale: return map<Scale>(left, constant, value, slope, count);
    case shift: return map<Shift>(left, constant, value, slope, count);
    case negate: return map<Negate>(left, constant, value, slope, count);
    case silu: return map<Silu>(left, constant, value, slope, count);
    case gelu: return map<Gelu>(left, constant, value, slope, count);
    case gelu_tanh: return map<GeluTanh>(left, constant, value, slope, count);
    case relu: return map<Relu>(left, constant, value, slope, count);
    case tanh: return map<Tanh>(left, constant, value, slope, count);
    case sigmoid: return map<Sigmoid>(left, constant, value, slope, count);
    case softplus: return map<Softplus>(left, constant, value, slope, count);
    case exp: return map<Exp>(left, constant, value, slope, count);
    case log: return map<Log>(left, constant, value, slope, count);
    case sqrt: return map<Sqrt>(left, constant, value, slope, count);
    case rsqrt: return map<Rsqrt>(left, constant, value, slope, count);
    case square: return map<Square>(left, constant, value, slope, count);
    case reciprocal: return map<Reciprocal>(left, constant, value, slope, count);
    case sin: return map_angles<SmallSin, Sin>(left, value, slope, count);
    case cos: return map_angles<SmallCos, Cos>(left, value, slope, count);
    case leaky_relu: return map<LeakyRelu>(left, constant, value, slope, count);
    case abs: return map<Abs>(left, constant, value, slope, count);
  }
}
#undef EACH

template <typename Real>
INLINE void gated_body(const Real* weight, const Real* tangent, Real* out, std::int64_t count) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const Real passed = tangent[i];
    out[i] = weight[i] == Real(0) ? Real(0) : passed;
  }
}

template <typename Real>
INLINE void combined_body(const Real* left_weight, const Real* left, const Real* right_weight, const Real* right,
                                Real* out, std::int64_t count) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) out[i] = left_weight[i] * left[i] + right_weight[i] * right[i];
}

template <typename Real>
INLINE void quotient_body(const Real* left, const Real* ratio, const Real* right, const Real* divisor, Real* out,
                                std::int64_t count) {
  if (left) {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) out[i] = (left[i] - ratio[i] * right[i]) / divisor[i];
  } else {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) out[i] = -ratio[i] * right[i] / divisor[i];
  }
}

template <typename Real>
INLINE void gather_body(const void* source, int dtype, std::int64_t offset, std::int64_t stride,
                              std::int64_t count, Real* out) {
  if (dtype == 0) {
    const float* values = static_cast<const float*>(source) + offset;
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(values[i * stride]);
  } else if (dtype == 1) {
    const double* values = static_cast<const double*>(source) + offset;
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(values[i * stride]);
  } else {
    const std::uint16_t* values = static_cast<const std::uint16_t*>(source) + offset;
    for (std::int64_t i = 0; i < count; ++i)
      out[i] = static_cast<Real>(dtype == 2 ? widen_bfloat16(values[i * stride]) : widen_float16(values[i * stride]));
  }
}

}  // namespace

#define DEFINE_FOR(Real)                                                                                              \
  CLONES void run_step(int operation, const Real* left, const Real* right, Real constant, Real* value, Real* slope,   \
                       std::int64_t count) {                                                                          \
    run_step_body(operation, left, right, constant, value, slope, count);                                             \
  }                                                                                                                   \
  CLONES void gated(const Real* weight, const Real* tangent, Real* out, std::int64_t count) {                         \
    gated_body(weight, tangent, out, count);                                                                          \
  }                                                                                                                   \
  CLONES void combined(const Real* left_weight, const Real* left, const Real* right_weight, const Real* right,        \
                       Real* out, std::int64_t count) {                                                               \
    combined_body(left_weight, left, right_weight, right, out, count);                                                \
  }                                                                                                                   \
  CLONES void quotient(const Real* left, const Real* ratio, const Real* right, const Real* divisor, Real* out,        \
                       std::int64_t count) {                                                                          \
    quotient_body(left, ratio, right, divisor, out, count);                                                           \
  }                                                                                                                   \
  CLONES void gather(const void* source, int dtype, std::int64_t offset, std::int64_t stride, std::int64_t count,     \
                     Real* out) {                                                                                     \
    gather_body(source, dtype, offset, stride, count, out);                                                           \
  }
DEFINE_FOR(float)
DEFINE_FOR(double)

}  // namespace fastdensity::chain
