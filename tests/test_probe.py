"""Probes on the CPU: bits, moments, what they do not depend on, and every way their operators are called."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_cases import DTYPES, IDS, KEY, STREAM, assert_forms, assert_probes, random_products, ulps

import fastdensity as fd
from fastdensity._backend import native, use
from fastdensity.ops.probe import make_probes, orthogonal_probes, probe_forms
from fastdensity.probes import PROBE_DISTRIBUTIONS
from fastdensity.reference import probe as reference
from fastdensity.reference.philox import philox
from fastdensity.reference.probe import DISTRIBUTIONS, MOST_PROBES, STREAM_MEASURE, STREAM_STEER, hadamard_rows
from fastdensity.sums import row_dot

FULL = 2**32 - 1
EVERY = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
PUBLIC = pytest.mark.parametrize("distribution", PROBE_DISTRIBUTIONS)
COLUMNS = (1, 2, 3, 4, 31, 127, 128, 129, 2047, 2048, 2049, 5003)


def made(distribution, columns, first=0, count=1, ids=IDS, dtype=torch.float32, stream=STREAM, seed=KEY[0]):
    return make_probes(seed, ids, KEY[1], first, count, columns, distribution, stream, dtype)


def formed(distribution, products, first=0, ids=IDS):
    return probe_forms(products, KEY[0], ids, KEY[1], first, distribution, STREAM)


@EVERY
@pytest.mark.parametrize("columns", COLUMNS)
def test_kernels_are_the_reference(distribution, columns):
    for dtype in DTYPES:
        assert_probes(made(distribution, columns, 3, 2, dtype=dtype), distribution, first=3)
        products = random_products(2, len(IDS), columns, dtype)
        assert_forms(formed(distribution, products, 3), products, distribution, first=3)


@EVERY
@settings(deadline=None, max_examples=40)
@given(
    columns=st.sampled_from([1, 3, 127, 128, 129, 2048, 2049]),
    first=st.integers(0, MOST_PROBES - 2),
    step=st.sampled_from([0, 1, FULL - 1, FULL]),
    seed=st.sampled_from([0, 1, FULL, 2**32, 2**63 - 1]),
    sample=st.integers(0, 2**63 - 1),
)
def test_extreme_keys(distribution, columns, first, step, seed, sample):
    arguments = (seed, torch.tensor([sample, 0]), step, first, 2, columns, distribution)
    for stream in (STREAM_MEASURE, STREAM_STEER):
        got = make_probes(*arguments, stream, torch.float64)
        want = reference.make_probes(*arguments, stream, torch.float64)
        if distribution in ("rademacher", "hadamard"):
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_signs_are_the_bits_of_philox():
    """Written out once more, from the extension's own words."""
    sample, probe, columns = 2**31 + 7, 5, 300
    ids = torch.tensor([sample])
    for row, distribution in ((0, "rademacher"), (None, "hadamard")):
        number = STREAM + probe
        if row is None:
            row = int(hadamard_rows(KEY[0], ids, KEY[1], probe, columns, STREAM))
            number = STREAM + 0xFFFFFF
        got = made(distribution, columns, probe, 1, ids)[0, 0]
        for element in range(columns):
            words = native().philox_words(element // 128, number, KEY[1], sample, KEY[0])
            bit = words[element // 32 % 4] >> element % 32 & 1
            assert got[element] == (-1) ** (bit + bin(row & element).count("1"))


def test_normals_are_those_of_the_stream():
    words = philox(tuple(torch.tensor([word]) for word in (2, STREAM + 6, KEY[1], 9)), KEY[0])
    first, _ = reference.normals.__globals__["_box_muller"](words[0], words[1])
    got = made("normal", 12, 6, 1, torch.tensor([9]), torch.float64)
    assert float(got[0, 0, 8]) == pytest.approx(float(first), rel=1e-14)


def test_float_normals_are_within_four_ulp():
    ids = torch.arange(40)
    exact = reference.make_probes(3, ids, 1, 0, 1, 50_000, "normal", STREAM, torch.float64)
    got = make_probes(3, ids, 1, 0, 1, 50_000, "normal", STREAM, torch.float32)
    assert ulps(got, exact, torch.float32).max() <= 4
    assert exact.abs().max() > 4.5


@EVERY
@settings(deadline=None, max_examples=30)
@given(
    first=st.integers(0, 40), count=st.integers(1, 6), cut=st.integers(0, 6), columns=st.sampled_from([1, 5, 130, 2050])
)
def test_batch_order_and_cut_change_no_bit(distribution, first, count, cut, columns):
    cut = min(cut, count)
    ids = torch.tensor([5, 0, 2**32 - 1, 17])
    products = random_products(count, 4, columns)
    whole, forms = made(distribution, columns, first, count, ids), formed(distribution, products, first, ids)
    parts = [
        made(distribution, columns, begin, size, ids) for begin, size in ((first, cut), (first + cut, count - cut))
    ]
    assert torch.equal(torch.cat(parts), whole)
    tail = formed(distribution, products[cut:], first + cut, ids)
    assert torch.equal(tail, forms[cut:])
    order = torch.tensor([2, 0, 3])
    assert torch.equal(made(distribution, columns, first, count, ids[order]), whole[:, order])
    assert torch.equal(formed(distribution, products[:, order], first, ids[order]), forms[:, order])


@EVERY
def test_threads_change_no_bit(distribution):
    threads = torch.get_num_threads()
    products = random_products(2, 3, 70_001)
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append((made(distribution, 70_001, 0, 2, IDS[:3]), formed(distribution, products, 0, IDS[:3])))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_everything_in_the_key_counts():
    ids = torch.arange(500)
    for distribution in DISTRIBUTIONS:
        base = make_probes(1, ids, 2, 3, 1, 100, distribution, STREAM_MEASURE, torch.float64)
        others = {
            "seed": make_probes(2, ids, 2, 3, 1, 100, distribution, STREAM_MEASURE, torch.float64),
            "high seed": make_probes(1 + 2**32, ids, 2, 3, 1, 100, distribution, STREAM_MEASURE, torch.float64),
            "sample": make_probes(1, ids + 500, 2, 3, 1, 100, distribution, STREAM_MEASURE, torch.float64),
            "step": make_probes(1, ids, 3, 3, 1, 100, distribution, STREAM_MEASURE, torch.float64),
            "probe": make_probes(1, ids, 2, 4, 1, 100, distribution, STREAM_MEASURE, torch.float64),
            "stream": make_probes(1, ids, 2, 3, 1, 100, distribution, STREAM_STEER, torch.float64),
            "element": base.roll(1, dims=2),
        }
        for what, other in others.items():
            assert abs(float((base * other).mean())) < 5 / 50_000**0.5, (distribution, what)


@PUBLIC
def test_moments(distribution):
    """E z = 0, E z z^T = I, and the fourth moment of an element that belongs to the distribution."""
    samples, n = 4000, 10
    z = fd.probes(5, torch.arange(samples), 0, range(6), n, distribution, dtype=torch.float64).reshape(-1, n)
    bound = 5 * math.sqrt(3 / samples)  # probes of one sample may depend on each other
    assert z.mean(0).abs().max() < bound
    assert (z.T @ z / len(z) - torch.eye(n)).abs().max() < bound
    fourth = {"rademacher": 1.0, "hadamard": 1.0, "normal": 3.0}.get(distribution, 3 * n / (n + 2))
    assert float((z**4).mean()) == pytest.approx(fourth, rel=0.05)
    norms = z.norm(dim=1)
    if distribution != "normal":
        torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(n)), rtol=1e-14, atol=0)


