"""`fastdensity align`: which of the digits' latents raise the density of their sample with their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastdensity import digits, experiment, figures
from fastdensity.alignment import align as align_latents
from fastdensity.cli_options import (
    INTERRUPTED,
    SCHEDULES,
    check_choices,
    fail,
    load_flow,
    parse_device,
    prepare_folder,
    versions,
)
from fastdensity.flow import Flow


def align(
    n: Annotated[int, typer.Option("--n", help="Latents, drawn from the prior.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps from noise to data; the path ve needs the most.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the latents; latent i of a seed is the same for every n.")] = 0,
    schedule: Annotated[str, typer.Option(help=f"The path to sample along: {', '.join(SCHEDULES)}.")] = "vp",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of examples/train_digits.py instead of the embedded ones.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for what is written; made if it is not there.")] = Path(
        "fastdensity-alignment"
    ),
) -> None:
    """Count the digits' latents whose density rises together with that of their sample.

    Each latent's score is moved along with the sample (Euler in log-SNR, one Jacobian-vector product a step) and
    compared with the score at the end: a positive inner product means aligned, so that rescaling the latent controls
    the density of the sample. Writes alignment.json and alignment.png. Ctrl-C keeps the latents that were finished.
    """
    try:
        check_choices(n, steps, seed, schedule=(schedule, SCHEDULES))
        target = parse_device(device)
        flow = load_flow(checkpoint, target, schedule)
        prepare_folder(out)
    except ValueError as error:
        fail(str(error))
    latents = experiment.draw_latents(n, seed, float(flow.schedule.sigma(digits.LAM_NOISE)), target)
    finished: list[tuple[Tensor, Tensor]] = []
    interrupted = False
    try:
        _align_all(flow, latents, steps, finished)
    except KeyboardInterrupt:
        interrupted = True
    settings = {
        "n": n, "steps": steps, "seed": seed, "schedule": schedule, "device": device,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }  # fmt: skip
    if finished:
        try:
            summary = _write(out, finished, {"interrupted": interrupted, "settings": settings, "versions": versions()})
        except OSError as error:
            fail(f"--out {out}: writing failed, {error}")
        fraction, error_bar = 100 * summary["aligned_fraction"], 100 * summary["standard_error"]
        typer.echo(f"aligned: {fraction:.2f} % ± {error_bar:.2f} % of {summary['latents']} latents")
        typer.echo(f"mean cosine: {summary['mean_cosine']:.4f}")
        typer.echo(f"written to {out}: alignment.json alignment.png")
    if interrupted:
        typer.echo(f"interrupted: {sum(len(v) for v, _ in finished)} of {n} latents finished, kept in {out}", err=True)
        raise typer.Exit(INTERRUPTED)


def _align_all(flow: Flow, latents: Tensor, steps: int, finished: list[tuple[Tensor, Tensor]]) -> None:
    """Fills `finished` with (v.s, its cosine) of each block of latents."""
    grid = torch.linspace(digits.LAM_NOISE, digits.LAM_DATA, steps + 1, dtype=torch.float64)
    blocks = list(experiment.in_blocks(latents))
    console = Console(stderr=True)
    for block, count in track(blocks, "aligning", console=console, disable=not sys.stderr.isatty(), transient=True):
        result = align_latents(flow, block, grid, True, None, None, 0)
        assert result.cosine is not None
        finished.append((result.value[:count].cpu(), result.cosine[:count].cpu()))


def _write(folder: Path, finished: list[tuple[Tensor, Tensor]], facts: dict[str, Any]) -> dict[str, Any]:
    value, cosine = (torch.cat(part) for part in zip(*finished, strict=True))
    usable = value.isfinite() & cosine.isfinite()
    if not bool(usable.any()):
        fail("no latent gave finite numbers: the network diverged")
    value, cosine = value[usable], cosine[usable]
    fraction, error = figures.aligned_fraction(value)
    summary = {
        **facts,
        "aligned_fraction": fraction,
        "standard_error": error,
        "latents": len(value),
        "diverged": int((~usable).sum()),
        "mean_cosine": float(cosine.mean()),
        "alignment": value.tolist(),
        "cosine": cosine.tolist(),
    }
    experiment.write_whole(folder / "alignment.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    figures.alignment_figure(folder / "alignment.png", cosine)
    return summary
