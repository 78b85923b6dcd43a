#include "track_simd.h"

#include "clones.h"

namespace fastdensity::simd {
namespace {

constexpr int kLanes = 32;  // six sums at once: more would not fit the registers

template <typename Real>
INLINE double sum_of_lanes(const Real* lanes) {
  double sums[16];
  for (int lane = 0; lane < 16; ++lane)
    sums[lane] = static_cast<double>(lanes[lane]) + static_cast<double>(lanes[lane + 16]);
  for (int width = 8; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

// The first `lanes` elements from each pointer on; a full block has a number that the compiler knows.
template <bool kMixed, bool kKnown, typename Real>
struct Block {
  const EpsTerms<Real>& terms;
  const LastVectors<Real>& last;
  Real (&sums)[6][kLanes];

  INLINE void add(const Real* __restrict x, const Real* __restrict prediction, const Real* __restrict last_x,
                  const Real* __restrict last_eps, Real* __restrict eps, int lanes) const {
    for (int lane = 0; lane < lanes; ++lane) {
      const Real state = x[lane];
      Real here = terms.along_p * prediction[lane];
      if (kMixed) here = here + terms.along_x * state;
      here = terms.scale * here;
      eps[lane] = here;
      sums[0][lane] += here * here;
      sums[1][lane] += state * here;
      if (kKnown) {
        const Real before = last_eps[lane], move = last.now * state + last.before * last_x[lane];
        sums[2][lane] += here * before;
        sums[3][lane] += move * here;
        sums[4][lane] += move * before;
        sums[5][lane] += state * before;
      }
    }
  }
};

template <bool kMixed, bool kKnown, typename Real>
INLINE TrackGram products_body(const EpsTerms<Real>& terms, const LastVectors<Real>& last, const Real* x,
                               const Real* prediction, std::int64_t count, Real* eps) {
  Real sums[6][kLanes] = {};
  const Block<kMixed, kKnown, Real> block{terms, last, sums};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    block.add(x + i, prediction + i, kKnown ? last.x + i : nullptr, kKnown ? last.eps + i : nullptr, eps + i, kLanes);
  block.add(x + i, prediction + i, kKnown ? last.x + i : nullptr, kKnown ? last.eps + i : nullptr, eps + i,
            static_cast<int>(count - i));
  TrackGram gram;
  gram.square = sum_of_lanes(sums[0]), gram.state = sum_of_lanes(sums[1]);
  if (!kKnown) return gram;
  gram.turn = sum_of_lanes(sums[2]), gram.move = sum_of_lanes(sums[3]);
  gram.move_last = sum_of_lanes(sums[4]), gram.state_last = sum_of_lanes(sums[5]);
  return gram;
}

template <typename Real>
INLINE TrackGram any_products(const EpsTerms<Real>& terms, const LastVectors<Real>& last, const Real* x,
                              const Real* prediction, std::int64_t count, Real* eps) {
  if (last.eps)
    return terms.along_x != 0 ? products_body<true, true>(terms, last, x, prediction, count, eps)
                              : products_body<false, true>(terms, last, x, prediction, count, eps);
  return terms.along_x != 0 ? products_body<true, false>(terms, last, x, prediction, count, eps)
                            : products_body<false, false>(terms, last, x, prediction, count, eps);
}

}  // namespace

CLONES TrackGram track_products(const EpsTerms<float>& terms, const LastVectors<float>& last, const float* x,
                                const float* prediction, std::int64_t count, float* eps) {
  return any_products(terms, last, x, prediction, count, eps);
}

CLONES TrackGram track_products(const EpsTerms<double>& terms, const LastVectors<double>& last, const double* x,
                                const double* prediction, std::int64_t count, double* eps) {
  return any_products(terms, last, x, prediction, count, eps);
}

}  // namespace fastdensity::simd
