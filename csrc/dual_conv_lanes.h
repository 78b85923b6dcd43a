// Images in the lanes of a vector: how they come there and back. For dual_conv_simd.cpp and dual_winograd_simd.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "clones.h"
#include "ops.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // of vectors passed between functions that are always inlined

namespace fastdensity::simd {
namespace {

// kWide: 32 registers of vectors, else 16.
template <typename Real, int kLanes, bool kWide>
struct Lanes {
  typedef Real Vector __attribute__((vector_size(kLanes * sizeof(Real))));
  using Index = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
  typedef Index Indices __attribute__((vector_size(kLanes * sizeof(Real))));

  static constexpr int kOutputs = kWide ? 6 : 3;  // of a strip of 4 pixels

  static INLINE Vector load(const Real* source) {
    Vector vector;
    std::memcpy(&vector, source, sizeof(vector));
    return vector;
  }

  static INLINE void store(const Vector& vector, Real* target) { std::memcpy(target, &vector, sizeof(vector)); }

  // -- kLanes vectors of kLanes elements, transposed ------------------------------------------------------------------
  template <int kStep, int... kLane>
  static INLINE void exchange(Vector& a, Vector& b, std::integer_sequence<int, kLane...>) {
    constexpr Indices kFirst = {Index(kLane & kStep ? kLanes + kLane - kStep : kLane)...};
    constexpr Indices kSecond = {Index(kLane & kStep ? kLanes + kLane : kLane + kStep)...};
    const Vector first = __builtin_shuffle(a, b, kFirst);
    b = __builtin_shuffle(a, b, kSecond);
    a = first;
  }

  template <int kStep>
  static INLINE void exchange_all(Vector (&rows)[kLanes]) {
    if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
      for (int row = 0; row < kLanes; ++row)
        if (!(row & kStep)) exchange<kStep>(rows[row], rows[row + kStep], std::make_integer_sequence<int, kLanes>());
      exchange_all<2 * kStep>(rows);
    }
  }

  // One channel of the images into lanes; a lane without an image repeats the first.
  static INLINE void pack(const Real* const (&sources)[kLanes], std::int64_t height, std::int64_t width,
                          std::int64_t padding, Real* target) {
    const std::int64_t pixels = height * width, stride = width + 2 * padding;
    for (std::int64_t row = 0; padding && row <= height; ++row) {  // the end of a row and the start of the next
      const std::int64_t first = row ? row * stride - padding : 0, end = row < height ? row * stride + padding : row * stride;
      std::fill_n(target + first * kLanes, (end - first) * kLanes, Real(0));
    }
    std::int64_t column = 0, pixel = 0;
    Real* next = target + padding * kLanes;
    const auto advance = [&]() __attribute__((always_inline)) {
      next += kLanes;
      if (++column == width) column = 0, next += 2 * padding * kLanes;
    };
    for (; pixel + kLanes <= pixels; pixel += kLanes) {
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) rows[lane] = load(sources[lane] + pixel);
      exchange_all<1>(rows);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) store(rows[lane], next), advance();
    }
    for (; pixel < pixels; ++pixel, advance())
      for (int lane = 0; lane < kLanes; ++lane) next[lane] = sources[lane][pixel];
  }

  // All channels of `count` images; returns 1 in the lanes of those that get the bias.
  static INLINE Vector pack_images(const DualConvCall& call, std::int64_t first, std::int64_t count, Real* target) {
    const std::int64_t area = call.height * call.width;
    const std::int64_t padded = call.height * (call.width + 2 * call.padding[1]) * kLanes;
    const Real* sources[kLanes];
    Vector biased{};
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::int64_t image = first + (lane < count ? lane : 0);
      sources[lane] = static_cast<const Real*>(call.x) + image * call.channels * area;
      biased[lane] = image < call.biased ? Real(1) : Real(0);
    }
    for (std::int64_t channel = 0; channel < call.channels; ++channel) {
      pack(sources, call.height, call.width, call.padding[1], target + channel * padded);
      for (int lane = 0; lane < kLanes; ++lane) sources[lane] += area;
    }
    return biased;
  }

  // [element][lane] to each image's own memory.
  static INLINE void unpack(const Real* source, std::int64_t elements, std::int64_t count, std::int64_t stride,
                            Real* target) {
    std::int64_t element = 0;
    for (; element + kLanes <= elements; element += kLanes) {
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) rows[lane] = load(source + (element + lane) * kLanes);
      exchange_all<1>(rows);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane)
        if (lane < count) store(rows[lane], target + lane * stride + element);
    }
    for (; element < elements; ++element)
      for (std::int64_t lane = 0; lane < count; ++lane)
        target[lane * stride + element] = source[element * kLanes + lane];
  }
};

}  // namespace
}  // namespace fastdensity::simd

// DEFINE(Real, target, bytes of a vector, are there 32 registers of them) for every instruction set.
#if defined(__x86_64__) && !defined(FASTDENSITY_NO_CLONES)
#define FASTDENSITY_FOR_ALL(DEFINE, Real)                            \
  DEFINE(Real, __attribute__((target("default"))), 16, false)        \
  DEFINE(Real, __attribute__((target("arch=x86-64-v3"))), 32, false) \
  DEFINE(Real, __attribute__((target("arch=x86-64-v4"))), 64, true)
#else
#define FASTDENSITY_FOR_ALL(DEFINE, Real) DEFINE(Real, , 16, false)
#endif
