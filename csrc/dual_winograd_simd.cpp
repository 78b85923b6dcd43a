// 3 x 3 windows on even images by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016): a tile of 2 x 2 pixels of the result is
// 16 products instead of 36, on sums and differences of 4 x 4 pixels and of weights. Images lie in lanes as in
// dual_conv_simd.cpp; four tiles are taken at a time.
#include <algorithm>

#include "dual_conv_lanes.h"
#include "dual_conv_simd.h"

namespace fastdensity::simd {
namespace {

constexpr int kTiles = 4;

template <typename Real, int kLanes, bool kWide>
struct Winograd : Lanes<Real, kLanes, kWide> {
  using Base = Lanes<Real, kLanes, kWide>;
  using typename Base::Vector;
  using Base::kOutputs;
  using Base::load;
  using Base::store;

  struct Where {
    const DualConvCall& call;
    std::int64_t across, tiles, first;  // tiles in a row of the result and in all; the first of the four
    std::int64_t position;              // elements from one position of the transform to the next

    explicit Where(const DualConvCall& of)
        : call(of),
          across(of.out_width / 2),
          tiles(across * of.out_height / 2),
          first(0),
          position((of.channels * kTiles + 1) * kLanes) {}  // no power of two, or all of a tile share a cache line's set

    std::int64_t tile(int number) const { return std::min(first + number, tiles - 1); }  // repeats the last one
  };

  // B^T d B of one tile of one channel, the 16 positions `stride` elements apart.
  static INLINE void transform(const Where& at, const Real* channel, std::int64_t tile, Real* target) {
    const DualConvCall& call = at.call;
    const std::int64_t width = call.width + 2 * call.padding[1];
    const std::int64_t top = tile / at.across * 2 - call.padding[0], left = tile % at.across * 2;
    Vector d[4][4], rows[4][4];
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row) {
      const bool inside = top + row >= 0 && top + row < call.height;
      const Real* source = channel + ((top + row) * width + left) * kLanes;
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column) d[row][column] = inside ? load(source + column * kLanes) : Vector{};
    }
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      rows[0][column] = d[0][column] - d[2][column];
      rows[1][column] = d[1][column] + d[2][column];
      rows[2][column] = d[2][column] - d[1][column];
      rows[3][column] = d[1][column] - d[3][column];
    }
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row) {
      Real* next = target + 4 * row * at.position;
      store(rows[row][0] - rows[row][2], next);
      store(rows[row][1] + rows[row][2], next + at.position);
      store(rows[row][2] - rows[row][1], next + 2 * at.position);
      store(rows[row][1] - rows[row][3], next + 3 * at.position);
    }
  }

  // The products of one position, summed over channels: [output][tile].
  template <int kCount>
  static INLINE void multiply(std::int64_t channels, const Real* source, const Real* weight, Real* target) {
    Vector sums[kCount][kTiles];
#pragma GCC unroll 8
    for (int output = 0; output < kCount; ++output)
#pragma GCC unroll 4
      for (int tile = 0; tile < kTiles; ++tile) sums[output][tile] = Vector{};
    for (std::int64_t channel = 0; channel < channels; ++channel) {
#pragma GCC unroll 4
      for (int tile = 0; tile < kTiles; ++tile) {
        const Vector value = load(source + (channel * kTiles + tile) * kLanes);
#pragma GCC unroll 8
        for (int output = 0; output < kCount; ++output)
          sums[output][tile] += value * weight[output * channels + channel];
      }
    }
#pragma GCC unroll 8
    for (int output = 0; output < kCount; ++output)
#pragma GCC unroll 4
      for (int tile = 0; tile < kTiles; ++tile) store(sums[output][tile], target + (output * kTiles + tile) * kLanes);
  }

  // A^T m A of one tile of one output, with what is added to it.
  static INLINE void finish(const Real* products, std::int64_t position, const Vector& offset, std::int64_t width,
                            Real* target) {
    Vector m[4][4], rows[2][4];
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row)
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column) m[row][column] = load(products + (4 * row + column) * position);
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      rows[0][column] = m[0][column] + m[1][column] + m[2][column];
      rows[1][column] = m[1][column] - m[2][column] - m[3][column];
    }
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) {
      store(rows[row][0] + rows[row][1] + rows[row][2] + offset, target + row * width * kLanes);
      store(rows[row][1] - rows[row][2] - rows[row][3] + offset, target + (row * width + 1) * kLanes);
    }
  }

  // kCount outputs of four tiles. `weights`: [position][output][channel].
  template <int kCount>
  static INLINE void tile_outputs(const Where& at, std::int64_t output, const Vector& biased, const Real* weights,
                                  const ConvScratch<Real>& scratch, Real* results) {
    const DualConvCall& call = at.call;
    const Real* bias = static_cast<const Real*>(call.bias);
    constexpr std::int64_t kPosition = kCount * kTiles * kLanes;
    for (int position = 0; position < 16; ++position)
      multiply<kCount>(call.channels, scratch.transformed + position * at.position,
                       weights + position * weight_position(call) + output * call.channels,
                       scratch.products + position * kPosition);
    for (int i = 0; i < kCount; ++i) {
      const Vector offset = bias ? biased * bias[output + i] : Vector{};
      Real* target = results + i * call.out_height * call.out_width * kLanes;
      for (int number = 0; number < kTiles; ++number) {
        const std::int64_t tile = at.tile(number);
        const std::int64_t pixel = tile / at.across * 2 * call.out_width + tile % at.across * 2;
        finish(scratch.products + (i * kTiles + number) * kLanes, kPosition, offset, call.out_width,
               target + pixel * kLanes);
      }
    }
  }

  template <int kCount>
  static INLINE int some_outputs(const Where& at, std::int64_t output, std::int64_t left, const Vector& biased,
                                 const Real* weights, const ConvScratch<Real>& scratch, Real* results) {
    if constexpr (kCount > 1) {
      if (left < kCount) return some_outputs<kCount - 1>(at, output, left, biased, weights, scratch, results);
    }
    tile_outputs<kCount>(at, output, biased, weights, scratch, results);
    return kCount;
  }

  static INLINE void some_images(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,
                                 std::int64_t end, const Real* weights, const ConvScratch<Real>& scratch) {
    const Vector biased = Base::pack_images(call, first, count, scratch.images);
    const std::int64_t padded = call.height * (call.width + 2 * call.padding[1]) * kLanes;
    const std::int64_t pixels = call.out_height * call.out_width;
    Where at(call);
    for (; at.first < at.tiles; at.first += kTiles) {
      for (std::int64_t channel = 0; channel < call.channels; ++channel)
        for (int number = 0; number < kTiles; ++number)
          transform(at, scratch.images + channel * padded, at.tile(number),
                    scratch.transformed + (channel * kTiles + number) * kLanes);
      for (std::int64_t output = begin; output < end;)
        output += some_outputs<kOutputs>(at, output, end - output, biased, weights, scratch,
                                         scratch.results + (output - begin) * pixels * kLanes);
    }
    Base::unpack(scratch.results, (end - begin) * pixels, count, call.outputs * pixels,
                 static_cast<Real*>(call.out) + (first * call.outputs + begin) * pixels);
  }

  static INLINE void all(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,
                         std::int64_t end, const Real* weights, const ConvScratch<Real>& scratch) {
    for (std::int64_t done = 0; done < count; done += kLanes)
      some_images(call, first + done, std::min<std::int64_t>(kLanes, count - done), begin, end, weights, scratch);
  }
};

