// The inner loop of track_cpu.cpp: eps and six inner products in one pass over a chunk of a row, compiled for several
// instruction sets as rows_simd.h's.
#pragma once

#include <cstdint>

#include "track_rule.h"

namespace fastdensity::simd {

// eps = scale (along_x x + along_p prediction); a state that does not count (along_x = 0) is not read for it.
template <typename Real>
struct EpsTerms {
  Real along_x, along_p, scale;
};

// What the last call left: its vectors, and the weights of x and last_x in the move of y = x / alpha.
template <typename Real>
struct LastVectors {
  const Real *x = nullptr, *eps = nullptr;
  Real now = 0, before = 0;
};

// Writes eps; sums as in TrackGram, `state` and `state_last` of x, not of y. Without last vectors four of them are 0.
TrackGram track_products(const EpsTerms<float>& terms, const LastVectors<float>& last, const float* x,
                         const float* prediction, std::int64_t count, float* eps);
TrackGram track_products(const EpsTerms<double>& terms, const LastVectors<double>& last, const double* x,
                         const double* prediction, std::int64_t count, double* eps);

}  // namespace fastdensity::simd
