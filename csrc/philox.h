// Philox4x32-10 (Salmon et al. 2011) and Box-Muller normals: the twin of fastdensity/reference/philox.py.
//
// Integers are those of the reference bit for bit; normals in float agree with its float64 ones to 4 ulp. The
// logarithm and the sine are polynomials on arguments that integers reduced exactly, so that a vectorising
// compiler keeps eight or sixteen of them in a register.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "rules.h"

namespace fastdensity {

constexpr std::uint32_t kStreamNoise = 0x4E000000u;

FASTDENSITY_HOST_DEVICE std::uint32_t multiply_high(std::uint32_t a, std::uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(a) * b) >> 32);
#endif
}

// Four words in place of the counter.
FASTDENSITY_HOST_DEVICE void philox(std::uint32_t word[4], std::uint64_t seed) {
  std::uint32_t key_0 = static_cast<std::uint32_t>(seed), key_1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t high_0 = multiply_high(0xD2511F53u, word[0]), low_0 = 0xD2511F53u * word[0];
    const std::uint32_t high_1 = multiply_high(0xCD9E8D57u, word[2]), low_1 = 0xCD9E8D57u * word[2];
    word[0] = high_1 ^ word[1] ^ key_0;
    word[1] = low_1;
    word[2] = high_0 ^ word[3] ^ key_1;
    word[3] = low_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
}

// log((word + 1/2) / 2^32), in float to 2 ulp: for word >= 2^31 from 1 - u, which is the small exact number.
FASTDENSITY_HOST_DEVICE float log_uniform(std::uint32_t word) {
  const bool upper = word >= 0x80000000u;
  // u = m 2^e with m in [sqrt(1/2), sqrt(2)); in the upper half m - 1 = -(1 - u) when that is above sqrt(1/2) - 1
  const float rest = (static_cast<float>(static_cast<std::int32_t>(~word & 0x7FFFFFFFu)) + 0.5f) * 2.3283064365386963e-10f;
  const float lower_u = (static_cast<float>(static_cast<std::int32_t>(word & 0x7FFFFFFFu)) + 0.5f) * 2.3283064365386963e-10f;
  const float u = upper ? 1.0f - rest : lower_u;
  std::int32_t bits;
  std::memcpy(&bits, &u, 4);
  std::int32_t exponent = ((bits - 0x3F3504F3) >> 23);  // 0x3F3504F3 = sqrt(1/2)
  const std::int32_t mantissa_bits = bits - (exponent << 23);
  float mantissa;
  std::memcpy(&mantissa, &mantissa_bits, 4);
  const float y = upper && exponent == 0 ? -rest : mantissa - 1.0f;
  // log(1 + y) = y - y^2/2 + y^3 P(y): minimax of Cephes' logf
  float poly = 7.0376836292e-2f;
  poly = poly * y - 1.1514610310e-1f;
  poly = poly * y + 1.1676998740e-1f;
  poly = poly * y - 1.2420140846e-1f;
  poly = poly * y + 1.4249322787e-1f;
  poly = poly * y - 1.6668057665e-1f;
  poly = poly * y + 2.0000714765e-1f;
  poly = poly * y - 2.4999993993e-1f;
  poly = poly * y + 3.3333331174e-1f;
  const float square = y * y;
  const float e = static_cast<float>(exponent);
  float value = poly * y * square;
  value += e * -2.12194440e-4f;
  value -= 0.5f * square;
  value += y;
  return value + e * 0.693359375f;
}

// Two normals of two words: the turn is (angle + 1/2) / 2^32, reduced to an eighth of a turn on integers.
FASTDENSITY_HOST_DEVICE void box_muller(std::uint32_t radius_word, std::uint32_t angle_word, float* first,
                                        float* second) {
  const float radius = sqrtf(-2.0f * log_uniform(radius_word));
  const std::uint32_t quarter = ((angle_word >> 29) + 1u) >> 1;
  const std::int32_t offset = static_cast<std::int32_t>(angle_word - (quarter << 30));
  const float angle = (static_cast<float>(offset) + 0.5f) * 1.4629180792671596e-9f;  // pi 2^-31
  const float square = angle * angle;
  float sine = -1.9515295891e-4f;
  sine = sine * square + 8.3321608736e-3f;
  sine = sine * square - 1.6666654611e-1f;
  sine = sine * square * angle + angle;
  float cosine = 2.443315711809948e-5f;
  cosine = cosine * square - 1.388731625493765e-3f;
  cosine = cosine * square + 4.166664568298827e-2f;
  cosine = cosine * square * square - 0.5f * square + 1.0f;
  const bool swap = quarter & 1u, negative = quarter & 2u;
  const float c = swap ? -sine : cosine, s = swap ? cosine : sine;
  const float signed_radius = negative ? -radius : radius;
  *first = signed_radius * c;
  *second = signed_radius * s;
}

FASTDENSITY_HOST_DEVICE void box_muller(std::uint32_t radius_word, std::uint32_t angle_word, double* first,
                                        double* second) {
  const double u = (static_cast<double>(radius_word) + 0.5) * 2.3283064365386962890625e-10;
  const double rest = (4294967295.5 - static_cast<double>(radius_word)) * 2.3283064365386962890625e-10;
  const double radius = sqrt(-2.0 * (u < 0.5 ? log(u) : log1p(-rest)));
  const std::uint32_t quarter = ((angle_word >> 29) + 1u) >> 1;
  const std::int32_t offset = static_cast<std::int32_t>(angle_word - (quarter << 30));
  const double angle = (static_cast<double>(offset) + 0.5) * 1.46291807926715968105133780430979e-9;
  const double sine = sin(angle), cosine = cos(angle);
  const bool swap = quarter & 1u, negative = quarter & 2u;
  const double c = swap ? -sine : cosine, s = swap ? cosine : sine;
  *first = (negative ? -radius : radius) * c;
  *second = (negative ? -radius : radius) * s;
}

// The four normals of elements 4 * block .. 4 * block + 3 of a row.
template <typename Real>
FASTDENSITY_HOST_DEVICE void noise_block(std::uint64_t seed, std::uint32_t sample_id, std::uint32_t step,
                                         std::uint32_t block, Real out[4]) {
  std::uint32_t word[4] = {block, kStreamNoise, step, sample_id};
  philox(word, seed);
  box_muller(word[0], word[1], &out[0], &out[1]);
  box_muller(word[2], word[3], &out[2], &out[3]);
}

}  // namespace fastdensity
