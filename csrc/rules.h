// The rule table in C++ and CUDA: the twin of fastdensity/rules.py, and the numbers of a row made from it.
//
// A row is processed in three moves: `plan` reads the row's parameters and says how the direction is made and
// how operands enter the output; the kernel sums direction.direction and direction.noise over the row; `finish`
// turns the sums into the one coefficient that was missing and into the row's report. All of it in double.
#pragma once

#include <cmath>

#include "ops.h"

#ifdef __CUDACC__
#define FASTDENSITY_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTDENSITY_HOST_DEVICE inline
#endif

namespace fastdensity {

// Everything a row needs between the moves. Vectors: v0, v1 and v2 as in RowsCall, and the direction
// d = along[0] v0 + along[1] v1 + along[2] v2, whose squared norm times `scale`^2 is ||eps||^2 (or ||s||^2).
struct RowPlan {
  double along[3] = {0, 0, 0};
  double out[3] = {0, 0, 0};
  double out_direction = 0;  // set by `finish`
  double scale = 1;
  double total = 0;   // numerator of eta - 1 over ||eps||^2
  double gain = 0;    // added to eta
  double reach = 0;   // d out_direction / d eta
  double noise = 0;   // scale of the projected noise
  double cfg = 1;
  double log_ratio = 0;  // change of ln(alpha / sigma)
  int flags = 0;
};

struct RowReport {
  double eta_minus_one, sq_norm, dlogp;
  int flags;
};

FASTDENSITY_HOST_DEVICE double row_parameter(const Parameter& parameter, std::int64_t row) {
  if (!parameter.data) return parameter.value;
  const std::int64_t at = row * parameter.stride;
  if (parameter.dtype == DataType::float64) return static_cast<const double*>(parameter.data)[at];
  return static_cast<double>(static_cast<const float*>(parameter.data)[at]);
}

// Inverse of the normal cumulative distribution: Wichura, "Algorithm AS 241" (1988), PPND16, relative error 1e-16.
FASTDENSITY_HOST_DEVICE double normal_quantile(double p) {
  const double q = p - 0.5;
  if (fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q *
           (((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r +
                4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r + 1.9715909503065514427e3) * r +
             1.3314166789178437745e2) * r + 3.3871328727963666080e0) /
           (((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r +
                2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r + 6.8718700749205790830e2) * r +
             4.2313330701600911252e1) * r + 1.0);
  }
  const double tail = q < 0 ? p : 1.0 - p;
  double r = sqrt(-log(tail));
  double value;
  if (r <= 5.0) {
    r -= 1.6;
    value = (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r +
                 1.27045825245236838258e0) * r + 3.64784832476320460504e0) * r + 5.76949722146069140550e0) * r +
              4.63033784615654529590e0) * r + 1.42343711074968357734e0) /
            (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r +
                 1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940e0) * r +
              2.05319162663775882187e0) * r + 1.0);
  } else {
    r -= 5.0;
    value = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r +
                 2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580e0) * r +
              5.46378491116411436990e0) * r + 6.65790464350110377720e0) /
            (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r +
                 7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r +
              5.99832206555887937690e-1) * r + 1.0);
  }
  return q < 0 ? -value : value;
}

// What `direction` and `step_base` are handed: sqrt(sigma^2 + alpha^2 sigma_data^2).
FASTDENSITY_HOST_DEVICE double edm_norm(double alpha, double sigma, double sigma_data) {
  return sqrt(sigma * sigma + (alpha * sigma_data) * (alpha * sigma_data));
}

// fastdensity/rules.py, `direction`: eps = scale * (along[0] x + along[1] p).
FASTDENSITY_HOST_DEVICE void direction(PredictionType type, double alpha, double sigma, double sigma_data,
                                       double edm_norm, double* along_x, double* along_p, double* scale) {
  *along_x = 1.0;
  switch (type) {
    case PredictionType::epsilon: *along_x = 0.0, *along_p = 1.0, *scale = 1.0; break;
    case PredictionType::sample: *along_p = -alpha, *scale = 1.0 / sigma; break;
    case PredictionType::v_prediction:
      *along_x = sigma, *along_p = alpha, *scale = 1.0 / (alpha * alpha + sigma * sigma);
      break;
    case PredictionType::velocity: *along_p = alpha, *scale = 1.0 / (alpha + sigma); break;
    case PredictionType::velocity_to_data: *along_p = -alpha, *scale = 1.0 / (alpha + sigma); break;
    case PredictionType::score: *along_x = 0.0, *along_p = 1.0, *scale = -sigma; break;
    case PredictionType::edm:
      *along_x = sigma, *along_p = -alpha * sigma_data * edm_norm, *scale = 1.0 / (edm_norm * edm_norm);
      break;
  }
}

