"""The divergence of a function on a batch, one number and one error bar per sample: `fd.divergence`.

    estimate = fd.divergence(model, x, t, method="hutchinson", num_matvecs=8)
    estimate.div, estimate.std_err      # (B,) each

Every product with the Jacobian is one of `fd.jvp`'s. Probes are functions of (seed, sample id, step, number) alone, so
a sample's estimate depends neither on its batch nor on how the work was cut. Two streams of probes never share a
word: what steers a sample is checked with probes it has not seen, since the error of a steering divergence cancels
against the same error in log p. docs/divergence.md says which method to take.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import check_distinct, check_integer, check_number, check_sample_ids, check_state
from fastdensity.traces.estimate import Estimate, Task, estimate
from fastdensity.traces.function import Function
from fastdensity.traces.key import ProbeKey
from fastdensity.traces.options import DivergenceMethod


@dataclass(frozen=True, slots=True)
class DivergenceEstimate:
    """What `divergence` found.

    Attributes:
        value: (B, *) fn(x), in fn's dtype.
        div: (B,) the divergence, float64; NaN where fn's result or its derivatives are not finite.
        std_err: (B,) standard error of div: 0 where it is exact, NaN where the method shows no spread (one probe) or
            div is NaN.
        num_matvecs: (B,) int64, products with the Jacobian that the sample took.
        converged: (B,) bool, False where a wanted tolerance was not met, or div is not finite.
    """

    value: Tensor
    div: Tensor
    std_err: Tensor
    num_matvecs: Tensor
    converged: Tensor


def divergence(
    fn: Callable[..., Any],
    x: Tensor,
    *args: Any,
    method: str = "hutchinson",
    num_matvecs: int = 1,
    distribution: str = "rademacher",
    seed: int = 0,
    sample_ids: Tensor | None = None,
    step: int = 0,
    abstol: float | None = None,
    reltol: float | None = None,
    max_matvecs: int | None = None,
    num_colours: int | None = None,
    resphere: bool = True,
    identity: float | Tensor = 0.0,
    memory: int | None = None,
    forward: str = "dual",
) -> DivergenceEstimate:
    """sum_i d fn_i / d x_i of each sample, exactly or from random products with the Jacobian.

    Args:
        fn: fn(x, *args) -> (B, *) like x; rows independent of each other. No gradient is kept.
        x: (B, *) floating. args: a tensor whose first dimension is B, also within tuples, lists and dicts, belongs to
            the samples one by one, all else to all. What fn closes over must not depend on the sample, or the batch is
            computed in one piece.
        method: "exact", one product per element; "hutchinson", the mean of z.(J z) over probes z (Hutchinson 1990);
            "hutchpp" (Meyer et al. 2021), "xtrace" (Epperly et al. 2024), for Jacobians whose spectrum decays;
            "colour", probes on pixels far apart (after Tang and Saad 2012), for local networks on images (C, H, W).
        num_matvecs: products per sample; 0, or above the number of elements, the result is exact, with a warning.
        distribution: "rademacher", "normal", "sphere", "orthogonal" or "hadamard"; of hutchinson and hutchpp.
        seed, sample_ids, step: the key of the probes; sample_ids int64 (B,), default 0 .. B-1, distinct
            modulo 2^32.
        abstol, reltol: draw probes until std_err <= max(abstol, reltol |div|), each sample for itself: first
            max(num_matvecs, 8) products, then doubling, up to max_matvecs (default: until exact costs no more). A last
            round that is too small for an error bar is left out.
        num_colours: of method "colour"; default all of num_matvecs in one sweep, which shows no spread.
        resphere: of "xtrace": scale test vectors within the complement of the others (section 2.3 there).
        identity: fn(x) = identity x + rest(x), a number or (B,): only the rest is estimated. It matters to normal
            probes, hutchpp and xtrace; the other probes know a multiple of the identity exactly.
        memory: bytes that intermediate results of one call of the network may take, roughly; default 256 MiB on CPU.
            There a call with one tangent takes up to 4 MiB, or what a single row does, whatever is given: no row's
            bits depend on it. A batch in one piece takes at least one tangent of all rows.
        forward: "dual" (`fd.jvp`), or "torch" (torch.func.jvp) for a fn that fd.jvp cannot trace.

    Returns:
        DivergenceEstimate with .value .div .std_err .num_matvecs .converged.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; repeated sample_ids; fn returns no tensor
            of x's shape (its Jacobian is not square), couples the rows, or is refused by `fd.jvp`.
        NotImplementedError: fn uses an operator without forward derivative.
    """
    check_state("x", x)
    how = DivergenceMethod(
        method, num_matvecs, distribution, None, abstol, reltol, max_matvecs, num_colours, resphere, memory, forward
    )
    ids = check_distinct(check_sample_ids(sample_ids, x))
    key = ProbeKey(check_integer("seed", seed, 0, 2**63 - 1), ids, check_integer("step", step, 0, 2**63 - 1))
    with torch.no_grad():
        found = estimate(Task(Function(fn, args, forward), x.detach(), key, _identity(identity, x)), how)
        return _report(found, how)


def estimate_divergence(
    fn: Callable[..., Any], x: Tensor, args: tuple[Any, ...], how: DivergenceMethod, key: ProbeKey
) -> Estimate:
    """The same for callers inside the package, whose arguments are checked already."""
    return estimate(Task(Function(fn, args, how.forward), x, key, None), how)


def directional_derivatives(
    fn: Callable[..., Any], x: Tensor, args: tuple[Any, ...], vectors: Tensor, forward: str = "dual"
) -> tuple[Tensor, Tensor]:
    """fn(x, *args) (B, *) and J v (K, B, *) for each of `vectors` (K, B, *)."""
    return Function(fn, args, forward).push(x, vectors)


def _identity(identity: Any, x: Tensor) -> Tensor | None:
    number = check_number("identity", identity, x)
    if not isinstance(number, Tensor):
        return None if number == 0.0 else torch.full((x.shape[0],), number, dtype=torch.float64, device=x.device)
    return number.to(torch.float64).expand(x.shape[0])


def _report(found: Estimate, how: DivergenceMethod) -> DivergenceEstimate:
    converged = found.div.isfinite()
    if how.has_tolerance:
        converged = converged & found.met
        missed = int((~found.met).sum())
        if missed:
            warnings.warn(
                f"{missed} of {missed + int(found.met.sum())} samples did not meet the tolerance within "
                f"{int(found.num_matvecs.max())} products; see .converged and .std_err",
                stacklevel=3,
            )
    return DivergenceEstimate(found.value, found.div, found.std_err, found.num_matvecs, converged)
