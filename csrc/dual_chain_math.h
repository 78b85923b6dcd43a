// The unary steps of a chain with their derivatives, element by element.
#pragma once

#include <cmath>

#include "vector_math.h"

namespace fastdensity::chain {

template <typename Real>
struct Sloped {
  Real value, slope;
};

struct Silu {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Logistic<Real> s = logistic(x);
    return {x * s.value, s.value + x * s.slope};
  }
};

struct Gelu {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Real z = magnitude_of(x), gauss = decay(Real(-0.5) * z * z);
    const Real tail = upper_tail(z, gauss);
    const Real mass = x >= Real(0) ? Real(1) - tail : tail;
    const Real bounded = z < Real(40) ? x : Real(0);  // no infinity times the density's zero
    return {x * mass, mass + bounded * (gauss * Real(0.39894228040143268))};
  }
};

struct GeluTanh {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Real c = Real(1.5957691216057308);  // 2 sqrt(2 / pi): (1 + tanh u) / 2 is the logistic function of 2 u
    const Real square = x * x;
    const Logistic<Real> s = logistic(c * x * (Real(1) + Real(0.044715) * square));
    return {x * s.value, s.value + x * c * (Real(1) + Real(0.134145) * square) * s.slope};
  }
};

struct Relu {  // the slope is 1 where the tangent passes
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    return {x <= Real(0) ? Real(0) : x, x <= Real(0) ? Real(0) : Real(1)};
  }
};

struct LeakyRelu {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real c) {
    return {x > Real(0) ? x : x * c, x > Real(0) ? Real(1) : c};
  }
};

struct Abs {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    return {std::fabs(x), x > Real(0) ? Real(1) : x < Real(0) ? Real(-1) : Real(0)};
  }
};

struct Tanh {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Real z = magnitude_of(x), e = decay(Real(-2) * z), r = Real(1) / (Real(1) + e);
    const Real large = (Real(1) - e) * r;
    const Real value = z < Real(0.625) ? small_tanh(x) : x < Real(0) ? -large : large;
    return {value, Real(4) * e * r * r};
  }
};

struct Sigmoid {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Logistic<Real> s = logistic(x);
    return {s.value, s.slope};
  }
};

struct Softplus {  // torch's: the identity beyond 20
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Real e = decay(-magnitude_of(x)), r = Real(1) / (Real(1) + e);
    const Real value = (x < Real(0) ? Real(0) : x) + log_one_plus(e);
    return {x > Real(20) ? x : value, x > Real(20) ? Real(1) : x < Real(0) ? e * r : r};
  }
};

struct Exp {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Real e = exponential(x);
    return {e, e};
  }
};

struct Log {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    return {logarithm(x), Real(1) / x};
  }
};

struct Sqrt {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Real root = std::sqrt(x);
    return {root, Real(0.5) / root};
  }
};

struct Rsqrt {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Real inverse = Real(1) / std::sqrt(x);
    return {inverse, Real(-0.5) * inverse / x};
  }
};

struct Square {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    return {x * x, x + x};
  }
};

struct Reciprocal {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    const Real inverse = Real(1) / x;
    return {inverse, -inverse * inverse};
  }
};

struct SmallSin {
  static INLINE Sloped<float> at(float x, float) {
    const Circle c = circle(x);
    return {c.sine, c.cosine};
  }
};

struct SmallCos {
  static INLINE Sloped<float> at(float x, float) {
    const Circle c = circle(x);
    return {c.cosine, -c.sine};
  }
};

struct Sin {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    return {std::sin(x), std::cos(x)};
  }
};

struct Cos {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    return {std::cos(x), -std::sin(x)};
  }
};

struct Scale {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real c) {
    return {x * c, c};
  }
};

struct Shift {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real c) {
    return {x + c, Real(1)};
  }
};

struct Negate {
  template <typename Real>
  static INLINE Sloped<Real> at(Real x, Real) {
    return {-x, Real(-1)};
  }
};

}  // namespace fastdensity::chain
