// The inner loops of dual_attention_cpu.cpp: a few queries of one head against all of its keys.
#pragma once

#include <cstdint>

#include "ops.h"

namespace fastdensity::simd {

constexpr std::int64_t kKeys = 8;      // whose scores are summed at a time, in registers
constexpr std::int64_t kQueries = 16;  // lanes of the widest vector: what memory is reserved for
constexpr std::int64_t kAlignment = 64;

// One thread's memory. Queries lie in lanes: element [i][lane] of `query`, of its tangent, of scores and of output.
// Keys come in tiles [plane][tile][column][key of the tile], zeros after the last; values are [plane][key][column].
template <typename Real>
struct NarrowScratch {
  Real *query, *tangent, *scores, *score_tangents, *output, *keys, *values;
};

#define FASTDENSITY_DECLARE(Real)                                                                       \
  /* one key head of one sample into scratch.keys and scratch.values */                                 \
  void pack_head(const NarrowAttentionCall& call, std::int64_t head, NarrowScratch<Real>& scratch);     \
  /* rows first .. end - 1 of the queries that attend to that head, all that is theirs of `out` */      \
  void attend(const NarrowAttentionCall& call, std::int64_t head, std::int64_t first, std::int64_t end, \
              NarrowScratch<Real>& scratch);
FASTDENSITY_DECLARE(float)
FASTDENSITY_DECLARE(double)
#undef FASTDENSITY_DECLARE

}  // namespace fastdensity::simd
