"""The Triton probe kernels in Triton's interpreter; run by tests/test_probe_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from probe_cases import DTYPES, IDS, KEY, STREAM, assert_forms, assert_probes, random_products

from fastdensity._backend import use
from fastdensity.ops.probe import make_probes, orthogonal_probes, probe_forms
from fastdensity.reference import probe as reference
from fastdensity.reference.probe import DISTRIBUTIONS
from fastdensity.triton_kernels.probe import make_probes_triton, probe_forms_triton

EVERY = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
# 1,300 columns make six tiles in three chunks of two
SPLIT = {"tile": 256, "most_chunks": 3}


def made(distribution, shape, dtype=torch.float32, first=0, ids=IDS, **sizes):
    out = torch.empty(shape, dtype=dtype)
    make_probes_triton(KEY[0], ids, KEY[1], first, shape[0], shape[2], distribution, STREAM, dtype, out, **sizes)
    return out


def formed(distribution, products, first=0, ids=IDS, **sizes):
    out = torch.empty(products.shape[:2], dtype=torch.float64)
    probe_forms_triton(products, KEY[0], ids, KEY[1], first, distribution, STREAM, out, **sizes)
    return out


@EVERY
@pytest.mark.parametrize("columns", [1, 2, 3, 33, 127, 128, 129, 517])
def test_probes_and_forms(distribution, columns):
    assert_probes(made(distribution, (1, 5, columns), first=3), distribution, first=3)
    products = random_products(1, 5, columns)
    assert_forms(formed(distribution, products, first=3), products, distribution, first=3)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(distribution, dtype):
    for columns in (40, 301):
        assert_probes(made(distribution, (2, 2, columns), dtype, ids=IDS[3:]), distribution, ids=IDS[3:])
        products = random_products(2, 2, columns, dtype)
        assert_forms(formed(distribution, products, ids=IDS[3:]), products, distribution, ids=IDS[3:])


@EVERY
@pytest.mark.parametrize("columns", [256, 1300, 1536])
def test_rows_in_chunks_of_several_tiles(distribution, columns):
    assert_probes(made(distribution, (2, 2, columns), ids=IDS[:2], **SPLIT), distribution, ids=IDS[:2])
    products = random_products(2, 2, columns)
    assert_forms(formed(distribution, products, ids=IDS[:2], **SPLIT), products, distribution, ids=IDS[:2])


@EVERY
def test_a_row_sees_neither_its_batch_nor_the_first_probe(distribution):
    products = random_products(2, 5, 600)
    whole, forms = made(distribution, (2, 5, 600), **SPLIT), formed(distribution, products, **SPLIT)
    alone = made(distribution, (1, 1, 600), first=1, ids=IDS[4:], **SPLIT)
    assert torch.equal(alone[0, 0], whole[1, 4])
    alone = formed(distribution, products[1:, 4:], first=1, ids=IDS[4:], **SPLIT)
    assert torch.equal(alone[0, 0], forms[1, 4])


def test_many_pairs_choose_their_rows():
    ids = torch.arange(9)
    got = made("hadamard", (40, 9, 5), ids=ids)
    assert_probes(got, "hadamard", ids=ids)  # five sets of eight


def test_misaligned_products_have_the_same_bits():
    products = random_products(1, 2, 64)
    shifted = torch.zeros(129)[1:].view(1, 2, 64).copy_(products)
    assert torch.equal(formed("normal", shifted, ids=IDS[:2]), formed("normal", products, ids=IDS[:2]))


def test_the_operators_reach_the_kernels():
    products = random_products(2, 5, 50)
    with use("triton"):
        probes = make_probes(*(KEY[0], IDS, KEY[1], 0, 2, 50, "normal", STREAM, torch.float32))
        forms = probe_forms(products, KEY[0], IDS, KEY[1], 0, "normal", STREAM)
        orthogonal = orthogonal_probes(KEY[0], IDS, KEY[1], 0, 2, 50, STREAM, torch.float64)
    assert torch.equal(probes, made("normal", (2, 5, 50)))
    assert torch.equal(forms, formed("normal", products))
    assert reference.row_dot(orthogonal[0], orthogonal[1]).abs().max() < 1e-12
