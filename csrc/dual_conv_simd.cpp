// Images lie in the lanes of a vector: every product is a vector times one weight, and borders are left out instead of
// multiplied. A strip of pixels of a few channels is summed in registers, over input channels and the window in order.
// Three widths are written out below, since the clones of clones.h would share one.
#include "dual_conv_simd.h"

#include <algorithm>

#include "dual_conv_lanes.h"

namespace fastdensity::simd {
namespace {

template <typename Real, int kLanes, bool kWide>
struct Strips : Lanes<Real, kLanes, kWide> {
  using Base = Lanes<Real, kLanes, kWide>;
  using typename Base::Vector;
  using Base::kOutputs;
  using Base::load;
  using Base::store;
  static constexpr int kOutputsOfEight = 3;  // of a strip of 8, where there are registers for it

  // -- a strip of kPixels of one row of kCount channels ---------------------------------------------------------------
  struct Where {
    const DualConvCall& call;
    const Real *images, *weight;  // the weights of the first channel
    std::int64_t row, column;     // of the result
  };

  template <int kCount, int kPixels>
  static INLINE void add_tap(const Real* source, std::int64_t step, const Real* weight, std::int64_t stride, int first,
                             int end, Vector (&sums)[kCount][kPixels]) {
#pragma GCC unroll 8
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      if (pixel < first || pixel >= end) continue;
      const Vector value = load(source + pixel * step);
#pragma GCC unroll 8
      for (int output = 0; output < kCount; ++output) sums[output][pixel] += value * weight[output * stride];
    }
  }

  // kThree: a window of three adjacent columns on a row that the strip fills, so that its ends miss one tap each.
  template <int kCount, int kPixels, bool kThree>
  static INLINE void sum(const Where& at, Vector (&sums)[kCount][kPixels]) {
    const DualConvCall& call = at.call;
    const std::int64_t top = at.row * call.stride[0] - call.padding[0], dilation = call.dilation[0];
    const std::int64_t first = top < 0 ? (-top + dilation - 1) / dilation : 0;
    const std::int64_t end = std::min(call.window[0], (call.height - top + dilation - 1) / dilation);
    const std::int64_t width = call.width + 2 * call.padding[1], step = call.stride[1] * kLanes;
    const std::int64_t window = call.window[0] * call.window[1], stride = call.channels * window;
#pragma GCC unroll 8
    for (int output = 0; output < kCount; ++output)
#pragma GCC unroll 8
      for (int pixel = 0; pixel < kPixels; ++pixel) sums[output][pixel] = Vector{};
    for (std::int64_t channel = 0; channel < call.channels; ++channel)
      for (std::int64_t tap = first; tap < end; ++tap) {
        const std::int64_t line = channel * call.height + top + tap * dilation;
        const Real* source = at.images + (line * width + at.column * call.stride[1]) * kLanes;
        const Real* weight = at.weight + channel * window + tap * call.window[1];
        if constexpr (kThree) {
          add_tap<kCount, kPixels>(source, kLanes, weight, stride, 1, kPixels, sums);
          add_tap<kCount, kPixels>(source + kLanes, kLanes, weight + 1, stride, 0, kPixels, sums);
          add_tap<kCount, kPixels>(source + 2 * kLanes, kLanes, weight + 2, stride, 0, kPixels - 1, sums);
        } else {
          for (std::int64_t column = 0; column < call.window[1]; ++column)
            add_tap<kCount, kPixels>(source + column * call.dilation[1] * kLanes, step, weight + column, stride, 0,
                                     kPixels, sums);
        }
      }
  }

  template <int kCount, int kPixels, bool kThree>
  static INLINE void strip(const Where& at, const Vector (&offsets)[kCount], Real* results) {
    Vector sums[kCount][kPixels];
    sum<kCount, kPixels, kThree>(at, sums);
    const std::int64_t pixels = at.call.out_height * at.call.out_width;
    Real* target = results + (at.row * at.call.out_width + at.column) * kLanes;
#pragma GCC unroll 8
    for (int output = 0; output < kCount; ++output)
#pragma GCC unroll 8
      for (int pixel = 0; pixel < kPixels; ++pixel)
        store(sums[output][pixel] + offsets[output], target + (output * pixels + pixel) * kLanes);
  }

