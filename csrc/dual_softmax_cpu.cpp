// Softmax and its tangents, row by row: p = softmax(x), tp_k = p (tx_k - sum(p tx_k)).
//
// Two operations share the inner loops: the op dual_softmax, from one tensor into another, and the scores of a dual
// attention in place, where a row may be masked and ends at the diagonal. The contracts are those of
// fastdensity/reference/dual_softmax.py and dual_attention.py. A row's bits depend on nothing but the row.
#include <algorithm>
#include <limits>
#include <vector>

#include "clones.h"
#include "ops.h"
#include "rows_simd.h"
#include "vector_math.h"

namespace fastdensity {
namespace {

constexpr std::int64_t kBlock = 2048;            // elements of a row summed in Real before a sum goes on in double
constexpr int kLanes = 64;                       // independent partial results: nothing is left to reorder
constexpr std::int64_t kSerialElements = 16384;  // below this a parallel region costs more than it saves

template <typename Real>
INLINE double sum_of_lanes(const Real* lanes) {
  double sums[16];
  for (int lane = 0; lane < 16; ++lane)
    sums[lane] = (static_cast<double>(lanes[lane]) + static_cast<double>(lanes[lane + 16])) +
                 (static_cast<double>(lanes[lane + 32]) + static_cast<double>(lanes[lane + 48]));
  for (int width = 8; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

template <typename Real>
INLINE Real largest_of(const Real* x, std::int64_t count) {
  Real lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = -std::numeric_limits<Real>::infinity();
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] = x[i] > lanes[lane] ? x[i] : lanes[lane];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane)
      lanes[lane] = lanes[lane + width] > lanes[lane] ? lanes[lane + width] : lanes[lane];
  return lanes[0];
}

struct Moments {
  double total = 0, along = 0;  // sum of e, and of e t
};

// x = e = exp(x - largest), and the sums of e and of e t in the same pass.
template <bool kTangent, typename Real>
INLINE Moments exponentials(Real* x, const Real* t, Real largest, std::int64_t count) {
  Moments result;
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t end = std::min(count, begin + kBlock);
    Real sums[kLanes] = {}, products[kLanes] = {};
    std::int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const Real value = decay(x[i + lane] - largest);
        sums[lane] += value;
        if (kTangent) products[lane] += value * t[i + lane];
        x[i + lane] = value;
      }
    for (int lane = 0; i < end; ++i, ++lane) {
      const Real value = decay(x[i] - largest);
      sums[lane] += value;
      if (kTangent) products[lane] += value * t[i];
      x[i] = value;
    }
    result.total += sum_of_lanes(sums);
    if (kTangent) result.along += sum_of_lanes(products);
  }
  return result;
}

template <typename Real>
INLINE double dot(const Real* a, const Real* b, std::int64_t count) {
  double total = 0;
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t end = std::min(count, begin + kBlock);
    Real lanes[kLanes] = {};
    std::int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
    for (int lane = 0; i < end; ++i, ++lane) lanes[lane] += a[i] * b[i];
    total += sum_of_lanes(lanes);
  }
  return total;
}

// In place: x becomes p, the tangents at x + plane, x + 2 plane, ... become those of p. The first tangent goes along
// with the value in both passes, the others read p.
template <typename Real>
INLINE void softmax_row_body(Real* x, Real largest, std::int64_t tangents, std::int64_t plane, std::int64_t count) {
  if (tangents == 0) {
    const Real scale = static_cast<Real>(1.0 / exponentials<false>(x, x, largest, count).total);
    for (std::int64_t i = 0; i < count; ++i) x[i] *= scale;
    return;
  }
  Real* tangent = x + plane;
  const Moments moments = exponentials<true>(x, tangent, largest, count);
  const Real scale = static_cast<Real>(1.0 / moments.total), mean = static_cast<Real>(moments.along / moments.total);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const Real p = x[i] * scale;
    x[i] = p;
    tangent[i] = p * (tangent[i] - mean);
  }
  for (std::int64_t k = 2; k <= tangents; ++k) {
    tangent = x + k * plane;
    const Real its_mean = static_cast<Real>(dot(x, tangent, count));
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) tangent[i] = x[i] * (tangent[i] - its_mean);
  }
}

template <typename Real>
INLINE void add_mask_body(Real* x, const Real* mask, std::int64_t stride, std::int64_t count) {
  if (stride == 1)
    for (std::int64_t i = 0; i < count; ++i) x[i] += mask[i];
  else
    for (std::int64_t i = 0; i < count; ++i) x[i] += mask[i * stride];
}

template <typename Real>
INLINE void keep_body(Real* x, const unsigned char* mask, std::int64_t stride, std::int64_t count) {
  constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
  if (stride == 1)
    for (std::int64_t i = 0; i < count; ++i) x[i] = mask[i] ? x[i] : kNothing;
  else
    for (std::int64_t i = 0; i < count; ++i) x[i] = mask[i * stride] ? x[i] : kNothing;
}

