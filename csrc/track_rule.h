// What the closed loop decides for a row, in C++ and CUDA: the twin of fastdensity/reference/track_rule.py, where each
// of these functions is explained. All of it in double.
#pragma once

#include "rules.h"
#include "track_model.h"

namespace fastdensity {

struct TrackGram {
  double square = 0, turn = 0, move = 0, move_last = 0, state = 0, state_last = 0;

  FASTDENSITY_HOST_DEVICE void operator+=(const TrackGram& other);
};

struct TrackParameters {
  double alpha, sigma, alpha_next, sigma_next, alpha_end, sigma_end, q, shift, cfg_scale, noise_scale,
      sigma_data, carry;
};
static_assert(sizeof(TrackParameters) == kTrackParameters * sizeof(double));

struct TrackMemory {
  double steps, alpha, sigma, alpha_end, sigma_end, sq_norm, rate, eta, noise, drift_eps, drift_state, commanded_next,
      realised_next, response, commanded, realised, limited;
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

constexpr double kTinyStep = 1e-9, kSamePlace = 1e-4, kLeastResponse = 1e-3, kLeastTypical = 0.1, kLeastQuiet = 0.05;
constexpr double kShortest = 0.5, kLongest = 2.0, kNearest = 0.1;

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
  bad |= !std::isfinite(now.alpha_next) || !std::isfinite(now.sigma_next) ||
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

// -- fastdensity/reference/track_estimate.py --------------------------------------------------------------------------

FASTDENSITY_HOST_DEVICE double kept_variance(const Row& row, const TrackMemory& before) {
  const double answer = clamp(before.steps > 0 ? before.response : 1.0, kLeastResponse, 1.0);
  return row.kappa_last * row.kappa_last * (1.0 / answer - 1.0);
}

FASTDENSITY_HOST_DEVICE double kept_response(const Row& row, const TrackMemory& before) {
  const double squared = row.kappa * row.kappa;
  return clamp(squared / (kept_variance(row, before) + squared), kLeastResponse, 1.0);
}

// `row` but for the noise at the end of the last step; returns what the noise brought.
FASTDENSITY_HOST_DEVICE double without_noise(const TrackMemory& before, Row& row) {
  if (!(before.noise > 0)) return 0.0;
  const double drift = before.drift_eps * row.turn + before.drift_state * (row.state - row.move);
  const double drift_last =
      before.drift_eps * row.square_last + before.drift_state * (row.state_last - row.move_last);
  const double answer = kept_response(row, before) / row.kappa, across = row.move_last - drift_last;
  const double along = across * row.turn / row.square_last, after = row.move - drift;
  row.square = fmax(row.square - answer * (after + along), kLeastQuiet * row.square);
  row.turn -= answer * across, row.move = drift, row.move_last = drift_last;
  return -0.5 * (after + along) / row.kappa;
}

FASTDENSITY_HOST_DEVICE Fit fit(const Row& row, const TrackMemory& before) {
  const double square = row.square;
  return two_variances(row.square_last / square, row.turn / square, row.move / square, row.move_last / square,
                       row.kappa, row.kappa_last, kept_variance(row, before));
}

FASTDENSITY_HOST_DEVICE double response(const Row& row, const Fit& found) {
  const double squared = row.kappa * row.kappa;
  double total = 0;
  for (const Part& part : found.parts) total += part.share * squared / (part.variance + squared);
  return clamp(total, kLeastResponse, 1.0);
}

FASTDENSITY_HOST_DEVICE double gain_of_fit(const Row& row, const Fit& found) {
  double total = 0;
  for (const Part& part : found.parts)
    total += part.share * part.before * part.before *
             gain(part.variance, found.kappa_last, found.kappa).at(part.move / part.before);
  return row.square * total;
}

FASTDENSITY_HOST_DEVICE double gain_by_trapezoid(const Row& row) {
  const double h = row.h_last, per_kappa = h > kTinyStep ? h / (row.kappa - row.kappa_last) : -1.0 / row.kappa;
  return 0.5 * per_kappa * (row.move + row.move_last) - 0.5 * h * (row.square + row.square_last);
}

// Variance of the noise of a step ahead, as it is in y = x / alpha.
FASTDENSITY_HOST_DEVICE double noise_over_state(const TrackParameters& now) {
  const double end = now.alpha_end > 0 ? now.alpha_end : 1.0;
  return (now.noise_scale / end) * (now.noise_scale / end);
}

FASTDENSITY_HOST_DEVICE void one_step_move(const TrackParameters& now, double* u, double* v) {
  const double alpha = now.alpha > 0 ? now.alpha : 1.0, end = now.alpha_end > 0 ? now.alpha_end : 1.0;
  *u = (now.sigma_next - now.alpha_next * (now.sigma / alpha)) / end, *v = now.alpha_next / end - 1.0;
}

FASTDENSITY_HOST_DEVICE Gain scaled(const Gain& by, double number) {
  Gain result;
  result.constant = number * by.constant, result.linear = number * by.linear, result.square = number * by.square;
  return result;
}

FASTDENSITY_HOST_DEVICE Gain predict(std::int64_t columns, const TrackParameters& now, const Row& row, double commanded,
                                     double answers, const Fit& found, bool ahead) {
  const double kappa = row.kappa, step = row.kappa_end - kappa, safe = step != 0 ? step : 1.0;
  const double carry = row.known ? now.carry : 0.0, steering = row.kappa_last * row.eta_last;
  double u = 0, v = 0;
  one_step_move(now, &u, &v);
  const double w = step * carry / kappa, per_eta = u * (1.0 + carry) / safe;
  const double size = static_cast<double>(columns), typical = fmax(size - 2.0 * commanded, kLeastTypical * size);
  // what noise would take of pure noise
  const double taken = 0.5 * size * noise_over_state(now) / (row.kappa_end * row.kappa_end);
  Gain by;
  if (!ahead) {
    const double rest = (v * row.state - w * (row.move + steering * row.turn)) / row.square / safe;
    by.constant = row.h * (rest - 1.0), by.linear = row.h * per_eta;
    by = scaled(by, row.square);
    by.constant -= taken * fmin(row.square / typical, 1.0);
    return by;
  }
  const double fall = clamp(1.0 - answers, kEdge, 1.0 - kEdge);
  const Band range = band(fmax(fmin(row.square / typical, 1.0 - fall), kEdge), fall);
  const double end = row.kappa_end * row.kappa_end;
  double variances[4], weights[4], total = 0, remains = 0, states = 0;
  for (int i = 0; i < 4; ++i) {
    variances[i] = kappa * kappa * exp(range.lowest + kNodes[i] * range.width);
    weights[i] = kWeights[i] / (variances[i] + kappa * kappa), total += weights[i];
    states += weights[i] * (variances[i] + kappa * kappa) / kappa;
    remains += kWeights[i] * end / (variances[i] + end);
  }
  const double mean = row.state / row.square - states / total;
  for (int i = 0; i < 4; ++i) {
    const double before = found.before(variances[i]), state = (variances[i] + kappa * kappa) / kappa + mean;
    const double moved = (found.kappa - found.kappa_last) * (found.offset + found.bend * before);
    by.add(weights[i] / total, gain(variances[i], kappa, row.kappa_end), per_eta,
           (v * state - w * (moved + steering * before)) / safe);
  }
  by = scaled(by, row.square);
  by.constant -= taken * remains;
  return by;
}

FASTDENSITY_HOST_DEVICE Gain predict_both(const Row& row, const TrackMemory& before) {
  const Fit found = fit(row, before);
  Gain by;
  for (const Part& part : found.parts)
    by.add(part.share * part.before * part.before, gain(part.variance, found.kappa_last, found.kappa),
           0.5 / part.before, 0.5 * row.eta_last);
  return scaled(by, row.square);
}

// -- fastdensity/reference/track_rule.py ------------------------------------------------------------------------------

FASTDENSITY_HOST_DEVICE double limit(double eta, double stride, double response, double mean_square) {
  const double reach = fmax(stride * response, 1e-12), distance = fmax(sqrt(mean_square / response), 1e-12);
  const double shortest = clamp(kNearest / distance, kShortest, 1.0);
  const double most = (1.0 - shortest * (1.0 - reach)) / reach, least = (1.0 - kLongest) / reach;
  return fmin(fmax(eta, least), most);
}

FASTDENSITY_HOST_DEVICE TrackReport advance(TrackScheme scheme, std::int64_t columns, const TrackParameters& now,
                                            const TrackMemory& before, const Row& row, TrackMemory& after) {
  const double h = row.h, square = row.square;
  const bool steady = row.known && row.h_last > kTinyStep;
  Row quiet = row;
  const double brought = without_noise(before, quiet);
  const bool smooth = steady && quiet.turn > 0;
  Fit found;
  if (smooth) found = fit(quiet, before);
  const double answers = smooth ? response(quiet, found) : kept_response(row, before);
  double commanded = before.commanded_next, realised = before.realised_next;
  if (row.known) commanded = 0.5 * row.h_last * (before.rate + row.rate);
  if (row.known) realised = (smooth ? gain_of_fit(quiet, found) : gain_by_trapezoid(quiet)) + brought;
  commanded += before.commanded, realised += before.realised;
  const double deficit = commanded - realised;
  const double trend = steady ? (row.rate - before.rate) / row.h_last : 0.0;
  const double commanded_next = h * row.rate + 0.5 * h * h * trend;
  const bool ahead = smooth && scheme == TrackScheme::direct;
  const Gain expected = predict(columns, now, row, commanded, answers, found, ahead);
  const double eta = expected.solved(commanded_next + deficit);
  const double bounded = limit(eta, -expm1(-h), answers, square / static_cast<double>(columns));
  after = TrackMemory{};
  after.response = answers, after.commanded = commanded, after.realised = realised, after.limited = before.limited;
  if (!row.guided) return {0.0, square, deficit, static_cast<double>(row.flags)};
  const bool limited = bounded != eta;
  double along_eps = 0, along_state = 0;
  one_step_move(now, &along_eps, &along_state);
  after.steps = (row.known ? before.steps : 0.0) + 1.0;
  after.alpha = now.alpha, after.sigma = now.sigma, after.alpha_end = now.alpha_end, after.sigma_end = now.sigma_end;
  after.sq_norm = square, after.rate = row.rate, after.eta = bounded, after.noise = noise_over_state(now);
  after.drift_eps = bounded * along_eps, after.drift_state = along_state;
  after.commanded_next = commanded_next, after.realised_next = expected.at(bounded);
  after.limited += limited ? 1.0 : 0.0;
  return {bounded - 1.0, square, deficit, static_cast<double>(row.flags | (limited ? limited_flag : 0))};
}

FASTDENSITY_HOST_DEVICE TrackReport correct(std::int64_t columns, const TrackMemory& before, const Row& row,
                                            TrackMemory& after) {
  const double h = row.h_last, deficit = before.commanded - before.realised;
  after = before;
  if (!(row.guided && row.known && row.turn > 0 && h > kTinyStep))
    return {0.0, row.square, deficit, static_cast<double>(row.flags)};
  const Gain expected = predict_both(row, before);
  const double eta = expected.solved(before.commanded_next + deficit), share = row.turn / row.square_last;
  const double mean = 0.5 * (row.eta_last + share * eta);
  const double kept =
      limit(mean, -expm1(-h), kept_response(row, before), row.square_last / static_cast<double>(columns));
  const bool limited = kept != mean;
  const double bounded = limited ? (2.0 * kept - row.eta_last) / share : eta;
  after.realised_next = expected.at(bounded);
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
