"""Timing on a CUDA device: events around replayed graphs and around plain calls, interleaved and shuffled.

Every variant is a list of calls, one per set of inputs, and the sets together are larger than the L2 cache, so that
no call finds its operands there. A graph of them holds no gap between launches: its replay is the device's time. The
same calls from Python, back to back, are what a loop of small steps sees.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdensity._backend import use

Call = Callable[[], Tensor]
SECONDS = 2e-3  # of one measurement, at least


@dataclass
class Variant:
    """One implementation on every set of inputs; `backend` is fastdensity's, None for plain torch."""

    calls: list[Call]
    backend: str | None = None

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Within the block, fastdensity runs on the variant's backend."""
        with nullcontext() if self.backend is None else use(self.backend):
            yield

    def run(self) -> None:
        for call in self.calls:
            call()


@dataclass
class Timing:
    """Seconds per call, one number per round."""

    device: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, list[float]] = field(default_factory=dict)

    def medians(self) -> tuple[dict[str, float], dict[str, float]]:
        """(device seconds, seconds of calls from Python) of each variant."""
        return (
            {name: statistics.median(seconds) for name, seconds in self.device.items()},
            {name: statistics.median(seconds) for name, seconds in self.calls.items()},
        )


def sets_beyond_cache(bytes_per_set: int, most_bytes: int = 2**32) -> int:
    """How many sets of inputs a variant rotates through: four times the L2 cache, at least two."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(4 * cache // bytes_per_set + 1, most_bytes // bytes_per_set))


def seconds_of(work: Callable[[], None], repeats: int) -> float:
    """Seconds of one call of `work`, the mean of `repeats`, between two events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats


def _captured(variant: Variant) -> Callable[[], None]:
    """The replay of a graph of all calls of a variant."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up off the default stream, as capturing wants
        variant.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        variant.run()
    return graph.replay


def measure(variants: dict[str, Variant], rounds: int, seed: int = 0) -> Timing:
    """Rounds in a new random order each; every measurement lasts `SECONDS` or one pass over the sets."""
    replays: dict[str, Callable[[], None]] = {}
    repeats: dict[str, int] = {}
    for name, variant in variants.items():
        with variant.chosen():
            replays[name] = _captured(variant)
        replays[name]()
        repeats[name] = max(1, round(SECONDS / seconds_of(replays[name], 2)))
    timing = Timing({name: [] for name in variants}, {name: [] for name in variants})
    order, shuffler = list(variants), random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            sets = len(variants[name].calls)
            timing.device[name].append(seconds_of(replays[name], repeats[name]) / sets)
            with variants[name].chosen():
                variants[name].run()
                torch.cuda.synchronize()
                timing.calls[name].append(seconds_of(variants[name].run, 1) / sets)
    return timing
