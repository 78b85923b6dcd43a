"""What the commands of the command line share: their options checked, and how they fail."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy
import torch
import typer

import fastdensity as fd
from fastdensity import _backend, digits

SCHEDULES: dict[str, type[fd.VP | fd.VE | fd.RectifiedFlow]] = {
    "vp": fd.VP,
    "ve": fd.VE,
    "rectified-flow": fd.RectifiedFlow,
}
INTERRUPTED, BAD_INPUT = 130, 2
MOST_SAMPLES, MOST_STEPS = 65_536, 100_000


def check_choices(n: int, steps: int, seed: int, **choices: tuple[str, Iterable[str]]) -> None:
    """ValueError for a number out of its range, or a choice that is not among the known ones it comes with."""
    limits = (("--n", n, 1, MOST_SAMPLES), ("--steps", steps, 1, MOST_STEPS), ("--seed", seed, 0, 2**63 - 1))
    for name, value, lowest, highest in limits:
        if not lowest <= value <= highest:
            raise ValueError(f"{name} must be in [{lowest}, {highest}], got {value}")
    for name, (choice, known) in choices.items():
        if choice not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {choice!r}")


def parse_device(device: str) -> torch.device:
    """A torch device that is there; ValueError otherwise."""
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:INDEX, got {device!r}") from None
    if parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:INDEX, got {device!r}")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return parsed


def check_backend(backend: str, device: torch.device) -> None:
    """ValueError for a backend that is unknown or does not work on the device."""
    if backend not in ("auto", *_backend.BACKENDS):
        raise ValueError(f"--backend must be one of auto, {', '.join(_backend.BACKENDS)}, got {backend!r}")
    with _backend.use(backend):
        try:
            _backend.choose(device.type)
        except RuntimeError as error:
            raise ValueError(f"--backend {backend}: {error}") from None


def load_flow(checkpoint: Path | None, device: torch.device, schedule: str) -> fd.Flow:
    """The flow of the embedded or the given digits, on the chosen path."""
    flow = digits.load_digits_flow(checkpoint, device)
    return flow if schedule == "vp" else digits.along_path(flow, SCHEDULES[schedule]())


def prepare_folder(folder: Path) -> None:
    """Makes the folder; ValueError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}") from None


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr."""
    typer.echo(f"fastdensity: error: {' '.join(message.split())}", err=True)
    raise typer.Exit(BAD_INPUT)


def versions() -> dict[str, str]:
    """Of the packages, the CPU and the GPU."""
    try:
        import triton
    except ImportError:
        triton_version = "not installed"
    else:
        triton_version = triton.__version__
    return {
        "fastdensity": fd.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "CPU": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
