"""fd.jvp on the CPU against torch's own forward mode: `python -m benchmarks.run jvp`.

Rivals: torch.func.jvp once per tangent, vmap over it, and torch.compile of both. Floor: the model's matrix products
alone. Ours is also compiled (`torch.compile(fd.trace_jvp(...), fullgraph=True)`). Nothing is timed that is wrong.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdensity as fd
from benchmarks import jvp_cases, jvp_memory, jvp_peers
from benchmarks.harness import Variant, measure
from benchmarks.jvp_cases import Case
from fastdensity.dual.cache import find

Record = dict[str, Any]
Errors = tuple[float, float]
OURS, OURS_COMPILED = "fastdensity", "fastdensity, compiled"
ROUNDS = 15
CASE_SECONDS = 25.0  # slow cases get fewer rounds, but LEAST_ROUNDS
LEAST_ROUNDS = 3
MEMORY_TOKENS = (1_024, 2_048, 4_096)
RIGHT = 1e-4  # relative; a rival that is further off is not timed, either


def run(rounds: int = ROUNDS, slow: bool = False) -> list[Record]:
    """A record per case; `slow` adds the rivals that compile for minutes."""
    records = []
    for make in _cases():
        torch.manual_seed(0)
        records.append(case_record(make(), rounds, slow))
        torch.compiler.reset()
    records += memory_records(MEMORY_TOKENS)
    small = jvp_cases.mlp(1, width=64, layers=4, batch=16)
    records.append(overhead_record(small))
    records.append(overhead_record(jvp_cases.dit_block(1)))
    if jvp_cases.has_diffusers():
        deep = jvp_cases.deep_dit()
        records += [trace_record(deep), overhead_record(deep)]
    return records


def _cases() -> Iterator[Callable[[], Case]]:
    yield from (lambda: jvp_cases.mlp(1), lambda: jvp_cases.mlp(8))
    yield from (lambda: jvp_cases.dit_block(1), lambda: jvp_cases.dit_block(8))
    if jvp_cases.has_diffusers():
        yield lambda: jvp_cases.unet()
    yield from (lambda: jvp_cases.attention(1_024), lambda: jvp_cases.attention(4_096))


# -- gate -------------------------------------------------------------------------------------------------------------
def gate(case: Case, variants: dict[str, Variant], vectors: Tensor) -> tuple[dict[str, Errors], dict[str, str]]:
    """Relative errors of value and tangents against float64, and why some rivals are not timed.

    Raises:
        SystemExit: fastdensity fails, or errs more than twice as much as torch.func.jvp in the same dtype.
    """
    exact = jvp_peers.exact(case, vectors)
    errors: dict[str, Errors] = {}
    failed: dict[str, str] = {}
    for name, variant in variants.items():
        ours = name.startswith(OURS)
        try:
            errors[name] = errors_of(variant(), exact)
        except Exception as error:
            if ours:
                raise
            failed[name] = _shortened(error)
            continue
        if not ours and not max(errors[name]) < RIGHT:
            failed[name] = f"wrong: relative errors {errors[name]}"
    measure_of_all = errors["func.jvp per tangent"]
    for name in (name for name in errors if name.startswith(OURS)):
        for what, ours_error, theirs in zip(("value", "tangents"), errors[name], measure_of_all, strict=True):
            if not ours_error < 2 * theirs + 4 * torch.finfo(torch.float32).eps:
                raise SystemExit(
                    f"{name} is wrong on {case.name} ({what}: relative error {ours_error:.1e}, "
                    f"torch.func.jvp's {theirs:.1e}): not timed"
                )
    return errors, failed


def errors_of(result: Any, exact: tuple[Tensor, Tensor]) -> Errors:
    value, tangents = result
    if not isinstance(tangents, Tensor):
        tangents = torch.stack(tangents)
    rows = exact[0].shape[0]
    return _error(value[:rows], exact[0]), _error(tangents[:, :rows], exact[1])


def _error(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        raise ValueError(f"shape {tuple(found.shape)} for {tuple(exact.shape)}")
    return float((found.double() - exact).norm() / exact.norm())


def _shortened(error: Exception) -> str:
    first = " ".join(str(error).split())
    return f"{type(error).__name__}: {first[:160]}"


# -- times ------------------------------------------------------------------------------------------------------------
def case_record(case: Case, rounds: int, slow: bool = False) -> Record:
    """Gate and times of one case."""
    vectors = case.vectors()
    variants: dict[str, Variant] = {OURS: lambda: fd.jvp(case.fn, case.primals, vectors)}
    if case.compiled:
        graph = torch.compile(fd.trace_jvp(case.fn, case.primals), fullgraph=True, dynamic=False)
        variants[OURS_COMPILED] = lambda: graph(case.primals, vectors)
    compiled = case.compiled and (slow or not case.slow_to_compile)
    variants |= jvp_peers.rivals(case, vectors, compiled)  # after ours: a failed compilation may spoil the next
    errors, failed = gate(case, variants, vectors)
    if case.compiled and not compiled:
        failed["compile(jvp)"] = "not tried: compiles for minutes (--slow)"
    timed = {name: variant for name, variant in variants.items() if name not in failed} | case.floors
    timing = measure(timed, _rounds_for(timed, rounds), patience=2)
    return {
        "case": case.name,
        "tangents": case.count,
        "median_seconds": timing.medians(),
        "relative_errors": errors,
        "failed": failed,
        "note": jvp_peers.NOTE,
        "targets": targets_of(case, timing.medians()),
        "rounds": len(timing.rounds[OURS]),
        "rounds_discarded": timing.discarded,
        "undisturbed": timing.guarded,
    }


def _rounds_for(variants: dict[str, Variant], most: int) -> int:
    """As many rounds as CASE_SECONDS hold; a round runs everything twice."""
    start = time.perf_counter()
    for variant in variants.values():
        variant()
    once = time.perf_counter() - start
    return min(most, max(LEAST_ROUNDS, int(CASE_SECONDS / (2 * once))))


def targets_of(case: Case, seconds: dict[str, float]) -> list[Record]:
    """Each target with what was reached: eager ours, and the best of ours."""
    best_ours = min(value for name, value in seconds.items() if name.startswith(OURS))
    others = {name: value for name, value in seconds.items() if not name.startswith((OURS, "floor"))}
    rival = min(others, key=others.__getitem__)
    found = []
    for target in case.targets:
        if target.against == "floor":
            floor = min(value for name, value in seconds.items() if name.startswith("floor"))
            reached, best = seconds[OURS] / floor, best_ours / floor
            met, wanted = reached <= target.ratio, f"<= {target.ratio:g} x the floor's time"
        else:
            reached, best = others[rival] / seconds[OURS], others[rival] / best_ours
            met, wanted = reached >= target.ratio, f">= {target.ratio:g} x faster than the best rival ({rival})"
        found.append({"wanted": wanted, "reached": reached, "reached_compiled_or_not": best, "met": met})
    return found


# -- memory, tracing, overhead ----------------------------------------------------------------------------------------
def memory_records(tokens: tuple[int, ...]) -> list[Record]:
    """Bytes that one jvp of attention needs above its inputs, each in a process of its own."""
    peaks = {name: {str(n): jvp_memory.peak_bytes(name, n) for n in tokens} for name in jvp_memory.VARIANTS}
    return [{"case": f"attention, peak memory at N = {tokens}", "tangents": 1, "peak_bytes": peaks}]


def trace_record(case: Case) -> Record:
    start = time.perf_counter()
    fd.trace_jvp(case.fn, case.primals)
    seconds = time.perf_counter() - start
    target = {"wanted": "< 6 s", "reached": seconds, "met": seconds < 6}
    return {"case": f"first trace of {case.name}", "median_seconds": {"fd.trace_jvp": seconds}, "targets": [target]}


def overhead_record(case: Case, calls: int = 200, repeats: int = 7) -> Record:
    """What a repeated fd.jvp does beside running its graph, which is replaced by one that returns at once."""
    vectors = case.vectors()
    fd.jvp(case.fn, case.primals, vectors)
    with mock.patch.object(find(case.fn, case.primals)[0], "graph", _nothing):
        found = [_seconds_per_call(lambda: fd.jvp(case.fn, case.primals, vectors), calls) for _ in range(repeats)]
    seconds = statistics.median(found)
    target = {"wanted": "< 50 us", "reached": seconds, "met": seconds < 50e-6}
    modules = sum(1 for _ in case.module.modules()) if case.module is not None else 0
    name = f"call overhead, {case.name} ({modules} modules)"
    return {"case": name, "median_seconds": {"fd.jvp without its graph": seconds}, "targets": [target]}


def _nothing(*arguments: object) -> None:
    pass


def _seconds_per_call(call: Variant, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


# -- table ------------------------------------------------------------------------------------------------------------
def print_table(records: list[Record]) -> None:
    """Times, ratios to ours, what failed, and the targets."""
    for record in records:
        tangents = f", K={record['tangents']}" if "tangents" in record else ""
        disturbed = "" if record.get("undisturbed", True) else "   (other load on this machine: do not quote)"
        print(f"\n{record['case']}{tangents}{disturbed}")
        seconds: dict[str, float] = record.get("median_seconds", {})
        for name, value in seconds.items():
            share = f"  {value / seconds[OURS]:6.2f} x fastdensity's time" if OURS in seconds else ""
            print(f"  {name:28s} {value * 1e3:10.3f} ms{share}")
        for name, peaks in record.get("peak_bytes", {}).items():
            print(f"  {name:28s} " + "  ".join(f"N={n}: {peak / 2**20:.1f} MiB" for n, peak in peaks.items()))
        for name, error in record.get("failed", {}).items():
            print(f"  {name:28s} failed: {error}")
        for target in record.get("targets", []):
            _print_target(target)


def _print_target(target: Record) -> None:
    small = target["wanted"].endswith("us")
    reached = f"{target['reached'] * 1e6:.0f} us" if small else f"{target['reached']:.2f}"
    best = target.get("reached_compiled_or_not")
    also = "" if best is None else f", compiled or not {best:.2f}"
    print(f"  wanted {target['wanted']}: {reached}{also} -> {'met' if target['met'] else 'MISSED'}")
