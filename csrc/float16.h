// bfloat16 and float16 to float and back, on integers and exact float operations: the same bits on CPU and GPU.
//
// Narrowing rounds to nearest, ties to even; NaN becomes the quiet NaN of the narrow type. Needs subnormal floats:
// not for code compiled to flush them to zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules.h"

namespace fastdensity {

FASTDENSITY_HOST_DEVICE float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

FASTDENSITY_HOST_DEVICE std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

FASTDENSITY_HOST_DEVICE float widen_bfloat16(std::uint32_t half) { return float_of_bits(half << 16); }

FASTDENSITY_HOST_DEVICE std::uint32_t narrow_bfloat16(float value) {
  const std::uint32_t bits = bits_of_float(value);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return is_nan ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

FASTDENSITY_HOST_DEVICE float widen_float16(std::uint32_t half) {
  const std::uint32_t magnitude = (half & 0x7FFFu) << 13, sign = (half & 0x8000u) << 16;
  const float scaled = float_of_bits(magnitude) * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
  const bool special = (half & 0x7FFFu) >= 0x7C00u;                       // infinity, NaN
  return float_of_bits((special ? magnitude | 0x7F800000u : bits_of_float(scaled)) | sign);
}

FASTDENSITY_HOST_DEVICE std::uint32_t narrow_float16(float value) {
  const std::uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // normal numbers: rebias and round on the integer; subnormal ones: let a float addition round
  const std::uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // rounds to infinity
  half = magnitude > 0x7F800000u ? 0x7E00u : half;   // NaN
  return half | sign;
}

}  // namespace fastdensity
