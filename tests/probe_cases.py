"""What tests of every backend's probes share: a key with extreme numbers, and comparisons with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.reference import probe as reference
from fastdensity.reference.probe import STREAM_MEASURE as STREAM

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**40 + 3])
KEY = (2**62 + 5, 2**32 - 1)  # seed, step


def ulps(got: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """|got - expected| in units of the last place that `dtype` has at the expected value."""
    rounded = expected.to(dtype).abs()
    ulp = torch.nextafter(rounded, torch.full_like(rounded, torch.inf)) - rounded
    return (got.double() - expected).abs() / ulp.double()


def assert_probes(out: Tensor, distribution: str, first: int = 0, ids: Tensor = IDS) -> None:
    """`out` (K, B, n) are the reference's probes: signs exactly, normals to 4 ulp of float32's or to 1e-14."""
    count, _, columns = out.shape
    out = out.cpu()
    exact = reference.make_probes(KEY[0], ids, KEY[1], first, count, columns, distribution, STREAM, torch.float64)
    if reference.resolve(distribution, columns) in ("rademacher", "hadamard"):
        assert torch.equal(out.double(), exact)
    elif out.dtype == torch.float64:
        torch.testing.assert_close(out, exact, rtol=1e-14, atol=1e-15)
    elif out.dtype == torch.float32:
        assert ulps(out, exact, torch.float32).max() <= (4 if distribution == "normal" else 5)
    else:  # one rounding; a tie in float32 may go the other way, and an interpreter truncates
        assert ulps(out, exact, out.dtype).max() <= 1.01


def assert_forms(out: Tensor, products: Tensor, distribution: str, first: int = 0, ids: Tensor = IDS) -> None:
    """`out` (K, B) are the forms of float64 probes and these products, to the precision of the arithmetic."""
    eps = torch.finfo(torch.float64 if products.dtype == torch.float64 else torch.float32).eps
    products = products.cpu().double()
    count, _, columns = products.shape
    z = reference.make_probes(KEY[0], ids, KEY[1], first, count, columns, distribution, STREAM, torch.float64)
    size = (z * products).norm(dim=-1)  # of the sum's terms, whose roundings are independent
    error = (out.cpu() - (z * products).sum(-1)).abs()
    assert out.dtype == torch.float64
    assert (error <= 8 * eps * size + 1e-300).all(), (error / (eps * size)).max()


def random_products(count: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(count, rows, columns, generator=generator, dtype=torch.float64).to(dtype)
