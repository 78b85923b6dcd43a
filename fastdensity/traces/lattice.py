"""Colourings of grids by sublattices: points of one colour lie on a sublattice, as far from each other as can be.

A sublattice of Z^d of index m parts a grid into m colours, its cosets. Each has one basis in Hermite normal form, an
upper triangular matrix with 0 <= b_kj < b_jj, so that all of them can be listed: there are as many as the divisors of m
sum to for d = 2. The best has the most distant neighbours of one colour, counted within the grid alone: a difference
that is longer than the grid joins no two of its points.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]
SEARCHED = {1: 1 << 62, 2: 128, 3: 64}  # the largest index of dimension d whose sublattices are all looked at
BEYOND = 4  # shells are compared up to this multiple of the smallest squared distance
TRIES = 32  # best lattices in turn, when those before leave colours unused


def colours(shape: tuple[int, ...], count: int) -> Tensor:
    """The colour of every point of a grid of at most 3 dimensions: int64 of that shape, all of 0 .. count-1 used.

    With at least as many colours as points, each point has a colour of its own. A count beyond `SEARCHED` that
    `usable` does not give may be numbered along the grid's rows: right, but neighbours may be near.
    """
    points = math.prod(shape)
    if count >= points:
        return torch.arange(points).reshape(shape)
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])  # the longest last: see _covers
    labels = _labels(_sizes(shape), count).reshape([shape[axis] for axis in order])
    return torch.from_numpy(labels.transpose(np.argsort(order)).copy())


@lru_cache(maxsize=256)
def usable(shape: tuple[int, ...], count: int) -> int:
    """The best number of colours up to `count`: of the largest distance within a colour, then the largest."""
    points = math.prod(shape)
    if count >= points:
        return max(1, points)
    sizes = _sizes(shape)
    if count <= SEARCHED[len(sizes)]:
        fewest = count if len(sizes) == 1 else max(1, 2 * count // 3)  # still fewer are not farther apart
        return max(range(fewest, count + 1), key=lambda number: (_best(sizes, number)[1], number))
    side = 2
    while count // math.prod(_scales(sizes, side)) > SEARCHED[len(sizes)]:
        side += 1
    scales = _scales(sizes, side)
    return math.prod(scales) * usable(_shrunk(sizes, scales), count // math.prod(scales))


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def _scales(sizes: tuple[int, ...], side: int) -> tuple[int, ...]:
    return tuple(min(side, size) for size in sizes)


def _shrunk(sizes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size // scale for size, scale in zip(sizes, scales, strict=True))


@lru_cache(maxsize=64)
def _labels(sizes: tuple[int, ...], count: int) -> Integers:
    """Colours of all points, in the order of the grid; large counts as a lattice of boxes, stretched."""
    places = np.indices(sizes).reshape(len(sizes), -1).T
    if count <= SEARCHED[len(sizes)]:
        return _numbers(_best(sizes, count)[0][None], places)[0]
    for side in range(2, max(sizes) + 1):
        scales = _scales(sizes, side)
        coarse, index = _shrunk(sizes, scales), count // math.prod(scales)
        if index * math.prod(scales) == count and index <= min(SEARCHED[len(sizes)], math.prod(coarse)):
            inside = np.ravel_multi_index(tuple((places % scales).T), scales)
            kept = [axis for axis, size in enumerate(coarse) if size > 1]
            order = sorted(kept, key=lambda axis: coarse[axis])
            outside = _outside(tuple(coarse[axis] for axis in order), index, (places // scales)[:, order])
            return inside * index + outside
    return np.arange(len(places)) % count


def _outside(sizes: tuple[int, ...], index: int, places: Integers) -> Integers:
    if index == 1:
        return np.zeros(len(places), dtype=np.int64)
    return _numbers(_best(sizes, index)[0][None], places)[0]


@lru_cache(maxsize=1024)
def _best(sizes: tuple[int, ...], index: int) -> tuple[Integers, float]:
    """The sublattice (d, d) of that index with the fewest short vectors, and the squared length of its shortest."""
    forms = _forms(len(sizes), index)
    for _ in range(TRIES):
        if not len(forms):
            break
        alive, nearest = _sparsest(forms, sizes)
        for form in forms[alive]:
            if _covers(form, sizes, index):
                return form, nearest
        forms = np.delete(forms, alive, axis=0)
    form = _along_rows(sizes, index)
    return form, _sparsest(form[None], sizes)[1]


def _sparsest(forms: Integers, sizes: tuple[int, ...]) -> tuple[Integers, float]:
    """Which of `forms` (L, d, d) have the fewest short vectors, shell by shell, and the shortest's squared length."""
    reach = 2 * math.ceil(float(forms[0].diagonal().prod()) ** (1 / len(sizes))) + 1
    while True:
        alive, nearest = np.arange(len(forms)), math.inf
        for squared, vectors in _shells(sizes, reach):
            if squared > BEYOND * nearest:
                break
            counts = (_numbers(forms[alive], vectors) == 0).sum(1)
            alive = alive[counts == counts.min()]
            if counts.min() > 0:
                nearest = min(nearest, squared)
        if nearest < math.inf or reach >= max(sizes) * len(sizes):
            return alive, nearest
        reach *= 2


