"""The ends of a trace in Triton's interpreter; run by tests/test_trace_linear_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from probe_cases import DTYPES, STREAM
from trace_linear_cases import (
    DISTRIBUTIONS,
    assert_first,
    assert_last,
    ids_of,
    key_of,
    random_first,
    random_last,
)

from fastdensity._backend import use
from fastdensity.ops.probe import make_probes
from fastdensity.ops.trace_linear import dual_linear_probe, dual_linear_trace
from fastdensity.triton_kernels.trace_linear import dual_linear_probe_triton, dual_linear_trace_triton

EVERY = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def first(problem, activation, key, count, columns, distribution):
    x, weight, _ = problem
    out = torch.full((1 + count, x.shape[0], weight.shape[0] // (1 + (activation == "geglu"))), torch.nan).to(x.dtype)
    dual_linear_probe_triton(*problem, activation, *key, count, columns, distribution, STREAM, out)
    return out


def last(problem, key, distribution):
    stacked, weight, _ = problem
    value = torch.full((stacked.shape[1], weight.shape[0]), torch.nan).to(stacked.dtype)
    forms = torch.full((stacked.shape[0] - 1, stacked.shape[1]), torch.nan).double()
    dual_linear_trace_triton(*problem, *key, distribution, STREAM, value, forms)
    return value, forms


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probes_are_those_of_make_probes(distribution, dtype):
    """A unit weight hands them on: elements of several words and counters, a tile's edge within a word."""
    columns = 150
    problem = torch.zeros(1, columns, dtype=dtype), torch.eye(columns, dtype=dtype), None
    key = key_of(1)
    got = first(problem, "none", key, 2, columns, distribution)[1:]
    with use("triton"):
        wanted = make_probes(*key, 2, columns, distribution, STREAM, dtype)
    assert torch.equal(got, wanted)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_layers_in_every_dtype(distribution, dtype):
    for count, activation, bias in ((1, "silu", True), (2, "none", False)):
        problem = random_first(5, 140, 26, dtype, bias)
        got = first(problem, activation, key_of(5), count, 140, distribution)
        assert_first(got, problem, activation, count, 140, distribution, key_of(5))


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_probes_beyond_the_group(count, activation):
    problem = random_first(3, 40, 12)
    got = first(problem, activation, key_of(3), count, 40, "rademacher")
    assert_first(got, problem, activation, count, 40, "rademacher", key_of(3))


@EVERY
@pytest.mark.parametrize("columns", [1, 2, 31, 128, 130])
def test_inputs_without_probes(distribution, columns):
    problem = random_first(4, 131, 10)
    got = first(problem, "tanh", key_of(4), 2, columns, distribution)
    assert_first(got, problem, "tanh", 2, columns, distribution, key_of(4))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_layers_in_every_dtype(distribution, dtype):
    for tangents, bias in ((1, True), (2, False)):
        problem = random_last(tangents, 5, 40, 150, dtype, bias)
        assert_last(*last(problem, key_of(5), distribution), problem, distribution, key_of(5))


@EVERY
@pytest.mark.parametrize("tangents", [1, 2, 3, 5, 8])
def test_planes_beyond_the_group(distribution, tangents):
    problem = random_last(tangents, 3, 20, 33)
    assert_last(*last(problem, key_of(3), distribution), problem, distribution, key_of(3))


def test_several_tiles_of_rows_and_partials():
    problem = random_last(1, 64 * 9 + 1, 8, 40)
    assert_last(*last(problem, key_of(577), "rademacher"), problem, "rademacher", key_of(577))
    problem = random_last(1, 2, 8, 32 * 65 + 7)
    assert_last(*last(problem, key_of(2), "normal"), problem, "normal", key_of(2))


def test_a_row_depends_on_no_other_row():
    (x, weight, bias), key = random_first(66, 40, 30), key_of(66)
    whole = first((x, weight, bias), "silu", key, 2, 40, "normal")
    alone = (key[0], ids_of(66)[65:66], *key[2:])
    assert torch.equal(first((x[65:66], weight, bias), "silu", alone, 2, 40, "normal")[:, 0], whole[:, 65])
    (stacked, weight, bias), key = random_last(2, 66, 40, 70), key_of(66)
    value, forms = last((stacked, weight, bias), key, "hadamard")
    value_alone, forms_alone = last((stacked[:, 65:66], weight, bias), alone, "hadamard")
    assert torch.equal(value_alone[0], value[65])
    assert torch.equal(forms_alone[:, 0], forms[:, 65])


def test_the_backend_reaches_the_kernels():
    problem, key = random_first(), key_of(5)
    stacked = random_last()
    with use("triton"):
        got = dual_linear_probe(*problem, "relu", *key, 2, 24, "rademacher", STREAM)
        value, forms = dual_linear_trace(*stacked, *key, "rademacher", STREAM)
    assert torch.equal(got, first(problem, "relu", key, 2, 24, "rademacher"))
    assert torch.equal(value, last(stacked, key, "rademacher")[0])
    assert torch.equal(forms, last(stacked, key, "rademacher")[1])
