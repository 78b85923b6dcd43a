// A row of the family on CPU, a chunk at a time: fastdensity/reference/rows.py. `rows_run.h` walks it over a batch.
#pragma once

#include "ops.h"
#include "philox.h"
#include "rows_operands.h"
#include "rules.h"

namespace fastdensity {

struct RowSums {
  double norm = 0, overlap = 0;

  void operator+=(const RowSums& other) { norm += other.norm, overlap += other.overlap; }
};

template <typename Real>
class RowKernel {
 public:
  using Plan = RowPlan;
  using Sums = RowSums;

  explicit RowKernel(const RowsCall& call)
      : call_(call),
        has_noise_(call.rule == Rule::step && (call.sample_ids || call.v2.data)) {}

  RowPlan plan(std::int64_t row) const { return plan_row(call_, row, has_noise_); }

  // First pass: direction.direction and direction.noise over one chunk.
  Sums sums(const RowPlan& plan, std::int64_t row, std::int64_t begin, std::int64_t size) const {
    Scratch scratch;
    const Real* direction = direction_of(plan, row, begin, size, scratch);
    Sums result;
    result.norm = simd::sum_of_squares(direction, size);
    result.overlap = overlap(plan, row, begin, size, direction);
    return result;
  }

  // direction.noise of a direction that the caller has made, in any scale.
  double overlap(const RowPlan& plan, std::int64_t row, std::int64_t begin, std::int64_t size,
                 const Real* direction) const {
    if (plan.noise == 0.0) return 0.0;
    Scratch scratch;
    return simd::dot(direction, noise_of(row, begin, size, scratch), size);
  }

  // Second pass: writes one chunk; false if any value of it is not finite.
  bool combine(const RowPlan& plan, std::int64_t row, std::int64_t begin, std::int64_t size) const {
    Scratch scratch;
    simd::Terms<Real> terms;
    // the state last: it is the largest term, and is then rounded once
    const Real* direction = direction_of(plan, row, begin, size, scratch);
    if (plan.out[1] != 0.0) terms.add(Real(plan.out[1]), prediction_of(plan, row, begin, size, scratch));
    terms.add(Real(plan.out_direction), direction);
    if (plan.out[2] != 0.0) terms.add(Real(plan.out[2]), noise_of(row, begin, size, scratch));
    if (plan.out[0] != 0.0) terms.add(Real(plan.out[0]), vector_of(call_.v0, row, begin, size, scratch.v0));
    const std::int64_t offset = row * call_.out_stride + begin;
    if (call_.out_dtype == real_type<Real>()) return simd::combine(terms, size, static_cast<Real*>(call_.out) + offset);
    const bool finite = simd::combine(terms, size, scratch.out);
    simd::store(scratch.out, call_.out, static_cast<int>(call_.out_dtype), offset, size);
    return finite;
  }

  void report(const RowPlan&, std::int64_t row, const RowReport& report, bool finite) const {
    if (!call_.report) return;
    Real* target = static_cast<Real*>(call_.report) + 4 * row;
    target[0] = static_cast<Real>(report.eta_minus_one);
    target[1] = static_cast<Real>(report.sq_norm);
    target[2] = static_cast<Real>(report.dlogp);
    target[3] = static_cast<Real>(report.flags | (finite ? 0 : non_finite));
  }

  bool writes() const { return true; }

  RowReport finish(RowPlan& plan, std::int64_t, const Sums& sums) const {
    return finish_row(call_, plan, as_held<Real>(sums.norm), sums.overlap);
  }

 private:
  struct Scratch {
    alignas(64) Real v0[simd::kChunk], prediction[simd::kChunk], uncond[simd::kChunk], direction[simd::kChunk], noise[simd::kChunk], out[simd::kChunk];
  };

  const Real* prediction_of(const RowPlan& plan, std::int64_t row, std::int64_t begin, std::int64_t size,
                            Scratch& scratch) const {
    return combined_prediction(call_.v1, call_.uncond, plan.cfg, row, begin, size, scratch.prediction, scratch.uncond);
  }

  const Real* noise_of(std::int64_t row, std::int64_t begin, std::int64_t size, Scratch& scratch) const {
    if (!call_.sample_ids) return vector_of(call_.v2, row, begin, size, scratch.noise);
    simd::noise(call_.seed, static_cast<std::uint32_t>(call_.sample_ids[row]), call_.step, begin, size, scratch.noise);
    return scratch.noise;
  }

  const Real* direction_of(const RowPlan& plan, std::int64_t row, std::int64_t begin, std::int64_t size,
                           Scratch& scratch) const {
    if (call_.rule == Rule::drift) return vector_of(call_.v2, row, begin, size, scratch.direction);
    if (call_.rule == Rule::radius) return vector_of(call_.v0, row, begin, size, scratch.direction);
    const Real* prediction = prediction_of(plan, row, begin, size, scratch);
    if (plan.along[0] == 0.0) return prediction;  // epsilon, score: the prediction itself
    simd::Terms<Real> terms;
    terms.add(Real(plan.along[1]), prediction);
    terms.add(Real(plan.along[0]), vector_of(call_.v0, row, begin, size, scratch.v0));
    simd::combine(terms, size, scratch.direction);
    return scratch.direction;
  }

  const RowsCall& call_;
  const bool has_noise_;
};

}  // namespace fastdensity
