// Queries lie in the lanes of a vector and keys come one after the other, so that nothing is summed across lanes: a
// query's bits depend neither on its neighbours nor on the width of the vectors. Three widths are written out below,
// since the clones of clones.h would share one.
//
// With e = exp(s - max s), n = sum e and m_k = sum(e ts_k) / n a row of the result is
//   o = sum(e v) / n,  to_k = sum(e (ts_k - m_k) v + e tv_k) / n.
#include "dual_attention_simd.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "clones.h"
#include "vector_math.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // of vectors passed between functions that are always inlined

namespace fastdensity::simd {
namespace {

constexpr std::int64_t kBlock = 128;  // keys summed in one chain

template <typename Real, int kLanes>
struct Attention {
  typedef Real Vector __attribute__((vector_size(kLanes * sizeof(Real))));
  using Scratch = NarrowScratch<Real>;

  static INLINE Vector load(const Real* source) {
    Vector vector;
    std::memcpy(&vector, source, sizeof(vector));
    return vector;
  }

  static INLINE void store(const Vector& vector, Real* target) { std::memcpy(target, &vector, sizeof(vector)); }

  // The rows of one plane of the query, in lanes; zeros in those that have no row.
  static INLINE void gather(const NarrowAttentionCall& call, std::int64_t plane, std::int64_t head, std::int64_t first,
                            std::int64_t rows, Real* target) {
    const AttentionOperand& query = call.query;
    const std::int64_t shared = call.heads / call.key_heads, width = call.width;
    const Real* data = static_cast<const Real*>(query.data) + plane * query.strides[0] +
                       head / call.key_heads * query.strides[1] + head % call.key_heads * shared * query.strides[2];
    std::int64_t group = first / call.length, position = first % call.length;
    for (std::int64_t lane = 0; lane < rows; ++lane) {
      const Real* row = data + group * query.strides[2] + position * query.strides[3];
      for (std::int64_t i = 0; i < width; ++i) target[i * kLanes + lane] = row[i];
      if (++position == call.length) position = 0, ++group;
    }
    for (std::int64_t lane = rows; lane < kLanes; ++lane)
      for (std::int64_t i = 0; i < width; ++i) target[i * kLanes + lane] = 0;
  }

  // output * factor into the rows of one plane of `out`: rows of one head are adjacent, as are the heads of a group.
  static INLINE void scatter(const NarrowAttentionCall& call, std::int64_t plane, std::int64_t head, std::int64_t first,
                             std::int64_t rows, const Vector& factor, Real* output) {
    const std::int64_t size = call.value_width, shared = call.heads / call.key_heads;
    const std::int64_t row = (plane * call.batch * call.key_heads + head) * shared * call.length + first;
    Real* target = static_cast<Real*>(call.out) + row * size;
    for (std::int64_t i = 0; i < size; ++i) store(load(output + i * kLanes) * factor, output + i * kLanes);
    for (std::int64_t lane = 0; lane < rows; ++lane)
      for (std::int64_t i = 0; i < size; ++i) target[lane * size + i] = output[i * kLanes + lane];
  }

  // scale times the sum of left k, of right tk, or of both, for the keys of one tile.
  template <bool kLeft, bool kRight>
  static INLINE void tile(const Real* left, const Real* right, const Real* k, const Real* tk, std::int64_t width,
                          Real scale, Vector (&sums)[kKeys]) {
    for (int key = 0; key < kKeys; ++key) sums[key] = Vector{};
    for (std::int64_t i = 0; i < width; ++i) {
      const Vector a = load(kLeft ? left + i * kLanes : right + i * kLanes), b = load(right + i * kLanes);
      for (int key = 0; key < kKeys; ++key) {
        if (kLeft) sums[key] += a * k[i * kKeys + key];
        if (kRight) sums[key] += b * tk[i * kKeys + key];
      }
    }
    for (int key = 0; key < kKeys; ++key) sums[key] *= scale;
  }

  // s, and the largest of them.
  static INLINE Vector scores(const NarrowAttentionCall& call, const Scratch& scratch) {
    const Real scale = static_cast<Real>(call.scale);
    Vector top = Vector{} - std::numeric_limits<Real>::infinity();
    for (std::int64_t first = 0; first < call.keys; first += kKeys) {
      Vector sums[kKeys];
      tile<true, false>(scratch.query, scratch.query, scratch.keys + first * call.width, nullptr, call.width, scale,
                        sums);
      Real* target = scratch.scores + first * kLanes;
      for (int key = 0; key < kKeys; ++key) store(sums[key], target + key * kLanes);
      const std::int64_t count = std::min(kKeys, call.keys - first);
      for (std::int64_t key = 0; key < count; ++key) {
        const Vector score = load(target + key * kLanes);
        top = score > top ? score : top;
      }
    }
    return top;
  }