#define DEFINE_FOR(Real)                                                                                              \
  CLONES Real largest(const Real* x, std::int64_t count) { return largest_of(x, count); }                             \
  CLONES void softmax_row(Real* x, Real top, std::int64_t tangents, std::int64_t plane, std::int64_t count) {         \
    softmax_row_body(x, top, tangents, plane, count);                                                                 \
  }                                                                                                                   \
  CLONES void add_mask(Real* x, const Real* mask, std::int64_t stride, std::int64_t count) {                          \
    add_mask_body(x, mask, stride, count);                                                                            \
  }                                                                                                                   \
  CLONES void keep(Real* x, const unsigned char* mask, std::int64_t stride, std::int64_t count) {                     \
    keep_body(x, mask, stride, count);                                                                                \
  }
DEFINE_FOR(float)
DEFINE_FOR(double)
#undef DEFINE_FOR

template <typename Function>
void for_each_row(std::int64_t rows, std::int64_t elements, int threads, const Function& function) {
  if (threads <= 1 || rows < 2 || elements < kSerialElements) {  // a region of one thread costs more than small rows
    for (std::int64_t row = 0; row < rows; ++row) function(row);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t row = 0; row < rows; ++row) function(row);
}

template <typename Real>
class ScoreRows {
 public:
  ScoreRows(const DualScoresCall& call) : call_(call), scores_(static_cast<Real*>(call.scores)) {}

  void run(std::int64_t row) const {
    Real* x = scores_ + row * call_.columns;
    const std::int64_t index = call_.first_row + row, plane = call_.rows * call_.columns;
    const std::int64_t position = index % call_.length;
    const std::int64_t count = call_.causal ? std::min(call_.columns, position + 1) : call_.columns;
    apply_mask(x, index / call_.length, position, count);
    const Real top = largest(x, count);
    const bool empty = top == -std::numeric_limits<Real>::infinity() && !any_nan(x, count);
    if (!empty) softmax_row(x, top, call_.tangents, plane, count);
    const std::int64_t first = empty ? 0 : count;  // zeros from here on
    for (std::int64_t k = 0; k <= call_.tangents; ++k)
      std::fill(x + k * plane + first, x + k * plane + call_.columns, Real(0));
  }

 private:
  void apply_mask(Real* x, std::int64_t head, std::int64_t position, std::int64_t count) const {
    if (!call_.mask) return;
    const std::int64_t* strides = call_.mask_strides;
    const std::int64_t offset =
        head / call_.heads * strides[0] + head % call_.heads * strides[1] + position * strides[2];
    if (call_.mask_is_bool)
      keep(x, static_cast<const unsigned char*>(call_.mask) + offset, strides[3], count);
    else
      add_mask(x, static_cast<const Real*>(call_.mask) + offset, strides[3], count);
  }

  static bool any_nan(const Real* x, std::int64_t count) {
    return std::any_of(x, x + count, [](Real value) { return value != value; });
  }

  const DualScoresCall& call_;
  Real* scores_;
};

template <typename Real>
void softmax_rows(const DualSoftmaxCall& call, int threads) {
  const std::int64_t columns = call.columns, planes = 1 + call.tangents, plane = call.rows * columns;
  const int dtype = static_cast<int>(call.dtype);
  for_each_row(call.rows, planes * plane, threads, [&](std::int64_t row) {
    if (sizeof(Real) == 8 || call.dtype == DataType::float32) {
      const Real* source = static_cast<const Real*>(call.x) + row * columns;
      Real* target = static_cast<Real*>(call.out) + row * columns;
      for (std::int64_t k = 0; k < planes; ++k) std::copy_n(source + k * plane, columns, target + k * plane);
      softmax_row(target, largest(target, columns), call.tangents, plane, columns);
      return;
    }
    thread_local std::vector<Real> buffer;  // 16-bit types: the whole row in float, rounded once
    buffer.resize(planes * columns);
    for (std::int64_t k = 0; k < planes; ++k)
      simd::load(call.x, dtype, k * plane + row * columns, columns, buffer.data() + k * columns);
    softmax_row(buffer.data(), largest(buffer.data(), columns), call.tangents, columns, columns);
    for (std::int64_t k = 0; k < planes; ++k)
      simd::store(buffer.data() + k * columns, call.out, dtype, k * plane + row * columns, columns);
  });
}

}  // namespace

void dual_softmax_cpu(const DualSoftmaxCall& call, int threads) {
  call.dtype == DataType::float64 ? softmax_rows<double>(call, threads) : softmax_rows<float>(call, threads);
}

void dual_attention_cpu(const DualScoresCall& call, int threads) {
  const std::int64_t elements = (1 + call.tangents) * call.rows * call.columns;
  if (call.dtype == DataType::float64) {
    const ScoreRows<double> scores(call);
    for_each_row(call.rows, elements, threads, [&](std::int64_t row) { scores.run(row); });
  } else {
    const ScoreRows<float> scores(call);
    for_each_row(call.rows, elements, threads, [&](std::int64_t row) { scores.run(row); });
  }
}

}  // namespace fastdensity
