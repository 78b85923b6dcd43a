// A local Gaussian whose spectrum is fitted to two evaluations, in C++ and CUDA: the twin, function by function, of
// fastdensity/reference/track_model.py, where each is explained. All of it in double.
#pragma once

#include "rules.h"

namespace fastdensity {
namespace track {

constexpr double kNodes[4] = {0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970263};
constexpr double kWeights[4] = {0.17392742256872693, 0.32607257743127307, 0.32607257743127307, 0.17392742256872693};
constexpr double kNarrow = 1e-3, kNarrowest = 1e-3, kWidest = 40.0, kEdge = 1e-9;
constexpr int kHalvings = 16;

FASTDENSITY_HOST_DEVICE double clamp(double value, double low, double high) {
  return value < low ? low : (value > high ? high : value);
}

struct Gain {
  double constant = 0, linear = 0, square = 0;

  FASTDENSITY_HOST_DEVICE double at(double slope) const { return constant + slope * (linear + slope * square); }

  FASTDENSITY_HOST_DEVICE double solved(double wanted) const {
    const double missing = constant + linear + square - wanted, rise = linear + 2.0 * square;
    const double determinant = rise * rise - 4.0 * square * missing;
    if (!(determinant > 0)) return square != 0 ? 1.0 - rise / (2.0 * square) : 1.0;
    const double root = sqrt(determinant), down = rise + (rise < 0 ? -root : root);
    return 1.0 + (fabs(down) > 0 ? -2.0 * missing / down : 0.0);
  }

  // Adds the gain `one` of a share of ||eps||^2 whose slope is per_eta eta + rest.
  FASTDENSITY_HOST_DEVICE void add(double share, const Gain& one, double per_eta, double rest) {
    constant += share * one.at(rest);
    linear += share * per_eta * (one.linear + 2.0 * rest * one.square);
    square += share * per_eta * per_eta * one.square;
  }
};

FASTDENSITY_HOST_DEVICE Gain gain(double variance, double kappa, double kappa_end) {
  const double h = log(kappa / kappa_end);
  Gain result;
  for (int i = 0; i < 4; ++i) {
    const double here = kappa * exp(-kNodes[i] * h), answer = here / (variance + here * here);
    const double a = answer * (variance + kappa * kappa) / kappa, b = answer * (here - kappa);
    result.constant -= kWeights[i] * a * a;
    result.linear += kWeights[i] * (a - 2.0 * a * b);
    result.square += kWeights[i] * (b - b * b);
  }
  result.constant *= h, result.linear *= h, result.square *= h;
  return result;
}

struct Part {
  double share = 0, before = 0, move = 0, variance = 0;
};

struct Fit {
  Part parts[2];
  double mean = 0, offset = 0, bend = 0, kappa = 1, kappa_last = 1;

  FASTDENSITY_HOST_DEVICE double before(double variance) const {
    const double step = kappa - kappa_last, top = variance + kappa * (kappa - step * offset);
    const double bottom = kappa * (kappa_last + step * bend) + variance * kappa / kappa_last;
    return bottom > 0 ? top / bottom : mean;
  }
};

struct TwoPoints {
  double share, low, high;
};

FASTDENSITY_HOST_DEVICE TwoPoints two_points(double mean, double spread, double least, double most) {
  const double below = mean - least, above = most - mean;
  if (!(below > kEdge && above > kEdge)) return {0.5, mean, mean};
  const double root = sqrt(spread);
  TwoPoints result{0.5, mean - root, mean + root};
  if (root > below) result = {spread / (below * below + spread), least, mean + spread / below};
  if (result.high > most) {
    result = {above * above / (above * above + spread), mean - spread / above, most};
    if (result.low < least) result = {above / (above + below), least, most};
  }
  return result;
}

FASTDENSITY_HOST_DEVICE Fit two_variances(double square_last, double turn, double move, double move_last, double kappa,
                                          double kappa_last, double usual) {
  const double step = kappa - kappa_last, spread = fmax(square_last - turn * turn, 0.0);
  const double mean_move = move / step, per_move_last = move_last / step, infinite = kappa_last / kappa;
  const double narrow = kNarrow * (infinite - 1.0), plain = mean_move / turn;
  double bend = spread > narrow * narrow ? (per_move_last - turn * mean_move) / spread : plain;
  bend = fmin(fmax(bend, -fabs(plain)), 3.0 * fabs(plain));
  Fit result;
  result.mean = turn, result.offset = mean_move - bend * turn, result.bend = bend;
  result.kappa = kappa, result.kappa_last = kappa_last;
  const double rise = kappa_last + step * bend, none = rise > 0 ? (kappa - step * result.offset) / rise : infinite;
  const bool telling = fabs(infinite - none) > narrow;
  const TwoPoints points = two_points(turn, spread, fmin(none, infinite), fmax(none, infinite));
  for (int i = 0; i < 2; ++i) {
    const double before = i == 0 ? points.low : points.high, moved = result.offset + bend * before;
    double left = 1.0 - kappa * before / kappa_last;
    if (!(fabs(left) > kEdge)) left = none < infinite ? kEdge : -kEdge;
    const double variance = fmax(kappa * (kappa_last * before + step * moved - kappa) / left, 0.0);
    Part& part = result.parts[i];
    part.share = i == 0 ? points.share : 1.0 - points.share;
    part.before = before, part.move = moved, part.variance = telling ? variance : usual;
  }
  return result;
}

struct Band {
  double lowest, width;
};

FASTDENSITY_HOST_DEVICE double band_excess(double answer, double fall, double width, double* slope) {
  const double whole = -expm1(-width), part = -expm1(-answer * width), rest = -expm1(-(1.0 - answer) * width);
  const double first = part / whole;
  const double bend = (answer * (1.0 - part) * whole - part * (1.0 - whole)) / (whole * whole);
  *slope = bend * rest + first * (1.0 - answer) * (1.0 - rest) - fall * answer;
  return first * rest - fall * answer * width;
}

FASTDENSITY_HOST_DEVICE Band band(double answer, double fall) {
  double low = kNarrowest, high = kWidest, slope = 0;
  for (int i = 0; i < kHalvings; ++i) {
    const double middle = sqrt(low * high);
    (band_excess(answer, fall, middle, &slope) < 0 ? high : low) = middle;
  }
  double width = sqrt(low * high);
  const double excess = band_excess(answer, fall, width, &slope);
  width = clamp(width - excess / (slope == 0 ? 1.0 : slope), kNarrowest, kWidest);
  const double first = clamp(expm1(-answer * width) / expm1(-width), kEdge, 1.0 - kEdge);
  return {log1p(-first) - log(first), width};
}

}  // namespace track
}  // namespace fastdensity
