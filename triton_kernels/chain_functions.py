"""The unary steps of chains in Triton: a function and its derivative at once, for kernels to inline.

Arithmetic is in float32 or float64, the dtype of the argument. The names are those of `fastdensity.chain_program`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logistic(x):
    """1 / (1 + e^-x), and its derivative as a product of it and its complement, neither by a subtraction."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    return tl.where(x >= 0, large, e * large), e * large * large


@triton.jit
def _tanh(x):
    """By exponentials; near zero, where those cancel, by a polynomial, or for float64 by a continued fraction."""
    z = tl.abs(x)
    e = tl.exp(-2.0 * z)
    large = (1.0 - e) / (1.0 + e)
    u = tl.minimum(x * x, 0.5)
    if x.dtype == tl.float64:
        fraction = 19.0 + u / 21.0
        for odd in tl.static_range(17, 0, -2):
            fraction = odd + u / fraction
        small = x / fraction
    else:
        p = -0.005717045 * u + 0.0206505872
        p = p * u - 0.0537434981
        p = p * u + 0.133314913
        p = p * u - 0.333332839
        small = p * u * x + x
    value = tl.where(z < 0.625, small, tl.where(x < 0, -large, large))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _gelu(x):
    mass = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * mass, mass + x * density


@triton.jit
def _gelu_tanh(x):
    """x times the logistic function of 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    square = x * x
    mass, slope = _logistic(1.5957691216057308 * x * (1.0 + 0.044715 * square))
    return x * mass, mass + x * (1.5957691216057308 * (1.0 + 0.134145 * square)) * slope


@triton.jit
def _softplus(x):
    """torch's: the identity beyond 20. log(1 + e) where 1 + e rounds is log(u) e / (u - 1), u what it rounds to."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    excess = u - 1.0
    logarithm = tl.where(excess == 0.0, e, tl.log(u) * (e / tl.where(excess == 0.0, 1.0, excess)))
    value = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + logarithm
    slope = tl.where(x < 0, e / u, 1.0 / u)
    return tl.where(x > 20, x, value), tl.where(x > 20, 1.0, slope)


@triton.jit
def unary(NAME: tl.constexpr, x, CONSTANT: tl.constexpr):
    """(value, derivative) of one step, in whose place stands anything where `pass_tangent` does not read it."""
    if NAME == "scale":
        return x * CONSTANT, x
    elif NAME == "shift":
        return x + CONSTANT, x
    elif NAME == "neg":
        return -x, x
    elif NAME == "silu":
        mass, slope = _logistic(x)
        return x * mass, mass + x * slope
    elif NAME == "gelu":
        return _gelu(x)
    elif NAME == "gelu_tanh":
        return _gelu_tanh(x)
    elif NAME == "relu":
        return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0).to(x.dtype)
    elif NAME == "tanh":
        return _tanh(x)
    elif NAME == "sigmoid":
        return _logistic(x)
    elif NAME == "softplus":
        return _softplus(x)
    elif NAME == "exp":
        value = tl.exp(x)
        return value, value
    elif NAME == "log":
        return tl.log(x), 1.0 / x
    elif NAME == "sqrt":
        value = tl.sqrt(x)
        return value, 0.5 / value
    elif NAME == "rsqrt":
        value = 1.0 / tl.sqrt(x)
        return value, -0.5 * value / x
    elif NAME == "square":
        return x * x, x + x
    elif NAME == "reciprocal":
        value = 1.0 / x
        return value, -value * value
    elif NAME == "sin":
        return tl.sin(x), tl.cos(x)
    elif NAME == "cos":
        return tl.cos(x), -tl.sin(x)
    elif NAME == "leaky_relu":
        one = tl.full(x.shape, 1.0, x.dtype)  # a literal alone would be float32 first
        return tl.where(x > 0, x, x * CONSTANT), tl.where(x > 0, one, one * CONSTANT)
    else:
        tl.static_assert(NAME == "abs", "unknown step")
        return tl.abs(x), (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def pass_tangent(NAME: tl.constexpr, slope, tangent, CONSTANT: tl.constexpr):
    """The tangent after a unary step. Those with a constant derivative do not read `slope`."""
    if NAME == "scale":
        return tangent * CONSTANT
    elif NAME == "shift":
        return tangent
    elif NAME == "neg":
        return -tangent
    elif NAME == "relu":  # no product: 0 * inf is not 0
        return tl.where(slope == 0.0, 0.0, tangent)
    else:
        return slope * tangent
