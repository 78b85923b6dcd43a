"""`fastdensity bench divergence`: which estimator of the divergence is worth its time on a network."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdensity.bench import divergence as measurements
from fastdensity.bench.divergence import Record, Reference, Variant
from fastdensity.bench.plot import save_pareto
from fastdensity.bench.report import json_of, table_of
from fastdensity.bench.subject import Subject, digits_subject, factory_subject
from fastdensity.cli_options import INTERRUPTED, fail, parse_device, prepare_folder, versions
from fastdensity.experiment import write_whole
from fastdensity.traces.options import DISTRIBUTIONS, METHODS, MOST_MATVECS

DISTRIBUTION_HELP = f"Probes of hutchinson and hutchpp, of {', '.join(DISTRIBUTIONS)}."
MODEL_HELP = "package.module:factory, which returns fn(x), or (fn, x) with states (B, *), of any weights."
CHECKPOINT_HELP = (
    "With --model: a file of yours, handed to factory(path). Without: weights of this package's digits network only, "
    "as examples/train_digits.py writes them."
)
REFERENCES = ("auto", "exact", "long")
MOST_SAMPLES, MOST_TRIALS, MOST_ROUNDS = 65_536, 100_000, 1_000

app = typer.Typer(
    help="Measure what is worth its time on a network.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def _bench() -> None:
    """Measure what is worth its time on a network."""


@dataclass
class Found:
    """What is measured of one subject so far."""

    subject: Subject
    reference: Reference
    records: list[Record] = field(default_factory=list)
    undisturbed: bool | None = None


@app.command()
def divergence(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    checkpoint: Annotated[Path | None, typer.Option(help=CHECKPOINT_HELP)] = None,
    lam: Annotated[
        list[str] | None, typer.Option(help="Log-SNR of the digits' states, comma separated or repeated; default 0.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Of one state, such as 3,32,32, for a factory without states: N(0, 1) is drawn.")
    ] = None,
    methods: Annotated[list[str], typer.Option(help=f"Of {', '.join(METHODS)}.")] = [",".join(METHODS)],  # noqa: B006, B008
    distributions: Annotated[list[str], typer.Option(help=DISTRIBUTION_HELP)] = ["rademacher,orthogonal"],  # noqa: B006
    matvecs: Annotated[list[str], typer.Option(help="Products per sample.")] = ["4,8,16,32"],  # noqa: B006
    sweeps: Annotated[int, typer.Option(help="Of colour probing: one shows no error bar, two do.")] = 1,
    samples: Annotated[int, typer.Option(help="States.")] = 16,
    trials: Annotated[int, typer.Option(help="Seeds for each state.")] = 32,
    rounds: Annotated[int, typer.Option(help="Of timing; 0 leaves it out.")] = 7,
    reference: Annotated[
        str, typer.Option(help=f"auto (exact up to {measurements.MOST_EXACT} elements), exact, or long: a long run.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of states and probes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for what is written; made if it is not there.")] = Path(
        "fastdensity-bench"
    ),
) -> None:
    """Compare estimators of the divergence: error, error bars, products, time and memory.

    Prints a table for each subject, with a star at what nothing beats in both time and error, and writes
    divergence.json and a Pareto plot. Ctrl-C keeps what was measured.
    """

    try:
        for name, value, lowest, highest in (
            ("--samples", samples, 1, MOST_SAMPLES),
            ("--trials", trials, 1, MOST_TRIALS),
            ("--rounds", rounds, 0, MOST_ROUNDS),
            ("--sweeps", sweeps, 1, MOST_MATVECS),
            ("--seed", seed, 0, 2**62),
        ):
            if not lowest <= value <= highest:
                raise ValueError(f"{name} must be in [{lowest}, {highest}], got {value}")
        chosen = _choices("--methods", methods, METHODS), _choices("--distributions", distributions, DISTRIBUTIONS)
        counts = _counts(matvecs)
        if reference not in REFERENCES:
            raise ValueError(f"--reference must be one of {', '.join(REFERENCES)}, got {reference!r}")
        target = parse_device(device)
        subjects = _subjects(model, checkpoint, lam, shape, samples, seed, target)
        prepare_folder(out)
    except ValueError as error:
        fail(str(error))
    finished: list[Found] = []
    interrupted = False
    try:
        for subject in subjects:
            listed, left_out = measurements.variants(*chosen, counts, subject.columns, sweeps)
            for line in left_out:
                typer.echo(f"{subject.name}: left out {line}", err=True)
            if not listed:
                raise ValueError("no method is left to measure")
            _measure(subject, listed, (reference, max(counts), trials, rounds, seed), finished)
    except KeyboardInterrupt:
        interrupted = True
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:  # of the user's function
        fail(f"{subject.name}: {error}")
    settings = {
        "model": model, "checkpoint": None if checkpoint is None else str(checkpoint), "methods": chosen[0],
        "distributions": chosen[1], "matvecs": counts, "sweeps": sweeps, "samples": len(subjects[0].x),
        "trials": trials, "rounds": rounds, "seed": seed, "device": device,
    }  # fmt: skip
    try:
        _write(out, finished, {"interrupted": interrupted, "settings": settings, "versions": versions()})
    except OSError as error:
        fail(f"--out {out}: writing failed, {error}")
    if interrupted:
        typer.echo(f"interrupted: what was measured is in {out}", err=True)
        raise typer.Exit(INTERRUPTED)


def _measure(
    subject: Subject, listed: list[Variant], how: tuple[str, int, int, int, int], finished: list[Found]
) -> None:
    """Adds to `finished` at once, and fills in: an interruption keeps what is there."""
    kind, most, trials, rounds, seed = how
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"{subject.name}: reference", total=len(listed))
        found = Found(subject, measurements.find_reference(subject, kind, most, seed))
        finished.append(found)
        for variant in listed:
            progress.update(bar, description=f"{subject.name}: {variant.family}")
            found.records.append(measurements.measure_error(subject, variant, found.reference, trials, seed))
            progress.advance(bar)
        if rounds:
            progress.update(bar, description=f"{subject.name}: time and memory", total=None)
            found.undisturbed = measurements.measure_cost(subject, found.records, rounds)


def _write(folder: Path, finished: list[Found], facts: dict[str, Any]) -> None:
    """Tables on the terminal; divergence.json and a plot for each subject in the folder."""
    finished = [found for found in finished if found.records]
    console = Console()
    names = ["divergence.json"]
    for found in finished:
        title = f"{found.subject.name}: {len(found.subject.x)} states of {found.subject.columns} elements, "
        console.print(table_of(title + f"reference {found.reference.kind}", found.records))
        if found.undisturbed is False:
            typer.echo("other programs took processor time meanwhile: times are rough")
        if found.undisturbed is not None:
            names.append(f"pareto_{_slug(found.subject.name)}.png")
            save_pareto(folder / names[-1], found.subject.name, found.records)
    results = [json_of(f.subject.name, f.reference, f.records, f.undisturbed) for f in finished]
    text = json.dumps({**facts, "results": results}, indent=2)
    write_whole(folder / names[0], lambda file: file.write(text.encode()))
    typer.echo(f"written to {folder}: {' '.join(names)}")


# -- options ----------------------------------------------------------------------------------------------------------
def _subjects(
    model: str | None,
    checkpoint: Path | None,
    lam: list[str] | None,
    shape: str | None,
    samples: int,
    seed: int,
    device: torch.device,
) -> list[Subject]:
    if model is None:
        if shape is not None:
            raise ValueError("--shape belongs to --model")
        numbers = _numbers("--lam", lam or ["0"])
        return [digits_subject(number, samples, seed, device, checkpoint) for number in numbers]
    if lam is not None:
        raise ValueError("--lam belongs to the digits: give it, or --model")
    sizes = None if shape is None else tuple(_counts([shape], "--shape", distinct=False))
    return [factory_subject(model, samples, seed, sizes, device, checkpoint)]


def _parts(texts: Sequence[str]) -> list[str]:
    return [part.strip() for part in ",".join(texts).split(",")]


def _choices(name: str, texts: Sequence[str], known: Sequence[str]) -> list[str]:
    chosen = list(dict.fromkeys(_parts(texts)))
    for choice in chosen:
        if choice not in known:
            raise ValueError(f"{name} must be of {', '.join(known)}, got {choice!r}")
    return chosen


def _counts(texts: Sequence[str], name: str = "--matvecs", distinct: bool = True) -> list[int]:
    counts = []
    for part in _parts(texts):
        if not re.fullmatch(r"[0-9]{1,9}", part) or not 1 <= int(part) <= MOST_MATVECS:
            raise ValueError(f"{name} must be whole numbers in [1, {MOST_MATVECS}], comma separated, got {part!r}")
        counts.append(int(part))
    return sorted(set(counts)) if distinct else counts


def _numbers(name: str, texts: Sequence[str]) -> list[float]:
    numbers = []
    for part in _parts(texts):
        try:
            number = float(part)
        except ValueError:
            raise ValueError(f"{name} must be numbers, comma separated, got {part!r}") from None
        if not -1e3 < number < 1e3:
            raise ValueError(f"{name} must be finite, got {part}")
        numbers.append(number)
    return list(dict.fromkeys(numbers))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.")
