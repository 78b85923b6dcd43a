"""What a bench leaves: a table on the terminal, and a JSON file."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastdensity.bench.divergence import Record, Reference

COLUMNS = ("", "method", "k", "RMSE", "%", "bias/se", "bar/RMSE", "ms", "MiB")
LEGEND = (
    "k: products per sample; %: RMSE over the RMS of the divergence; bias over its standard error; RMS error bar over "
    "RMSE, 1 is honest; ms per sample; MiB: peak of a call on all states; *: nothing is both faster and more accurate"
)


def table_of(title: str, records: list[Record]) -> Table:
    """One row per record, the fastest first; a star marks those on the Pareto front. It fits 80 columns."""
    left: Any = {"title_justify": "left", "caption_justify": "left"}
    table = Table(*COLUMNS, title=title, caption=LEGEND, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **left)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for record in sorted(records, key=_order):
        row = (
            "*" if record.pareto else "",
            record.variant.family,
            f"{record.products:g}",
            f"{record.rmse:.3g}",
            f"{100 * record.relative:.2f}",
            "" if not record.bias_error > 0 else f"{record.bias / record.bias_error:+.1f}",
            "" if record.calibration is None else f"{record.calibration:.2f}",
            "" if record.seconds is None else f"{1e3 * record.seconds[1]:.3g}",
            "" if record.bytes is None else f"{record.bytes / 2**20:.1f}",
        )
        table.add_row(*row, style="bold" if record.pareto else None)
    return table


def json_of(name: str, reference: Reference, records: list[Record], undisturbed: bool | None) -> dict[str, Any]:
    """The same, and the reference; undisturbed is None where nothing was timed."""
    return {
        "subject": name,
        "reference": {
            "kind": reference.kind,
            "rms": float(reference.div.square().mean().sqrt()),
            "rms_std_err": float(reference.std_err.square().mean().sqrt()),
        },
        "undisturbed": undisturbed,
        "records": [_row(record) for record in sorted(records, key=_order)],
    }


def _row(record: Record) -> dict[str, Any]:
    variant = record.variant
    lower, median, upper = record.seconds or (None, None, None)
    return {
        "family": variant.family,
        "method": variant.method,
        "distribution": variant.distribution,
        "products": record.products,
        "rmse": record.rmse,
        "rmse_std_err": _number(record.rmse_error),
        "relative_rmse": _number(record.relative),
        "bias": record.bias,
        "bias_std_err": _number(record.bias_error),
        "calibration": record.calibration,
        "median_seconds_per_sample": median,
        "quartiles_of_seconds": None if median is None else [lower, upper],
        "peak_bytes": record.bytes,
        "pareto": record.pareto,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no NaN


def _order(record: Record) -> tuple[float, float]:
    return (math.inf if record.seconds is None else record.seconds[1], record.products)
