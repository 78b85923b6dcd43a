// Norms of dual tensors on CPU: fastdensity/reference/dual_norm.py.
//
// Rows go in blocks: the values of a block's rows first, whose n is kept, then plane after plane the same rows of each
// tangent. Planes lie far apart in memory; a block is long enough for the processor to see streams. The sums of a row
// are made in chunks of simd::kNormChunk elements and added in their order, in double: a row's bits depend on nothing
// but the row.
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
constexpr std::int64_t kBlockElements = 16384;
constexpr std::int64_t kPivotElements = 16;

// What one thread works with. n and gain hold all rows of a block, the others one row.
template <typename Real>
struct NormScratch {
  std::vector<Real> n, gain, loaded, out, scale, shift;
  std::vector<Normal<Real>> normals;
};

template <typename Real>
class NormKernel {
 public:
  using Scratch = NormScratch<Real>;

  NormKernel(const DualNormCall& call, int threads)
      : call_(call),
        in_place_(call.dtype == (sizeof(Real) == 4 ? DataType::float32 : DataType::float64)),
        block_rows_(std::max<std::int64_t>(
            1, std::min(kBlockElements / call.size, call.rows / (4 * static_cast<std::int64_t>(threads))))) {}

  std::int64_t blocks() const { return (call_.rows + block_rows_ - 1) / block_rows_; }

  Scratch scratch() const {
    const std::size_t size = static_cast<std::size_t>(call_.size), block = size * block_rows_;
    Scratch scratch;
    scratch.n.resize(block), scratch.gain.resize(call_.groups ? block : 0);
    scratch.loaded.resize(in_place_ ? 0 : size), scratch.out.resize(in_place_ ? 0 : size);
    scratch.scale.resize(size), scratch.shift.resize(size);
    scratch.normals.resize(block_rows_);
    return scratch;
  }

  void run(std::int64_t block, Scratch& scratch) const {
    const std::int64_t stop = std::min((block + 1) * block_rows_, call_.rows);
    for (std::int64_t row = block * block_rows_; row < stop;) {
      const std::int64_t end = call_.groups ? stop : std::min(stop, modulation_end(row));
      run_rows(row, end, scratch);
      row = end;
    }
  }

 private:
  std::int64_t offset(std::int64_t plane, std::int64_t row) const { return (plane * call_.rows + row) * call_.size; }

  std::int64_t chunk_size(std::int64_t begin) const { return std::min(kNormChunk, call_.size - begin); }

  // A row of x, in place where it has the right type already.
  const Real* load(std::int64_t plane, std::int64_t row, Scratch& scratch) const {
    if (in_place_) return static_cast<const Real*>(call_.x) + offset(plane, row);
    simd::load(call_.x, static_cast<int>(call_.dtype), offset(plane, row), call_.size, scratch.loaded.data());
    return scratch.loaded.data();
  }

  // Where to write a row; `finish` converts it where it is a buffer.
  Real* target(std::int64_t plane, std::int64_t row, Scratch& scratch) const {
    return in_place_ ? static_cast<Real*>(call_.out) + offset(plane, row) : scratch.out.data();
  }

  void finish(std::int64_t plane, std::int64_t row, const Scratch& scratch) const {
    if (!in_place_)
      simd::store(scratch.out.data(), call_.out, static_cast<int>(call_.dtype), offset(plane, row), call_.size);
  }

  // The first row after `row` that is modulated by other numbers.
  std::int64_t modulation_end(std::int64_t row) const {
    std::int64_t end = call_.rows;
    for (const Modulation* modulation : {&call_.multiplier, &call_.addend})
      if (modulation->data) end = std::min(end, (row / modulation->every + 1) * modulation->every);
    return end;
  }

  // Elementwise scale and shift of layer and root-mean-square norms.
  void join_modulation(std::int64_t row, Scratch& scratch) const {
    const auto row_of = [row](const Modulation& modulation) {
      const Real* data = static_cast<const Real*>(modulation.data);
      return data ? data + row / modulation.every * modulation.stride : nullptr;
    };
    simd::join_affine(static_cast<const Real*>(call_.weight), static_cast<const Real*>(call_.bias),
                      row_of(call_.multiplier), row_of(call_.addend), call_.size, scratch.scale.data(),
                      scratch.shift.data());
  }

  // The same of one group: the numbers of its channels, each for the channel's elements.
  void spread_channels(std::int64_t row, Scratch& scratch) const {
    const std::int64_t channels = call_.size / call_.spatial, first = row % call_.groups * channels;
    const Real *weight = static_cast<const Real*>(call_.weight), *bias = static_cast<const Real*>(call_.bias);
    for (std::int64_t channel = 0; channel < channels; ++channel) {
      const std::int64_t at = channel * call_.spatial;
      std::fill_n(scratch.scale.data() + at, call_.spatial, weight ? weight[first + channel] : Real(1));
      std::fill_n(scratch.shift.data() + at, call_.spatial, bias ? bias[first + channel] : Real(0));
    }
  }

