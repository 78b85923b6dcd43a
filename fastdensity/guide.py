"""One line that turns a sampler into a density-guided one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdensity.boundary import describe
from fastdensity.guidance import check_interval, check_quantile


def guide(
    target: Any,
    *,
    q: float | Tensor = 0.5,
    interval: tuple[float, float] | None = None,
    track: bool = True,
) -> Any:
    """The guided form of a sampler's part: log p gains sqrt(2 D) ndtri(q) nats per unit of ln(alpha / sigma).

    Karczewski, Heinonen and Garg, "Devil is in the Details" (ICML 2025), eq. 23, and docs/few-steps.md.

    Args:
        target: a diffusers scheduler, whose `step` is hooked in place and which is returned.
        q: in (0, 1), a number or (B,): above 1/2 smoother samples, below it more detail.
        interval: (from, to) of log-SNR lam = 2 ln(alpha / sigma) where guidance acts; None: everywhere but at the
            ends of the path, where the density of its noise, or of its data, is not defined.
        track: closes the loop: what a step really did to log p is made up for in the next one. With q = 1/2 that is
            a corrector of the plain sampler; q = 1/2 without it changes no bit.

    Raises:
        TypeError, ValueError: an unknown target, a scheduler in the middle of a run, q or interval out of range.
    """
    wanted, acts = check_quantile(q), check_interval(interval)
    if not isinstance(track, bool):
        raise TypeError(f"track must be True or False, got {describe(track)}")
    modules = {kind.__module__.split(".")[0] for kind in type(target).__mro__}
    if "diffusers" in modules and hasattr(target, "step"):
        from fastdensity.integrations.diffusers import guide_scheduler

        return guide_scheduler(target, wanted, acts, track)
    raise TypeError(f"target must be a diffusers scheduler, got {describe(target)}")
