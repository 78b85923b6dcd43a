// The closed loop on CPU: fastdensity/reference/track.py. One pass over a row makes eps and the six inner products that
// csrc/track_rule.h decides from. Chunks and sums as in rows_cpu.cpp: a row's bits depend on nothing but the row.
#include <algorithm>
#include <cstring>
#include <vector>

#include "ops.h"
#include "rows_operands.h"
#include "track_rule.h"

namespace fastdensity {
namespace {

using simd::kChunk;

template <typename Real>
class TrackKernel {
 public:
  explicit TrackKernel(const TrackCall& call) : call_(call) {}

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
    const Real* x = vector_of(call_.x, row, begin, size, scratch.x);
    Real* eps = static_cast<Real*>(call_.eps) + row * call_.columns + begin;
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

  void finish(const TrackParameters& now, const TrackMemory& before, TrackGram gram, std::int64_t row) const {
    gram.square = as_held<Real>(gram.square);
    // eps may be finite where the state is not, if it is the prediction itself: the row is broken all the same
    if (!std::isfinite(gram.state)) gram.square = NAN;
    gram.state /= now.alpha, gram.state_last /= now.alpha;
    TrackMemory after;
    const TrackReport report = track::decide(call_.scheme, call_.columns, now, before, gram, after);
    std::memcpy(call_.memory_out + row * kTrackMemory, &after, sizeof(after));
    std::memcpy(call_.report + 4 * row, &report, sizeof(report));
  }

 private:
  struct Scratch {
    alignas(64) Real x[kChunk], prediction[kChunk], uncond[kChunk], last_x[kChunk], last_eps[kChunk], move[kChunk];
  };

  void write_eps(const TrackParameters& now, const Real* x, std::int64_t row, std::int64_t begin, std::int64_t size,
                 Scratch& scratch, Real* eps) const {
    const Real* prediction = combined_prediction(call_.prediction, call_.uncond, now.cfg_scale, row, begin, size,
                                                 scratch.prediction, scratch.uncond);
    const double norm = edm_norm(now.alpha, now.sigma, now.sigma_data);
    double along_x, along_p, scale;
    fastdensity::direction(call_.type, now.alpha, now.sigma, now.sigma_data, norm, &along_x, &along_p, &scale);
    simd::Terms<Real> direction, scaled;  // the scale outside: x - alpha p cancels, and is to be rounded once
    direction.add(Real(along_p), prediction);
    if (along_x != 0.0) direction.add(Real(along_x), x);
    simd::combine(direction, size, eps);
    if (scale == 1.0) return;
    scaled.add(Real(scale), eps);
    simd::combine(scaled, size, eps);
  }

  const TrackCall& call_;
};

void add(TrackGram& total, const TrackGram& part) {
  total.square += part.square, total.turn += part.turn, total.move += part.move, total.move_last += part.move_last;
  total.state += part.state, total.state_last += part.state_last;
}

template <typename Real>
void run(const TrackCall& call, int threads) {
  const TrackKernel<Real> kernel(call);
  const std::int64_t chunks = (call.columns + kChunk - 1) / kChunk, pieces = call.rows * chunks;
  if (call.rows * call.columns <= kSerialElements) threads = 1;
  std::vector<TrackGram> parts(pieces);
  const auto piece = [&](std::int64_t index) {
    const std::int64_t row = index / chunks, begin = index % chunks * kChunk;
    const std::int64_t size = std::min(kChunk, call.columns - begin);
    parts[index] = kernel.products(kernel.parameters(row), kernel.memory(row), row, begin, size);
  };
  if (threads == 1) {
    for (std::int64_t index = 0; index < pieces; ++index) piece(index);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t index = 0; index < pieces; ++index) piece(index);
  }
  for (std::int64_t row = 0; row < call.rows; ++row) {
    TrackGram total;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) add(total, parts[row * chunks + chunk]);
    kernel.finish(kernel.parameters(row), kernel.memory(row), total, row);
  }
}

}  // namespace

void track_cpu(const TrackCall& call, int threads) {
  if (call.rows <= 0 || call.columns <= 0) return;
  threads = std::max(threads, 1);
  call.in_double ? run<double>(call, threads) : run<float>(call, threads);
}

}  // namespace fastdensity
