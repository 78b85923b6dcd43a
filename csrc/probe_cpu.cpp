// Probes on the CPU: made, or multiplied with products and never stored. The contract is that of
// fastdensity/reference/probe.py.
//
// The work is cut into chunks of a row, and a row's sum adds its chunks in their order: no bit depends on the number of
// threads or on the other rows. Signs are never numbers on the way to a sum: they flip the sign bits of the products.
#include <algorithm>
#include <vector>

#include "clones.h"
#include "float16.h"
#include "probe.h"
#include "rows_simd.h"

namespace fastdensity {
namespace {

constexpr std::int64_t kChunk = simd::kChunk;
constexpr std::int64_t kBlocks = kChunk / kSignsPerCounter, kWords = kChunk / 32;
constexpr int kLanes = 64;                       // independent partial sums
constexpr std::int64_t kSerialElements = 32768;  // below this a parallel region costs more than it saves

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

// Bit i of a word as the sign of a number; `one` are the bits that are set besides.
INLINE float with_sign(std::uint32_t bits, std::uint32_t word, int i) {
  return float_of_bits(bits ^ ((word << (31 - i)) & 0x80000000u));
}
INLINE double with_sign(std::uint64_t bits, std::uint32_t word, int i) {
  bits ^= static_cast<std::uint64_t>((word << (31 - i)) & 0x80000000u) << 32;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
INLINE std::uint32_t bits_of(float value) { return bits_of_float(value); }
INLINE std::uint64_t bits_of(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

// The sign words of a whole chunk, which begins at 128 * first.
INLINE void sign_words(const Probe& probe, std::uint32_t first, std::uint32_t* words) {
#pragma GCC ivdep
  for (std::uint32_t block = 0; block < kBlocks; ++block) sign_block(probe, first + block, words + 4 * block);
}

template <typename Real>
INLINE void signs_body(const Probe& probe, std::int64_t begin, std::int64_t count, Real* out) {
  std::uint32_t words[kWords];
  sign_words(probe, static_cast<std::uint32_t>(begin / kSignsPerCounter), words);
  const auto one = bits_of(Real(1));
  std::int64_t j = 0;
  for (; j + 32 <= count; j += 32)
    for (int i = 0; i < 32; ++i) out[j + i] = with_sign(one, words[j / 32], i);
  for (int i = 0; j + i < count; ++i) out[j + i] = with_sign(one, words[j / 32], i);
}

template <typename Real>
INLINE double signed_sum_body(const Probe& probe, std::int64_t begin, std::int64_t count, const Real* values) {
  std::uint32_t words[kWords];
  sign_words(probe, static_cast<std::uint32_t>(begin / kSignsPerCounter), words);
  Real lanes[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 32; ++i)
        lanes[32 * half + i] += with_sign(bits_of(values[j + 32 * half + i]), words[j / 32 + half], i);
  for (int lane = 0; j + lane < count; ++lane)
    lanes[lane] += with_sign(bits_of(values[j + lane]), words[j / 32 + lane / 32], lane % 32);
  return sum_of_lanes(lanes);
}

template <typename Real>
INLINE void normals_body(const Probe& probe, std::int64_t begin, std::int64_t count, Real* out) {
  const std::uint32_t first = static_cast<std::uint32_t>(begin / 4);
  const std::int64_t blocks = count / 4;
#pragma GCC ivdep
  for (std::int64_t block = 0; block < blocks; ++block)
    normal_block(probe.seed, probe.sample_id, probe.step, probe.number, first + static_cast<std::uint32_t>(block),
                 out + 4 * block);
  if (count % 4) {
    Real tail[4];
    normal_block(probe.seed, probe.sample_id, probe.step, probe.number, first + static_cast<std::uint32_t>(blocks),
                 tail);
    for (std::int64_t i = 0; i < count % 4; ++i) out[4 * blocks + i] = tail[i];
  }
}

template <typename Real>
INLINE double squares_body(const Real* values, std::int64_t count) {
  double lanes[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const double value = static_cast<double>(values[j + lane]);
      lanes[lane] += value * value;
    }
  for (int lane = 0; j + lane < count; ++lane) {
    const double value = static_cast<double>(values[j + lane]);
    lanes[lane] += value * value;
  }
  return sum_of_lanes(lanes);
}

#define DEFINE_FOR(Real)                                                                                        \
  CLONES void signs(const Probe& probe, std::int64_t begin, std::int64_t count, Real* out) {                    \
    signs_body(probe, begin, count, out);                                                                       \
  }                                                                                                             \
  CLONES double signed_sum(const Probe& probe, std::int64_t begin, std::int64_t count, const Real* values) {    \
    return signed_sum_body(probe, begin, count, values);                                                        \
  }                                                                                                             \
  CLONES void normals(const Probe& probe, std::int64_t begin, std::int64_t count, Real* out) {                  \
    normals_body(probe, begin, count, out);                                                                     \
  }                                                                                                             \
  CLONES double squares(const Real* values, std::int64_t count) { return squares_body(values, count); }         \
  CLONES void scale(const Real* values, Real factor, std::int64_t count, Real* out) {                           \
    for (std::int64_t j = 0; j < count; ++j) out[j] = values[j] * factor;                                       \
  }
DEFINE_FOR(float)
DEFINE_FOR(double)
#undef DEFINE_FOR

struct Sums {
  double form = 0, squares = 0;
};

template <typename Real>
class ProbeRows {
 public:
  ProbeRows(const ProbeCall& call, int threads)
      : call_(call),
        chunks_((call.columns + kChunk - 1) / kChunk),
        pairs_(call.probes * call.rows),
        threads_(pairs_ * call.columns < kSerialElements ? 1 : std::max(threads, 1)),
        rows_(call.distribution == Distribution::hadamard ? pairs_ : 0) {
    if (rows_.empty()) return;
    const int order = hadamard_order(call.columns);
    each(pairs_, [&](std::int64_t pair) {
      const std::uint32_t id = static_cast<std::uint32_t>(call.sample_ids[pair % call.rows]);
      rows_[pair] = hadamard_row(call, call.first + pair / call.rows, id, order);
    });
  }

  void make() {
    if (call_.distribution == Distribution::sphere) return make_sphere();
    each_chunk([&](std::int64_t pair, std::int64_t, std::int64_t begin, std::int64_t count) {
      alignas(64) Real buffer[kChunk];
      Real* out = target(pair, begin, buffer);
      const Probe probe = probe_at(pair);
      is_normal(call_) ? normals(probe, begin, count, out) : signs(probe, begin, count, out);
      store(out, pair, begin, count);
    });
  }

  void forms(double* out) {
    std::vector<Sums> parts(pairs_ * chunks_);
    each_chunk([&](std::int64_t pair, std::int64_t chunk, std::int64_t begin, std::int64_t count) {
      parts[pair * chunks_ + chunk] = chunk_sums(probe_at(pair), pair, begin, count);
    });
    const bool scaled = call_.distribution == Distribution::sphere;
    for (std::int64_t pair = 0; pair < pairs_; ++pair) {
      const Sums sums = total(parts.data() + pair * chunks_);
      out[pair] = scaled ? sums.form * sphere_scale(call_.columns, sums.squares) : sums.form;
    }
  }

 private:
  static constexpr DataType kType = sizeof(Real) == 4 ? DataType::float32 : DataType::float64;

  template <typename Function>
  void each(std::int64_t count, const Function& function) const {
    if (threads_ == 1) {  // entering a parallel region of one thread costs more than a small row
      for (std::int64_t i = 0; i < count; ++i) function(i);
      return;
    }
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (std::int64_t i = 0; i < count; ++i) function(i);
  }

  template <typename Function>
  void each_chunk(const Function& function) const {
    each(pairs_ * chunks_, [&](std::int64_t task) {
      const std::int64_t pair = task / chunks_, chunk = task % chunks_, begin = chunk * kChunk;
      function(pair, chunk, begin, std::min(kChunk, call_.columns - begin));
    });
  }

  Probe probe_at(std::int64_t pair) const {
    return probe_of(call_, pair / call_.rows, pair % call_.rows, rows_.empty() ? 0 : rows_[pair]);
  }

  Sums total(const Sums* parts) const {
    Sums sums;
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk)
      sums.form += parts[chunk].form, sums.squares += parts[chunk].squares;
    return sums;
  }

  Sums chunk_sums(const Probe& probe, std::int64_t pair, std::int64_t begin, std::int64_t count) const {
    alignas(64) Real converted[kChunk], z[kChunk];
    const std::int64_t offset = pair * call_.columns + begin;
    const Real* values = static_cast<const Real*>(call_.products) + offset;
    if (call_.dtype != kType) {
      simd::load(call_.products, static_cast<int>(call_.dtype), offset, count, converted);
      values = converted;
    }
    if (!is_normal(call_)) return {signed_sum(probe, begin, count, values), 0};
    normals(probe, begin, count, z);
    const bool scaled = call_.distribution == Distribution::sphere;
    return {simd::dot(z, values, count), scaled ? squares(z, count) : 0};
  }

  // Where a chunk is made: its place in the result, if it has that type.
  Real* target(std::int64_t pair, std::int64_t begin, Real* buffer) const {
    return call_.dtype == kType ? static_cast<Real*>(call_.out) + pair * call_.columns + begin : buffer;
  }

  void store(const Real* made, std::int64_t pair, std::int64_t begin, std::int64_t count) const {
    if (call_.dtype != kType)
      simd::store(made, call_.out, static_cast<int>(call_.dtype), pair * call_.columns + begin, count);
  }

  // Normals are scaled where they lie; for 16-bit results, which cannot hold them, they are made again.
  void make_sphere() {
    std::vector<Sums> parts(pairs_ * chunks_);
    each_chunk([&](std::int64_t pair, std::int64_t chunk, std::int64_t begin, std::int64_t count) {
      alignas(64) Real buffer[kChunk];
      Real* z = target(pair, begin, buffer);
      normals(probe_at(pair), begin, count, z);
      parts[pair * chunks_ + chunk].squares = squares(z, count);
    });
    each_chunk([&](std::int64_t pair, std::int64_t, std::int64_t begin, std::int64_t count) {
      alignas(64) Real buffer[kChunk];
      Real* z = target(pair, begin, buffer);
      if (z == buffer) normals(probe_at(pair), begin, count, z);
      const double factor = sphere_scale(call_.columns, total(parts.data() + pair * chunks_).squares);
      scale(z, static_cast<Real>(factor), count, z);
      store(z, pair, begin, count);
    });
  }

  const ProbeCall& call_;
  const std::int64_t chunks_, pairs_;
  const int threads_;
  std::vector<std::int64_t> rows_;  // of Sylvester's matrix, of each pair
};

}  // namespace

void make_probes_cpu(const ProbeCall& call, int threads) {
  call.dtype == DataType::float64 ? ProbeRows<double>(call, threads).make() : ProbeRows<float>(call, threads).make();
}

void probe_forms_cpu(const ProbeCall& call, int threads) {
  double* out = static_cast<double*>(call.out);
  call.dtype == DataType::float64 ? ProbeRows<double>(call, threads).forms(out)
                                  : ProbeRows<float>(call, threads).forms(out);
}

}  // namespace fastdensity