@lru_cache(maxsize=32)
def _shells(sizes: tuple[int, ...], reach: int) -> list[tuple[int, Integers]]:
    """Differences of points of the grid up to a length, one of each pair +-v, by their squared length."""
    spans = [min(size - 1, reach) for size in sizes]
    axes = np.meshgrid(*(np.arange(-span, span + 1) for span in spans), indexing="ij")
    vectors = np.stack(axes, -1).reshape(-1, len(sizes))
    vectors = vectors[len(vectors) // 2 + 1 :]  # those after 0 in lexicographic order
    squared = (vectors**2).sum(1)
    lengths = np.unique(squared[squared <= reach**2])
    return [(int(length), vectors[squared == length]) for length in lengths]


@lru_cache(maxsize=256)
def _forms(dims: int, index: int) -> Integers:
    """All Hermite normal forms of a determinant, (L, d, d)."""
    forms = []
    for diagonal in product([size for size in range(1, index + 1) if index % size == 0], repeat=dims):
        if math.prod(diagonal) != index:
            continue
        above = [(row, column) for column in range(dims) for row in range(column)]
        offsets = [diagonal[column] for _, column in above]
        form = np.zeros((math.prod(offsets), dims, dims), dtype=np.int64)
        form[:, range(dims), range(dims)] = diagonal
        for (row, column), offset in zip(above, np.indices(offsets), strict=True):
            form[:, row, column] = offset.ravel()
        forms.append(form)
    return np.concatenate(forms)


def _along_rows(sizes: tuple[int, ...], index: int) -> Integers:
    """The lattice that numbers a grid's points row by row, modulo the index: it always uses every colour."""
    form = np.eye(len(sizes), dtype=np.int64)
    form[-1, -1] = index
    for axis in range(len(sizes) - 1):
        form[axis, -1] = -math.prod(sizes[axis + 1 :]) % index
    return form


def _numbers(forms: Integers, places: Integers) -> Integers:
    """The coset of every place (P, d) under every lattice (L, d, d): (L, P) numbers, 0 for the lattice itself."""
    left = [places[None, :, axis] for axis in range(places.shape[1])]
    number = np.zeros((len(forms), len(places)), dtype=np.int64)
    for axis in range(len(left)):
        size = forms[:, axis, axis, None]
        steps = left[axis] // size
        number = number * size + left[axis] - steps * size
        for later in range(axis + 1, len(left)):
            left[later] = left[later] - steps * forms[:, axis, later, None]
    return number


def _covers(form: Integers, sizes: tuple[int, ...], index: int) -> bool:
    """Has the grid points of all colours? A box of the diagonal's sizes has one of each."""
    if all(form.diagonal() <= sizes):
        return True
    places = np.indices(sizes).reshape(len(sizes), -1).T
    return len(np.unique(_numbers(form[None], places))) == index
