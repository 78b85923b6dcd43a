// The rows family on CPU: fastdensity/reference/rows.py, chunk by chunk.
//
// A row is cut into chunks of simd::kChunk elements whatever the batch and the number of threads, and the sums of
// its chunks are added in their order, in double: a row's bits depend on nothing but the row.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "philox.h"
#include "rows_operands.h"
#include "rules.h"

namespace fastdensity {
namespace {

using simd::kChunk;

constexpr std::int64_t kSegment = 8;  // chunks

struct Sums {
  double norm = 0, overlap = 0;
};

template <typename Real>
class RowKernel {
 public:
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
    if (plan.noise != 0.0) result.overlap = simd::dot(direction, noise_of(row, begin, size, scratch), size);
    return result;
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

  void report(std::int64_t row, const RowReport& report, bool finite) const {
    if (!call_.report) return;
    Real* target = static_cast<Real*>(call_.report) + 4 * row;
    target[0] = static_cast<Real>(report.eta_minus_one);
    target[1] = static_cast<Real>(report.sq_norm);
    target[2] = static_cast<Real>(report.dlogp);
    target[3] = static_cast<Real>(report.flags | (finite ? 0 : non_finite));
  }

  RowReport finish(RowPlan& plan, const Sums& sums) const {
    return finish_row(call_, plan, as_held<Real>(sums.norm), sums.overlap);
  }

 private:
  struct Scratch {
    alignas(64) Real v0[kChunk], prediction[kChunk], uncond[kChunk], direction[kChunk], noise[kChunk], out[kChunk];
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

std::int64_t chunk_size(const RowsCall& call, std::int64_t chunk) {
  return std::min(kChunk, call.columns - chunk * kChunk);
}

// One row from beginning to end. The second pass finds the latest chunks in the cache and begins with these, in
// segments long enough for the processor to see streams.
template <typename Real>
void run_row(const RowKernel<Real>& kernel, const RowsCall& call, std::int64_t chunks, std::int64_t row) {
  RowPlan plan = kernel.plan(row);
  Sums total;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Sums part = kernel.sums(plan, row, chunk * kChunk, chunk_size(call, chunk));
    total.norm += part.norm, total.overlap += part.overlap;
  }
  const RowReport report = kernel.finish(plan, total);
  bool finite = true;
  for (std::int64_t end = chunks; end > 0; end -= kSegment)
    for (std::int64_t chunk = std::max<std::int64_t>(end - kSegment, 0); chunk < end; ++chunk)
      finite &= kernel.combine(plan, row, chunk * kChunk, chunk_size(call, chunk));
  kernel.report(row, report, finite);
}

template <typename Real>
void run_by_rows(const RowsCall& call, std::int64_t chunks, int threads) {
  const RowKernel<Real> kernel(call);
  if (threads == 1) {  // entering a parallel region of one thread costs more than a small row
    for (std::int64_t row = 0; row < call.rows; ++row) run_row(kernel, call, chunks, row);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t row = 0; row < call.rows; ++row) run_row(kernel, call, chunks, row);
}

// Few long rows: all threads share each row, chunk by chunk.
template <typename Real>
void run_by_chunks(const RowsCall& call, std::int64_t chunks, int threads) {
  const RowKernel<Real> kernel(call);
  std::vector<Sums> parts(chunks);
  for (std::int64_t row = 0; row < call.rows; ++row) {
    RowPlan plan = kernel.plan(row);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
      parts[chunk] = kernel.sums(plan, row, chunk * kChunk, chunk_size(call, chunk));
    Sums total;
    for (const Sums& part : parts) total.norm += part.norm, total.overlap += part.overlap;
    const RowReport report = kernel.finish(plan, total);
    int finite = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(& : finite)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
      finite &= kernel.combine(plan, row, chunk * kChunk, chunk_size(call, chunk)) ? 1 : 0;
    kernel.report(row, report, finite != 0);
  }
}

template <typename Real>
void run(const RowsCall& call, int threads) {
  const std::int64_t chunks = (call.columns + kChunk - 1) / kChunk;
  if (call.rows * call.columns <= kSerialElements) threads = 1;
  const bool rows_fill_threads = call.rows >= 4 * threads || call.rows % threads == 0;
  if (threads > 1 && !rows_fill_threads && chunks >= 2 * threads)
    run_by_chunks<Real>(call, chunks, threads);
  else
    run_by_rows<Real>(call, chunks, threads);
}

}  // namespace

void rows_cpu(const RowsCall& call, int threads) {
  if (call.rows <= 0 || call.columns <= 0) return;
  threads = std::max(threads, 1);
  accumulates_in_double(call) ? run<double>(call, threads) : run<float>(call, threads);
}

}  // namespace fastdensity
