// Four elements at a time between memory and registers: the loads and stores of rows_cuda_kernels.cuh.
//
// A warp takes a run of consecutive elements, and each thread kQuads quads of it, so that every access of the warp is
// consecutive and the distance of a thread's quads is known to the compiler. Which thread holds which element depends
// on nothing but the length of the row: aligned rows move a quad in wide accesses (16 bytes, 8 for 16-bit types),
// others element by element, into the same registers.
#pragma once

#include <type_traits>

#include "float16.h"
#include "ops.h"

namespace fastdensity::cuda {

constexpr int kStep = 4 * 32;  // elements between two quads of a thread

// The quads of one thread: quad k starts at element begin + k * kStep of the row. 32 bits are enough for `left`, what
// the row still has from `begin` on, and spare registers.
struct Span {
  std::int64_t begin;
  int left;

  template <int kQuads>
  static __device__ __forceinline__ Span of_thread(std::int64_t tile_begin, std::int64_t columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const std::int64_t begin = tile_begin + warp * kStep * kQuads + lane * 4;
    const std::int64_t left = columns - begin;
    return {begin, static_cast<int>(left < kStep * kQuads ? left : kStep * kQuads)};
  }

  __device__ __forceinline__ bool has(int k, int j) const { return k * kStep + j < left; }
};

template <typename Real>
struct Quad {
  Real at[4];
};

// A quad as its bits came from memory. Converting waits for the memory, so all operands are read before any is
// converted. Whole 32-bit words at every point: halves that meet across branches would take a register each.
template <typename Real>
struct RawQuad {
  std::uint32_t word[sizeof(Real)];
};

// An element type: the words that a quad of it takes, and element j out of and into them (which were 0).
template <DataType kType>
struct Format;

template <>
struct Format<DataType::float32> {
  static constexpr int kWords = 4;
  static __device__ __forceinline__ float get(const std::uint32_t* word, int j) { return float_of_bits(word[j]); }
  template <typename Real>
  static __device__ __forceinline__ void put(std::uint32_t* word, int j, Real value) {
    word[j] = bits_of_float(static_cast<float>(value));
  }
};

template <>
struct Format<DataType::float64> {
  static constexpr int kWords = 8;
  static __device__ __forceinline__ double get(const std::uint32_t* word, int j) {
    const std::uint64_t bits = static_cast<std::uint64_t>(word[2 * j + 1]) << 32 | word[2 * j];
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
  }
  static __device__ __forceinline__ void put(std::uint32_t* word, int j, double value) {
    std::uint64_t bits;
    std::memcpy(&bits, &value, 8);
    word[2 * j] = static_cast<std::uint32_t>(bits), word[2 * j + 1] = static_cast<std::uint32_t>(bits >> 32);
  }
};

template <>
struct Format<DataType::bfloat16> {
  static constexpr int kWords = 2;
  static __device__ __forceinline__ float get(const std::uint32_t* word, int j) {
    return widen_bfloat16(word[j / 2] >> j % 2 * 16 & 0xFFFFu);
  }
  template <typename Real>
  static __device__ __forceinline__ void put(std::uint32_t* word, int j, Real value) {
    word[j / 2] |= narrow_bfloat16(static_cast<float>(value)) << j % 2 * 16;
  }
};

template <>
struct Format<DataType::float16> {
  static constexpr int kWords = 2;
  static __device__ __forceinline__ float get(const std::uint32_t* word, int j) {
    return widen_float16(word[j / 2] >> j % 2 * 16 & 0xFFFFu);
  }
  template <typename Real>
  static __device__ __forceinline__ void put(std::uint32_t* word, int j, Real value) {
    word[j / 2] |= narrow_float16(static_cast<float>(value)) << j % 2 * 16;
  }
};

// Calls body(Format<dtype>{}): where an element type known at run time meets the templates. Rows that accumulate in
// float hold no float64. One of the calls always happens: what a skipped one left unwritten would keep registers.
template <typename Real, typename Body>
__device__ __forceinline__ void with_format(DataType dtype, Body body) {
  if constexpr (sizeof(Real) == 8)
    if (dtype == DataType::float64) return body(Format<DataType::float64>{});
  if (dtype == DataType::float32) return body(Format<DataType::float32>{});
  if (dtype == DataType::bfloat16) return body(Format<DataType::bfloat16>{});
  body(Format<DataType::float16>{});
}

template <int kWords>
using Element = std::conditional_t<kWords == 2, std::uint16_t, std::conditional_t<kWords == 4, std::uint32_t, uint2>>;

// Members one by one, not memcpy: that forgets the alignment, and moves bytes.
template <int kWords>
__device__ __forceinline__ void read_wide(const Element<kWords>* source, std::uint32_t* word) {
  if constexpr (kWords == 2) {
    const uint2 bits = *reinterpret_cast<const uint2*>(source);
    word[0] = bits.x, word[1] = bits.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 bits = reinterpret_cast<const uint4*>(source)[i / 4];
      word[i] = bits.x, word[i + 1] = bits.y, word[i + 2] = bits.z, word[i + 3] = bits.w;
    }
  }
}

