"""Colour probing: partitions of a sample's elements, and Jacobians that are local; none of them symmetric."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_products import MatrixProducts, matrices, variance_of_signs
from torch import Tensor

from fastdensity.traces import colour
from fastdensity.traces.colour import sample_colours, usable_colours


def variance_of_sweep(matrix: Tensor, colours: Tensor) -> Tensor:
    """Of one sweep over colours: what is left of `variance_of_signs` is that between elements of one colour."""
    return variance_of_signs(matrix * (colours[:, None] == colours))


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=5), num_colours=st.integers(1, 70))
def test_colours_part_the_elements(shape: list[int], num_colours: int) -> None:
    """Every element has one colour, every colour has an element, and channels share none unless they must."""
    colours = sample_colours(tuple(shape), num_colours)
    used = usable_colours(tuple(shape), num_colours)
    assert colours.shape == (math.prod(shape),)
    assert colours.unique().tolist() == list(range(used))
    assert used <= num_colours
    channels = math.prod(shape[: max(1, len(shape) - 3)]) if len(shape) > 1 else 1
    if num_colours >= channels:
        sets = [set(part.tolist()) for part in colours.reshape(channels, -1)]
        assert sum(map(len, sets)) == len(set().union(*sets))
    if num_colours >= math.prod(shape):
        assert used == math.prod(shape)


def test_every_element_is_probed_once() -> None:
    seen = []

    class Recorder(MatrixProducts):
        def apply(self, vectors: Tensor) -> Tensor:
            seen.append(vectors)
            return super().apply(vectors)

    products = Recorder(matrices(2, 36), shape=(1, 6, 6))
    colour(products, 10, 5)
    assert len(seen) == 2
    for sweep, vectors in enumerate(seen):
        assert torch.equal((vectors != 0).sum(0), torch.ones(2, 36, dtype=torch.int64))
        assert torch.equal(vectors.sum(0), products.probes(sweep, 1, "rademacher")[0])


@pytest.mark.parametrize("width", [1, 2, 4])
def test_bands_are_exact_when_colours_are_farther_apart(width: int) -> None:
    place = torch.arange(48)
    near = (place[:, None] - place).abs() <= width
    products = MatrixProducts(matrices(3, 48) * near)
    exact = colour(products, width + 1)
    torch.testing.assert_close(exact.div, products.traces(), rtol=1e-13, atol=0)
    assert exact.std_err.isnan().all()
    twice = colour(products, 2 * width + 2, width + 1)
    assert twice.std_err.max() < 1e-12
    assert (colour(products, width).div - products.traces()).abs().min() > 1e-6


@pytest.mark.parametrize(("shape", "enough", "reach"), [((8, 9), 4, 3), ((5, 6, 7), 4, 2), ((3, 4, 9), 24, 5)])
def test_local_kernels_are_exact_when_colours_are_farther_apart(
    shape: tuple[int, ...], enough: int, reach: int
) -> None:
    """Samples (C, L), (C, H, W): kernels across all channels that reach squared distances below `reach`."""
    shape = (2, *shape) if len(shape) == 2 and reach == 3 else shape
    channels, grid = shape[0], torch.cartesian_prod(*(torch.arange(size) for size in shape[1:]))
    squared = torch.cdist(grid.double(), grid.double()).square().repeat(channels, channels)
    products = MatrixProducts(matrices(2, math.prod(shape)) * (squared < reach), shape=shape)
    result = colour(products, channels * enough)
    torch.testing.assert_close(result.div, products.traces(), rtol=1e-13, atol=0)


def image_prior(side: int, length: float) -> Tensor:
    """E[x_0 | x] of a Gaussian process with covariance exp(-distance / length), noise about 1 that differs by pixel."""
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    covariance = torch.exp(-torch.cdist(grid, grid) / length)
    noise = (0.8 + 0.4 * torch.rand(side * side, generator=torch.Generator().manual_seed(0))).double()
    return covariance @ torch.linalg.inv(covariance + noise.square().diag())


def test_local_denoiser() -> None:
    """15 colours against 16 signs: 44 times the accuracy with one noise for all; the project asks for 20."""
    matrix = image_prior(16, 4.0)
    assert (matrix - matrix.T).abs().max() > 1e-3
    products = MatrixProducts(matrix, rows=400, shape=(1, 16, 16))
    trace = products.traces()
    coloured = colour(products, 16)
    assert (coloured.colours, coloured.products) == (15, 15)
    signs = products.forms(0, 16, "rademacher").mean(0)
    rmse = [(estimate - trace).square().mean().sqrt() for estimate in (coloured.div, signs)]
    wanted = variance_of_sweep(matrix, sample_colours((1, 16, 16), 16)).sqrt(), (variance_of_signs(matrix) / 16).sqrt()
    torch.testing.assert_close(torch.stack(rmse), torch.stack(wanted), rtol=0.12, atol=0)
    assert rmse[1] / rmse[0] > 25


def test_error_falls_with_the_number_of_colours() -> None:
    matrix = image_prior(16, 4.0)
    errors = [variance_of_sweep(matrix, sample_colours((1, 16, 16), count)) for count in (1, 2, 4, 8, 13, 34, 64, 256)]
    assert errors[-1] == 0
    assert all(fewer > 1.2 * more for fewer, more in itertools.pairwise(errors))


def test_convolutional_denoiser() -> None:
    """One hidden layer of 3 x 3 convolutions sees 5 x 5 pixels: 25 colours of a channel suffice, 9 nearly do."""
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64) / 6 for shape in ((8, 1, 3, 3), (1, 8, 3, 3))
    )
    at = torch.randn(1, 12, 12, generator=generator, dtype=torch.float64)

    def denoise(x: Tensor) -> Tensor:
        return torch.conv2d(torch.tanh(torch.conv2d(x, first, padding=1)), second, padding=1) + x / 2

    matrix = torch.func.jacrev(denoise)(at).reshape(144, 144)
    assert (matrix - matrix.T).abs().max() > 1e-3
    products = MatrixProducts(matrix, rows=300, shape=(1, 12, 12))
    torch.testing.assert_close(colour(products, 34).div, products.traces(), rtol=1e-12, atol=0)
    error = (colour(products, 9).div - products.traces()).square().mean().sqrt()
    rival = (products.forms(0, 9, "rademacher").mean(0) - products.traces()).square().mean().sqrt()
    assert error < 0.7 * rival


def test_numbers_of_colours_out_of_range() -> None:
    products = MatrixProducts(matrices(1, 6))
    for num_colours in (0, 5):
        with pytest.raises(ValueError, match="num_colours must be in"):
            colour(products, 4, num_colours)
