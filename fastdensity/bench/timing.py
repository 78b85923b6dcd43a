"""Timing that can be believed on a shared machine: interleaved, shuffled, guarded against other load.

All variants of a case run in one process, in rounds; each round runs every variant once in a new random order and
is thrown away when other processes took more than `LOAD_LIMIT` of a core meanwhile. What is reported is the median
over the rounds, and ratios of medians.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

LOAD_LIMIT = 0.05
Variant = Callable[[], object]


@dataclass
class Timing:
    """Seconds per call of each variant, one number per kept round.

    guarded: no kept round was disturbed by other load.
    """

    rounds: dict[str, list[float]] = field(default_factory=dict)
    discarded: int = 0
    guarded: bool = True

    def median(self, name: str) -> float:
        """Over the rounds."""
        return statistics.median(self.rounds[name])

    def medians(self) -> dict[str, float]:
        """Of all variants."""
        return {name: self.median(name) for name in self.rounds}


def _machine_seconds() -> float:
    """Processor seconds that the whole machine has spent, idle and waiting excluded; 0 where /proc is absent."""
    try:
        with open("/proc/stat") as stat:
            fields = [int(field) for field in stat.readline().split()[1:]]
    except OSError:
        return 0.0
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _calls_for(variant: Variant, seconds: float) -> int:
    """How many calls take about `seconds`, after a warm-up."""
    variant()
    start = time.perf_counter()
    variant()
    once = max(time.perf_counter() - start, 1e-7)
    return max(1, int(seconds / once))


def measure(
    variants: dict[str, Variant], rounds: int = 30, seconds: float = 0.03, patience: int = 4, seed: int = 0
) -> Timing:
    """Median-ready timings of `variants`; after `patience` times as many rounds, noisy rounds are kept and said so."""
    order = list(variants)
    shuffler = random.Random(seed)
    calls = {name: _calls_for(variant, seconds) for name, variant in variants.items()}
    timing = Timing({name: [] for name in variants})
    kept = 0
    for attempt in range(rounds * patience):
        shuffler.shuffle(order)
        machine, own, start = _machine_seconds(), _own_seconds(), time.perf_counter()
        results = {name: _time(variants[name], calls[name]) for name in order}
        elapsed = time.perf_counter() - start
        others = (_machine_seconds() - machine) - (_own_seconds() - own)
        noisy = others > LOAD_LIMIT * elapsed
        attempts_left = rounds * patience - attempt - 1
        if noisy and attempts_left >= rounds - kept:
            timing.discarded += 1
            continue
        timing.guarded &= not noisy
        for name, result in results.items():
            timing.rounds[name].append(result)
        kept += 1
        if kept == rounds:
            break
    return timing


def _time(variant: Variant, calls: int) -> float:
    variant()  # the first call of a round finds another variant's data in the cache
    start = time.perf_counter()
    for _ in range(calls):
        variant()
    return (time.perf_counter() - start) / calls
