// The closed loop on CPU: fastdensity/reference/track.py. A row's first pass makes eps and the six inner products that
// csrc/track_rule.h decides from, beside the sums of the step; its second one writes the step with the eta decided on.
#include <algorithm>
#include <cstring>

#include "rows_kernel.h"
#include "rows_run.h"
#include "track_rule.h"
#include "track_simd.h"

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
    double overlap = 0;  // of eps and noise

    void operator+=(const Sums& other) { gram += other.gram, overlap += other.overlap; }
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
    if (writes()) result.overlap = step_.overlap(plan.step, row, begin, size, eps_of(row, begin));
    return result;
  }

  Numbers finish(Plan& plan, std::int64_t row, const Sums& total) const {
    Numbers result{};
    TrackGram gram = total.gram;
    gram.square = as_held<Real>(gram.square);
    // eps may be finite where the state is not, if it is the prediction itself: the row is broken all the same
    if (!std::isfinite(gram.state)) gram.square = NAN;
    result.loop = decide(plan, row, gram);
    if (!writes()) return result;
    plan.step.gain = result.loop.eta_minus_one;
    const double scale = plan.step.scale;  // the step's direction is eps / scale
    result.step = step_.finish(plan.step, row, {gram.square / (scale * scale), total.overlap / scale});
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
    alignas(64) Real x[kChunk], prediction[kChunk], uncond[kChunk], last_x[kChunk], last_eps[kChunk];
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

  Real* eps_of(std::int64_t row, std::int64_t begin) const {
    return static_cast<Real*>(call_.eps) + row * call_.step.columns + begin;
  }

  TrackGram products(const TrackParameters& now, const TrackMemory& before, std::int64_t row, std::int64_t begin,
                     std::int64_t size) const {
    Scratch scratch;
    const Real* x = vector_of(call_.step.v0, row, begin, size, scratch.x);
    const Real* prediction = combined_prediction(call_.step.v1, call_.step.uncond, now.cfg_scale, row, begin, size,
                                                 scratch.prediction, scratch.uncond);
    const double norm = edm_norm(now.alpha, now.sigma, now.sigma_data);
    double along_x, along_p, scale;
    direction(call_.step.type, now.alpha, now.sigma, now.sigma_data, norm, &along_x, &along_p, &scale);
    simd::LastVectors<Real> last;
    if (before.steps != 0 && call_.last_x.data && call_.last_eps.data) {
      last.x = vector_of(call_.last_x, row, begin, size, scratch.last_x);
      last.eps = vector_of(call_.last_eps, row, begin, size, scratch.last_eps);
      last.now = Real(1.0 / now.alpha), last.before = Real(-1.0 / before.alpha);
    }
    return simd::track_products({Real(along_x), Real(along_p), Real(scale)}, last, x, prediction, size,
                                eps_of(row, begin));
  }

  TrackReport decide(const Plan& plan, std::int64_t row, TrackGram gram) const {
    gram.state /= plan.now.alpha, gram.state_last /= plan.now.alpha;
    TrackMemory after;
    const TrackReport report = track::decide(call_.scheme, call_.step.columns, plan.now, plan.before, gram, after);
    std::memcpy(call_.memory_out + row * kTrackMemory, &after, sizeof(after));
    return report;
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
