"""How accurate log p is: tracked and encoded log p against a mixture's own. `python -m benchmarks.log_density`.

Numbers, not times: docs/log-density.md quotes them. The mixture has 3 components, in 24 dimensions unless said
otherwise, on the VP path from log-SNR -3 to 4 (the reverse diffusion on VE, too); the density at -3 is the mixture's
own, not a normal's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdensity as fd
from fastdensity.guidance import Guidance
from fastdensity.schedules import Schedule
from fastdensity.trajectory import log_normal_density

FIRST, LAST = -3.0, 4.0
ROWS = 1000


def mixture(dimension: int, schedule: Schedule | None = None) -> fd.GaussianMixture:
    generator = torch.Generator().manual_seed(1)
    return fd.GaussianMixture(
        torch.rand(3, generator=generator, dtype=torch.float64) + 0.5,
        torch.randn(3, dimension, generator=generator, dtype=torch.float64),
        torch.rand(3, dimension, generator=generator, dtype=torch.float64) / 2 + 0.1,
        fd.VP() if schedule is None else schedule,
    )


def grid(steps: int) -> Tensor:
    return torch.linspace(FIRST, LAST, steps + 1, dtype=torch.float64)


def slip(flow: fd.GaussianMixture, latents: Tensor, levels: Tensor, **options: Any) -> tuple[Tensor, int]:
    """Tracked less true gain of log p (B,), and evaluations."""
    result = fd.sample(flow, latents, levels, log_prob=True, **options)
    assert result.log_prob is not None
    tracked = result.log_prob - log_normal_density(latents, float(flow.schedule.sigma(FIRST)))
    return tracked - (flow.log_prob(result.x, LAST) - flow.log_prob(latents, FIRST)), result.nfe


def deterministic() -> None:
    guidances: dict[str, fd.DensityGuidance | None] = {
        "none": None,
        "q = 0.4": fd.DensityGuidance(0.4, track=False),
        "b = -1": fd.DensityGuidance(b=lambda x, lam: -1.0, track=False),
        "b = -lam/5 + sin(sum x)": fd.DensityGuidance(b=lambda x, lam: torch.sin(x.sum(1)) - 0.2 * lam, track=False),
    }
    print("ODE: largest |tracked - true| log p of 16 samples, nats (network evaluations)")
    for name, guidance in guidances.items():
        flow = mixture(24)
        latents = flow.sample(16, FIRST, seed=2)
        cells = []
        for steps in (100, 1000):
            error, nfe = slip(flow, latents, grid(steps), solver="heun", guidance=guidance)
            cells.append(f"heun {steps}: {float(error.abs().max()):.1e} ({nfe})")
        for tolerance in (1e-4, 1e-6, 1e-8):
            options: dict[str, Any] = {"solver": "dopri5", "rtol": tolerance, "atol": tolerance}
            error, nfe = slip(flow, latents, grid(1), guidance=guidance, **options)
            cells.append(f"dopri5 {tolerance:.0e}: {float(error.abs().max()):.1e} ({nfe})")
        print(f"  {name:24s}", "  ".join(cells))


def stochastic() -> None:
    print(f"SDE: tracked - true log p of {ROWS} samples, nats: mean, standard error of the mean, rms")
    noisy = fd.StochasticDensityGuidance(b=lambda x, lam: -1.0, noise=lambda lam: 0.5, track=False)
    diffusion, steps = fd.ReverseDiffusion(), (100, 400, 1600, 6400)
    for dimension in (5, 24):
        _slips_of_noise("reverse diffusion", mixture(dimension), "euler", diffusion, steps)
        _slips_of_noise("reverse diffusion, VE", mixture(dimension, fd.VE()), "euler", diffusion, steps)
        _slips_of_noise("reverse diffusion, VE", mixture(dimension, fd.VE()), "ddim", diffusion, steps)
        _slips_of_noise("b = -1, phi_rel 0.5", mixture(dimension), "euler", noisy, steps[:3])


def _slips_of_noise(
    name: str, flow: fd.GaussianMixture, solver: str, guidance: Guidance, numbers: tuple[int, ...]
) -> None:
    latents = flow.sample(ROWS, FIRST, seed=2)
    for steps in numbers:
        error, _ = slip(flow, latents, grid(steps), solver=solver, guidance=guidance, seed=3)
        mean, bar = float(error.mean()), float(error.std()) / ROWS**0.5
        where = f"{name:22s} {solver:5s} D = {latents.shape[1]:2d} {steps:5d} steps"
        print(f"  {where}  {mean:8.4f} ± {bar:.4f}  rms {float(error.square().mean().sqrt()):.3f}", flush=True)


def probes() -> None:
    flow = mixture(24)
    network = fd.Flow(lambda x, lam: flow.prediction(x, lam), flow.schedule)
    x = flow.sample(256, LAST, seed=2)
    exact = fd.log_prob(flow, x, grid(1), solver="dopri5").log_prob
    print("probes, 4 Rademacher each: rms error of encoded log p, rms of std_err, nats (evaluations)")
    for solver, steps in (("dopri5", 1), ("dopri5", 16), ("heun", 80)):
        options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if solver == "dopri5" else {}
        how = {"method": "hutchinson", "num_matvecs": 4}
        found = fd.log_prob(network, x, grid(steps), solver=solver, divergence=how, **options)
        error, bar = ((v.square().mean().sqrt()) for v in (found.log_prob - exact, found.std_err))
        print(f"  {solver} on {steps:2d}: {float(error):.3f}, {float(bar):.3f} ({found.nfe})")


def digits() -> None:
    from fastdensity import digits as embedded

    flow = embedded.load_digits_flow()
    latents = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = latents * float(flow.schedule.sigma(embedded.LAM_NOISE))
    ends = [embedded.LAM_NOISE, embedded.LAM_DATA]
    with torch.no_grad():
        x = fd.sample(flow, latents, ends, solver="dopri5", rtol=1e-5, atol=1e-5).x
    print("embedded digits, 64 samples of the flow: mean bits per dimension of 17 grey levels (evaluations)")
    for tolerance in (1e-3, 1e-4, 1e-5):
        found = fd.log_prob(flow, x, ends, solver="dopri5", divergence="exact", rtol=tolerance, atol=tolerance)
        alpha = float(flow.schedule.alpha(embedded.LAM_DATA))  # x / alpha is the picture
        bits = fd.bits_per_dimension(found.log_prob, 64, data_scale=embedded.LEVELS / 2 / alpha)
        print(f"  dopri5 {tolerance:.0e}: {float(bits.mean()):.4f} ({found.nfe})")


if __name__ == "__main__":
    deterministic()
    stochastic()
    probes()
    digits()
