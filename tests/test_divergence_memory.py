"""What `memory=` of fd.divergence bounds, and that no bit depends on it or on the parts in which work is done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from matrix_products import MatrixProducts, matrices
from mixtures import normals
from torch import Tensor, nn

import fastdensity as fd
from fastdensity.bench.memory import peak_bytes
from fastdensity.ops.probe import OrthogonalProbes, orthogonal_probes
from fastdensity.traces import blocks, colour
from fastdensity.traces.options import DISTRIBUTIONS

MEBIBYTE = 1 << 20
METHODS = [("exact", "rademacher"), ("hutchpp", "normal"), ("xtrace", "sphere"), ("colour", "rademacher")]
METHODS += [("hutchinson", distribution) for distribution in DISTRIBUTIONS]


def elementwise(x: Tensor) -> Tensor:
    return torch.sin(x) * x


def convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1)


@pytest.mark.parametrize(("method", "distribution"), METHODS)
@pytest.mark.parametrize("make", [lambda: elementwise, convolution])
def test_no_bit_depends_on_memory(
    method: str, distribution: str, make: Callable[[], Callable[[Tensor], Tensor]]
) -> None:
    fn, x = make(), normals(5, 3, 6, 6).float()
    found = [
        fd.divergence(fn, x, method=method, num_matvecs=19, distribution=distribution, memory=memory)
        for memory in (1, 50_000, None)
    ]
    for name in ("value", "div", "std_err"):
        first, *others = (getattr(estimate, name).nan_to_num(-1.0) for estimate in found)
        assert all(torch.equal(first, other) for other in others), name


@pytest.mark.parametrize("tangents", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("num_colours", [1, 8, 11, 40])
def test_colours_in_parts(tangents: int, num_colours: int) -> None:
    every = matrices(3, 40)
    whole = colour(MatrixProducts(every, shape=(2, 4, 5)), 80, num_colours)
    parts = colour(MatrixProducts(every, shape=(2, 4, 5), tangents=tangents), 80, num_colours)
    torch.testing.assert_close(whole.div, parts.div, rtol=1e-13, atol=0)  # a product of matrices rounds as it likes
    torch.testing.assert_close(whole.std_err, parts.std_err, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert (whole.products, whole.colours) == (parts.products, parts.colours)


def test_rows_do_not_depend_on_memory() -> None:
    x = torch.zeros(9, 3, 32, 32)
    plans = [blocks.plan(blocks.Function(elementwise), x, memory, 64) for memory in (1, 16 * MEBIBYTE, 1 << 40)]
    assert len({plan.rows for plan in plans}) == 1
    assert plans[0].tangents == 1 < plans[1].tangents < plans[2].tangents
    assert blocks.plan(blocks.Function(elementwise), x, None, 64, kept=MEBIBYTE).rows == 2 < plans[0].rows


@pytest.mark.parametrize("num_matvecs", [1, 4])
def test_a_batch_of_images_takes_what_was_asked(num_matvecs: int) -> None:
    """12 MiB of results, and 4 for a call of the least size; 256 rows a call once took 290 and 380 MiB."""
    x = torch.randn(64, 3, 128, 128)
    peak = peak_bytes(lambda: fd.divergence(elementwise, x, num_matvecs=num_matvecs, memory=MEBIBYTE))
    assert peak < 30 * MEBIBYTE


@pytest.mark.parametrize("method", ["colour", "hutchinson", "exact"])
def test_many_probes_take_what_was_asked(method: str) -> None:
    """All colours' vectors at once were 245 MiB; and small results kept between large ones scattered those over 80."""
    model, x = convolution(), torch.randn(8, 3, 32, 32)
    peak = peak_bytes(lambda: fd.divergence(model, x, method=method, num_matvecs=600, memory=MEBIBYTE), repeats=1)
    assert peak < 12 * MEBIBYTE


# -- orthogonal probes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 32], [20, 20], [3, 17, 17, 3]])
def test_orthogonal_probes_in_parts(sizes: list[int]) -> None:
    """Blocks of 17 vectors, begun and ended anywhere."""
    ids = torch.tensor([3, 2**31, 0])
    whole = orthogonal_probes(5, ids, 2, 4, 40, 17, 1, torch.float64)
    made = OrthogonalProbes(5, ids, 2, 17, 1)
    first, parts = 4, []
    for size in sizes:
        parts.append(made.take(first, size, torch.float64))
        first += size
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(made.take(6, 3, torch.float64), whole[2:5])  # back again


def test_orthogonal_probes_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part made all before it again, and for all copies that fill a block up: 50 seconds for these."""
    made = []
    take = OrthogonalProbes._basis_of

    def counted(self: OrthogonalProbes, block: int, size: int) -> Tensor:
        before = 0 if self._basis is None else len(self._basis)
        basis = take(self, block, size)
        made.append((len(basis) - before) * basis.shape[1])
        return basis

    monkeypatch.setattr(OrthogonalProbes, "_basis_of", counted)
    fd.divergence(convolution(), torch.randn(8, 3, 32, 32), num_matvecs=32, distribution="orthogonal", memory=1)
    assert len(made) > 32
    assert sum(made) == 8 * 32
