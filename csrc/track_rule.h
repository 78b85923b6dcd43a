// What the closed loop decides for a row, in C++ and CUDA: the twin of fastdensity/reference/track_rule.py, where each
// of these functions is explained. All of it in double.
#pragma once

#include "rules.h"

namespace fastdensity {

struct TrackGram {
  double square = 0, turn = 0, move = 0, move_last = 0, state = 0, state_last = 0;

  FASTDENSITY_HOST_DEVICE void operator+=(const TrackGram& other);
};

struct TrackParameters {
  double alpha, sigma, alpha_next, sigma_next, alpha_end, sigma_end, q, shift, repair, cfg_scale, noise_scale,
      sigma_data, carry, final;
};
static_assert(sizeof(TrackParameters) == kTrackParameters * sizeof(double));

struct TrackMemory {
  double steps, alpha, sigma, alpha_end, sigma_end, sq_norm, rate, eta, noisy, drift_eps, drift_state, commanded_next, realised_next, length,
      mismatch, skew, response, commanded, realised, limited;
};
static_assert(sizeof(TrackMemory) == kTrackMemory * sizeof(double));

struct TrackReport {
  double eta_minus_one, sq_norm, deficit, flags;
};

FASTDENSITY_HOST_DEVICE void TrackGram::operator+=(const TrackGram& other) {
  square += other.square, turn += other.turn, move += other.move, move_last += other.move_last;
  state += other.state, state_last += other.state_last;
}

namespace track {

constexpr double kTinyStep = 1e-9, kSamePlace = 1e-4, kLeastCosine = 0.05, kFastestFall = -3.0, kFastestRise = 1.0;
constexpr double kShortest = 0.5, kLongest = 2.0, kNearest = 0.1;

FASTDENSITY_HOST_DEVICE double clamp(double value, double low, double high) {
  return value < low ? low : (value > high ? high : value);
}

// What a decision starts from; numbers that a row does not have are 0 or 1.
struct Row {
  double rate = 0, kappa = 1, kappa_last = 1, kappa_end = 1, h = 0, h_last = 0, square = 1, square_last = 1, turn = 0,
         move = 0, move_last = 0, state = 0, state_last = 0, eta_last = 1;
  bool known = false, guided = false;
  int flags = 0;
};

FASTDENSITY_HOST_DEVICE int problems(TrackScheme scheme, const TrackParameters& now, double rate, double square) {
  int flags = end_flags(now.alpha) | end_flags(now.sigma) | end_flags(now.alpha_end) | end_flags(now.sigma_end);
  bool bad = !(now.q > 0 && now.q < 1) || !(now.noise_scale >= 0) || !std::isfinite(rate);
  if (scheme != TrackScheme::corrector) bad |= !(now.alpha * now.sigma_end < now.sigma * now.alpha_end);
  bad |= !std::isfinite(now.alpha_next) || !std::isfinite(now.sigma_next) || !std::isfinite(now.repair) ||
         !std::isfinite(now.cfg_scale) || !std::isfinite(now.noise_scale) || !std::isfinite(now.carry);
  if (bad) flags |= bad_parameter;
  if (square == 0) flags |= zero_score;
  if (!std::isfinite(square)) flags |= non_finite;
  return flags;
}

FASTDENSITY_HOST_DEVICE bool arrived(const TrackParameters& now, const TrackMemory& before) {
  const double here = now.sigma * before.alpha_end, wanted = now.alpha * before.sigma_end;
  return fabs(here - wanted) <= kSamePlace * fabs(wanted);
}

FASTDENSITY_HOST_DEVICE Row make_row(TrackScheme scheme, std::int64_t columns, const TrackParameters& now,
                                     const TrackMemory& before, const TrackGram& gram) {
  Row row;
  const bool quantile = now.q > 0 && now.q < 1;
  const double rate =
      now.shift + sqrt(2.0 * static_cast<double>(columns)) * (quantile ? normal_quantile(now.q) : NAN);
  row.flags = problems(scheme, now, rate, gram.square);
  const bool started = before.steps > 0;
  const bool here = now.alpha > 0 && now.sigma > 0 && gram.square > 0 && std::isfinite(rate) &&
                    std::isfinite(now.alpha * now.sigma * gram.square * now.cfg_scale);
  const bool on_course =
      arrived(now, before) && std::isfinite(gram.turn + gram.move + gram.move_last + gram.state_last);
  if (started && here && !on_course) row.flags |= stale_state;
  row.known = started && on_course && here;
  row.guided = (row.flags & ~stale_state) == 0;
  if (here) {
    row.rate = rate, row.kappa = now.sigma / now.alpha;
    row.square = gram.square, row.state = gram.state;
  }
  if (row.guided) row.kappa_end = now.sigma_end / now.alpha_end;
  row.h = log(row.kappa / row.kappa_end);
  if (row.known) {
    row.kappa_last = before.sigma / before.alpha, row.square_last = before.sq_norm, row.eta_last = before.eta;
    row.h_last = log(row.kappa_last / row.kappa);
    row.turn = gram.turn, row.move = gram.move, row.move_last = gram.move_last, row.state_last = gram.state_last;
  }
  return row;
}

struct Measured {
  double commanded, realised, miss, mismatch, skew;
};

FASTDENSITY_HOST_DEVICE Measured measure(const Row& row, const TrackMemory& before) {
  if (!row.known)
    return {before.commanded + before.commanded_next, before.realised + before.realised_next, 0, 0, 0};
  const double h = row.h_last, earlier = before.length;
  const bool steady = h > kTinyStep, noisy = before.noisy != 0, smooth = steady && !noisy;
  const double per_kappa = steady ? h / (row.kappa - row.kappa_last) : -1.0 / row.kappa;
  double drift = row.move, drift_last = row.move_last, share = 0;
  if (noisy) {
    drift = before.drift_eps * row.turn + before.drift_state * (row.state - row.move);
    drift_last = before.drift_eps * row.square_last + before.drift_state * (row.state_last - row.move_last);
    share = row.square - 2.0 * row.turn + row.square_last;
  }
  double gain = 0.5 * per_kappa * (drift + drift_last) - 0.5 * h * (row.square + row.square_last - share);
  gain -= 0.5 * (row.move + row.move_last - drift - drift_last) / row.kappa;
  Measured result{0, 0, 0, 0, 0};
  if (smooth) {
    result.mismatch = row.square + row.rate - per_kappa * row.move / h;
    result.skew = before.skew;
    if (earlier > kTinyStep) result.skew -= 0.5 * ((h * h - earlier * earlier) / earlier) * before.mismatch;
  }
  gain += 0.5 * (result.skew + 0.5 * h * result.mismatch) - 0.5 * (before.skew + 0.5 * earlier * before.mismatch);
  result.commanded = before.commanded + 0.5 * h * (before.rate + row.rate);
  result.realised = before.realised + gain;
  result.miss = gain - before.realised_next;
  return result;
}

struct Prediction {
  double base, slope;
};

FASTDENSITY_HOST_DEVICE void one_step_move(const TrackParameters& now, double* u, double* v) {
  const double alpha = now.alpha > 0 ? now.alpha : 1.0, end = now.alpha_end > 0 ? now.alpha_end : 1.0;
  *u = (now.sigma_next - now.alpha_next * (now.sigma / alpha)) / end, *v = now.alpha_next / end - 1.0;
}

FASTDENSITY_HOST_DEVICE Prediction predict(const TrackParameters& now, const Row& row, bool ahead, double u, double v) {
  double along = 1, mean_square = row.square, lean = 0;
  if (ahead) {
    const double nodes[4] = {0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970263};
    const double weights[4] = {0.17392742256872693, 0.32607257743127307, 0.32607257743127307, 0.17392742256872693};
    const double fall = clamp(log(row.square / row.square_last) / row.h_last, kFastestFall, kFastestRise);
    const double log_cosine = log(clamp(row.turn / sqrt(row.square * row.square_last), kLeastCosine, 1.0));
    double across = 0, mean = 0;
    along = 0;
    for (int i = 0; i < 4; ++i) {
      const double size = exp(0.5 * fall * (nodes[i] * row.h)), ratio = nodes[i] * row.h / row.h_last;
      const double cosine = exp(log_cosine * ratio * ratio), sine = 1.0 - cosine * cosine;
      along += weights[i] * size * cosine;
      across += weights[i] * size * sqrt(sine > 0 ? sine : 0.0);
      mean += weights[i] * size * size;
    }
    mean_square = mean * row.square;
    const double normal = row.square_last - row.turn * row.turn / row.square;
    if (normal > 1e-12 * row.square_last) lean = across * sqrt(row.square / normal);
  }
  const double a = along + lean * row.turn / row.square, c = -lean;
  const double step = row.kappa_end - row.kappa, carry = row.known ? now.carry : 0.0;
  const double w = step * carry / row.kappa;
  u *= 1.0 + carry;
  const double per_kappa = row.h / (step != 0 ? step : 1.0);
  const double last = a * row.turn + c * row.square_last;
  const double rest = v * (a * row.state + c * row.state_last) -
                      w * (a * row.move + c * row.move_last + row.kappa_last * row.eta_last * last);
  return {per_kappa * rest - row.h * mean_square, per_kappa * u * along * row.square};
}

FASTDENSITY_HOST_DEVICE double response(const Row& row, const TrackMemory& before) {
  const double kappa = row.kappa, last = row.kappa_last;
  const double denominator = row.move + row.turn * (last * last - kappa * kappa) / last;
  double found = before.steps > 0 ? before.response : 1.0;
  if (row.known && row.h_last > kTinyStep && before.noisy == 0 && row.turn > 0 &&
      denominator > 0.25 * row.turn * (last - kappa))
    found = (row.square * kappa - row.turn * kappa * kappa / last) / denominator;
  return clamp(found, 1e-3, 1.0);
}

FASTDENSITY_HOST_DEVICE double limit(double eta, double stride, double response, double mean_square) {
  const double reach = fmax(stride * response, 1e-12), distance = fmax(sqrt(mean_square / response), 1e-12);
  const double shortest = clamp(kNearest / distance, kShortest, 1.0);
  const double most = (1.0 - shortest * (1.0 - reach)) / reach, least = (1.0 - kLongest) / reach;
  return fmin(fmax(eta, least), most);
}

FASTDENSITY_HOST_DEVICE TrackReport advance(TrackScheme scheme, std::int64_t columns, const TrackParameters& now,
                                            const TrackMemory& before, const Row& row, TrackMemory& after) {
  const Measured measured = measure(row, before);
  const double deficit = measured.commanded - measured.realised, h = row.h;
  const bool steady = row.known && row.h_last > kTinyStep;
  const double trend = steady ? (row.rate - before.rate) / row.h_last : 0.0;
  const double commanded = h * row.rate + 0.5 * h * h * trend, wanted = commanded + deficit;
  const bool ahead = steady && before.noisy == 0 && row.turn > 0 && scheme == TrackScheme::direct &&
                     now.noise_scale == 0;
  double along_eps, along_state;
  one_step_move(now, &along_eps, &along_state);
  const Prediction ahead_of_us = predict(now, row, ahead, along_eps, along_state);
  double error = 0;
  if (ahead && now.final != 0 && before.steps > 2) error = measured.miss * (h / row.h_last) * (h / row.h_last);
  double eta = 1.0;
  if (row.guided && fabs(ahead_of_us.slope) > 0)
    eta = (wanted - error - ahead_of_us.base) / ahead_of_us.slope + now.repair / row.square;
  const double answer = response(row, before);
  const double bounded = limit(eta, -expm1(-h), answer, row.square / static_cast<double>(columns));
  after = TrackMemory{};
  after.response = answer, after.commanded = measured.commanded, after.realised = measured.realised;
  after.limited = before.limited;
  if (!row.guided) return {0.0, row.square, deficit, static_cast<double>(row.flags)};
  const bool limited = bounded != eta;
  after.steps = (row.known ? before.steps : 0.0) + 1.0;
  after.alpha = now.alpha, after.sigma = now.sigma, after.alpha_end = now.alpha_end, after.sigma_end = now.sigma_end;
  after.sq_norm = row.square, after.rate = row.rate, after.eta = bounded, after.noisy = now.noise_scale > 0 ? 1.0 : 0.0;
  after.drift_eps = bounded * along_eps, after.drift_state = along_state;
  after.commanded_next = commanded;
  after.realised_next = limited ? ahead_of_us.base + ahead_of_us.slope * bounded + error : wanted;
  after.length = row.known ? row.h_last : 0.0, after.mismatch = measured.mismatch, after.skew = measured.skew;
  after.limited += limited ? 1.0 : 0.0;
  return {bounded - 1.0, row.square, deficit, static_cast<double>(row.flags | (limited ? limited_flag : 0))};
}

FASTDENSITY_HOST_DEVICE TrackReport correct(std::int64_t columns, const TrackMemory& before, const Row& row,
                                            TrackMemory& after) {
  const double h = row.h_last, deficit = before.commanded - before.realised, both = row.square + row.turn;
  after = before;
  if (!(row.guided && row.known && both > 0 && h > kTinyStep))
    return {0.0, row.square, deficit, static_cast<double>(row.flags)};
  const double first = row.eta_last * (row.square_last + row.turn), wanted = before.commanded_next + deficit;
  const double eta = (2.0 * (2.0 * (wanted / h) + row.square_last + row.square) - first) / both;
  const double bounded = limit(eta, -expm1(-h), clamp(before.response, 1e-3, 1.0),
                               row.square / static_cast<double>(columns));
  const bool limited = bounded != eta;
  const double reached = h * (0.25 * (first + bounded * both) - 0.5 * (row.square_last + row.square));
  after.realised_next = limited ? reached : wanted;
  after.limited += limited ? 1.0 : 0.0;
  return {bounded - 1.0, row.square, deficit, static_cast<double>(row.flags | (limited ? limited_flag : 0))};
}

FASTDENSITY_HOST_DEVICE TrackReport decide(TrackScheme scheme, std::int64_t columns, const TrackParameters& now,
                                           const TrackMemory& before, const TrackGram& gram, TrackMemory& after) {
  const Row row = make_row(scheme, columns, now, before, gram);
  TrackReport report = scheme == TrackScheme::corrector ? correct(columns, before, row, after)
                                                        : advance(scheme, columns, now, before, row, after);
  report.sq_norm = gram.square;
  return report;
}

}  // namespace track
}  // namespace fastdensity