  // s becomes e, zero where a tile has no key; returns their sum.
  static INLINE Vector exponentials(const Scratch& scratch, const Vector& top, std::int64_t keys) {
    constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
    Real shift[kLanes];
    store(top == kNothing ? Vector{} : top, shift);  // where all scores are -inf, e is zero
    Vector total{};
    for (std::int64_t first = 0; first < keys; first += kKeys) {
      Real* s = scratch.scores + first * kLanes;
      const std::int64_t count = std::min(kKeys, keys - first);
      for (std::int64_t key = 0; key < count; ++key)
        for (int lane = 0; lane < kLanes; ++lane) s[key * kLanes + lane] = decay(s[key * kLanes + lane] - shift[lane]);
      std::fill(s + count * kLanes, s + kKeys * kLanes, Real(0));
      Vector part{};
      for (int key = 0; key < kKeys; ++key) part += load(s + key * kLanes);
      total += part;
    }
    return total;
  }

  // ts = tq k + q tk; returns the sum of e ts.
  template <bool kQuery, bool kKey>
  static INLINE Vector score_tangents(const NarrowAttentionCall& call, const Scratch& scratch, std::int64_t plane) {
    const std::int64_t step = kKeys * call.width, tiles = (call.keys + kKeys - 1) / kKeys;
    const Real scale = static_cast<Real>(call.scale);
    Vector along{};
    for (std::int64_t index = 0; index < tiles; ++index) {
      const Real *k = scratch.keys + index * step, *tk = kKey ? k + plane * tiles * step : k;
      Vector sums[kKeys], part{};
      tile<kQuery, kKey>(scratch.tangent, scratch.query, k, tk, call.width, scale, sums);
      const std::int64_t at = index * kKeys * kLanes;
      for (int key = 0; key < kKeys; ++key) {
        store(sums[key], scratch.score_tangents + at + key * kLanes);
        part += load(scratch.scores + at + key * kLanes) * sums[key];
      }
      along += part;
    }
    return along;
  }

  // kColumns columns of sum(e (ts - mean) v), of sum(e tv), or of both.
  template <bool kScores, bool kValue, int kColumns>
  static INLINE void columns(const Scratch& scratch, const Vector& mean, const Real* v, const Real* tv,
                             std::int64_t keys, std::int64_t size, Real* output) {
    for (int column = 0; column < kColumns; ++column) store(Vector{}, output + column * kLanes);
    for (std::int64_t first = 0; first < keys; first += kBlock) {
      const std::int64_t end = std::min(keys, first + kBlock);
      Vector sums[kColumns];
      for (int column = 0; column < kColumns; ++column) sums[column] = Vector{};
      for (std::int64_t key = first; key < end; ++key) {
        const Vector e = load(scratch.scores + key * kLanes);
        Vector te = e;
        if (kScores) te *= load(scratch.score_tangents + key * kLanes) - mean;
        for (int column = 0; column < kColumns; ++column) {
          if (kScores) sums[column] += te * v[key * size + column];
          if (kValue) sums[column] += e * tv[key * size + column];
        }
      }
      for (int column = 0; column < kColumns; ++column)
        store(load(output + column * kLanes) + sums[column], output + column * kLanes);
    }
  }

  template <bool kScores, bool kValue>
  static INLINE void outputs(const NarrowAttentionCall& call, const Scratch& scratch, const Vector& mean,
                             std::int64_t plane) {
    const std::int64_t size = call.value_width, keys = call.keys;
    const Real *v = scratch.values, *tv = v + plane * keys * size;
    std::int64_t at = 0;
    for (; at + 8 <= size; at += 8)
      columns<kScores, kValue, 8>(scratch, mean, v + at, tv + at, keys, size, scratch.output + at * kLanes);
    if (at + 4 <= size) {
      columns<kScores, kValue, 4>(scratch, mean, v + at, tv + at, keys, size, scratch.output + at * kLanes);
      at += 4;
    }
    for (; at < size; ++at)
      columns<kScores, kValue, 1>(scratch, mean, v + at, tv + at, keys, size, scratch.output + at * kLanes);
  }

  static INLINE void tangent(const NarrowAttentionCall& call, const Scratch& scratch, std::int64_t plane,
                             const Vector& inverse) {
    Vector along{};
    if (call.query.dual && call.key.dual)
      along = score_tangents<true, true>(call, scratch, plane);
    else if (call.query.dual)
      along = score_tangents<true, false>(call, scratch, plane);
    else if (call.key.dual)
      along = score_tangents<false, true>(call, scratch, plane);
    const Vector mean = along * inverse;
    if (!call.query.dual && !call.key.dual)
      outputs<false, true>(call, scratch, mean, plane);
    else if (call.value.dual)
      outputs<true, true>(call, scratch, mean, plane);
    else
      outputs<true, false>(call, scratch, mean, 0);
  }

