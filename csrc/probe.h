// Probe vectors on CPU and GPU: the twin of fastdensity/reference/probe.py, whose integers these are bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops.h"
#include "philox.h"

namespace fastdensity {

constexpr std::uint32_t kHadamardSigns = 0xFFFFFFu;
constexpr std::uint32_t kHadamardRows = 0x01000000u;
constexpr std::int64_t kSignsPerCounter = 128;

inline bool is_normal(const ProbeCall& call) {
  return call.distribution == Distribution::normal || call.distribution == Distribution::sphere;
}

// What the elements of one probe of one sample are made of: its place in Philox's counters, and for Hadamard the row of
// Sylvester's matrix, as the signs that its lowest five bits give to 32 elements, and the rest of its bits. These are
// the signs of row 0, none, for other distributions.
struct Probe {
  std::uint64_t seed;
  std::uint32_t sample_id, step, number, pattern = 0, row = 0;
};

FASTDENSITY_HOST_DEVICE int hadamard_order(std::int64_t columns) {
  int order = 0;
  while ((std::int64_t{1} << order) < columns) ++order;
  return order;
}

// The row of Sylvester's matrix for a probe: a permutation of 0 .. 2^order - 1, by a Feistel network.
FASTDENSITY_HOST_DEVICE std::int64_t hadamard_row(const ProbeCall& call, std::int64_t probe, std::uint32_t sample_id,
                                                  int order) {
  const int low_bits = (order + 1) / 2;
  const std::uint32_t low_mask = (1u << low_bits) - 1, high_mask = (1u << (order - low_bits)) - 1;
  const std::uint32_t number = call.stream + kHadamardRows + static_cast<std::uint32_t>(probe >> order);
  const std::int64_t index = probe & ((std::int64_t{1} << order) - 1);
  std::uint32_t low = static_cast<std::uint32_t>(index) & low_mask;
  std::uint32_t high = static_cast<std::uint32_t>(index >> low_bits);
  const std::uint32_t rounds = order < 8 ? 24 : 8;  // small halves mix slowly
  for (std::uint32_t round = 0; round < rounds; round += 2) {
    std::uint32_t word[4] = {round << 24 | low, number, call.step, sample_id};
    philox(word, call.seed);
    high ^= word[0] & high_mask;
    std::uint32_t next[4] = {(round + 1) << 24 | high, number, call.step, sample_id};
    philox(next, call.seed);
    low ^= next[0] & low_mask;
  }
  return static_cast<std::int64_t>(high) << low_bits | low;
}

// Probe `index` of this call. `row` is its hadamard_row; other distributions ignore it.
FASTDENSITY_HOST_DEVICE Probe probe_of(const ProbeCall& call, std::int64_t index, std::int64_t sample,
                                       std::int64_t row) {
  Probe probe;
  probe.seed = call.seed, probe.step = call.step;
  probe.sample_id = static_cast<std::uint32_t>(call.sample_ids[sample]);
  probe.number = call.stream + static_cast<std::uint32_t>(call.first + index);
  if (call.distribution != Distribution::hadamard) return probe;
  const std::int64_t set = (call.first + index) >> hadamard_order(call.columns);
  probe.number = call.stream + kHadamardSigns - static_cast<std::uint32_t>(set);
  probe.row = static_cast<std::uint32_t>(row >> 5);
  probe.pattern = (row & 1 ? 0xAAAAAAAAu : 0u) ^ (row & 2 ? 0xCCCCCCCCu : 0u) ^ (row & 4 ? 0xF0F0F0F0u : 0u) ^
                  (row & 8 ? 0xFF00FF00u : 0u) ^ (row & 16 ? 0xFFFF0000u : 0u);
  return probe;
}

// All bits set where an odd number of them is set.
FASTDENSITY_HOST_DEVICE std::uint32_t spread_parity(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return 0u - (__popc(bits) & 1u);
#else
  for (int shift = 16; shift > 0; shift /= 2) bits ^= bits >> shift;
  return 0u - (bits & 1u);
#endif
}

// The signs of elements 128 * block .. 128 * block + 127, 32 to a word, the first in the lowest bit; set means -1.
FASTDENSITY_HOST_DEVICE void sign_block(const Probe& probe, std::uint32_t block, std::uint32_t words[4]) {
  std::uint32_t word[4] = {block, probe.number, probe.step, probe.sample_id};
  philox(word, probe.seed);
  for (std::uint32_t w = 0; w < 4; ++w)
    words[w] = word[w] ^ probe.pattern ^ spread_parity(probe.row & (4 * block + w));
}

// What a probe of the sphere multiplies normals of this squared norm with.
FASTDENSITY_HOST_DEVICE double sphere_scale(std::int64_t columns, double squares) {
  return sqrt(static_cast<double>(columns)) / sqrt(squares);
}

}  // namespace fastdensity
