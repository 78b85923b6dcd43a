// The steps of a chain on short vectors; dual_chain_simd.cpp compiles each for several instruction sets.
#pragma once

#include <cstdint>

namespace fastdensity::chain {

// Positions as in fastdensity/chain_program.py.
enum Operation : int {
  add = 0, subtract, multiply, divide, scale, shift, negate, silu, gelu, gelu_tanh, relu, tanh, sigmoid, softplus,
  exp, log, sqrt, rsqrt, square, reciprocal, sin, cos, leaky_relu, abs, operations
};

// value = operation(left, right or constant); where `slope` is given, it receives the derivative of a unary one.
// `value` may be `left` or `right`, but for sin and cos.
void run_step(int operation, const float* left, const float* right, float constant, float* value, float* slope,
              std::int64_t count);
void run_step(int operation, const double* left, const double* right, double constant, double* value, double* slope,
              std::int64_t count);

#define DECLARE_FOR(Real)                                                                                              \
  /* out = weight * tangent, or zero where the weight is zero */                                                       \
  void gated(const Real* weight, const Real* tangent, Real* out, std::int64_t count);                                  \
  /* out = left_weight * left + right_weight * right */                                                                \
  void combined(const Real* left_weight, const Real* left, const Real* right_weight, const Real* right, Real* out,     \
                std::int64_t count);                                                                                   \
  /* out = (left - ratio * right) / divisor, without `left` where it is null */                                        \
  void quotient(const Real* left, const Real* ratio, const Real* right, const Real* divisor, Real* out,                \
                std::int64_t count);                                                                                   \
  /* out[i] = source[i * stride], converted */                                                                         \
  void gather(const void* source, int dtype, std::int64_t offset, std::int64_t stride, std::int64_t count, Real* out);
DECLARE_FOR(float)
DECLARE_FOR(double)
#undef DECLARE_FOR

}  // namespace fastdensity::chain
