// Norms of dual tensors on CPU: fastdensity/reference/dual_norm.py, row by row, chunk by chunk.
//
// A row is cut into chunks of simd::kNormChunk elements, whose sums are added in their order, in double: its bits
// depend on nothing but the row. A row of one chunk is read from memory once, value first, then each tangent.
#include "dual_norm_simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "rows_simd.h"

namespace fastdensity {
namespace {

using simd::kNormChunk;
using simd::Normal;
using simd::Projection;
using simd::TwoSums;

constexpr std::int64_t kSerialElements = 32768;  // below this a parallel region costs more than it saves
constexpr std::int64_t kPivotElements = 16;

// What one thread works with.
template <typename Real>
struct NormScratch {
  alignas(64) Real loaded[kNormChunk], n[kNormChunk], gain[kNormChunk], out[kNormChunk];
  alignas(64) Real scale_chunk[kNormChunk], shift_chunk[kNormChunk];
  std::vector<Real> scale, shift;  // of the last row, and the rows of modulation that they hold
  std::int64_t joined[2] = {-1, -1};
  std::vector<Projection<Real>> projections;
  std::vector<TwoSums> sums;
};

template <typename Real>
struct Affine {
  const Real *scale, *shift;
};

template <typename Real>
class NormKernel {
 public:
  using Scratch = NormScratch<Real>;

  explicit NormKernel(const DualNormCall& call) : call_(call) {}

  void run(std::int64_t row, Scratch& scratch) const {
    join_modulation(row, scratch);
    call_.size <= kNormChunk ? run_one_chunk(row, scratch) : run_chunks(row, scratch);
  }

 private:
  static constexpr DataType real_type() { return sizeof(Real) == 4 ? DataType::float32 : DataType::float64; }

  std::int64_t offset(std::int64_t plane, std::int64_t row, std::int64_t begin) const {
    return (plane * call_.rows + row) * call_.size + begin;
  }

  std::int64_t chunk_size(std::int64_t begin) const { return std::min(kNormChunk, call_.size - begin); }

  // A chunk of x, in place where it has the right type already.
  const Real* load(std::int64_t plane, std::int64_t row, std::int64_t begin, Scratch& scratch) const {
    const std::int64_t at = offset(plane, row, begin);
    if (call_.dtype == real_type()) return static_cast<const Real*>(call_.x) + at;
    simd::load(call_.x, static_cast<int>(call_.dtype), at, chunk_size(begin), scratch.loaded);
    return scratch.loaded;
  }

  // Where to write a chunk; `finish` converts it where it is a buffer.
  Real* target(std::int64_t plane, std::int64_t row, std::int64_t begin, Scratch& scratch) const {
    return call_.dtype == real_type() ? static_cast<Real*>(call_.out) + offset(plane, row, begin) : scratch.out;
  }

  void finish(std::int64_t plane, std::int64_t row, std::int64_t begin, Scratch& scratch) const {
    if (call_.dtype != real_type())
      simd::store(scratch.out, call_.out, static_cast<int>(call_.dtype), offset(plane, row, begin), chunk_size(begin));
  }

  // Layer and root-mean-square norms: weight and modulation as one scale and shift, kept while rows share them.
  void join_modulation(std::int64_t row, Scratch& scratch) const {
    if (call_.groups) return;
    const std::int64_t rows[2] = {row / call_.multiplier.every, row / call_.addend.every};
    if (rows[0] == scratch.joined[0] && rows[1] == scratch.joined[1]) return;
    const auto row_of = [&](const Modulation& modulation, int i) {
      const Real* data = static_cast<const Real*>(modulation.data);
      return data ? data + rows[i] * modulation.stride : nullptr;
    };
    if (scratch.joined[0] < 0 || call_.multiplier.data || call_.addend.data) {
      scratch.scale.resize(call_.size), scratch.shift.resize(call_.size);
      simd::join_affine(static_cast<const Real*>(call_.weight), static_cast<const Real*>(call_.bias),
                        row_of(call_.multiplier, 0), row_of(call_.addend, 1), call_.size, scratch.scale.data(),
                        scratch.shift.data());
    }
    scratch.joined[0] = rows[0], scratch.joined[1] = rows[1];
  }

  // scale and shift of a chunk, one number per element
  Affine<Real> affine(std::int64_t row, std::int64_t begin, Scratch& scratch) const {
    if (!call_.groups) return {scratch.scale.data() + begin, scratch.shift.data() + begin};
    const std::int64_t first_channel = row % call_.groups * (call_.size / call_.spatial);
    const Real *weight = static_cast<const Real*>(call_.weight), *bias = static_cast<const Real*>(call_.bias);
    const std::int64_t end = begin + chunk_size(begin);
    for (std::int64_t at = begin; at < end;) {
      const std::int64_t channel = at / call_.spatial, stop = std::min((channel + 1) * call_.spatial, end);
      const Real scale = weight ? weight[first_channel + channel] : Real(1);
      const Real shift = bias ? bias[first_channel + channel] : Real(0);
      std::fill(scratch.scale_chunk + (at - begin), scratch.scale_chunk + (stop - begin), scale);
      std::fill(scratch.shift_chunk + (at - begin), scratch.shift_chunk + (stop - begin), shift);
      at = stop;
    }
    return {scratch.scale_chunk, scratch.shift_chunk};
  }

