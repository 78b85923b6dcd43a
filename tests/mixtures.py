"""Problems whose answers are known: small mixtures on every path, and log-SNR grids."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

import fastdensity as fd
from fastdensity.schedules import Schedule

# The same examples every time, no clock (machines are shared), and no folder of examples left behind.
settings.register_profile("fastdensity", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("fastdensity")

SCHEDULES: dict[str, Schedule] = {
    "VP": fd.VP(),
    "VE": fd.VE(),
    "EDM": fd.EDM(),
    "RectifiedFlow": fd.RectifiedFlow(),
    "functions": Schedule.from_functions(lambda lam: torch.exp(lam / 4), lambda lam: torch.exp(-lam / 4)),
}


def mixture(
    schedule: Schedule | None = None, components: int = 3, shape: tuple[int, ...] = (5,), **options: Any
) -> fd.GaussianMixture:
    """The same numbers whatever the path; variances between 0.1 and 0.6."""
    generator = torch.Generator().manual_seed(1)
    return fd.GaussianMixture(
        torch.rand(components, generator=generator, dtype=torch.float64) + 0.5,
        torch.randn((components, *shape), generator=generator, dtype=torch.float64),
        torch.rand((components, *shape), generator=generator, dtype=torch.float64) / 2 + 0.1,
        fd.VP() if schedule is None else schedule,
        **options,
    )


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lam_grid(first: float, last: float, steps: int) -> Tensor:
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number that was wanted."""
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())
