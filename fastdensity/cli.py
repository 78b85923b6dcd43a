"""The command line: `fastdensity sample` guides the embedded digits, `fastdensity align` says which of their latents
raise the density of the sample with their own, `fastdensity info` what works here."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastdensity as fd
from fastdensity import _backend, cli_bench, digits, experiment
from fastdensity.cli_align import align
from fastdensity.cli_options import (
    BAD_INPUT,
    INTERRUPTED,
    SCHEDULES,
    check_backend,
    check_choices,
    fail,
    load_flow,
    parse_device,
    prepare_folder,
    versions,
)
from fastdensity.experiment import Finished
from fastdensity.solvers import SOLVERS

MEANS = "means over the samples; nats, and PNG bytes for detail; commanded: beyond what the flow itself does to log p"

app = typer.Typer(
    help="Density-guided sampling of flow and diffusion models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(align)
app.add_typer(cli_bench.app, name="bench")


@app.command()
def sample(
    n: Annotated[int, typer.Option("--n", help="Samples at each q; all q start from the same latents.")] = 16,
    q: Annotated[
        list[str], typer.Option("--q", help="Quantiles in (0, 1), comma separated or repeated; 0.5 is unguided.")
    ] = ["0.3,0.4,0.5,0.6,0.7"],  # noqa: B006  (typer reads the default, nobody writes to it)
    solver: Annotated[str, typer.Option(help=f"One of {', '.join(SOLVERS)}.")] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(help="Steps from noise to data.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the latents; sample i of a seed is the same for every n.")] = 0,
    schedule: Annotated[str, typer.Option(help=f"The path to sample along: {', '.join(SCHEDULES)}.")] = "vp",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of examples/train_digits.py instead of the embedded ones.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX.")] = "cpu",
    backend: Annotated[str, typer.Option(help=f"Of the kernels: auto, {', '.join(_backend.BACKENDS)}.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for what is written; made if it is not there.")] = Path(
        "fastdensity-samples"
    ),
) -> None:
    """Draw digits from the same latents at several q, with their exact log density and detail.

    The network was trained on the VP path. Any Gaussian path carries the same problem at equal log-SNR, so the others
    rescale x to VP's before the network sees it. Latents are moved to the median radius first. log p is tracked along
    the guided trajectory with the exact divergence. Ctrl-C keeps every q that was finished.
    """
    try:
        quantiles = _parse_quantiles(q)
        check_choices(n, steps, seed, solver=(solver, SOLVERS), schedule=(schedule, SCHEDULES))
        target = parse_device(device)
        check_backend(backend, target)
        flow = load_flow(checkpoint, target, schedule)
        prepare_folder(out)
    except ValueError as error:
        fail(str(error))
    finished: list[Finished] = []
    interrupted = False
    try:
        with _backend.use(backend):
            latents = experiment.make_latents(n, seed, float(flow.schedule.sigma(digits.LAM_NOISE)), target)
            _sample_all(flow, latents, quantiles, solver, steps, out, finished)
    except KeyboardInterrupt:
        interrupted = True
    except OSError as error:
        fail(f"--out {out}: writing failed after {len(finished)} q, {error}")
    settings = {
        "n": n, "q": quantiles, "solver": solver, "steps": steps, "seed": seed, "schedule": schedule,
        "checkpoint": None if checkpoint is None else str(checkpoint), "device": device, "backend": backend,
    }  # fmt: skip
    if finished:
        experiment.write_merged(
            out, finished, {"interrupted": interrupted, "settings": settings, "versions": versions()}
        )
        _print_table(finished, out)
    if interrupted:
        typer.echo(f"interrupted: {len(finished)} of {len(quantiles)} q finished and kept in {out}", err=True)
        raise typer.Exit(INTERRUPTED)


@app.command()
def info() -> None:
    """Print versions, the CPU, and which backends work here and why the others do not."""
    console = Console()
    table = Table(title="versions", title_justify="left", show_header=False)
    for name, value in versions().items():
        table.add_row(name, value)
    backends = Table(title="backends", title_justify="left")
    for column in ("backend", "works", "why"):
        backends.add_column(column, overflow="fold")
    for name, (works, reason) in _backend.report().items():
        backends.add_row(name, "yes" if works else "no", reason)
    console.print(table)
    console.print(backends)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; an error that typer finds becomes one line too."""
    try:
        code = app(args=arguments, prog_name="fastdensity", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # of typer's usage errors, whichever library it takes them from
            raise
        message = error.format_message()
        if message:
            typer.echo(f"fastdensity: error: {message}", err=True)
        return int(getattr(error, "exit_code", BAD_INPUT))


def _sample_all(
    flow: fd.Flow,
    latents: torch.Tensor,
    quantiles: list[float],
    solver: str,
    steps: int,
    folder: Path,
    finished: list[Finished],
) -> None:
    """Fills `finished` q by q, each kept in the folder as soon as it is done."""
    grid = torch.linspace(digits.LAM_NOISE, digits.LAM_DATA, steps + 1, dtype=torch.float64)
    columns = (TextColumn("q = {task.fields[q]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = len(quantiles) * steps * math.ceil(latents.shape[0] / experiment.BLOCK)
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("", total=total, q=quantiles[0])
        for q in quantiles:
            progress.update(bar, q=q)
            result = experiment.sample_digits(flow, latents, q, solver, grid, lambda *_: progress.advance(bar))
            experiment.keep(folder, finished, result)


def _print_table(finished: list[Finished], folder: Path) -> None:
    rows = [result.summary() for result in finished]
    table = Table("q", "log p", "detail", "commanded", "realised", "residual", "samples/s", caption=MEANS)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        keys = ("log_prob", "detail", "commanded", "realised", "residual")
        means = [row[f"mean_{key}"] for key in keys]
        cells = ("diverged" if mean is None else f"{mean + 0.0:.2f}" for mean in means)
        table.add_row(str(row["q"]), *cells, f"{row['samples_per_second']:.1f}")
    Console().print(table)
    for row in rows:
        if row["flagged"]:
            typer.echo(f"q = {row['q']}: {row['flagged']} samples were not guided as asked; see flags in the npz")
        if row["limited"]:
            typer.echo(f"q = {row['q']}: {row['limited']} samples were to go further than a step can; see residual")
    typer.echo(f"written to {folder}: samples.png density.png samples.npz summary.json and an npz for each q")


def _parse_quantiles(texts: list[str]) -> list[float]:
    quantiles = []
    for text in ",".join(texts).split(","):
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"--q must be numbers in (0, 1), comma separated, got {text.strip()!r}") from None
        if not 0.0 < value < 1.0:
            raise ValueError(f"--q must be in (0, 1), got {text.strip()}")
        if value in quantiles:
            raise ValueError(f"--q must give each value once, got {text.strip()} twice")
        quantiles.append(value)
    return sorted(quantiles)
