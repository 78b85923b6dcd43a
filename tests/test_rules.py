"""The rule table: the C++ twin agrees with it, and each prediction type means what it says."""

from __future__ import annotations

import math

import pytest

from fastdensity import rules
from fastdensity._backend import native

ENDS = [(0.9, 0.3, 0.95, 0.2), (0.1, 0.99, 0.2, 0.9), (1.0, 40.0, 1.0, 12.0), (0.4, 0.6, 0.0, 1.0)]


def python_coefficients(kind, alpha, sigma, alpha_next, sigma_next, sigma_data):
    norm = math.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
    return (
        *rules.direction(kind, alpha, sigma, sigma_data, norm),
        *rules.step_base(kind, alpha, sigma, alpha_next, sigma_next, sigma_data, norm),
    )


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("number", range(len(rules.PREDICTION_TYPES)))
def test_cpp_table_is_the_python_table(number, ends):
    expected = python_coefficients(rules.PREDICTION_TYPES[number], *ends, 0.7)
    assert native().rule_coefficients(number, *ends, 0.7) == pytest.approx(expected, rel=1e-15, abs=1e-16)


def predict(kind, x0, eps, alpha, sigma, sigma_data):
    """The network output of each type for known data and noise, written from its definition."""
    kappa = sigma / alpha
    c_skip = sigma_data**2 / (kappa**2 + sigma_data**2)
    c_out = kappa * sigma_data / math.sqrt(kappa**2 + sigma_data**2)
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "velocity": eps - x0,
        "velocity_to_data": x0 - eps,
        "score": -eps / sigma,
        "edm": (x0 - c_skip * (x0 + kappa * eps)) / c_out,
    }[kind]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", rules.PREDICTION_TYPES)
def test_table_means_what_it_says(kind, ends):
    alpha, sigma, alpha_next, sigma_next = ends
    x0, eps = 0.37, -1.21
    x, p = alpha * x0 + sigma * eps, predict(kind, x0, eps, alpha, sigma, 0.7)
    along_x, along_p, scale, out_x, out_p, out_direction = python_coefficients(kind, *ends, 0.7)
    direction = along_x * x + along_p * p
    assert scale * direction == pytest.approx(eps, rel=1e-12)
    stepped = out_x * x + out_p * p + out_direction * direction
    assert stepped == pytest.approx(alpha_next * x0 + sigma_next * eps, rel=1e-12)