  Normal<Real> normal_of(const Real* x) const {
    Normal<Real> normal;
    if (call_.centered) {
      double sum = 0;
      for (std::int64_t begin = 0; begin < call_.size; begin += kNormChunk)
        sum += simd::sum(x + begin, chunk_size(begin));
      normal.pivot = static_cast<Real>(sum / call_.size);
    }
    TwoSums total;
    for (std::int64_t begin = 0; begin < call_.size; begin += kNormChunk) {
      const TwoSums part = simd::centred_sums(x + begin, normal.pivot, chunk_size(begin));
      total.first += part.first, total.second += part.second;
    }
    const double mean = call_.centered ? total.first / call_.size : 0.0;
    const double variance = total.second / call_.size - mean * mean;  // the mean of d is nearly 0: nothing cancels
    normal.correction = static_cast<Real>(mean);
    normal.scale = static_cast<Real>(1.0 / std::sqrt((variance < 0 ? 0.0 : variance) + call_.eps));
    return normal;
  }

  Projection<Real> projection_of(const Real* tangent, const Real* n, Real scale) const {
    Projection<Real> projection;
    projection.scale = scale;
    if (call_.centered) {  // a number near the mean, taken off before anything is summed
      const std::int64_t count = std::min(kPivotElements, call_.size);
      for (std::int64_t i = 0; i < count; ++i) projection.pivot += tangent[i];
      projection.pivot /= static_cast<Real>(count);
    }
    TwoSums total;
    for (std::int64_t begin = 0; begin < call_.size; begin += kNormChunk) {
      const TwoSums part = simd::tangent_sums(tangent + begin, n + begin, projection.pivot, chunk_size(begin));
      total.first += part.first, total.second += part.second;
    }
    if (call_.centered) projection.mean = static_cast<Real>(total.first / call_.size);
    projection.along = static_cast<Real>(total.second / call_.size);
    return projection;
  }

  // Value of a row: n and, for groups, gain are left in the block's memory.
  void run_value(std::int64_t row, const Real* x, const Normal<Real>& normal, Real* n, Real* gain,
                 Scratch& scratch) const {
    Real* y = target(0, row, scratch);
    for (std::int64_t begin = 0; begin < call_.size; begin += kNormChunk) {
      const std::int64_t count = chunk_size(begin);
      const Real *scale = scratch.scale.data() + begin, *shift = scratch.shift.data() + begin;
      simd::norm_value(x + begin, normal, scale, shift, count, n + begin, y + begin);
      if (!call_.groups) continue;
      if (call_.silu)
        simd::silu_with_slope(scale, count, y + begin, gain + begin);
      else
        std::copy_n(scale, count, gain + begin);
    }
    finish(0, row, scratch);
  }

  void run_rows(std::int64_t first, std::int64_t end, Scratch& scratch) const {
    if (!call_.groups) join_modulation(first, scratch);
    for (std::int64_t row = first; row < end; ++row) {
      if (call_.groups) spread_channels(row, scratch);
      const std::int64_t at = (row - first) * call_.size;
      const Real* x = load(0, row, scratch);
      scratch.normals[row - first] = normal_of(x);
      Real* gain = call_.groups ? scratch.gain.data() + at : nullptr;
      run_value(row, x, scratch.normals[row - first], scratch.n.data() + at, gain, scratch);
    }
    for (std::int64_t plane = 1; plane < call_.planes; ++plane)
      for (std::int64_t row = first; row < end; ++row) {
        const std::int64_t at = (row - first) * call_.size;
        const Real *tangent = load(plane, row, scratch), *n = scratch.n.data() + at;
        const Real* gain = call_.groups ? scratch.gain.data() + at : scratch.scale.data();
        const Projection<Real> projection = projection_of(tangent, n, scratch.normals[row - first].scale);
        simd::norm_tangent(tangent, n, gain, projection, call_.size, target(plane, row, scratch));
        finish(plane, row, scratch);
      }
  }

  const DualNormCall& call_;
  const bool in_place_;
  const std::int64_t block_rows_;
};

template <typename Real>
void run(const DualNormCall& call, int threads) {
  const NormKernel<Real> kernel(call, threads);
  const std::int64_t blocks = kernel.blocks();
  if (threads == 1) {  // entering a parallel region of one thread costs more than a small row
    NormScratch<Real> scratch = kernel.scratch();
    for (std::int64_t block = 0; block < blocks; ++block) kernel.run(block, scratch);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    NormScratch<Real> scratch = kernel.scratch();
#pragma omp for schedule(static)
    for (std::int64_t block = 0; block < blocks; ++block) kernel.run(block, scratch);
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
