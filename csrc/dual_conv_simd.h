// The inner loops of dual_conv_cpu.cpp: a few images at a time, one in each lane of a vector.
#pragma once

#include <cstdint>

#include "ops.h"

namespace fastdensity::simd {

constexpr std::int64_t kImages = 16;      // in the lanes of the widest vector: what memory is reserved for
constexpr std::int64_t kMostOutputs = 6;  // channels of the result that are summed at a time, in registers

// Elements from one position of the transformed weights to the next: no power of two, for the sake of the caches.
inline std::int64_t weight_position(const DualConvCall& call) { return call.outputs * call.channels + kImages; }

// One thread's memory: images as [channel][row][column, with its padding][lane], results as [channel][pixel][lane]; of
// four tiles the transforms [position][channel][tile][lane] and products [position][output][tile][lane].
template <typename Real>
struct ConvScratch {
  Real *images, *results, *transformed, *products;
};

#define FASTDENSITY_DECLARE(Real)                                                                            \
  /* channels begin .. end - 1 of the results of images first .. first + count - 1, at most kImages */       \
  void convolve(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,        \
                std::int64_t end, const ConvScratch<Real>& scratch);                                         \
  /* the same for 3 x 3 windows, by tiles of 2 x 2, with the transformed weights [position][output][channel] */ \
  void convolve_tiles(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,  \
                      std::int64_t end, const Real* weights, const ConvScratch<Real>& scratch);              \
  void transform_weights(const DualConvCall& call, Real* target);
FASTDENSITY_DECLARE(float)
FASTDENSITY_DECLARE(double)
#undef FASTDENSITY_DECLARE

}  // namespace fastdensity::simd
