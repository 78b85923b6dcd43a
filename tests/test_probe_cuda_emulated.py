"""The CUDA probe kernels without a GPU: csrc/probe_cuda.cu, compiled for the CPU, against the torch reference.

The emulation's blocks are small, so that a thousand elements are more than one chunk; tests/test_probe_gpu.py looks at
what it cannot show.
"""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import probe_library as emulation
from cuda_emulation.probe_library import ONE_TILE, ONE_TILE_CHUNKS
from probe_cases import DTYPES, IDS, KEY, STREAM, assert_forms, assert_probes, random_products

from fastdensity.reference.probe import DISTRIBUTIONS

# A row in one warp, in a few, in a whole block, in chunks, wide or not.
COLUMNS = (1, 2, 36, 127, 129, 777, ONE_TILE, ONE_TILE + 4, 4102)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    found = emulation.build(tmp_path_factory.mktemp("probe_emulation"))
    if found is None:
        pytest.skip("needs g++")
    return found


def made(library, distribution, shape, dtype=torch.float32, first=0, ids=IDS, order=0):
    out = torch.full(shape, float("nan"), dtype=dtype)
    emulation.launch(library, out, None, (KEY[0], ids, KEY[1]), first, shape, distribution, STREAM, order)
    return out


def formed(library, distribution, products, first=0, ids=IDS, order=0):
    out = torch.full(products.shape[:2], float("nan"), dtype=torch.float64)
    key = (KEY[0], ids, KEY[1])
    emulation.launch(library, out, products, key, first, tuple(products.shape), distribution, STREAM, order)
    return out


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probes(library, distribution, columns):
    for dtype in DTYPES:
        assert_probes(made(library, distribution, (2, len(IDS), columns), dtype, first=3), distribution, first=3)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_forms(library, distribution, columns):
    for dtype in DTYPES:
        products = random_products(2, len(IDS), columns, dtype)
        assert_forms(formed(library, distribution, products, first=3), products, distribution, first=3)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chunks_of_several_tiles(library, distribution):
    shape = (1, 1, ONE_TILE_CHUNKS + 260)
    assert_probes(made(library, distribution, shape, ids=IDS[:1]), distribution, ids=IDS[:1])
    products = random_products(*shape)
    assert_forms(formed(library, distribution, products, ids=IDS[:1]), products, distribution, ids=IDS[:1])


@pytest.mark.parametrize("columns", [40, 1500])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_bits_depend_on_neither_batch_nor_order_nor_alignment(library, distribution, columns):
    products = random_products(2, 5, columns)
    whole, forms = made(library, distribution, (2, 5, columns)), formed(library, distribution, products)
    assert torch.equal(made(library, distribution, (2, 5, columns), order=9), whole)
    assert torch.equal(formed(library, distribution, products, order=9), forms)
    for row in (0, 4):
        ids = IDS[row : row + 1]
        alone = products[1:, row : row + 1].contiguous()
        assert torch.equal(made(library, distribution, (1, 1, columns), first=1, ids=ids)[0, 0], whole[1, row])
        assert torch.equal(formed(library, distribution, alone, first=1, ids=ids)[0, 0], forms[1, row])
        shifted = torch.zeros(columns + 1)[1:].copy_(alone[0, 0])[None, None]
        assert torch.equal(formed(library, distribution, shifted, first=1, ids=ids)[0, 0], forms[1, row])


def test_more_chunks_than_a_grid_takes(library):
    """Fifty blocks are the most here."""
    for distribution in DISTRIBUTIONS:
        out = made(library, distribution, (3, 5, 4 * ONE_TILE))
        assert_probes(out, distribution)
        products = random_products(3, 5, 4 * ONE_TILE)
        assert_forms(formed(library, distribution, products), products, distribution)
