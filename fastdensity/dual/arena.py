"""Memory that the results of a graph share from call to call.

Two results lie in the same place where one is not read any more when the other is made. A small network's memory stays
in the cache then, and no call asks the system for new pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx

MOST_BYTES = 1 << 23  # that a program holds on to
MOST_RESULTS = 1 << 26  # bytes of all results, above which a call's Python does not count
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Result:
    """What an op made. stays: it was written where it was asked to, and not brought along by another library."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stays: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Place:
    """Where a result lies, from when its node runs to the last that reads it."""

    offset: int
    end: int
    last: int


class Arena:
    """numbers: of the results that have a place, the position in the list that `memory` gives."""

    def __init__(self, places: dict[fx.Node, Place], results: dict[fx.Node, Result]) -> None:
        self.numbers = {node: number for number, node in enumerate(places)}
        self._parts = [(place.offset, results[node]) for node, place in places.items()]
        self._bytes = max((place.end for place in places.values()), default=0)
        self._free: list[list[Tensor]] = []

    @contextmanager
    def memory(self) -> Iterator[list[Tensor]]:
        """The results' tensors, for one call alone: another thread gets its own."""
        try:
            tensors = self._free.pop()
        except IndexError:
            tensors = self._make()
        yield tensors
        self._free.append(tensors)

    def _make(self) -> list[Tensor]:
        block = torch.empty(self._bytes + ALIGNMENT, dtype=torch.uint8, device="cpu")
        first = -block.data_ptr() % ALIGNMENT
        return [
            block[first + offset : first + offset + result.nbytes].view(result.dtype).view(result.shape)
            for offset, result in self._parts
        ]


def arena_for(graph: fx.Graph, results: dict[fx.Node, Result]) -> Arena | None:
    """Places for the results that stay and do not leave the graph; None for a large network, which gains nothing."""
    if sum(result.nbytes for result in results.values()) > MOST_RESULTS:
        return None
    last = _last_reads(graph, results)
    places: dict[fx.Node, Place] = {}
    alive: list[Place] = []
    for number, node in enumerate(graph.nodes):
        end = last.get(node)
        if end is not None and results[node].stays and results[node].nbytes:
            alive = [place for place in alive if place.last >= number]
            place = _lowest(alive, results[node].nbytes, end)
            if place.end <= MOST_BYTES:
                places[node] = place
                alive.append(place)
    return Arena(places, results)


def _lowest(alive: list[Place], size: int, last: int) -> Place:
    """The first gap of that size between places that are in use."""
    offset = 0
    for place in sorted(alive, key=lambda place: place.offset):
        if offset + size <= place.offset:
            break
        offset = max(offset, -(-place.end // ALIGNMENT) * ALIGNMENT)
    return Place(offset, offset + size, last)


def _last_reads(graph: fx.Graph, results: dict[fx.Node, Result]) -> dict[fx.Node, int | None]:
    """The number of the last node that may read a result, be it through views; None for what the graph returns.

    Any node that is no op of ours counts as a view of all that it reads.
    """
    shows: dict[fx.Node, set[fx.Node]] = {}
    last: dict[fx.Node, int | None] = {}
    for number, node in enumerate(graph.nodes):
        read = set().union(*(shows[item] for item in node.all_input_nodes))
        for result in read:
            last[result] = None if node.op == "output" else number
        shows[node] = {node} if node in results else read
        if node in results:
            last[node] = number
    return last
