// The closed loop on CPU: fastdensity/reference/track.py. A row's first pass makes eps and the six inner products that
// csrc/track_rule.h decides from, beside the sums of the step; its second one writes the step with the eta decided on.
#include <algorithm>
#include <cstring>

#include "rows_kernel.h"
#include "rows_run.h"
#include "track_rule.h"

namespace fastdensity {
namespace {

using simd::kChunk;

template <typename Real>
class TrackKernel {
 public:
  struct Plan {
    TrackParameters now;
    TrackMemory before;
    RowPlan step;
  };

  struct Sums {
    TrackGram gram;
    RowSums step;

    void operator+=(const Sums& other) { gram += other.gram, step += other.step; }
  };

  struct Numbers {
    TrackReport loop;
    RowReport step;
  };

  explicit TrackKernel(const TrackCall& call) : call_(call), step_(call.step) {}

  bool writes() const { return call_.step.out; }

  Plan plan(std::int64_t row) const {
    Plan result{parameters(row), memory(row), {}};
    if (writes()) result.step = step_.plan(row);
    return result;
  }

  Sums sums(const Plan& plan, std::int64_t row, std::int64_t begin, std::int64_t size) const {
    Sums result;
    result.gram = products(plan.now, plan.before, row, begin, size);
    if (writes()) result.step = step_.sums(plan.step, row, begin, size);
    return result;
  }

  Numbers finish(Plan& plan, std::int64_t row, const Sums& total) const {
    Numbers result{decide(plan, row, total.gram), {}};
    if (!writes()) return result;
    plan.step.gain = result.loop.eta_minus_one;
    result.step = step_.finish(plan.step, row, total.step);
    result.step.flags |= static_cast<int>(result.loop.flags);
    return result;
  }

  bool combine(const Plan& plan, std::int64_t row, std::int64_t begin, std::int64_t size) const {
    return step_.combine(plan.step, row, begin, size);
  }

  void report(const Plan& plan, std::int64_t row, const Numbers& numbers, bool finite) const {
    std::memcpy(call_.report + 4 * row, &numbers.loop, sizeof(numbers.loop));
    if (writes()) step_.report(plan.step, row, numbers.step, finite);
  }

 private:
  struct Scratch {
    alignas(64) Real x[kChunk], prediction[kChunk], uncond[kChunk], last_x[kChunk], last_eps[kChunk], move[kChunk];
  };

  TrackParameters parameters(std::int64_t row) const {
    double values[kTrackParameters];
    for (int i = 0; i < kTrackParameters; ++i) values[i] = row_parameter(call_.parameters[i], row);
    TrackParameters result;
    std::memcpy(&result, values, sizeof(values));
    return result;
  }

  TrackMemory memory(std::int64_t row) const {
    TrackMemory result;
    std::memcpy(&result, call_.memory + row * kTrackMemory, sizeof(result));
    return result;
  }

  TrackGram products(const TrackParameters& now, const TrackMemory& before, std::int64_t row, std::int64_t begin,
                     std::int64_t size) const {
    Scratch scratch;
    const Real* x = vector_of(call_.step.v0, row, begin, size, scratch.x);
    Real* eps = static_cast<Real*>(call_.eps) + row * call_.step.columns + begin;
    write_eps(now, x, row, begin, size, scratch, eps);
    TrackGram gram;
    gram.square = simd::sum_of_squares(eps, size);
    gram.state = simd::dot(x, eps, size);
    if (before.steps == 0 || !call_.last_x.data || !call_.last_eps.data) return gram;
    const Real* last = vector_of(call_.last_eps, row, begin, size, scratch.last_eps);
    simd::Terms<Real> move;
    move.add(Real(1.0 / now.alpha), x);
    move.add(Real(-1.0 / before.alpha), vector_of(call_.last_x, row, begin, size, scratch.last_x));
    simd::combine(move, size, scratch.move);
    gram.turn = simd::dot(eps, last, size);
    gram.move = simd::dot(scratch.move, eps, size);
    gram.move_last = simd::dot(scratch.move, last, size);
    gram.state_last = simd::dot(x, last, size);
    return gram;
  }

  TrackReport decide(const Plan& plan, std::int64_t row, TrackGram gram) const {
    gram.square = as_held<Real>(gram.square);
    // eps may be finite where the state is not, if it is the prediction itself: the row is broken all the same
    if (!std::isfinite(gram.state)) gram.square = NAN;
    gram.state /= plan.now.alpha, gram.state_last /= plan.now.alpha;
    TrackMemory after;
    const TrackReport report = track::decide(call_.scheme, call_.step.columns, plan.now, plan.before, gram, after);
    std::memcpy(call_.memory_out + row * kTrackMemory, &after, sizeof(after));
    return report;
  }

  void write_eps(const TrackParameters& now, const Real* x, std::int64_t row, std::int64_t begin, std::int64_t size,
                 Scratch& scratch, Real* eps) const {
    const Real* prediction = combined_prediction(call_.step.v1, call_.step.uncond, now.cfg_scale, row, begin, size,
                                                 scratch.prediction, scratch.uncond);
    const double norm = edm_norm(now.alpha, now.sigma, now.sigma_data);
    double along_x, along_p, scale;
    fastdensity::direction(call_.step.type, now.alpha, now.sigma, now.sigma_data, norm, &along_x, &along_p, &scale);
    simd::Terms<Real> direction, scaled;  // the scale outside: x - alpha p cancels, and is to be rounded once
    direction.add(Real(along_p), prediction);
    if (along_x != 0.0) direction.add(Real(along_x), x);
    simd::combine(direction, size, eps);
    if (scale == 1.0) return;
    scaled.add(Real(scale), eps);
    simd::combine(scaled, size, eps);
  }

  const TrackCall& call_;
  const RowKernel<Real> step_;
};

}  // namespace

void track_cpu(const TrackCall& call, int threads) {
  const RowsCall& step = call.step;
  if (step.rows <= 0 || step.columns <= 0) return;
  threads = std::max(threads, 1);
  if (call.in_double)
    rows_run::run(TrackKernel<double>(call), step.rows, step.columns, threads);
  else
    rows_run::run(TrackKernel<float>(call), step.rows, step.columns, threads);
}

}  // namespace fastdensity