template <int kWords>
__device__ __forceinline__ void read_element(const Element<kWords>* source, int j, std::uint32_t* word) {
  if constexpr (kWords == 2) {
    word[j / 2] |= static_cast<std::uint32_t>(source[j]) << j % 2 * 16;
  } else if constexpr (kWords == 4) {
    word[j] = source[j];
  } else {
    const uint2 bits = source[j];
    word[2 * j] = bits.x, word[2 * j + 1] = bits.y;
  }
}

// Elements beyond the end of the row read as 0.
template <int kWords, typename Real, int kQuads>
__device__ __forceinline__ void read_words(const Rows& rows, bool wide, std::int64_t row, const Span& span,
                                           RawQuad<Real> (&raw)[kQuads]) {
  const Element<kWords>* source = static_cast<const Element<kWords>*>(rows.data) + (row * rows.row_stride + span.begin);
#pragma unroll
  for (int k = 0; k < kQuads; ++k) {
    raw[k] = {};
    if (wide) {
      if (span.has(k, 0)) read_wide<kWords>(source + k * kStep, raw[k].word);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (span.has(k, j)) read_element<kWords>(source + k * kStep, j, raw[k].word);
    }
  }
}

template <typename Real, int kQuads>
__device__ __forceinline__ void read(const Rows& rows, bool wide, std::int64_t row, const Span& span,
                                     RawQuad<Real> (&raw)[kQuads]) {
  if constexpr (sizeof(Real) == 8)
    if (rows.dtype == DataType::float64) return read_words<8>(rows, wide, row, span, raw);
  if (rows.dtype == DataType::float32) return read_words<4>(rows, wide, row, span, raw);
  read_words<2>(rows, wide, row, span, raw);
}

template <typename Real, int kQuads>
__device__ __forceinline__ void convert(DataType dtype, const RawQuad<Real> (&raw)[kQuads],
                                        Quad<Real> (&quads)[kQuads]) {
  with_format<Real>(dtype, [&](auto format) {
#pragma unroll
    for (int k = 0; k < kQuads; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) quads[k].at[j] = format.get(raw[k].word, j);
  });
}

// One instruction by name: the compiler splits the assignment in some kernels.
__device__ __forceinline__ void store(uint2* target, const std::uint32_t* word) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(target), "r"(word[0]), "r"(word[1]) : "memory");
#else
  *target = {word[0], word[1]};
#endif
}

__device__ __forceinline__ void store(uint4* target, const std::uint32_t* word) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(word[0]), "r"(word[1]), "r"(word[2]),
               "r"(word[3])
               : "memory");
#else
  *target = {word[0], word[1], word[2], word[3]};
#endif
}

template <int kWords>
__device__ __forceinline__ void write_wide(Element<kWords>* target, const std::uint32_t* word) {
  if constexpr (kWords == 2) {
    store(reinterpret_cast<uint2*>(target), word);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) store(reinterpret_cast<uint4*>(target) + i / 4, word + i);
  }
}

template <int kWords>
__device__ __forceinline__ void write_element(Element<kWords>* target, int j, const std::uint32_t* word) {
  if constexpr (kWords == 2) {
    target[j] = static_cast<std::uint16_t>(word[j / 2] >> j % 2 * 16);
  } else if constexpr (kWords == 4) {
    target[j] = word[j];
  } else {
    target[j] = {word[2 * j], word[2 * j + 1]};
  }
}

template <typename Real, int kQuads>
__device__ __forceinline__ void write(void* data, DataType dtype, bool wide, std::int64_t offset, const Span& span,
                                      const Quad<Real> (&quads)[kQuads]) {
  with_format<Real>(dtype, [&](auto format) {
    constexpr int kWords = decltype(format)::kWords;
    Element<kWords>* target = static_cast<Element<kWords>*>(data) + (offset + span.begin);
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      std::uint32_t word[kWords] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) format.put(word, j, quads[k].at[j]);
      if (wide) {
        if (span.has(k, 0)) write_wide<kWords>(target + k * kStep, word);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (span.has(k, j)) write_element<kWords>(target + k * kStep, j, word);
      }
    }
  });
}

}  // namespace fastdensity::cuda