  // kCount channels from `output` on, the bias in the lanes of `biased`.
  template <int kCount, int kPixels>
  static INLINE void tile(const DualConvCall& call, std::int64_t output, const Vector& biased, const Real* images,
                          Real* results) {
    const std::int64_t size = call.channels * call.window[0] * call.window[1];
    const Real *weight = static_cast<const Real*>(call.weight) + output * size,
               *bias = static_cast<const Real*>(call.bias);
    Vector offsets[kCount];
    for (int i = 0; i < kCount; ++i) offsets[i] = bias ? biased * bias[output + i] : Vector{};
    const bool three = call.window[1] == 3 && call.stride[1] == 1 && call.padding[1] == 1 && call.dilation[1] == 1 &&
                       call.out_width == kPixels;
    for (std::int64_t row = 0; row < call.out_height; ++row) {
      std::int64_t column = 0;
      if (three) {
        strip<kCount, kPixels, true>({call, images, weight, row, 0}, offsets, results);
        continue;
      }
      for (; column + kPixels <= call.out_width; column += kPixels)
        strip<kCount, kPixels, false>({call, images, weight, row, column}, offsets, results);
      for (; column < call.out_width; ++column)
        strip<kCount, 1, false>({call, images, weight, row, column}, offsets, results);
    }
  }

  // The largest tile up to kCount that `left` channels fill; returns its size.
  template <int kCount, int kPixels>
  static INLINE int some_tile(const DualConvCall& call, std::int64_t output, std::int64_t left, const Vector& biased,
                              const ConvScratch<Real>& scratch) {
    if constexpr (kCount > 1) {
      if (left < kCount) return some_tile<kCount - 1, kPixels>(call, output, left, biased, scratch);
    }
    tile<kCount, kPixels>(call, output, biased, scratch.images, scratch.results);
    return kCount;
  }

  static INLINE void some_images(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,
                                 std::int64_t end, const ConvScratch<Real>& scratch) {
    const std::int64_t pixels = call.out_height * call.out_width;
    const Vector biased = Base::pack_images(call, first, count, scratch.images);
    Real* out = static_cast<Real*>(call.out) + first * call.outputs * pixels;
    const bool eight = kWide && call.out_width % 8 == 0;
    for (std::int64_t output = begin; output < end;) {
      const int done = eight ? some_tile<kOutputsOfEight, 8>(call, output, end - output, biased, scratch)
                             : some_tile<kOutputs, 4>(call, output, end - output, biased, scratch);
      Base::unpack(scratch.results, done * pixels, count, call.outputs * pixels, out + output * pixels);
      output += done;
    }
  }

  static INLINE void all(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,
                         std::int64_t end, const ConvScratch<Real>& scratch) {
    for (std::int64_t done = 0; done < count; done += kLanes)
      some_images(call, first + done, std::min<std::int64_t>(kLanes, count - done), begin, end, scratch);
  }
};

#define DEFINE_FOR(Real, TARGET, BYTES, WIDE)                                                                   \
  TARGET void convolve_in_lanes(const DualConvCall& call, std::int64_t first, std::int64_t count,               \
                                std::int64_t begin, std::int64_t end, const ConvScratch<Real>& scratch) {       \
    Strips<Real, BYTES / sizeof(Real), WIDE>::all(call, first, count, begin, end, scratch);                      \
  }
FASTDENSITY_FOR_ALL(DEFINE_FOR, float)
FASTDENSITY_FOR_ALL(DEFINE_FOR, double)

}  // namespace

#define DEFINE_ENTRY(Real)                                                                                  \
  void convolve(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,       \
                std::int64_t end, const ConvScratch<Real>& scratch) {                                       \
    convolve_in_lanes(call, first, count, begin, end, scratch);                                             \
  }
DEFINE_ENTRY(float)
DEFINE_ENTRY(double)

}  // namespace fastdensity::simd
