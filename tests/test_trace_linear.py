"""The ends of a trace: the references, the CPU path in blocks and whole, and every transform of torch."""

from __future__ import annotations

import pytest
import torch
from probe_cases import DTYPES, STREAM
from trace_linear_cases import DISTRIBUTIONS, assert_first, assert_last, ids_of, key_of, random_first, random_last

import fastdensity.ops.trace_linear_native as native
from fastdensity._backend import use
from fastdensity.ops.probe import make_probes
from fastdensity.ops.trace_linear import dual_linear_probe, dual_linear_trace
from fastdensity.reference import trace_linear as reference

EVERY = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
# bytes of scratch memory: all at once; blocks of some probes; of some rows of one; of one row
SCRATCH = pytest.mark.parametrize("scratch", [1 << 22, 4_000, 800, 1])


@EVERY
def test_references_are_a_jvp_and_a_dot_product(distribution):
    (x, weight, bias), key = random_first(4, 9, 9, torch.float64), key_of(4)

    def layer(y):
        return torch.nn.functional.silu(torch.nn.functional.linear(y, weight, bias))

    z = make_probes(*key, 2, 9, distribution, STREAM, torch.float64)
    got = reference.dual_linear_probe(x, weight, bias, "silu", *key, 2, 9, distribution, STREAM)
    pushed = [torch.func.jvp(layer, (x,), (vector,)) for vector in z]
    torch.testing.assert_close(got, torch.stack([pushed[0][0], *(t for _, t in pushed)]), rtol=1e-12, atol=1e-12)
    value, forms = reference.dual_linear_trace(got, weight, bias, *key, distribution, STREAM)
    torch.testing.assert_close(value, got[0] @ weight.T + bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(forms, (z * (got[1:] @ weight.T)).sum(-1), rtol=1e-12, atol=1e-12)


@SCRATCH
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probes_are_those_of_make_probes(distribution, dtype, scratch, monkeypatch):
    """A unit weight hands them on, bit for bit."""
    monkeypatch.setattr(native, "SCRATCH_BYTES", scratch)
    key = key_of(5)
    problem = torch.zeros(5, 70, dtype=dtype), torch.eye(70, dtype=dtype), None
    got = dual_linear_probe(*problem, "none", *key, 4, 70, distribution, STREAM)
    assert torch.equal(got[1:], make_probes(*key, 4, 70, distribution, STREAM, dtype))


@SCRATCH
@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ends_in_every_dtype(distribution, dtype, scratch, monkeypatch):
    monkeypatch.setattr(native, "SCRATCH_BYTES", scratch)
    key = key_of(5)
    for activation, bias in (("none", True), ("none", False), ("silu", True), ("geglu", True)):
        problem = random_first(5, 40, 26, dtype, bias)
        got = dual_linear_probe(*problem, activation, *key, 3, 40, distribution, STREAM)
        assert_first(got, problem, activation, 3, 40, distribution, key)
    for bias in (True, False):
        problem = random_last(3, 5, 24, 50, dtype, bias)
        assert_last(*dual_linear_trace(*problem, *key, distribution, STREAM), problem, distribution, key)


@SCRATCH
@pytest.mark.parametrize("columns", [1, 2, 23])
def test_inputs_without_probes(columns, scratch, monkeypatch):
    monkeypatch.setattr(native, "SCRATCH_BYTES", scratch)
    problem = random_first(5, 24, 10)
    got = dual_linear_probe(*problem, "tanh", *key_of(5), 3, columns, "normal", STREAM)
    assert_first(got, problem, "tanh", 3, columns, "normal", key_of(5))


@pytest.mark.parametrize("rows", [255, 600])
def test_both_matrix_products_of_torch_are_right(rows):
    """Few and many rows take different libraries."""
    problem, key = random_first(rows, 40, 48), key_of(rows)
    got = dual_linear_probe(*problem, "gelu", *key, 2, 40, "rademacher", STREAM)
    assert_first(got, problem, "gelu", 2, 40, "rademacher", key)
    problem = random_last(2, rows, 40, 48)
    assert_last(*dual_linear_trace(*problem, *key, "normal", STREAM), problem, "normal", key)


def test_strided_inputs():
    key = key_of(5)
    x, weight, bias = random_first()
    strided = x.t().contiguous().t(), torch.stack([weight] * 2, -1)[..., 0], torch.stack([bias] * 2, -1)[:, 1]
    got = dual_linear_probe(*strided, "silu", *key, 2, 24, "rademacher", STREAM)
    assert_first(got, (x, weight, bias), "silu", 2, 24, "rademacher", key)
    stacked = random_last()[0]
    transposed = stacked.transpose(1, 2).contiguous().transpose(1, 2)
    got = dual_linear_trace(transposed, *strided[1:], *key, "rademacher", STREAM)
    assert_last(*got, (stacked, weight, bias), "rademacher", key)


@SCRATCH
def test_a_row_among_as_many_others_has_the_same_bits(scratch, monkeypatch):
    """Whatever the others are, and wherever among them it stands: what `fastdensity.divergence` relies on."""
    monkeypatch.setattr(native, "SCRATCH_BYTES", scratch)
    (x, weight, bias), (stacked, *last) = random_first(8, 40, 30), random_last(3, 8, 24, 50)
    seed, ids, *rest = key_of(8)

    def both(order):
        key = (seed, ids[order], *rest)
        got = dual_linear_probe(x[order], weight, bias, "silu", *key, 3, 40, "rademacher", STREAM)
        value, forms = dual_linear_trace(stacked[:, order], *last, *key, "normal", STREAM)
        return got[:, 5 if order[5] == 5 else 0], value[0 if order[0] == 5 else 5], forms[:, 0 if order[0] == 5 else 5]

    for mine, theirs in zip(both(torch.arange(8)), both(torch.full((8,), 5)), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(both(torch.arange(8)), both(torch.tensor([5, 1, 1, 1, 1, 1, 1, 1])), strict=True):
        assert torch.equal(mine, theirs)


def test_inputs_are_left_alone():
    problem, last = random_first(), random_last()
    copies = [tensor.clone() for tensor in (*problem, *last)]
    dual_linear_probe(*problem, "silu", *key_of(5), 2, 24, "rademacher", STREAM)
    dual_linear_trace(*last, *key_of(5), "rademacher", STREAM)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((*problem, *last), copies, strict=True))


def test_empty_batches():
    _, weight, bias = random_first(inputs=8, outputs=6)
    key = key_of(0)
    assert dual_linear_probe(torch.zeros(0, 8), weight, bias, "silu", *key, 2, 8, "normal", STREAM).shape == (3, 0, 6)
    value, forms = dual_linear_trace(torch.zeros(3, 0, 8), weight, bias, *key, "normal", STREAM)
    assert (value.shape, forms.shape) == ((0, 6), (2, 0))


# torch's transforms


def test_derivatives_in_both_modes():
    (x, weight, bias), key = random_first(2, 3, 3, torch.float64), key_of(2)

    def trace(x, weight, bias):
        stacked = dual_linear_probe(x, weight, bias, "softplus", *key, 2, 3, "hadamard", STREAM)
        return dual_linear_trace(stacked, weight, bias, *key, "hadamard", STREAM)

    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(trace, tensors, check_forward_ad=True, fast_mode=True)


def test_vmap():
    problems, key = [random_first() for _ in range(3)], key_of(5)
    weight, bias = problems[0][1:]

    def run(x):
        stacked = dual_linear_probe(x, weight, bias, "silu", *key, 2, 24, "normal", STREAM)
        return stacked, dual_linear_trace(stacked, weight.T, None, *key, "normal", STREAM)[1]

    mapped = torch.vmap(run)(torch.stack([x for x, _, _ in problems]))
    for mine, theirs in zip(mapped, zip(*(run(x) for x, _, _ in problems), strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs), rtol=1e-5, atol=1e-5)


def test_compiled_whole():
    (x, weight, bias), key = random_first(outputs=24), key_of(5)

    def run(x):
        stacked = dual_linear_probe(x, weight, bias, "silu", *key, 2, 24, "rademacher", STREAM)
        return dual_linear_trace(stacked, weight, bias, *key, "rademacher", STREAM)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_operators_are_good_citizens():
    key = key_of(5)
    arguments = (*random_first(), "silu", *key, 2, 24, "rademacher", STREAM)
    torch.library.opcheck(torch.ops.fastdensity.dual_linear_probe.default, arguments)
    torch.library.opcheck(torch.ops.fastdensity.dual_linear_trace.default, (*random_last(), *key, "rademacher", STREAM))


def test_torch_backend_agrees():
    problem, last, key = random_first(), random_last(), key_of(5)

    def run():
        got = dual_linear_probe(*problem, "silu", *key, 2, 24, "rademacher", STREAM)
        return got, *dual_linear_trace(*last, *key, "rademacher", STREAM)

    with use("torch"):
        wanted = run()
    for found, other in zip(run(), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)  # both add up float32 products


def test_wrong_arguments_are_named():
    (x, weight, bias), stacked, ids = random_first(), random_last()[0], ids_of(5)
    good = {"sample_ids": ids, "first": 0, "count": 1, "columns": 24, "distribution": "normal"}

    def probe(x=x, weight=weight, bias=bias, **changes):
        given = good | changes
        order = (given[name] for name in ("count", "columns", "distribution"))
        return dual_linear_probe(x, weight, bias, "silu", 1, given["sample_ids"], 0, given["first"], *order, STREAM)

    def trace(stacked=stacked, weight=weight, bias=bias, ids=ids, distribution="normal"):
        return dual_linear_trace(stacked, weight, bias, 1, ids, 0, 0, distribution, STREAM)

    for call, changes, error, words in (
        (probe, {"distribution": "sphere"}, ValueError, "distribution must be one of"),
        (probe, {"count": 0}, ValueError, "at least one"),
        (probe, {"first": 2**24 - 1}, ValueError, "probes must be in"),
        (probe, {"columns": 25}, ValueError, r"columns must be in \[1, 24\]"),
        (probe, {"sample_ids": ids[:4]}, ValueError, "x must be .* with B = 4 sample ids"),
        (probe, {"weight": weight.t()}, ValueError, "weight must have shape"),
        (probe, {"weight": weight.double()}, TypeError, "weight and bias"),
        (trace, {"distribution": "orthogonal"}, ValueError, "distribution must be one of"),
        (trace, {"stacked": stacked[0]}, ValueError, "stacked must be"),
        (trace, {"ids": ids[:4]}, ValueError, "stacked must be .* with B = 4 sample ids"),
        (trace, {"stacked": stacked[:1]}, ValueError, "at least one"),
        (trace, {"weight": weight.t()}, ValueError, "weight must have shape"),
        (trace, {"weight": weight[:0], "bias": None}, ValueError, "a row for each element"),
        (trace, {"bias": bias.double()}, TypeError, "weight and bias"),
    ):
        with pytest.raises(error, match=words):
            call(**changes)
