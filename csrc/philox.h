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

// log((word + 1/2) / 2^32): the mantissa minus 1 is rounded once, so that digits are kept next to u = 1 too.
FASTDENSITY_HOST_DEVICE float log_uniform(std::uint32_t word) {
  // word + 1/2 = high + low, both exact; signed conversions of parts below 2^31 are what vector units have
  const float high = static_cast<float>(static_cast<std::int32_t>(word >> 8)) * 256.0f;
  const float low = static_cast<float>(static_cast<std::int32_t>(word & 0xFFu)) + 0.5f;
  const float sum = high + low;
  std::int32_t bits;
  std::memcpy(&bits, &sum, 4);
  const std::int32_t exponent = (bits - 0x3F3504F3) >> 23;  // the mantissa lies in [sqrt(1/2), sqrt(2))
  const std::int32_t scale_bits = (127 - exponent) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, 4);
  const float y = (high * scale - 1.0f) + low * scale;
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
  const float octaves = static_cast<float>(exponent - 32);
  // log 2 = 0.693359375 - 2.12194440e-4; the first part times an exponent is exact
  const float value = (poly * y * square + octaves * -2.12194440e-4f) - 0.5f * square;
  return (value + y) + octaves * 0.693359375f;
}

// Two normals of two words: the turn is (angle + 1/2) / 2^32, reduced to an eighth of a turn on integers.
FASTDENSITY_HOST_DEVICE void box_muller(std::uint32_t radius_word, std::uint32_t angle_word, float* first,
                                        float* second) {
  const float radius = sqrtf(-2.0f * log_uniform(radius_word));
  const std::uint32_t quarter = ((angle_word >> 29) + 1u) >> 1;
  const std::int32_t offset = static_cast<std::int32_t>(angle_word - (quarter << 30));
  // high has 22 bits and pi = 3 + 0.14...: high times 3 is exact, the angle is rounded once
  const float high = static_cast<float>(offset & -256), low = static_cast<float>(offset & 255) + 0.5f;
  const float angle = high * 1.3969838619232178e-9f + (high * 6.593421734394185e-11f + low * 1.4629180792671596e-9f);
  const float square = angle * angle;
  const float sine = angle + angle * (square * ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square -
                                                1.6666654611e-1f));
  float cosine = (2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f;
  cosine = (cosine * square * square - 0.5f * square) + 1.0f;
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

// The four normals of elements 4 * block .. 4 * block + 3 of a row of stream `number`.
template <typename Real>
FASTDENSITY_HOST_DEVICE void normal_block(std::uint64_t seed, std::uint32_t sample_id, std::uint32_t step,
                                          std::uint32_t number, std::uint32_t block, Real out[4]) {
  std::uint32_t word[4] = {block, number, step, sample_id};
  philox(word, seed);
  box_muller(word[0], word[1], &out[0], &out[1]);
  box_muller(word[2], word[3], &out[2], &out[3]);
}

// Those of the noise of a step.
template <typename Real>
FASTDENSITY_HOST_DEVICE void noise_block(std::uint64_t seed, std::uint32_t sample_id, std::uint32_t step,
                                         std::uint32_t block, Real out[4]) {
  normal_block(seed, sample_id, step, kStreamNoise, block, out);
}

}  // namespace fastdensity
