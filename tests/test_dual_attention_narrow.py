"""The kernel for narrow heads on CPU, on sizes around the vectors' widths, whether or not it would be chosen there."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from attention_cases import assert_as_good_as_eager, by_func_jvp, random_problem

from fastdensity.ops import dual_attention_native
from fastdensity.ops.dual_attention import dual_attention
from fastdensity.reference import dual_attention as reference

DUALS = [duals for duals in itertools.product((True, False), repeat=3) if any(duals)]
choice = dual_attention_native._is_narrow


@pytest.fixture(autouse=True)
def always_narrow(monkeypatch):
    monkeypatch.setattr(dual_attention_native, "_is_narrow", lambda rows, columns: True)


def attend(problem):
    return dual_attention(*problem.arguments)


def assert_exact(problem):
    assert problem.query.dtype == torch.float64
    assert (attend(problem) - by_func_jvp(problem)).abs().max() < 1e-12


@pytest.mark.parametrize("width", range(1, 34))
def test_columns(width):
    assert_exact(random_problem(length=17, keys=11, width=width, value_width=34 - width, tangents=1))


@pytest.mark.parametrize("keys", [*range(1, 18), 127, 128, 129, 256, 300])
def test_keys(keys):
    assert_exact(random_problem(batch=1, length=5, keys=keys))
    assert_as_good_as_eager(*with_result(random_problem(length=20, keys=keys, dtype=torch.float32)))


@pytest.mark.parametrize("length", [*range(1, 19), 31, 32, 33, 300])
def test_queries(length):
    assert_exact(random_problem(length=length, keys=9, tangents=3))


def with_result(problem):
    return problem, attend(problem)


@pytest.mark.parametrize("duals", DUALS, ids=str)
def test_what_is_plain(duals):
    problem = random_problem(
        heads=6, length=7, keys=19, width=5, value_width=13, duals=duals
    )  # three heads share a key
    assert_exact(problem)
    assert_as_good_as_eager(*with_result(problem.to(torch.float32)))


def test_zero_tangents_are_those_of_what_is_plain():
    problem = random_problem(length=20, keys=30, dtype=torch.float32)
    key, value = problem.key.clone(), problem.value.clone()
    key[1:], value[1:] = 0, 0
    plain = replace(problem, key=key[0], value=value[0], duals=(True, False, False))
    assert torch.equal(attend(replace(problem, key=key, value=value)), attend(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 20, 32, 64])
def test_precision(width, dtype):
    for duals in ((True, True, True), (True, False, False), (False, False, True)):
        problem = random_problem(heads=4, length=64, keys=256, width=width, value_width=width, duals=duals, dtype=dtype)
        assert_as_good_as_eager(*with_result(replace(problem, scale=width**-0.5)))


def test_large_scores_do_not_overflow():
    """The scale is a power of two: of others, where they are rounded decides about such scores."""
    problem = random_problem(batch=8, heads=8, key_heads=8, length=40, keys=30, dtype=torch.float32)
    assert_as_good_as_eager(*with_result(replace(problem, scale=256.0)))


def test_neither_batch_nor_threads_show():
    problem = random_problem(batch=5, heads=4, length=40, keys=70, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(attend(problem))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    cut = [x[:, 3:4] for x in (problem.query, problem.key, problem.value)]
    assert torch.equal(attend(replace(problem, query=cut[0], key=cut[1], value=cut[2])), results[0][:, 3:4])
    first = replace(problem, query=problem.query[:, :, :, 21:25])
    assert torch.equal(attend(first), results[0][:, :, :, 21:25])


def test_strides():
    problem = random_problem(heads=4, key_heads=4, length=21, keys=21, width=8, value_width=8, dtype=torch.float32)
    want = attend(problem)
    inner = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (problem.query, problem.key, problem.value)]
    assert torch.equal(attend(replace(problem, query=inner[0], key=inner[1], value=inner[2])), want)
    outer = [x.mT.contiguous().mT for x in (problem.query, problem.key, problem.value)]
    assert torch.equal(attend(replace(problem, query=outer[0], key=outer[1], value=outer[2])), want)
    shared = replace(problem, key=problem.key[:, :1].expand(-1, 2, -1, -1, -1))
    assert torch.equal(attend(shared), attend(replace(shared, key=shared.key.contiguous())))


def test_a_nan_stays_in_its_row():
    problem = random_problem(length=20, keys=30, dtype=torch.float32)
    query = problem.query.clone()
    query[0, 0, 0, 3, 0] = math.nan
    out, clean = attend(replace(problem, query=query)), attend(problem)
    assert out[:, 0, 0, 3].isnan().all()
    rest = torch.ones(20, dtype=torch.bool)
    rest[3] = False
    assert torch.equal(out[:, :, :, rest], clean[:, :, :, rest])


def test_rows_that_attend_to_nothing_are_zero():
    problem = random_problem(length=20, keys=30, duals=(False, True, True), dtype=torch.float32)
    query, key = problem.query.abs(), problem.key.clone()
    key[0, ..., 0] = -math.inf
    problem = replace(problem, query=query, key=key)
    assert not attend(problem).any()
    assert not reference.dual_attention(*problem.arguments).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_columns_to_compare(dtype):
    """Scores of width 0 are all zero: the mean of the values."""
    problem = random_problem(length=20, keys=30, width=0, dtype=dtype)
    torch.testing.assert_close(attend(problem), reference.dual_attention(*problem.arguments))


def test_who_is_narrow(monkeypatch):
    monkeypatch.setattr(dual_attention_native, "_is_narrow", choice)
    assert choice(256, 8)
    assert choice(8, 1)
    assert not choice(7, 8)
    assert choice(32, 64)
    assert choice(45, 64)
    assert not choice(17, 64)
    assert not choice(256, 65)
    taken = []
    monkeypatch.setattr(dual_attention_native, "_launch_narrow", lambda *call: taken.append(call[-1].zero_()))
    problem = random_problem(heads=4, length=8, keys=9)
    attend(problem)
    assert len(taken) == 1
    attend(replace(problem, causal=True))
    attend(replace(problem, mask=torch.ones(8, 9, dtype=torch.bool)))
    attend(random_problem(heads=4, length=8, keys=9, value_width=65))
    attend(random_problem(length=3))
    assert len(taken) == 1
