"""What benchmarks.few_steps samples: targets with known log p, paths with their grids, and the guided flow itself.

In the Gaussians the flow stretches everywhere alike, so the guided flow's log p at its end is known in closed form:
that of the plain flow's end, plus what was commanded. Else it is found by many short steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastdensity as fd
from fastdensity.conversions import to_epsilon
from fastdensity.digits import LAM_DATA, LAM_NOISE, load_digits_flow
from fastdensity.schedules import Schedule

FINE_SOLVER = "dpmpp_2m"
DIGITS_TOLERANCE = 1e-5  # of the encoding that finds log p


def _vp(steps: int) -> Tensor:
    return torch.linspace(-9.0, 7.0, steps + 1, dtype=torch.float64)


def _karras(steps: int) -> Tensor:
    sigmas = fd.karras_sigmas(steps + 1, sigma_min=0.02, sigma_max=80.0)
    return -2.0 * sigmas.log()


def _shifted_rectified(steps: int, noisiest: float = 0.99) -> Tensor:
    time = torch.linspace(noisiest, 0.01, steps + 1, dtype=torch.float64)
    return torch.as_tensor(fd.RectifiedFlow.lam_from_time(3.0 * time / (1.0 + 2.0 * time)))


def _digits_grid(steps: int) -> Tensor:
    return torch.linspace(LAM_NOISE, LAM_DATA, steps + 1)


@dataclass(frozen=True)
class Path:
    """A path and its grid of log-SNR for a number of steps."""

    name: str
    schedule: Schedule
    grid: Callable[[int], Tensor]


PATHS = (
    Path("VP, even log-SNR", fd.VP(), _vp),
    Path("VE, Karras spacing", fd.VE(), _karras),
    Path("rectified flow, shifted", fd.RectifiedFlow(), _shifted_rectified),
)
# the digits network knows lam from -10 to 10
DIGITS_PATHS = (
    Path(PATHS[0].name, fd.VP(), _digits_grid),
    PATHS[1],
    Path(PATHS[2].name, fd.RectifiedFlow(), lambda steps: _shifted_rectified(steps, 0.98)),
)
SPREAD, ISOTROPIC, MIXTURE, DIGITS = (
    "Gaussian, variances 0.001 to 1, 1,024 dimensions",
    "Gaussian, variance 0.25, 1,024 dimensions",
    "8 Gaussians, 256 dimensions",
    "digits network, 64 dimensions",
)


def gaussian(variances: Tensor, schedule: Schedule) -> fd.GaussianMixture:
    return fd.GaussianMixture([1.0], torch.zeros(1, len(variances)), variances[None], schedule)


def mixture(schedule: Schedule, dimension: int = 256) -> fd.GaussianMixture:
    generator = torch.Generator().manual_seed(1)
    weights = torch.softmax(torch.randn(8, generator=generator, dtype=torch.float64), 0)
    means = torch.randn(8, dimension, generator=generator, dtype=torch.float64) * 0.5
    variances = torch.rand(8, dimension, generator=generator, dtype=torch.float64) * 0.2 + 0.02
    return fd.GaussianMixture(weights, means, variances, schedule)


TARGETS: dict[str, Callable[[Schedule], fd.GaussianMixture]] = {
    SPREAD: lambda path: gaussian(torch.logspace(-3, 0, 1024, dtype=torch.float64), path),
    ISOTROPIC: lambda path: gaussian(torch.full((1024,), 0.25, dtype=torch.float64), path),
    MIXTURE: mixture,
}


@dataclass
class Problem:
    """Latents to be sampled along a path, and where the guided flow takes them.

    fine: steps of the guided flow where it is not known in closed form. ends, changes: what was found, by q.
    """

    name: str
    flow: fd.GaussianMixture | fd.Flow
    path: Path
    latents: Tensor
    fine: int
    ends: dict[float, Tensor] = field(default_factory=dict)
    log_probs: dict[float, Tensor] = field(default_factory=dict)
    changes: dict[float, float] = field(default_factory=dict)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p of x at the end of the grid, (B,)."""
        grid = self.path.grid(1)
        if isinstance(self.flow, fd.GaussianMixture):
            return self.flow.log_prob(x, float(grid[-1]))
        options: dict[str, Any] = {"solver": "dopri5", "rtol": DIGITS_TOLERANCE, "atol": DIGITS_TOLERANCE}
        return fd.log_prob(self.flow, x, grid, divergence="exact", **options).log_prob

    def commanded(self, q: float) -> float:
        """sqrt(2 D) ndtri(q) nats per unit of l = lam / 2, over the grid."""
        grid = self.path.grid(1)
        quantile = float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
        return math.sqrt(2.0 * self.latents[0].numel()) * quantile * float(grid[-1] - grid[0]) / 2.0

    def end(self, q: float) -> Tensor:
        """Where the guided flow takes the latents."""
        if q not in self.ends:
            exact = self.gaussian_end() if q == 0.5 else None
            self.ends[q] = self._fine_end(q) if exact is None else exact
        return self.ends[q]

    def end_log_prob(self, q: float) -> Tensor:
        """log p there."""
        if q not in self.log_probs:
            exact = self.gaussian_end()
            found = self.log_prob(self.end(q)) if exact is None else self.log_prob(exact) + self.commanded(q)
            self.log_probs[q] = found
        return self.log_probs[q]

    def gaussian_end(self) -> Tensor | None:
        """Where a Gaussian's own flow takes the latents: each coordinate goes with its standard deviation."""
        if not isinstance(self.flow, fd.GaussianMixture) or len(self.flow.weights) > 1:
            return None
        first, last = (self._variances(lam) for lam in self.path.grid(1).tolist())
        return self.latents * (last / first).sqrt()

    def _variances(self, lam: float) -> Tensor:
        assert isinstance(self.flow, fd.GaussianMixture)
        alpha, sigma = float(self.path.schedule.alpha(lam)), float(self.path.schedule.sigma(lam))
        return alpha**2 * self.flow.variances + sigma**2

    def _fine_end(self, q: float) -> Tensor:
        """By `fine` steps of equal length in lam, of second order; `changes` keeps what half as many would change."""
        guidance = fd.DensityGuidance(q, track=False)
        if not isinstance(self.flow, fd.GaussianMixture):
            options: dict[str, Any] = {"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6}
            return fd.sample(self.flow, self.latents, self.path.grid(1), guidance=guidance, **options).x
        first, last = self.path.grid(1).tolist()
        coarse, fine = (
            fd.sample(
                self.flow,
                self.latents,
                torch.linspace(first, last, steps + 1, dtype=torch.float64),
                FINE_SOLVER,
                guidance,
            ).x
            for steps in (self.fine // 2, self.fine)
        )
        self.changes[q] = float((coarse - fine).norm() / fine.norm())
        return fine


class OnPath(nn.Module):
    """The digits network for the states of another path: x / alpha is the same on all of them."""

    def __init__(self, flow: fd.Flow, schedule: Schedule) -> None:
        super().__init__()
        assert isinstance(flow.model, nn.Module)
        self.model, self.flow, self.schedule = flow.model, flow, schedule

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        """The predicted noise (B, *) at x (B, *), lam (B,)."""
        own = self.flow.schedule
        alpha, sigma, given = (
            torch.as_tensor(part(lam)).to(x.dtype) for part in (own.alpha, own.sigma, self.schedule.alpha)
        )
        at_home = x * (alpha / given)[:, None, None, None]
        return to_epsilon(self.model(at_home, lam), at_home, alpha, sigma, self.flow.prediction_type)


def digits_flow(schedule: Schedule) -> fd.Flow:
    """The embedded digits on this path."""
    flow = load_digits_flow()
    return flow if isinstance(schedule, fd.VP) else fd.Flow(OnPath(flow, schedule), schedule)


def problem(name: str, path: Path, rows: int, fine: int) -> Problem:
    """Latents from N(0, sigma^2) at the grid's begin, the same for every solver, number of steps and q."""
    flow = digits_flow(path.schedule) if name == DIGITS else TARGETS[name](path.schedule)
    shape = (1, 8, 8) if isinstance(flow, fd.Flow) else tuple(flow.sample_shape)
    normals = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents = normals * float(path.schedule.sigma(float(path.grid(1)[0])))
    return Problem(name, flow, path, latents.float() if name == DIGITS else latents, fine)