@PUBLIC
def test_one_dimension_is_a_sign(distribution):
    z = fd.probes(5, range(300), 3, range(4), 1, distribution)
    if distribution != "normal":
        assert torch.equal(z.abs(), torch.ones(4, 300, 1))
        assert abs(float(z.mean())) < 5 / 1200**0.5


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 33])
def test_a_full_hadamard_set_gives_the_trace(n):
    order = 1 << reference.hadamard_order(n)
    assert n <= order < 2 * n
    matrix = torch.randn(n, n, dtype=torch.float64)
    for begin in (0, order, 7 * order):
        z = fd.probes(9, [4, 2**35], 1, range(begin, begin + order), n, "hadamard", dtype=torch.float64)
        forms = torch.einsum("kbi,ij,kbj->kb", z, matrix, z)
        torch.testing.assert_close(forms.mean(0), matrix.trace().expand(2), rtol=1e-12, atol=1e-12)
        second = torch.einsum("kbi,kbj->bij", z, z)
        assert torch.equal(second, order * torch.eye(n, dtype=torch.float64).expand(2, n, n))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 40, 200])
def test_hadamard_rows_are_permutations(n):
    order = 1 << reference.hadamard_order(n)
    ids = torch.arange(3)
    for begin in (0, 5 * order):
        rows = torch.stack([hadamard_rows(1, ids, 2, begin + j, n, STREAM) for j in range(order)])
        assert torch.equal(rows.sort(0).values, torch.arange(order)[:, None].expand(-1, 3))


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_all_orders_of_hadamard_rows_are_equally_likely(n):
    """chi^2 of the rows of the first two probes: 5 standard deviations above its mean at most."""
    ids = torch.arange(20_000)
    first, second = (hadamard_rows(3, ids, 0, j, n, STREAM) for j in range(2))
    counts = torch.bincount(first * n + second, minlength=n * n).reshape(n, n).double()
    assert counts.diagonal().sum() == 0
    expected = len(ids) / (n * (n - 1))
    chi = ((counts - expected) ** 2 / expected).sum() - n * expected
    freedom = n * (n - 1) - 1
    assert float(chi) < freedom + 5 * math.sqrt(2 * freedom)
    single = torch.bincount(second, minlength=n).double()
    assert float(((single - len(ids) / n) ** 2).sum() / (len(ids) / n)) < n - 1 + 5 * math.sqrt(2 * (n - 1))


