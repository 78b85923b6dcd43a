"""dual_attention against torch's scaled_dot_product_attention under func.jvp, in every combination of what it takes."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from attention_cases import MASKS, assert_as_good_as_eager, by_func_jvp, random_problem

from fastdensity._backend import use
from fastdensity.ops import dual_attention_native
from fastdensity.ops.dual_attention import dual_attention
from fastdensity.reference import dual_attention as reference

DUALS = [duals for duals in itertools.product((True, False), repeat=3) if any(duals)]
SHAPES = {
    "self": {"length": 9, "keys": 9, "width": 8, "value_width": 8},
    "cross, grouped": {"heads": 4, "length": 7, "keys": 13, "width": 72, "value_width": 40},
    "one query, one key head": {"heads": 3, "key_heads": 1, "length": 1, "keys": 20, "width": 5, "value_width": 3},
    "more queries than keys": {"heads": 4, "length": 33, "keys": 6},
}
# chunks of one row of queries at a time, of a few, of a few heads
CHUNK_BYTES = (1, 20_000, 2**22)


def attend(problem):
    return dual_attention(*problem.arguments)


@pytest.mark.parametrize("duals", DUALS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", MASKS)
def test_is_func_jvp_of_attention(mask, causal, duals):
    for number, shape in enumerate(SHAPES.values()):
        problem = random_problem(**shape, tangents=1 + number % 3, duals=duals, mask=mask, causal=causal)
        want = by_func_jvp(problem)
        assert (attend(problem) - want).abs().max() < 1e-12
        assert (reference.dual_attention(*problem.arguments) - want).abs().max() < 1e-12


@pytest.mark.parametrize("chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", ["none", "bool", "add"])
def test_chunks(monkeypatch, mask, causal, chunk_bytes):
    monkeypatch.setattr(dual_attention_native, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(dual_attention_native, "_is_narrow", lambda rows, columns: False)
    problem = random_problem(heads=6, length=75, keys=50, mask=mask, causal=causal, tangents=1)
    assert (attend(problem) - by_func_jvp(problem)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "add"])
def test_precision(mask, dtype):
    for causal, duals in itertools.product((False, True), ((True, True, True), (True, False, False))):
        problem = random_problem(
            heads=4, length=64, keys=80, width=64, value_width=72, mask=mask, causal=causal, duals=duals, dtype=dtype
        )
        assert_as_good_as_eager(problem, attend(problem))


def test_large_scores_do_not_overflow():
    # many rows: how far a row is off depends on how close its two largest scores are
    options = {"batch": 8, "heads": 8, "key_heads": 8, "length": 20, "keys": 30, "width": 72}
    problem = replace(random_problem(**options, dtype=torch.float32), scale=256.0)
    assert_as_good_as_eager(problem, attend(problem))


@pytest.mark.parametrize("mask", ["bool", "add"])
def test_rows_that_attend_to_nothing_are_zero(mask):
    problem = random_problem(mask=mask, dtype=torch.float32)
    assert not attend(problem)[:, 0, 0, 0].any()
    nothing = replace(problem, mask=torch.zeros(7, dtype=torch.bool))
    assert not attend(nothing).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_other_dtypes(dtype):
    """An additive mask of another precision, transposed and expanded memory."""
    problem = random_problem(heads=4, dtype=dtype)
    mask = torch.randn(7, 2, dtype=torch.float32).t()[:, None, None, :].expand(2, 4, 5, 7)
    got = attend(replace(problem, mask=mask))
    want = attend(replace(problem, mask=mask.contiguous().to(torch.float64)))
    torch.testing.assert_close(got, want)


def test_any_strides():
    problem = random_problem(heads=4, length=9, keys=9, width=8, value_width=8)
    packed = torch.stack([problem.query, problem.query, problem.query], -2).transpose(2, 3)  # as a joint projection
    query = packed[..., 1, :].transpose(2, 3)
    assert not query.is_contiguous()
    value = torch._neg_view(problem.value.mT.contiguous().mT)
    got = attend(replace(problem, query=query, value=value))
    assert got.is_contiguous()
    assert torch.equal(got, attend(replace(problem, value=-problem.value)))


def sample(problem, first, last):
    cut = [
        x[:, first:last] if dual else x[first:last]
        for x, dual in zip((problem.query, problem.key, problem.value), problem.duals, strict=True)
    ]
    return replace(problem, query=cut[0], key=cut[1], value=cut[2])


@pytest.mark.parametrize(("length", "width"), [(16, 64), (100, 40), (300, 64), (16, 72), (100, 80), (300, 72)])
def test_a_sample_does_not_see_its_batch(length, width):
    problem = random_problem(batch=5, length=length, keys=length, width=width, value_width=width, dtype=torch.float32)
    whole = attend(problem)
    for first, last in ((0, 1), (2, 5)):
        assert torch.equal(attend(sample(problem, first, last)), whole[:, first:last])


@pytest.mark.parametrize("name", ["batch", "heads", "length", "value_width", "keys", "width", "tangents"])
def test_empty(name):
    options = {"heads": 2, "key_heads": 2, name: 0}
    if name == "heads":
        options["key_heads"] = 0
    problem = random_problem(**options)
    out = attend(problem)
    torch.testing.assert_close(out, reference.dual_attention(*problem.arguments))
    if name == "keys":
        assert out.numel()
        assert not out.any()


def test_what_does_not_fit_is_named():
    good = random_problem()
    wrong = {
        "query must be": {"query": good.query[0]},
        "key must be": {"key": good.key[..., :5]},
        "key must have a number of heads": {"key": good.key[:, :, [0, 0, 0]], "value": good.value[:, :, [0, 0, 0]]},
        "key must have 2 tangents": {"key": good.key[:2]},
        "value must be": {"value": good.value[:, :, :, :3]},
        "value must have the query's dtype": {"value": good.value.float()},
        "mask must be broadcastable": {"mask": torch.ones(3, 7, dtype=torch.bool)},
        "mask must be bool or floating": {"mask": torch.ones(5, 7, dtype=torch.int64)},
        "one of query_dual": {
            "query": good.query[0], "key": good.key[0], "value": good.value[0], "duals": (False, False, False),
        },
    }  # fmt: skip
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            attend(replace(good, **changes))


@pytest.mark.parametrize("mask", ["none", "bool", "add"])
def test_nested_forward_mode(mask):
    problem = random_problem(mask=mask, causal=True, tangents=1)
    primals = (problem.query, problem.key, problem.value)
    directions = tuple(torch.randn_like(x) for x in primals)

    def through(function):
        def run(query, key, value):
            return function(replace(problem, query=query, key=key, value=value))

        return torch.func.jvp(run, primals, directions)

    for got, want in zip(through(attend), through(by_func_jvp), strict=True):
        assert (got - want).abs().max() < 1e-12


def test_vmap_and_backward():
    problem = random_problem(length=3, keys=4, width=2, value_width=2, heads=2, key_heads=1, tangents=1, mask="bool")
    keys = torch.stack([problem.key, 2 * problem.key])
    batched = torch.vmap(lambda key: attend(replace(problem, key=key)))(keys)
    torch.testing.assert_close(batched, torch.stack([attend(replace(problem, key=key)) for key in keys]))
    inputs = tuple(x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value))

    def run(query, key, value):
        return attend(replace(problem, query=query, key=key, value=value))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_in_graphs(mask):
    problem = random_problem(mask=mask, duals=(True, False, True))
    compiled = torch.compile(dual_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*problem.arguments), attend(problem))
    operator = torch.ops.fastdensity.dual_attention
    torch.library.opcheck(operator, problem.arguments)
    query = problem.query.clone().requires_grad_()
    torch.library.opcheck(operator, (query, *problem.arguments[1:]))


def test_the_torch_backend_agrees():
    problem = random_problem()
    with use("torch"):
        want = attend(problem)
    torch.testing.assert_close(attend(problem), want)


MEMORY = """
import resource, torch
from fastdensity.ops.dual_attention import dual_attention
torch.set_num_threads(1)
dual_attention(*(torch.randn(2, 1, 1, 300, 16) for _ in range(3)), True, True, True, None, True, 0.25)
mask = torch.zeros(1, 1, 1, 4096).expand(1, 1, 4096, 4096)
inputs = [torch.randn(2, 1, 1, 4096, 16) for _ in range(3)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dual_attention(*inputs, True, True, True, mask, False, 0.25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_far_below_that_of_the_scores():
    """Scores and their tangents would take 128 MiB, the expanded mask 64."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 24 * 1024  # KiB


def test_additive_and_bool_masks_agree():
    problem = random_problem(mask="bool", dtype=torch.float32)
    added = torch.zeros(problem.mask.shape).masked_fill(~problem.mask, -math.inf)
    assert torch.equal(attend(problem), attend(replace(problem, mask=added)))
