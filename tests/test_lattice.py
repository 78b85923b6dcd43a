"""Colourings of grids: distances between points of one colour, counted one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdensity.traces import lattice


def nearest(colours: Tensor) -> float:
    """The smallest squared distance between two points of one colour."""
    points = torch.ones_like(colours).nonzero().double()
    squared = torch.cdist(points, points).square().round()
    same = (colours.flatten()[:, None] == colours.flatten()).fill_diagonal_(False)
    return squared[same].min().item() if same.any() else math.inf


@settings(deadline=None, max_examples=80)
@given(shape=st.lists(st.integers(1, 12), min_size=1, max_size=3), count=st.integers(1, 90))
def test_every_colour_is_used(shape: list[int], count: int) -> None:
    points = math.prod(shape)
    colours = lattice.colours(tuple(shape), count)
    assert colours.shape == tuple(shape)
    assert colours.dtype == torch.int64
    assert colours.unique().tolist() == list(range(min(count, points)))
    best = lattice.usable(tuple(shape), count)
    assert 1 <= best <= min(count, points)
    assert nearest(lattice.colours(tuple(shape), best)) >= nearest(colours)


@pytest.mark.parametrize(
    ("dims", "squared"),
    [
        (1, {1: 1, 2: 4, 3: 9, 7: 49, 8: 64}),
        (2, {1: 1, 2: 2, 4: 4, 5: 5, 8: 8, 9: 9, 10: 10, 12: 13, 15: 17, 23: 25, 30: 34}),
        (3, {1: 1, 2: 2, 4: 3, 8: 4, 16: 8, 32: 12}),  # 2, 16: face-centred; 4, 32: body-centred
    ],
)
def test_known_best_lattices(dims: int, squared: dict[int, int]) -> None:
    side = {1: 100, 2: 24, 3: 11}[dims]
    for count, wanted in squared.items():
        assert nearest(lattice.colours((side,) * dims, count)) == wanted


def test_the_best_number_of_colours() -> None:
    assert [lattice.usable((64, 64), count) for count in (1, 3, 7, 16, 17, 19, 32)] == [1, 3, 7, 15, 17, 18, 30]
    assert [lattice.usable((16, 16, 16), count) for count in (2, 5, 8)] == [2, 4, 8]
    assert lattice.usable((50,), 17) == 17


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (2, 3, 20), (1, 30), (4, 1, 9)])
def test_short_sides_are_put_to_use(shape: tuple[int, ...]) -> None:
    """A grid that ends before a colour's next point has no nearer neighbours than a grid without ends."""
    for count in (2, 4, 5, 11):
        dims = sum(size > 1 for size in shape)
        endless = nearest(lattice.colours((24,) * dims if dims < 3 else (12,) * 3, count))
        assert nearest(lattice.colours(shape, count)) >= endless
    assert nearest(lattice.colours((2, 40), 20)) > 81  # ten columns' worth of colours


@pytest.mark.parametrize(("shape", "count"), [((40, 40), 300), ((30, 40), 555), ((12, 12, 12), 200), ((2, 900), 400)])
def test_numbers_beyond_the_search(shape: tuple[int, ...], count: int) -> None:
    assert count > lattice.SEARCHED[len(shape)]
    used = lattice.usable(shape, count)
    assert 0.8 * count < used <= count
    colours = lattice.colours(shape, used)
    assert colours.unique().tolist() == list(range(used))
    lattices = {2: 0.8, 3: 0.75}[len(shape)] * used ** (2 / len(shape))
    assert nearest(colours) > lattices
    assert lattice.colours(shape, count).unique().tolist() == list(range(count))


def test_colours_are_not_shared_memory() -> None:
    colours = lattice.colours((6, 7), 5)
    colours.zero_()
    assert lattice.colours((6, 7), 5).max() == 4
