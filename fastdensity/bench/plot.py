"""The Pareto plot: error against time, both logarithmic, one curve for each family of estimators."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdensity.bench.divergence import Record
from fastdensity.figures import _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008), without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
SIZE = (7.4, 4.4)  # inches
EXACT_COLOUR, FRONT_COLOUR = "#444444", "#BBBBBB"


def save_pareto(path: str | Path, title: str, records: list[Record]) -> None:
    """Writes a PNG of the records that have a time; a number at each point says how many products it took.

    Horizontal bars span the quartiles of the time, vertical ones two standard errors of the error. A point without
    error, the exact method's, is a vertical line.

    Raises:
        ValueError: no record has a time. ImportError: matplotlib is not installed. OSError: path cannot be written.
    """
    timed = [record for record in records if record.seconds is not None]
    if not timed:
        raise ValueError("no record has a time to be drawn")
    families: dict[str, list[Record]] = {}
    for record in timed:
        families.setdefault(record.variant.family, []).append(record)
    with _figure(Path(path), SIZE) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        _front([record for record in timed if record.pareto and record.rmse > 0], axes)
        drawn = 0
        for family, members in families.items():
            points = sorted((record for record in members if record.rmse > 0), key=lambda record: record.products)
            if points:
                _family(axes, family, points, COLOURS[drawn % len(COLOURS)], MARKERS[drawn % len(MARKERS)])
                drawn += 1
            for record in (record for record in members if record.rmse == 0):
                _exact(axes, record)
        _ticks(axes)
        axes.set_xlabel("time per sample  (ms)")
        axes.set_ylabel("RMS error of the divergence")
        axes.set_title(f"{title}: numbers are products per sample", fontsize=9, loc="left")
        axes.grid(alpha=0.25, linewidth=0.6, which="both")
        figure.legend(loc="outside right upper", frameon=False)


def _ticks(axes: Axes) -> None:
    """Written out, and as many as the axis' range leaves room for; after everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis, (lower, upper) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        decades = math.log10(upper / lower)
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _family(axes: Axes, family: str, points: list[Record], colour: str, marker: str) -> None:
    times = [[1e3 * value for value in record.seconds or ()] for record in points]
    x = [time[1] for time in times]
    y = [record.rmse for record in points]
    # a bar down to zero or below would leave a logarithmic axis
    lower = [min(2 * record.rmse_error, 0.9 * record.rmse) for record in points]
    upper = [2 * record.rmse_error for record in points]
    axes.errorbar(
        x, y, xerr=[[time[1] - time[0] for time in times], [time[2] - time[1] for time in times]], yerr=[lower, upper],
        color=colour, marker=marker, markersize=5, linewidth=1.2, elinewidth=0.8, capsize=2, label=family,
    )  # fmt: skip
    for record, left, height in zip(points, x, y, strict=True):
        axes.annotate(
            f"{record.products:g}", (left, height), (4, 4), textcoords="offset points", fontsize=7, color=colour
        )


def _exact(axes: Axes, record: Record) -> None:
    assert record.seconds is not None
    label = f"{record.variant.family} ({record.products:g} products)"
    axes.axvline(1e3 * record.seconds[1], color=EXACT_COLOUR, linestyle="--", linewidth=1.2, label=label)


def _front(points: list[Record], axes: Axes) -> None:
    """The staircase below which nothing was found."""
    if not points:
        return
    points = sorted(points, key=_median)
    steps: Any = {"where": "post", "color": FRONT_COLOUR, "linewidth": 5, "alpha": 0.6, "zorder": 0}
    times = [1e3 * _median(record) for record in points]
    axes.step(times, [record.rmse for record in points], label="Pareto front", **steps)


def _median(record: Record) -> float:
    assert record.seconds is not None
    return record.seconds[1]