#define DEFINE_FOR(Real, TARGET, BYTES, WIDE)                                                                     \
  TARGET void tiles_in_lanes(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin, \
                             std::int64_t end, const Real* weights, const ConvScratch<Real>& scratch) {           \
    Winograd<Real, BYTES / sizeof(Real), WIDE>::all(call, first, count, begin, end, weights, scratch);            \
  }
FASTDENSITY_FOR_ALL(DEFINE_FOR, float)
FASTDENSITY_FOR_ALL(DEFINE_FOR, double)

// G g G^T of every window.
template <typename Real>
INLINE void transformed(const DualConvCall& call, Real* target) {
  const std::int64_t windows = call.outputs * call.channels, position = weight_position(call);
#pragma GCC ivdep
  for (std::int64_t window = 0; window < windows; ++window) {
    const Real* g = static_cast<const Real*>(call.weight) + 9 * window;
    Real rows[4][3];
    for (int column = 0; column < 3; ++column) {
      const Real outer = g[column] + g[6 + column];
      rows[0][column] = g[column], rows[3][column] = g[6 + column];
      rows[1][column] = Real(0.5) * (outer + g[3 + column]), rows[2][column] = Real(0.5) * (outer - g[3 + column]);
    }
    for (int row = 0; row < 4; ++row) {
      const Real outer = rows[row][0] + rows[row][2];
      Real* next = target + 4 * row * position + window;
      next[0] = rows[row][0], next[3 * position] = rows[row][2];
      next[position] = Real(0.5) * (outer + rows[row][1]), next[2 * position] = Real(0.5) * (outer - rows[row][1]);
    }
  }
}

}  // namespace

#define DEFINE_ENTRIES(Real)                                                                                     \
  CLONES void transform_weights(const DualConvCall& call, Real* target) { transformed(call, target); }           \
  void convolve_tiles(const DualConvCall& call, std::int64_t first, std::int64_t count, std::int64_t begin,      \
                      std::int64_t end, const Real* weights, const ConvScratch<Real>& scratch) {                 \
    tiles_in_lanes(call, first, count, begin, end, weights, scratch);                                            \
  }
DEFINE_ENTRIES(float)
DEFINE_ENTRIES(double)

}  // namespace fastdensity::simd
