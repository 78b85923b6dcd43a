"""fd.divergence against other packages, and colour probing against random signs: `python -m benchmarks.run divergence`.

Time and peak memory per divergence of a batch at equal numbers of Rademacher probes, so at equal variance. Nothing is
timed that is wrong: every variant is given the same probes first and held against z.(J z) in float64.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from typing import Any

import torch
from torch import Tensor

import fastdensity as fd
from benchmarks import divergence_cases, divergence_peers
from benchmarks.divergence_cases import Case
from benchmarks.divergence_peers import OURS, Peer
from benchmarks.harness import Variant, measure
from fastdensity.bench.memory import peak_bytes
from fastdensity.ops.probe import make_probes
from fastdensity.reference.probe import STREAM_MEASURE
from fastdensity.traces.colour import sample_colours, usable_colours

Record = dict[str, Any]
COUNTS = (1, 8)
ROUNDS = 7
LEAST_ROUNDS = 3
CASE_SECONDS = 40.0
RIGHT = 1e-3  # relative; a rival that is further off is not timed
TARGET = 1.5
WANTED_ERROR, WANTED_RATIO = 0.01, 5.0
CHECK_TRIALS = 64


def run(rounds: int = ROUNDS, slow: bool = False) -> list[Record]:
    """Records of time and memory, then of products to one per cent; `slow` adds rivals that compile for minutes."""
    records = []
    for make in divergence_cases.makes():
        torch.manual_seed(0)
        case = make()
        records += [estimate_record(case, count, rounds, slow or not case.slow_to_compile) for count in COUNTS]
        if case.exact:
            records.append(exact_record(case, rounds))
        torch.compiler.reset()
    return records + [products_record(case) for case in divergence_cases.denoisers()]


def versions() -> dict[str, str]:
    """Of the packages that take part."""
    found = {}
    for name in (*divergence_peers.PACKAGES, "torchcfm", "torchdiffeq", "diffusers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# -- gate -------------------------------------------------------------------------------------------------------------
def probes_of(case: Case, count: int) -> Tensor:
    """Those that fd.divergence takes, (count, B, *)."""
    ids = torch.arange(case.x.shape[0])
    flat = make_probes(0, ids, 0, 0, count, case.columns, "rademacher", STREAM_MEASURE, case.x.dtype)
    return flat.reshape(count, *case.x.shape)


def gate(peers: dict[str, Peer], expected: Tensor, probes: Tensor | None) -> tuple[dict[str, float], dict[str, str]]:
    """Relative errors against `expected` (B,), given the same probes, and why some rivals are not timed.

    Raises:
        SystemExit: fastdensity is wrong.
    """
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, peer in peers.items():
        try:
            errors[name] = _error(name, peer, expected, probes)
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        if not errors[name] < RIGHT:
            failed[name] = f"wrong: relative error {errors[name]:.1e}"
    if OURS in failed:
        raise SystemExit(f"fastdensity is {failed[OURS]}: not timed")
    return errors, failed


def _error(name: str, peer: Peer, expected: Tensor, probes: Tensor | None) -> float:
    if probes is None or name == OURS:
        found = peer()
    else:
        with divergence_peers.given(name, probes):
            found = peer()
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)} for {tuple(expected.shape)}")
    return float((found.double() - expected).norm() / expected.norm())


# -- time and memory --------------------------------------------------------------------------------------------------
def estimate_record(case: Case, count: int, rounds: int, compiled: bool) -> Record:
    """`count` probes per sample."""
    probes = probes_of(case, count)
    expected = divergence_peers.forms(case, probes).mean(0)
    peers = {OURS: divergence_peers.ours(case, count), **divergence_peers.estimates(case, count, compiled)}
    errors, failed = gate(peers, expected, probes)
    if not compiled:
        failed["compile(vmap(jvp))"] = "not tried: compiles for minutes (--slow)"
    return _timed(f"{case.name}, {count} probes", peers, errors, failed, rounds)


def exact_record(case: Case, rounds: int) -> Record:
    """Every element."""
    basis = torch.eye(case.columns).reshape(-1, 1, *case.x.shape[1:]).expand(-1, *case.x.shape)
    expected = divergence_peers.forms(case, basis).sum(0)
    peers = {OURS: divergence_peers.ours_exact(case), **divergence_peers.exacts(case)}
    return _timed(f"{case.name}, exact", peers, *gate(peers, expected, None), rounds)


def _timed(name: str, peers: dict[str, Peer], errors: dict[str, float], failed: dict[str, str], rounds: int) -> Record:
    right: dict[str, Variant] = {name: peer for name, peer in peers.items() if name not in failed}
    start = time.perf_counter()
    peaks = {name: peak_bytes(peer, repeats=1, warm=False) for name, peer in right.items()}  # warm from the gate
    fitting = int(CASE_SECONDS / (2 * (time.perf_counter() - start)))  # a round runs everything at least twice
    timing = measure(right, min(rounds, max(LEAST_ROUNDS, fitting)), patience=2)
    seconds = timing.medians()
    record: Record = {"case": name, "median_seconds": seconds, "peak_bytes": peaks, "relative_errors": errors}
    rivals = {name: value for name, value in seconds.items() if name != OURS}
    if rivals:
        fastest = min(rivals, key=rivals.__getitem__)
        reached = rivals[fastest] / seconds[OURS]
        wanted = f">= {TARGET:g} x faster than the fastest rival ({fastest})"
        record["targets"] = [{"wanted": wanted, "reached": reached, "met": reached >= TARGET}]
    return record | {
        "failed": failed,
        "note": divergence_peers.NOTE,
        "rounds": len(timing.rounds[OURS]),
        "rounds_discarded": timing.discarded,
        "undisturbed": timing.guarded,
        "versions": versions(),
    }


# -- products to a wanted error ----------------------------------------------------------------------------------------
def products_record(case: Case, trials: int = CHECK_TRIALS) -> Record:
    """How many products each needs for an RMS error of WANTED_ERROR of the RMS divergence, over the samples.

    Both variances are known in closed form from the Jacobians: 2 sum S_ij^2 with S the symmetric part, over all pairs
    of different elements for random signs, over pairs of one colour for colour probing; means of k, or of sweeps, have
    one k-th of it. What the closed form says of colour probing is then measured, with fd.divergence itself.
    """
    symmetric, div = _symmetric_parts(case)
    scale = float(div.square().mean())
    allowed = WANTED_ERROR**2 * scale
    off_diagonal = symmetric.square().mean(0)
    off_diagonal.fill_diagonal_(0.0)
    signs_variance = 2 * float(off_diagonal.sum())
    signs = max(1, math.ceil(signs_variance / allowed))
    variances = _colour_variances(case, off_diagonal)
    needed = {k: k * max(1, math.ceil(variance / allowed)) for k, variance in variances.items()}
    colours = min(needed, key=lambda k: (needed[k], k))
    measured = _measured_errors(case, needed[colours], colours, trials, math.sqrt(scale), div)
    ratio = signs / needed[colours]
    wanted = f"{WANTED_RATIO:g} x fewer products to {WANTED_ERROR:.0%} than random signs"
    return {
        "case": f"{case.name}: products to {WANTED_ERROR:.0%}",
        "elements": case.columns,
        "products": {"rademacher": signs, "colour": needed[colours]},
        "colours": colours,
        "relative_errors": measured,
        "relative_error_by_colours": {str(k): math.sqrt(v / scale) for k, v in variances.items()},
        "relative_error_of_one_sign_probe": math.sqrt(signs_variance / scale),
        "targets": [{"wanted": wanted, "reached": ratio, "met": ratio >= WANTED_RATIO}],
    }


def _symmetric_parts(case: Case) -> tuple[Tensor, Tensor]:
    """(J + J') / 2 (B, n, n) and tr J (B,), in float64."""
    wide = case.double()
    basis = torch.eye(case.columns, dtype=torch.float64).reshape(-1, 1, *case.x.shape[1:])
    columns = torch.stack([fd.jvp(wide.module, (wide.x, wide.time), e.expand(1, *case.x.shape))[1][0] for e in basis])
    jacobians = columns.flatten(2).permute(1, 2, 0)
    return (jacobians + jacobians.mT) / 2, jacobians.diagonal(dim1=1, dim2=2).sum(1)


def _colour_variances(case: Case, off_diagonal: Tensor) -> dict[int, float]:
    """Of one sweep, for every number of colours that `fastdensity` can use."""
    shape = tuple(case.x.shape[1:])
    found = {}
    for number in sorted({usable_colours(shape, number) for number in range(1, case.columns + 1)}):
        colours = sample_colours(shape, number)
        found[number] = 2 * float(off_diagonal[colours[:, None] == colours].sum())
    return found


def _measured_errors(
    case: Case, products: int, colours: int, trials: int, scale: float, div: Tensor
) -> dict[str, float]:
    """Relative RMS errors of fd.divergence with as many products, by colours and by signs, over samples and trials."""
    by_colour: dict[str, Any] = {"method": "colour", "num_matvecs": products, "num_colours": colours}
    found = {}
    for name, options in (("colour", by_colour), ("rademacher", {"num_matvecs": products})):
        runs = [fd.divergence(case.module, case.x, case.time, seed=seed, **options).div for seed in range(trials)]
        found[name] = float((torch.stack(runs) - div).square().mean().sqrt()) / scale
    return found


# -- table ------------------------------------------------------------------------------------------------------------
def print_table(records: list[Record]) -> None:
    """Times and memory of every variant, products to one per cent, and the targets."""
    for record in records:
        disturbed = "" if record.get("undisturbed", True) else "   (other load on this machine: do not quote)"
        print(f"\n{record['case']}{disturbed}")
        seconds: dict[str, float] = record.get("median_seconds", {})
        for name, value in seconds.items():
            share = f"{value / seconds[OURS]:6.2f} x fastdensity's time"
            print(f"  {name:28s} {value * 1e3:10.2f} ms  {share}  {record['peak_bytes'][name] / 2**20:8.1f} MiB")
        for name, count in record.get("products", {}).items():
            at = (
                ""
                if name != "colour"
                else f" ({record['colours']} colours, measured {record['relative_errors'][name]:.2%})"
            )
            print(f"  {name:28s} {count:6d} of {record['elements']} products{at}")
        for name, why in record.get("failed", {}).items():
            print(f"  {name:28s} failed: {why}")
        for target in record.get("targets", []):
            print(f"  wanted {target['wanted']}: {target['reached']:.2f} -> {'met' if target['met'] else 'MISSED'}")
