"""The digits experiment behind `fastdensity sample`: the same latents at several q, and what is kept of each.

Whatever is finished is on disk: every file is written beside its name first and then moved there.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fastdensity import figures
from fastdensity.digits import LEVELS
from fastdensity.flow import Flow
from fastdensity.guidance import DensityGuidance
from fastdensity.ops.rows_prior import scale_prior
from fastdensity.reference.philox import normals
from fastdensity.rules import FLAG_LIMITED
from fastdensity.sampling import sample

BLOCK = 16  # samples computed at once, always: what is computed for sample i is the same whatever n is
LATENTS_STREAM = 0x4C000000  # of Philox, apart from the streams of noise and probes


@dataclass(frozen=True)
class Finished:
    """All samples of one q.

    x (n, 1, 8, 8) is the state at the end of the path and images (n, 8, 8) the digits in it, x / alpha; log_prob and
    std_err (n,) in nats, detail (n,) in PNG bytes, flags, commanded and realised (n,) as in `fastdensity.SampleResult`.
    """

    q: float
    x: Tensor
    images: Tensor
    log_prob: Tensor
    std_err: Tensor
    detail: Tensor
    flags: Tensor
    commanded: Tensor
    realised: Tensor
    seconds: float

    def arrays(self) -> dict[str, Any]:
        """What goes into an npz."""
        names = ("x", "images", "log_prob", "std_err", "detail", "flags", "commanded", "realised")
        return {"q": numpy.float64(self.q), **{name: getattr(self, name).numpy() for name in names}}

    def summary(self) -> dict[str, Any]:
        """Means over the samples, None where a sample diverged; flagged counts those not guided as asked, limited those
        that were to go further than a step can."""
        return {
            "q": self.q,
            "mean_log_prob": _number(self.log_prob.mean()),
            "mean_detail": _number(self.detail.mean()),
            "samples_per_second": len(self.x) / self.seconds,
            "mean_commanded": _number(self.commanded.mean()),
            "mean_realised": _number(self.realised.mean()),
            "mean_residual": _number((self.commanded - self.realised).mean()),
            "flagged": int((self.flags & ~FLAG_LIMITED != 0).sum()),
            "limited": int((self.flags & FLAG_LIMITED != 0).sum()),
        }


def make_latents(n: int, seed: int, sigma: float, device: torch.device | str = "cpu") -> Tensor:
    """(n, 1, 8, 8) float32: N(0, sigma^2 I) moved to the median radius; sample i is a function of (seed, i)."""
    return scale_prior(draw_latents(n, seed, sigma, device), quantile=0.5, sigma=sigma)


def draw_latents(n: int, seed: int, sigma: float, device: torch.device | str = "cpu") -> Tensor:
    """(n, 1, 8, 8) float32 from N(0, sigma^2 I); sample i is a function of (seed, i)."""
    blocks = [normals(seed, torch.arange(begin, begin + BLOCK), 0, 64, LATENTS_STREAM) for begin in range(0, n, BLOCK)]
    return torch.cat(blocks)[:n].float().reshape(-1, 1, 8, 8).to(device) * sigma


def in_blocks(latents: Tensor) -> Iterator[tuple[Tensor, int]]:
    """(BLOCK latents, how many of them count), in order; the last block is filled up with copies."""
    for block in torch.split(latents, BLOCK):
        yield block[torch.arange(BLOCK, device=block.device) % block.shape[0]], block.shape[0]


def sample_digits(
    flow: Flow, latents: Tensor, q: float, solver: str, grid: Tensor, callback: Callable[..., Any]
) -> Finished:
    """Guides the latents (n, 1, 8, 8) at grid[0] to grid[-1]; callback as in `fastdensity.sample`, for every block."""
    started = time.perf_counter()
    guidance = DensityGuidance(q=q)
    parts = []
    for whole, count in in_blocks(latents):
        result = sample(
            flow, whole, grid, solver=solver, guidance=guidance, log_prob=True, divergence="exact", callback=callback
        )
        assert result.log_prob is not None
        assert result.std_err is not None
        assert result.commanded is not None
        assert result.realised is not None
        kept = (result.x, result.log_prob, result.std_err, result.flags, result.commanded, result.realised)
        parts.append([values[:count].cpu() for values in kept])
    x, log_prob, std_err, flags, commanded, realised = (torch.cat(part) for part in zip(*parts, strict=True))
    images = x[:, 0] / float(flow.schedule.alpha(float(grid[-1])))
    seconds = time.perf_counter() - started
    detail = [figures.png_bytes(image, LEVELS) if image.isfinite().all() else math.nan for image in images]
    found = torch.tensor(detail).double()
    return Finished(q, x, images, log_prob, std_err, found, flags, commanded, realised, seconds)


def keep(folder: Path, finished: list[Finished], result: Finished) -> None:
    """Into the list first: what is in it is written again if an interruption falls between the two."""
    finished.append(result)
    write_whole(folder / f"q_{result.q}.npz", partial(_save_arrays, result.arrays()))


def write_merged(folder: Path, finished: list[Finished], facts: dict[str, Any]) -> None:
    """Everything that is made of several q: merged arrays, the two pictures, and summary.json with `facts` on top."""
    last = finished.pop()
    keep(folder, finished, last)
    merged = [result.arrays() for result in finished]
    arrays = {name: numpy.stack([one[name] for one in merged]) for name in merged[0]}
    write_whole(folder / "samples.npz", partial(_save_arrays, arrays))
    images = torch.stack([result.images for result in finished])
    labels = [f"q = {result.q}" for result in finished]
    figures.save_picture_grid(folder / "samples.png", images.nan_to_num(1.0), labels)
    quantiles = [result.q for result in finished]
    log_prob, detail = (torch.stack([getattr(r, name) for r in finished]) for name in ("log_prob", "detail"))
    figures.save_curves(folder / "density.png", quantiles, log_prob, detail)
    summary = {**facts, "results": [result.summary() for result in finished]}
    write_whole(folder / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Through a file beside it, so that an interruption leaves the old file or the new one."""
    unfinished = path.with_name(path.name + ".partial")
    try:
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _number(value: Tensor) -> float | None:
    return value.item() if value.isfinite() else None  # JSON knows no NaN


def _save_arrays(arrays: dict[str, Any], file: Any) -> None:
    numpy.savez(file, **arrays)