// fastdensity/rules.py, `step_base`: the unguided step out[0] x + out[1] p + out_direction d.
FASTDENSITY_HOST_DEVICE void step_base(PredictionType type, double alpha, double sigma, double alpha_next,
                                       double sigma_next, double sigma_data, double edm_norm, double* out_x,
                                       double* out_p, double* out_direction) {
  const double turn = sigma_next * alpha - alpha_next * sigma;
  double norm = alpha + sigma;
  *out_direction = 0.0;
  switch (type) {
    case PredictionType::epsilon:
      *out_x = alpha_next / alpha, *out_p = 0.0, *out_direction = sigma_next - alpha_next * (sigma / alpha);
      break;
    case PredictionType::sample: *out_x = 0.0, *out_p = alpha_next, *out_direction = sigma_next / sigma; break;
    case PredictionType::v_prediction:
      norm = alpha * alpha + sigma * sigma;
      *out_x = (alpha_next * alpha + sigma_next * sigma) / norm, *out_p = turn / norm;
      break;
    case PredictionType::velocity: *out_x = (alpha_next + sigma_next) / norm, *out_p = turn / norm; break;
    case PredictionType::velocity_to_data: *out_x = (alpha_next + sigma_next) / norm, *out_p = -turn / norm; break;
    case PredictionType::score:
      *out_x = alpha_next / alpha, *out_p = 0.0;
      *out_direction = (sigma_next - alpha_next * (sigma / alpha)) * -sigma;
      break;
    case PredictionType::edm:
      norm = edm_norm * edm_norm;
      *out_x = (alpha_next * alpha * sigma_data * sigma_data + sigma_next * sigma) / norm;
      *out_p = -sigma_data * turn / edm_norm;
      break;
  }
}

FASTDENSITY_HOST_DEVICE int end_flags(double end) {
  if (end == 0.0) return endpoint;
  return end > 0.0 && std::isfinite(end) ? 0 : bad_parameter;
}

FASTDENSITY_HOST_DEVICE void plan_guided(const RowsCall& call, std::int64_t row, bool has_noise, RowPlan& plan) {
  const Parameter* p = call.parameters;
  const double alpha = row_parameter(p[0], row), sigma = row_parameter(p[1], row);
  const double alpha_next = row_parameter(p[2], row), sigma_next = row_parameter(p[3], row);
  const double q = row_parameter(p[4], row), sigma_data = row_parameter(p[9], row);
  const double norm = edm_norm(alpha, sigma, sigma_data);
  plan.gain = row_parameter(p[6], row);
  plan.cfg = row_parameter(p[7], row);
  plan.noise = has_noise ? row_parameter(p[8], row) : 0.0;
  direction(call.type, alpha, sigma, sigma_data, norm, &plan.along[0], &plan.along[1], &plan.scale);

  plan.flags |= end_flags(alpha) | end_flags(sigma);
  if (q > 0.0 && q < 1.0)
    plan.total = row_parameter(p[5], row) + sqrt(2.0 * static_cast<double>(call.columns)) * normal_quantile(q);
  else
    plan.flags |= bad_parameter;
  if (!std::isfinite(plan.total) || !std::isfinite(plan.gain) || !std::isfinite(plan.cfg) ||
      !std::isfinite(plan.noise) || plan.noise < 0.0)
    plan.flags |= bad_parameter;

  if (call.rule == Rule::prediction) {
    plan.out[1] = 1.0;
    plan.reach = plan.flags ? 0.0 : 1.0 / plan.along[1];
    return;
  }
  plan.flags |= end_flags(alpha_next) | end_flags(sigma_next);
  step_base(call.type, alpha, sigma, alpha_next, sigma_next, sigma_data, norm, &plan.out[0], &plan.out[1],
            &plan.out_direction);
  plan.out[2] = plan.noise;
  if (!plan.flags) {
    plan.reach = (sigma_next * alpha - alpha_next * sigma) * plan.scale / alpha;
    plan.log_ratio = log(alpha_next * sigma) - log(sigma_next * alpha);
  }
}

FASTDENSITY_HOST_DEVICE RowPlan plan_row(const RowsCall& call, std::int64_t row, bool has_noise) {
  RowPlan plan;
  const Parameter* p = call.parameters;
  if (call.rule == Rule::drift) {
    const double dt = row_parameter(p[2], row);
    plan.along[2] = 1.0;
    plan.total = row_parameter(p[0], row) + row_parameter(p[1], row);
    plan.out[0] = call.v0.data ? 1.0 : 0.0;
    plan.out[1] = plan.reach = plan.log_ratio = dt;
    if (!std::isfinite(plan.total)) plan.flags |= bad_parameter;
  } else if (call.rule == Rule::radius) {
    plan.along[0] = 1.0;
    plan.total = row_parameter(p[0], row);
    if (!(plan.total >= 0.0) || !std::isfinite(plan.total)) plan.flags |= bad_parameter;
  } else {
    plan_guided(call, row, has_noise, plan);
  }
  return plan;
}

// `norm` is d.d, `overlap` is d.noise (0 without noise). Sets plan.out_direction and plan.flags.
FASTDENSITY_HOST_DEVICE RowReport finish_row(const RowsCall& call, RowPlan& plan, double norm, double overlap) {
  if (norm == 0.0) plan.flags |= zero_score;
  if (!std::isfinite(norm)) plan.flags |= non_finite;
  const bool guided = plan.flags == 0;
  const double sq_norm = norm * plan.scale * plan.scale;
  if (call.rule == Rule::radius) {
    plan.out_direction = guided ? plan.total / sqrt(norm) : 1.0;
    return {plan.out_direction - 1.0, sq_norm, 0.0, plan.flags};
  }
  const double eta_minus_one = guided ? plan.gain + plan.total / sq_norm : 0.0;
  if (guided) plan.out_direction += plan.reach * eta_minus_one;
  if (plan.noise != 0.0 && norm > 0.0 && std::isfinite(norm)) plan.out_direction -= plan.noise * overlap / norm;
  const double dlogp = guided && call.rule != Rule::prediction ? eta_minus_one * sq_norm * plan.log_ratio : 0.0;
  return {eta_minus_one, sq_norm, dlogp, plan.flags};
}

}  // namespace fastdensity