  static INLINE void rows(const NarrowAttentionCall& call, std::int64_t head, std::int64_t first, std::int64_t count,
                          const Scratch& scratch) {
    gather(call, 0, head, first, count, scratch.query);
    const Vector top = scores(call, scratch);
    const Vector total = exponentials(scratch, top, call.keys);
    const Vector inverse = total == 0 ? Vector{} : 1 / total;
    outputs<false, true>(call, scratch, Vector{}, 0);
    scatter(call, 0, head, first, count, inverse, scratch.output);
    for (std::int64_t plane = 1; plane <= call.tangents; ++plane) {
      if (call.query.dual) gather(call, plane, head, first, count, scratch.tangent);
      tangent(call, scratch, plane, inverse);
      scatter(call, plane, head, first, count, inverse, scratch.output);
    }
  }

  static INLINE void all_rows(const NarrowAttentionCall& call, std::int64_t head, std::int64_t first, std::int64_t end,
                              const Scratch& scratch) {
    for (; first < end; first += kLanes) rows(call, head, first, std::min<std::int64_t>(kLanes, end - first), scratch);
  }
};

template <typename Real>
const Real* head_of(const AttentionOperand& operand, std::int64_t plane, std::int64_t head, std::int64_t heads) {
  return static_cast<const Real*>(operand.data) + plane * operand.strides[0] + head / heads * operand.strides[1] +
         head % heads * operand.strides[2];
}

template <typename Real>
void pack(const NarrowAttentionCall& call, std::int64_t head, NarrowScratch<Real>& scratch) {
  const std::int64_t keys = call.keys, width = call.width, size = call.value_width;
  Real* target = scratch.keys;
  for (std::int64_t plane = 0; plane < (call.key.dual ? 1 + call.tangents : 1); ++plane) {
    const Real* source = head_of<Real>(call.key, plane, head, call.key_heads);
    for (std::int64_t first = 0; first < keys; first += kKeys, target += kKeys * width)
      for (std::int64_t key = 0; key < kKeys; ++key) {
        const Real* row = source + (first + key) * call.key.strides[3];
        for (std::int64_t i = 0; i < width; ++i) target[i * kKeys + key] = first + key < keys ? row[i] : Real(0);
      }
  }
  target = scratch.values;
  for (std::int64_t plane = 0; plane < (call.value.dual ? 1 + call.tangents : 1); ++plane) {
    const Real* source = head_of<Real>(call.value, plane, head, call.key_heads);
    for (std::int64_t key = 0; key < keys; ++key, target += size)
      std::copy_n(source + key * call.value.strides[3], size, target);
  }
}

#if defined(__x86_64__) && !defined(FASTDENSITY_NO_CLONES)
#define DEFINE_FOR(Real, TARGET, BYTES)                                                               \
  TARGET void attend_in_lanes(const NarrowAttentionCall& call, std::int64_t head, std::int64_t first, \
                              std::int64_t end, const NarrowScratch<Real>& scratch) {                 \
    Attention<Real, BYTES / sizeof(Real)>::all_rows(call, head, first, end, scratch);                 \
  }
#define DEFINE_FOR_ALL(Real)                                      \
  DEFINE_FOR(Real, __attribute__((target("default"))), 16)        \
  DEFINE_FOR(Real, __attribute__((target("arch=x86-64-v3"))), 32) \
  DEFINE_FOR(Real, __attribute__((target("arch=x86-64-v4"))), 64)
#else
#define DEFINE_FOR_ALL(Real)                                                                                     \
  void attend_in_lanes(const NarrowAttentionCall& call, std::int64_t head, std::int64_t first, std::int64_t end, \
                       const NarrowScratch<Real>& scratch) {                                                     \
    Attention<Real, 16 / sizeof(Real)>::all_rows(call, head, first, end, scratch);                               \
  }
#endif
DEFINE_FOR_ALL(float)
DEFINE_FOR_ALL(double)

}  // namespace

#define DEFINE_ENTRIES(Real)                                                                            \
  void pack_head(const NarrowAttentionCall& call, std::int64_t head, NarrowScratch<Real>& scratch) {    \
    pack(call, head, scratch);                                                                          \
  }                                                                                                     \
  void attend(const NarrowAttentionCall& call, std::int64_t head, std::int64_t first, std::int64_t end, \
              NarrowScratch<Real>& scratch) {                                                           \
    attend_in_lanes(call, head, first, end, scratch);                                                   \
  }
DEFINE_ENTRIES(float)
DEFINE_ENTRIES(double)

}  // namespace fastdensity::simd