  Normal<Real> normal_of(std::int64_t row, Scratch& scratch) const {
    Normal<Real> normal;
    if (call_.centered) {
      double sum = 0;
      for (std::int64_t begin = 0; begin < call_.size; begin += kNormChunk)
        sum += simd::sum(load(0, row, begin, scratch), chunk_size(begin));
      normal.pivot = static_cast<Real>(sum / call_.size);
    }
    TwoSums total;
    for (std::int64_t begin = 0; begin < call_.size; begin += kNormChunk) {
      const TwoSums part = simd::centred_sums(load(0, row, begin, scratch), normal.pivot, chunk_size(begin));
      total.first += part.first, total.second += part.second;
    }
    const double mean = call_.centered ? total.first / call_.size : 0.0;
    const double variance = total.second / call_.size - mean * mean;  // the mean of d is nearly 0: nothing cancels
    normal.correction = static_cast<Real>(mean);
    normal.scale = static_cast<Real>(1.0 / std::sqrt((variance < 0 ? 0.0 : variance) + call_.eps));
    return normal;
  }

  // A number near the tangent's mean, which is taken off before anything is summed.
  Real pivot_of(const Real* tangent) const {
    if (!call_.centered) return 0;
    const std::int64_t count = std::min(kPivotElements, call_.size);
    Real sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += tangent[i];
    return sum / static_cast<Real>(count);
  }

  Projection<Real> projection_of(Real pivot, const TwoSums& sums) const {
    const double mean = call_.centered ? sums.first / call_.size : 0.0;
    return {pivot, static_cast<Real>(mean), static_cast<Real>(sums.second / call_.size)};
  }

  void write_value(const Real* x, const Normal<Real>& normal, std::int64_t row, std::int64_t begin,
                   Scratch& scratch) const {
    const Affine<Real> affine = this->affine(row, begin, scratch);
    Real* y = target(0, row, begin, scratch);
    simd::norm_value(x, normal, affine.scale, affine.shift, chunk_size(begin), scratch.n, scratch.gain, y);
    if (call_.silu) simd::silu_with_slope(chunk_size(begin), y, scratch.gain);
    finish(0, row, begin, scratch);
  }

  void write_tangent(const Real* tangent, const Projection<Real>& projection, std::int64_t plane, std::int64_t row,
                     std::int64_t begin, Scratch& scratch) const {
    simd::norm_tangent(tangent, scratch.n, scratch.gain, projection, chunk_size(begin),
                       target(plane, row, begin, scratch));
    finish(plane, row, begin, scratch);
  }

  void run_one_chunk(std::int64_t row, Scratch& scratch) const {
    const Normal<Real> normal = normal_of(row, scratch);
    write_value(load(0, row, 0, scratch), normal, row, 0, scratch);
    for (std::int64_t plane = 1; plane < call_.planes; ++plane) {
      const Real* tangent = load(plane, row, 0, scratch);
      const Real pivot = pivot_of(tangent);
      const TwoSums sums = simd::tangent_sums(tangent, scratch.n, pivot, call_.size);
      write_tangent(tangent, projection_of(pivot, sums), plane, row, 0, scratch);
    }
  }

  // Sums of all tangents first, then the results; n of a chunk is made again, never stored.
  void run_chunks(std::int64_t row, Scratch& scratch) const {
    const Normal<Real> normal = normal_of(row, scratch);
    scratch.sums.assign(call_.planes, {}), scratch.projections.assign(call_.planes, {});
    for (std::int64_t begin = 0; begin < call_.size; begin += kNormChunk) {
      simd::normalise(load(0, row, begin, scratch), normal, chunk_size(begin), scratch.n);
      for (std::int64_t plane = 1; plane < call_.planes; ++plane) {
        const Real* tangent = load(plane, row, begin, scratch);
        if (begin == 0) scratch.projections[plane].pivot = pivot_of(tangent);
        const Real pivot = scratch.projections[plane].pivot;
        const TwoSums part = simd::tangent_sums(tangent, scratch.n, pivot, chunk_size(begin));
        scratch.sums[plane].first += part.first, scratch.sums[plane].second += part.second;
      }
    }
    for (std::int64_t plane = 1; plane < call_.planes; ++plane)
      scratch.projections[plane] = projection_of(scratch.projections[plane].pivot, scratch.sums[plane]);
    for (std::int64_t begin = 0; begin < call_.size; begin += kNormChunk) {
      write_value(load(0, row, begin, scratch), normal, row, begin, scratch);
      for (std::int64_t plane = 1; plane < call_.planes; ++plane)
        write_tangent(load(plane, row, begin, scratch), scratch.projections[plane], plane, row, begin, scratch);
    }
  }

  const DualNormCall& call_;
};

template <typename Real>
void run(const DualNormCall& call, int threads) {
  const NormKernel<Real> kernel(call);
  if (threads == 1) {  // entering a parallel region of one thread costs more than a small row
    NormScratch<Real> scratch;
    for (std::int64_t row = 0; row < call.rows; ++row) kernel.run(row, scratch);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    NormScratch<Real> scratch;
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < call.rows; ++row) kernel.run(row, scratch);
  }
}

}  // namespace

void dual_norm_cpu(const DualNormCall& call, int threads) {
  if (call.planes <= 0 || call.rows <= 0 || call.size <= 0) return;
  if (call.planes * call.rows * call.size <= kSerialElements) threads = 1;
  threads = std::max(threads, 1);
  call.dtype == DataType::float64 ? run<double>(call, threads) : run<float>(call, threads);
}

}  // namespace fastdensity
