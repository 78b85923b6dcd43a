// A chunk of an operand as numbers of the arithmetic's type: what rows_cpu.cpp and track_cpu.cpp read rows with.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops.h"
#include "rows_simd.h"

namespace fastdensity {

constexpr std::int64_t kSerialElements = 32768;  // below this a parallel region costs more than it saves

template <typename Real>
constexpr DataType real_type() {
  return sizeof(Real) == 4 ? DataType::float32 : DataType::float64;
}

// The operand in place where it has the right type already, else converted into `buffer`.
template <typename Real>
const Real* vector_of(const Rows& rows, std::int64_t row, std::int64_t begin, std::int64_t size, Real* buffer) {
  const std::int64_t offset = row * rows.row_stride + begin;
  if (rows.dtype == real_type<Real>()) return static_cast<const Real*>(rows.data) + offset;
  simd::load(rows.data, static_cast<int>(rows.dtype), offset, size, buffer);
  return buffer;
}

// uncond + cfg (cond - uncond), or cond alone; in place, or in `buffer`.
template <typename Real>
const Real* combined_prediction(const Rows& cond, const Rows& uncond, double cfg, std::int64_t row, std::int64_t begin,
                                std::int64_t size, Real* buffer, Real* uncond_buffer) {
  const Real* conditional = vector_of(cond, row, begin, size, buffer);
  if (!uncond.data) return conditional;
  const Real* unconditional = vector_of(uncond, row, begin, size, uncond_buffer);
  simd::classifier_free(unconditional, conditional, Real(cfg), size, buffer);
  return buffer;
}

// A sum that the arithmetic's type cannot hold counts as infinite, as it does where all of it runs in that type.
template <typename Real>
double as_held(double sum) {
  const Real held = static_cast<Real>(sum);
  return std::isfinite(held) ? sum : static_cast<double>(held);
}

}  // namespace fastdensity
