// The inner loops of dual_conv_cpu.cpp: a few images at a time, one in each lane of a vector.
#pragma once

#include <cstdint>

#include "ops.h"

namespace fastdensity::simd {

constexpr std::int64_t kImages = 16;      // in the lanes of the widest vector: what memory is reserved for
constexpr std::int64_t kMostOutputs = 6;  // channels of the result that are summed at a time, in registers

// One thread's memory: images as [channel][row][column, with its padding][lane], results as [channel][pixel][lane].
template <typename Real>
struct ConvScratch {
  Real *images, *results;
};

#define FASTDENSITY_DECLARE(Real)                                                                            \
  /* channels begin .. end - 1 of the results of images first .. first + count - 1, at most kImages */       \
  void convolve(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,        \
                std::int64_t end, const ConvScratch<Real>& scratch);
FASTDENSITY_DECLARE(float)
FASTDENSITY_DECLARE(double)
#undef FASTDENSITY_DECLARE

}  // namespace fastdensity::simd
