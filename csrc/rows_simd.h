// The inner loops of rows_cpu.cpp: plain loops over one chunk of a row, compiled for several instruction sets.
//
// Each function is built three times (baseline, AVX2, AVX-512) and the loader picks once per process. Sums keep
// 64 independent lanes, so that the compiler may vectorise without reordering and the error stays that of a tree.
#pragma once

#include <cstdint>

namespace fastdensity::simd {

constexpr std::int64_t kChunk = 2048;  // elements of a row handled at a time: all buffers stay in the L1/L2 cache

// Element conversion; `dtype` as fastdensity::DataType.
void load(const void* source, int dtype, std::int64_t offset, std::int64_t count, float* target);
void load(const void* source, int dtype, std::int64_t offset, std::int64_t count, double* target);
void store(const float* source, void* target, int dtype, std::int64_t offset, std::int64_t count);
void store(const double* source, void* target, int dtype, std::int64_t offset, std::int64_t count);

// sum of left[i] * right[i]
double dot(const float* left, const float* right, std::int64_t count);
double dot(const double* left, const double* right, std::int64_t count);

// sum of values[i]^2
double sum_of_squares(const float* values, std::int64_t count);
double sum_of_squares(const double* values, std::int64_t count);

// out = sum of weights[t] * vectors[t], for 1 to 4 terms; `out` may be one of the vectors. Is all of it finite?
template <typename Real>
struct Terms {
  int count = 0;
  Real weight[4];
  const Real* vector[4];
  void add(Real w, const Real* v) { weight[count] = w, vector[count++] = v; }
};
bool combine(const Terms<float>& terms, std::int64_t count, float* out);
bool combine(const Terms<double>& terms, std::int64_t count, double* out);

// uncond + scale * (cond - uncond)
void classifier_free(const float* uncond, const float* cond, float scale, std::int64_t count, float* out);
void classifier_free(const double* uncond, const double* cond, double scale, std::int64_t count, double* out);

// Normals of elements [offset, offset + count) of a row; offset is a multiple of 4.
void noise(std::uint64_t seed, std::uint32_t sample_id, std::uint32_t step, std::int64_t offset, std::int64_t count,
           float* out);
void noise(std::uint64_t seed, std::uint32_t sample_id, std::uint32_t step, std::int64_t offset, std::int64_t count,
           double* out);

// out = a + s b + t c, the floor that benchmarks hold the kernels against; `streaming` writes past the cache, and needs
// an `out` aligned to 16 bytes.
void triad(const float* a, const float* b, const float* c, float s, float t, std::int64_t count, float* out,
           bool streaming);

}  // namespace fastdensity::simd
