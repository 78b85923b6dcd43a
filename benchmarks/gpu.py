"""The rows family on a CUDA device: `python -m benchmarks.gpu [--budget SECONDS] [--rounds N] [--out FOLDER]`.

Measures what the memory can do, holds every variant against float64 on the same inputs, times those that are right
(benchmarks/gpu_timing.py says how), writes FOLDER/NAME-OF-THE-DEVICE.json and prints a table last. A variant of
fastdensity that is wrong is not timed and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import ROW_SHAPES
from benchmarks.gpu_cases import CASES, Case, Inputs, variants
from benchmarks.gpu_timing import Variant, measure
from benchmarks.run import RESULTS, environment
from fastdensity._backend import report

TOLERANCE = 2e-6  # relative, in the 2-norm; float32 arithmetic on equal inputs
COLUMNS = ("floor: copy", "cuda", "triton", "tuned eager", "torch.compile, default")
AUTOTUNE = "max-autotune-no-cudagraphs"


def device_report() -> dict[str, Any]:
    """The card, and the software that the numbers depend on."""
    properties = torch.cuda.get_device_properties(0)
    found = environment() | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if "FASTDENSITY_COMMIT" in os.environ:
        found["commit"] = os.environ["FASTDENSITY_COMMIT"]
    return found


def ceilings() -> dict[str, float]:
    """Bytes a second, read plus written, of a large copy and of a triad a + s b."""
    count = 2**28
    a, b, out = (torch.randn(count, device="cuda") for _ in range(3))
    found = {
        "copy": Variant([lambda: out.copy_(a)]),
        "triad": Variant([lambda: torch.add(a, b, alpha=0.5, out=out)]),
    }
    seconds, _ = measure(found, rounds=9).medians()
    return {"copy": 2 * 4 * count / seconds["copy"], "triad": 3 * 4 * count / seconds["triad"]}


def check(case: Case, found: dict[str, Variant], inputs: list[Inputs]) -> tuple[dict[str, float], dict[str, str]]:
    """(the worst relative error of each variant on the first and last inputs, what is wrong with those not to time)."""
    errors: dict[str, float] = {}
    problems: dict[str, str] = {}
    for place in (0, -1):
        exact = inputs[place].exact(case.eager)
        for name, variant in found.items():
            if name.startswith("floor") or name in problems:
                continue
            inputs[place].out.fill_(float("nan"))  # an element that nobody writes is an error
            try:
                with variant.chosen():
                    result = variant.calls[place]()
                errors[name] = max(float((result.double() - exact).norm() / exact.norm()), errors.get(name, 0.0))
            except Exception as error:  # a rival that does not compile here must not cost the others their numbers
                problems[name] = f"{type(error).__name__}: {error}"[:400]
                continue
            if not errors[name] < TOLERANCE:
                problems[name] = f"relative error {errors[name]:.1e}"
    return errors, problems


def run_case(case: Case, shape: tuple[int, int], backends: list[str], modes: list[str], rounds: int) -> dict[str, Any]:
    """One record: errors, and the medians of every variant that is right."""
    torch._dynamo.reset()
    found, inputs = variants(case, *shape, backends, modes)
    errors, problems = check(case, found, inputs)
    device, calls = measure({name: one for name, one in found.items() if name not in problems}, rounds).medians()
    return {
        "case": case.name,
        "shape": f"{shape[0]} x {shape[1]:,}",
        "least_bytes": case.least_bytes(*shape),
        "input_sets": len(inputs),
        "device_seconds": device,
        "call_seconds": calls,
        "relative_error": errors,
        "problems": problems,
    }


def run(rounds: int, budget: float) -> list[dict[str, Any]]:
    """All cases; compiled rivals are left out, and said to be, once the budget is nearly spent."""
    start = time.monotonic()
    backends = [name for name in ("cuda", "triton") if report()[name][0]]
    records = []
    for case in CASES:
        for shape in ROW_SHAPES:
            left = budget - (time.monotonic() - start)
            modes = [] if case.tuned is None else ["default"] + [AUTOTUNE] * case.autotuned
            skipped = modes if left < 0.2 * budget else modes[1:] if left < 0.4 * budget else []
            record = run_case(case, shape, backends, [mode for mode in modes if mode not in skipped], rounds)
            record["skipped"] = [f"torch.compile, {mode}" for mode in skipped]
            records.append(record)
            print(f"{time.monotonic() - start:6.0f} s  {case.name}, {record['shape']}", flush=True)
            torch.cuda.empty_cache()
    return records


def print_table(records: list[dict[str, Any]], limits: dict[str, float]) -> None:
    """Microseconds on the device, and what share of the large copy's bandwidth the CUDA kernels reach."""
    print(f"\nceilings: copy {limits['copy'] / 1e12:.2f} TB/s, triad {limits['triad'] / 1e12:.2f} TB/s")
    print("device microseconds, writing into a given output")
    print(f"{'':44s}" + "".join(f"{name.split(': ')[-1].split(', ')[0]:>14s}" for name in COLUMNS) + "    share")
    for record in records:
        seconds = record["device_seconds"]
        cells = "".join(f"{seconds[name] * 1e6:14.1f}" if name in seconds else f"{'-':>14s}" for name in COLUMNS)
        share = record["least_bytes"] / limits["copy"] / seconds["cuda"] if "cuda" in seconds else float("nan")
        print(f"{record['case'] + ', ' + record['shape']:44s}{cells}  {share:7.2f}")
        for name, problem in record["problems"].items():
            print(f"  WRONG, not timed: {name}: {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=200.0, help="seconds to stay within, about")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    about = device_report()
    print(json.dumps(about, indent=1))
    with torch.no_grad():
        limits = ceilings()
        records = run(options.rounds, options.budget)
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{slug}.json"
    content = {"environment": about, "bytes_per_second": limits, "records": records}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")
    print_table(records, limits)
    return int(any(name.startswith(("cuda", "triton")) for record in records for name in record["problems"]))


if __name__ == "__main__":
    raise SystemExit(main())
