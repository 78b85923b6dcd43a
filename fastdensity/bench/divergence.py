"""Estimators of the divergence, side by side: error against a reference, error bars, products, time, memory."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdensity.bench.memory import peak_bytes
from fastdensity.bench.subject import Subject
from fastdensity.bench.timing import measure
from fastdensity.divergence import DivergenceEstimate, divergence
from fastdensity.traces.options import LEAST_MATVECS

MOST_EXACT = 4_096  # elements of a sample; above, the reference is a long run
LONG_RUN = 64  # times the most products of any variant
LONG_RUN_STEP = 1  # of the probes' key, so that a long run shares none with what it judges
WITH_DISTRIBUTION = ("hutchinson", "hutchpp")
ROUND_SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to estimate; distribution None where the method has none, sweeps of "colour" only."""

    method: str
    num_matvecs: int
    distribution: str | None = None
    sweeps: int = 1

    @property
    def family(self) -> str:
        """What it shares with the variants of other numbers of products."""
        if self.method == "colour" and self.sweeps > 1:
            return f"colour, {self.sweeps} sweeps"
        return self.method if self.distribution is None else f"{self.method}, {self.distribution}"

    def options(self) -> dict[str, Any]:
        """Arguments of `fastdensity.divergence`."""
        options: dict[str, Any] = {"method": self.method, "num_matvecs": self.num_matvecs}
        if self.distribution is not None:
            options["distribution"] = self.distribution
        if self.method == "colour" and self.sweeps > 1:
            options["num_colours"] = self.num_matvecs // self.sweeps
        return options


@dataclass(slots=True)
class Record:
    """What was measured of a variant.

    Attributes:
        products: with the Jacobian, per sample. rmse: root mean square of div - reference over samples and trials, the
            reference's own error taken out; rmse_error: its standard error. relative: rmse over the reference's RMS.
        bias, bias_error: mean of div - reference, and its standard error. calibration: RMS of std_err over rmse, None
            where the method shows no bar. seconds: per sample, (lower quartile, median, upper quartile).
        bytes: peak memory of a call on all samples. pareto: nothing else is as fast and as accurate.
    """

    variant: Variant
    products: float
    rmse: float
    rmse_error: float
    relative: float
    bias: float
    bias_error: float
    calibration: float | None
    seconds: tuple[float, float, float] | None = None
    bytes: int | None = None
    pareto: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """div (B,) and its standard error (B,), 0 where exact; kind says how it was found."""

    kind: str
    div: Tensor
    std_err: Tensor


def variants(
    methods: Sequence[str], distributions: Sequence[str], matvecs: Sequence[int], columns: int, sweeps: int = 1
) -> tuple[list[Variant], list[str]]:
    """Every combination that makes sense for samples of `columns` elements, and why the others are left out."""
    found, left_out = [], []
    for method in methods:
        if method == "exact":
            found.append(Variant("exact", columns))
            continue
        for count in matvecs:
            least = max(LEAST_MATVECS.get(method, 1), sweeps if method == "colour" else 1)
            if count < least:
                left_out.append(f"{method} with {count}: it needs {least} products")
            elif count > columns:
                left_out.append(f"{method} with {count}: a sample has {columns} elements, exact is cheaper")
            elif method in WITH_DISTRIBUTION:
                found += [Variant(method, count, distribution) for distribution in distributions]
            else:
                found.append(Variant(method, count, None, sweeps if method == "colour" else 1))
    return found, left_out


def find_reference(subject: Subject, kind: str, most_matvecs: int, seed: int) -> Reference:
    """The exact divergence, or a long run of Rademacher probes; "auto": the exact one up to MOST_EXACT elements."""
    products = LONG_RUN * most_matvecs
    if kind == "exact" or (kind == "auto" and subject.columns <= MOST_EXACT) or products >= subject.columns:
        found = estimate_one(subject, Variant("exact", subject.columns), seed)
        return Reference("exact", found.div, found.std_err)
    long = Variant("hutchinson", products, "rademacher")
    found = estimate_one(subject, long, seed, LONG_RUN_STEP)
    return Reference(f"{products} Rademacher probes", found.div, found.std_err)


def estimate_one(subject: Subject, variant: Variant, seed: int, step: int = 0) -> DivergenceEstimate:
    """One call, without warnings: what they say is what is measured."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        options = variant.options()
        if variant.method == "exact":
            options["num_matvecs"] = 1
        return divergence(subject.fn, subject.x, *subject.args, seed=seed, step=step, **options)


def measure_error(subject: Subject, variant: Variant, reference: Reference, trials: int, seed: int) -> Record:
    """Errors of `trials` seeds; an exact method needs but one.

    Raises:
        ValueError: an estimate or the reference is not finite.
    """
    runs = [estimate_one(subject, variant, seed + i) for i in range(1 if variant.method == "exact" else trials)]
    errors = torch.stack([run.div for run in runs]) - reference.div
    if not bool(errors.isfinite().all()):
        raise ValueError(f"{subject.name}: the divergence by {variant.family} is not finite at some states")
    squares = errors.square()
    own = float(reference.std_err.square().mean())
    mean_square = max(float(squares.mean()) - own, 0.0)
    rmse, count = math.sqrt(mean_square), errors.numel()
    size = float(reference.div.square().mean().sqrt())
    spread = float(squares.std()) / math.sqrt(count) if count > 1 else math.nan
    bars = torch.stack([run.std_err for run in runs]).square().mean().sqrt()
    shows_bar = variant.method != "exact" and rmse > 0 and bool(bars.isfinite())
    return Record(
        variant,
        float(runs[0].num_matvecs.double().mean()),
        rmse,
        spread / (2 * rmse) if rmse > 0 else 0.0,
        rmse / size if size > 0 else math.nan,
        float(errors.mean()),
        math.hypot(float(errors.std()) / math.sqrt(count) if count > 1 else 0.0, math.sqrt(own / errors.shape[1])),
        float(bars) / rmse if shows_bar else None,
    )


def measure_cost(subject: Subject, records: list[Record], rounds: int) -> bool:
    """Fills in times and memory, and who is Pareto-optimal; False where other load could not be kept out.

    All variants are timed in rounds, each round in a new order; see `fastdensity.bench.timing`.
    """
    calls = {str(index): _call(subject, record.variant) for index, record in enumerate(records)}
    for record, call in zip(records, calls.values(), strict=True):
        record.bytes = peak_bytes(call, subject.x.device)
    timing = measure(calls, rounds=rounds, seconds=ROUND_SECONDS, patience=2)
    for record, seconds in zip(records, timing.rounds.values(), strict=True):
        each = [value / subject.x.shape[0] for value in seconds]
        quartiles = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else 3 * each
        record.seconds = (quartiles[0], quartiles[1], quartiles[2])
    mark_pareto(records)
    return timing.guarded


def _call(subject: Subject, variant: Variant) -> Callable[[], object]:
    def run() -> None:
        estimate_one(subject, variant, 0)
        if subject.x.device.type == "cuda":
            torch.cuda.synchronize(subject.x.device)

    return run


def mark_pareto(records: list[Record]) -> None:
    """Of those with a time, those that no other beats in one of (time, error) and equals in the other."""
    best = math.inf
    for record in sorted(_timed(records), key=lambda record: (record.seconds[1], record.rmse)):  # type: ignore[index]
        record.pareto = record.rmse < best
        best = min(best, record.rmse)


def _timed(records: list[Record]) -> Iterator[Record]:
    return (record for record in records if record.seconds is not None)
