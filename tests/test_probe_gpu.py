"""Probes on a GPU, CUDA and Triton: the reference's integers, float32's normals, graphs, rows beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from probe_cases import DTYPES, IDS, KEY, STREAM, assert_forms, assert_probes, random_products
from torch import Tensor

import fastdensity as fd
from fastdensity._backend import report as backend_report
from fastdensity._backend import use
from fastdensity.ops.probe import make_probes, probe_forms
from fastdensity.reference.probe import DISTRIBUTIONS

pytestmark = pytest.mark.gpu
EVERY = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    works, why = backend_report()[request.param]
    if not works:
        pytest.skip(why)
    with use(request.param):
        yield request.param


def made(distribution: str, columns: int, first: int = 0, count: int = 1, ids: Tensor = IDS, dtype=torch.float32):
    return make_probes(KEY[0], ids.cuda(), KEY[1], first, count, columns, distribution, STREAM, dtype)


def formed(distribution: str, products: Tensor, first: int = 0, ids: Tensor = IDS) -> Tensor:
    return probe_forms(products.cuda(), KEY[0], ids.cuda(), KEY[1], first, distribution, STREAM)


@EVERY
@pytest.mark.parametrize("columns", [1, 2, 3, 36, 127, 128, 129, 4096, 5003, 70_000])
def test_is_the_reference(distribution, columns):
    for dtype in DTYPES:
        assert_probes(made(distribution, columns, 3, 2, dtype=dtype), distribution, first=3)
        products = random_products(2, len(IDS), columns, dtype)
        assert_forms(formed(distribution, products, 3), products, distribution, first=3)


@EVERY
def test_chunks_of_several_tiles(distribution):
    columns = 4096 * 512 + 260
    assert_probes(made(distribution, columns, ids=IDS[:2]), distribution, ids=IDS[:2])
    products = random_products(1, 2, columns)
    assert_forms(formed(distribution, products, ids=IDS[:2]), products, distribution, ids=IDS[:2])


@EVERY
@pytest.mark.parametrize("columns", [7, 3072, 20_001])
def test_batch_and_cut_change_no_bit(distribution, columns):
    products = random_products(3, 5, columns)
    whole, forms = made(distribution, columns, 0, 3), formed(distribution, products)
    for row in range(5):
        ids = IDS[row : row + 1]
        assert torch.equal(made(distribution, columns, 2, 1, ids)[0, 0], whole[2, row])
        assert torch.equal(formed(distribution, products[2:, row : row + 1], 2, ids)[0, 0], forms[2, row])


def test_the_public_function_works_where_the_ids_are():
    for distribution in (*DISTRIBUTIONS, "orthogonal"):
        z = fd.probes(1, IDS.cuda(), 0, range(3), (4, 5), distribution)
        assert z.is_cuda
        torch.testing.assert_close(z.cpu(), fd.probes(1, IDS, 0, range(3), (4, 5), distribution))


@EVERY
def test_a_graph_replays(distribution):
    ids, products = IDS.cuda(), random_products(2, 5, 9000).cuda()

    def work():
        z = make_probes(1, ids, 0, 0, 2, 9000, distribution, STREAM, torch.float32)
        return z, probe_forms(products, 1, ids, 0, 0, distribution, STREAM)

    expected = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


def test_a_row_of_more_than_two_to_the_31_elements():
    columns = 2**31 + 256
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free device memory")
    z = made("hadamard", columns, 5, 1, IDS[:1], torch.bfloat16)
    form = float(formed("hadamard", z, 5, IDS[:1]))
    assert form == columns  # z.z
    assert float(z.float().sum()) != columns