def test_half_a_hadamard_set_beats_signs():
    """Sampling without replacement: Var is that of Rademacher times (N - k) / (N - 1) on average over rows."""
    n, k, ids = 16, 8, torch.arange(3000)
    matrix = torch.randn(n, n, dtype=torch.float64)
    variances = {}
    for distribution in ("rademacher", "hadamard"):
        z = fd.probes(1, ids, 0, range(k), n, distribution, dtype=torch.float64)
        variances[distribution] = float(torch.einsum("kbi,ij,kbj->kb", z, matrix, z).mean(0).var())
    assert variances["hadamard"] == pytest.approx(variances["rademacher"] * (16 - 8) / 15, rel=0.15)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_orthogonal_probes_are_orthogonal(n):
    z = fd.probes(2, [3, 2**33], 1, range(2 * n + 1), n, "orthogonal", dtype=torch.float64)
    for block in (z[:n], z[n : 2 * n]):
        gram = torch.einsum("kbi,lbi->bkl", block, block) / n
        assert (gram - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12
    assert n == 1 or abs(float((z[0] * z[n]).sum(-1)[0])) < 0.999 * n


def test_orthogonal_probes_are_haar():
    """The variance of the mean of k of them is the sphere's times (n - k) / (n - 1), over k."""
    n, k, ids = 6, 4, torch.arange(4000)
    matrix = torch.randn(n, n, dtype=torch.float64)
    matrix = matrix + matrix.T
    z = fd.probes(1, ids, 0, range(k), n, "orthogonal", dtype=torch.float64)
    means = torch.einsum("kbi,ij,kbj->kb", z, matrix, z).mean(0)
    sphere = 2 * n / (n + 2) * float(matrix.square().sum() - matrix.trace() ** 2 / n)
    assert float(means.var()) == pytest.approx(sphere / k * (n - k) / (n - 1), rel=0.12)
    assert abs(float(means.mean() - matrix.trace())) < 5 * float(means.std()) / 4000**0.5
    assert abs(float(z[:, :, 0].mean())) < 5 / (4 * 4000) ** 0.5  # signs are free


@settings(deadline=None, max_examples=25)
@given(first=st.integers(0, 20), count=st.integers(1, 9), columns=st.integers(1, 9), row=st.integers(0, 3))
def test_orthogonal_probes_depend_on_no_batch_and_no_later_probe(first, count, columns, row):
    ids = torch.tensor([5, 0, 2**32 - 1, 17])
    whole = orthogonal_probes(1, ids, 2, 0, 32, columns, STREAM, torch.float64)
    part = orthogonal_probes(1, ids[row : row + 1], 2, first, count, columns, STREAM, torch.float64)
    assert torch.equal(part[:, 0], whole[first : first + count, row])


def test_public_shapes_and_numbers():
    ids = torch.tensor([3, 1], dtype=torch.int32)
    whole = fd.probes(1, ids, 2, range(8), (3, 2, 2))
    assert whole.shape == (8, 2, 3, 2, 2)
    assert whole.dtype == torch.float32
    assert torch.equal(fd.probes(1, ids, 2, 5, (3, 2, 2)), whole[5])
    assert torch.equal(fd.probes(1, [3, 1], 2, [6, 1, 2, 2, 7], 12), whole[[6, 1, 2, 2, 7]].flatten(2))
    assert fd.probes(1, ids, 2, 0, ()).shape == (2,)
    assert fd.probes(1, ids, 2, [], 4).shape == (0, 2, 4)
    assert fd.probes(1, [], 2, [0, 1], 4).shape == (2, 0, 4)
    for distribution in PROBE_DISTRIBUTIONS:
        assert fd.probes(1, ids, 2, [0, 2], (3, 0), distribution).shape == (2, 2, 3, 0)
        picked = fd.probes(1, ids, 2, [4, 1], 3, distribution)
        assert torch.equal(picked, fd.probes(1, ids, 2, range(5), 3, distribution)[[4, 1]])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed must be in \[0, 9223372036854775807\], got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an int, got float 1.0"),
        ({"sample_ids": 3}, TypeError, "sample_ids must be an int64 or int32 tensor .* got int 3"),
        ({"sample_ids": torch.zeros(2)}, TypeError, "sample_ids must be .* got a float32 tensor"),
        ({"sample_ids": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"sample_ids must have shape \(B,\)"),
        ({"sample_ids": [0.5]}, TypeError, "each of sample_ids must be an int"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"probe": 2**24 - 1}, ValueError, r"probe must be in \[0, 16777214\], got 16777215"),
        ({"probe": [0, -1]}, ValueError, "each probe must be in"),
        ({"probe": "3"}, TypeError, "probe must be an int, a range or a sequence of ints, got str '3'"),
        ({"probe": torch.tensor(3)}, TypeError, "probe must be an int"),
        ({"probe": 1.5}, TypeError, "probe must be an int"),
        ({"shape": (3, -1)}, ValueError, "each size of shape must be in"),
        ({"shape": 2.0}, TypeError, "shape must be an int or a sequence of ints, got float 2.0"),
        ({"shape": (2**20, 2**20)}, ValueError, "shape must have up to 17179869184 elements"),
        ({"distribution": "gaussian"}, ValueError, "distribution must be one of rademacher, normal, sphere, hadamard"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str):
    arguments = {"seed": 0, "sample_ids": [0], "step": 0, "probe": 0, "shape": 3} | changes
    with pytest.raises(error, match=message):
        fd.probes(**arguments)


def test_internal_limits():
    with pytest.raises(ValueError, match="probes must be in"):
        made("rademacher", 3, MOST_PROBES - 1, 2)
    with pytest.raises(ValueError, match="may have up to"):
        made("rademacher", 2**34 + 1)
    with pytest.raises(ValueError, match="distribution must be one of"):
        made("orthogonal", 3)
    with pytest.raises(ValueError, match=r"products must be \(K, B, n\) with B = 5 sample ids"):
        formed("normal", torch.zeros(2, 4, 3))


@EVERY
def test_empty_products(distribution):
    assert torch.equal(formed(distribution, torch.zeros(2, 5, 0)), torch.zeros(2, 5, dtype=torch.float64))
    assert formed(distribution, torch.zeros(0, 5, 3)).shape == (0, 5)
    assert formed(distribution, torch.zeros(2, 0, 3), ids=IDS[:0]).shape == (2, 0)


def test_special_products_reach_their_own_sum_only():
    products = random_products(2, 5, 300)
    clean = formed("rademacher", products)
    products[1, 3, 299], products[0, 2, 0] = math.nan, math.inf
    spoilt = formed("rademacher", products)
    assert spoilt[1, 3].isnan()
    assert spoilt[0, 2].isinf()
    spoilt[1, 3], spoilt[0, 2] = clean[1, 3], clean[0, 2]
    assert torch.equal(spoilt, clean)


@EVERY
def test_strided_and_negative_products(distribution):
    products = random_products(2, 5, 64)
    want = formed(distribution, products)
    assert torch.equal(formed(distribution, products.transpose(0, 2).contiguous().transpose(0, 2)), want)
    imaginary = torch.complex(torch.zeros_like(products), products).conj().imag
    assert torch.equal(formed(distribution, imaginary), -want)
    assert torch.equal(formed(distribution, products, ids=IDS.repeat_interleave(2)[::2]), want)


@EVERY
def test_forms_of_long_rows_are_as_exact_as_pairwise(distribution):
    products = random_products(1, 1, 1_000_003) + 3
    got, ids = formed(distribution, products, ids=IDS[:1]), IDS[:1]
    z = reference.make_probes(KEY[0], ids, KEY[1], 0, 1, 1_000_003, distribution, STREAM, torch.float64)
    error = (got - row_dot(z[0], products[0])).abs()
    assert float(error) < 3e-8 * float((z * products).norm()) * math.log2(1e6)


@EVERY
def test_derivatives(distribution):
    products = random_products(2, 3, 7, torch.float64).requires_grad_()
    ids = IDS[:3]
    z = made(distribution, 7, 1, 2, ids, torch.float64)

    def function(values):
        return formed(distribution, values, 1, ids)

    assert torch.autograd.gradcheck(function, products, fast_mode=True)
    (gradient,) = torch.autograd.grad(function(products).sum(), products)
    torch.testing.assert_close(gradient, z)
    tangent = random_products(2, 3, 7, torch.float64).flip(0)
    value, derivative = torch.func.jvp(function, (products.detach(),), (tangent,))
    torch.testing.assert_close(value, function(products.detach()))
    torch.testing.assert_close(derivative, (z * tangent).sum(-1))
    stacked = torch.stack([products.detach(), tangent])
    torch.testing.assert_close(
        torch.func.vmap(function)(stacked), torch.stack([function(values) for values in stacked]), rtol=1e-13, atol=0
    )


@EVERY
def test_operators_pass_opcheck(distribution):
    operators = torch.ops.fastdensity
    torch.library.opcheck(operators.make_probes.default, (3, IDS, 1, 0, 2, 9, distribution, STREAM, torch.float32))
    for products in (random_products(2, 5, 9), random_products(2, 5, 9).requires_grad_(distribution == "rademacher")):
        torch.library.opcheck(operators.probe_forms.default, (products, 3, IDS, 1, 0, distribution, STREAM))


def test_compiled_whole_and_for_every_step():
    """Steps, seeds and first probes are numbers of the graph, not of its code."""

    def estimate(matrix, ids, step, first):
        z = make_probes(7, ids, step, first, 2, 6, "sphere", STREAM, torch.float64)
        return probe_forms(z @ matrix.T, 7, ids, step, first, "sphere", STREAM)

    torch.compiler.reset()
    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    matrix = torch.randn(6, 6, dtype=torch.float64)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for step in range(5):
        got = compiled(matrix, IDS, step, 2 * step)
        torch.testing.assert_close(got, estimate(matrix, IDS, step, 2 * step), rtol=1e-13, atol=1e-13)
    assert counters["unique_graphs"] - before <= 2


def test_fake_tensors_and_graphs():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        ids = mode.from_tensor(IDS)
        z = made("normal", 33, 0, 2, ids, torch.bfloat16)
        forms = formed("normal", z, 0, ids)
    assert (z.shape, z.dtype) == ((2, 5, 33), torch.bfloat16)
    assert (forms.shape, forms.dtype) == ((2, 5), torch.float64)


@EVERY
def test_the_torch_backend(distribution):
    with use("torch"):
        assert_probes(made(distribution, 130, 1, 2), distribution, first=1)
        products = random_products(2, 5, 130)
        assert_forms(formed(distribution, products, 1), products, distribution, first=1)
