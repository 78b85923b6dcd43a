"""fd.jvp on a CUDA device in bfloat16: `python -m benchmarks.gpu_jvp [--budget SECONDS] [--rounds N] [--out FOLDER]`.

Attention of SD3's shape and a block of DiT-XL/2, with K tangents, against torch.func.jvp (once per tangent; eager, in
SDPA's MATH backend, and compiled), jvp_flash_attention where it is installed, and the matrix products alone. What is
further from float64 than the tolerance is not timed; if that is fastdensity's, the exit status is 1. Times are those of
calls from Python between two CUDA events. Writes FOLDER/NAME-OF-THE-DEVICE-jvp.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdensity as fd
from benchmarks.gpu import device_report
from benchmarks.gpu_timing import seconds_of
from benchmarks.jvp_cases import DiTBlock, attention_products, packed_attention
from benchmarks.jvp_peers import helped, one_jvp
from benchmarks.run import RESULTS
from fastdensity.ops.dual_attention import dual_attention

DEVICE, DTYPE = "cuda", torch.bfloat16
TANGENTS = (1, 4, 8)
OURS, EAGER = "fastdensity", "func.jvp"
SECONDS = 0.02  # of one measurement, at least
Call = Callable[[], Any]


@dataclass
class Case:
    """fn of primals (x, ...) in DTYPE along vectors (K, *); `exact` of value and tangents for the first `part` rows."""

    name: str
    fn: Callable[..., Tensor]
    exact_fn: Callable[..., Tensor]
    primals: tuple[Tensor, ...]
    vectors: Tensor
    ours: dict[str, Call]
    rivals: dict[str, Call]
    floor: Call
    narrow: Callable[[Tensor], Tensor]  # of x and of a result: the part that is compared

    def exact(self) -> tuple[Tensor, Tensor]:
        x, *rest = (self.narrow(primal).double() for primal in self.primals)
        with helped():
            found = [one_jvp(self.exact_fn, (x, *rest), self.narrow(vector).double()) for vector in self.vectors[:2]]
        return found[0][0], torch.stack([tangent for _, tangent in found])


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def products(linears: list[tuple[int, int, int]], batched: list[tuple[int, int, int, int]]) -> Call:
    """The GEMMs that no implementation can avoid, in cuBLAS."""
    calls: list[Call] = [
        partial(torch.mm, draw(rows, inner), draw(columns, inner).t(), out=draw(rows, columns))
        for rows, inner, columns in linears
    ]
    made: dict[tuple[int, int, int, int], Call] = {}
    for sizes in batched:
        batch, rows, inner, columns = sizes
        if sizes not in made:  # memory for one of a kind: a matrix of scores is large
            operands = draw(batch, rows, inner), draw(batch, inner, columns)
            made[sizes] = partial(torch.bmm, *operands, out=draw(batch, rows, columns))
        calls.append(made[sizes])
    return lambda: [call() for call in calls]


def per_tangent(one: Callable[..., Any], primals: tuple[Tensor, ...], vectors: Tensor, compiled: bool = False) -> Call:
    def run() -> tuple[Tensor, list[Tensor]]:
        with helped(compiled):
            found = [one(primals, vector) for vector in vectors]
        return found[0][0], [tangent for _, tangent in found]

    return run


def attention(count: int, batch: int = 1, heads: int = 24, tokens: int = 4_096, size: int = 64) -> Case:
    """Of one tensor (B, 3, H, N, d) that holds query, key and value."""
    x, vectors = draw(batch, 3, heads, tokens, size), draw(count, batch, 3, heads, tokens, size)
    dual = torch.cat([x[None], vectors])

    def ours() -> tuple[Tensor, Tensor]:
        q, k, v = dual.unbind(2)
        out = dual_attention(q, k, v, True, True, True, None, False, size**-0.5)
        return out[0], out[1:]

    rivals = {EAGER: per_tangent(partial(one_jvp, packed_attention), (x,), vectors)}
    if find_spec("jvp_flash_attention") is not None:
        from jvp_flash_attention.jvp_attention import JVPAttn

        def flash(packed: Tensor) -> Tensor:
            result: Tensor = JVPAttn.fwd_dual(*(part.contiguous() for part in packed.unbind(1)))
            return result

        rivals["jvp_flash_attention"] = per_tangent(partial(one_jvp, flash), (x,), vectors)
    return Case(
        f"attention, B H={batch * heads}, d={size}, N={tokens:,}",
        packed_attention,
        packed_attention,
        (x,),
        vectors,
        {OURS: ours, "fd.jvp": lambda: fd.jvp(packed_attention, (x,), vectors)},
        rivals,
        products([], attention_products(count, batch * heads, tokens, size)),
        lambda tensor: tensor[:1, ..., :2, :, :],  # two heads
    )


def dit_block(count: int, width: int = 1_152, heads: int = 16, tokens: int = 256, batch: int = 8) -> Case:
    """A block of DiT-XL/2 on images of 256 pixels."""
    model = DiTBlock(width, heads).to(DEVICE, DTYPE).requires_grad_(False)
    primals, vectors = (draw(batch, tokens, width), draw(batch, width)), draw(count, batch, tokens, width)
    graph = torch.compile(fd.trace_jvp(model, primals), fullgraph=True, dynamic=False)
    compiled = torch.compile(lambda primals, vector: one_jvp(model, primals, vector), dynamic=False)
    rows = (1 + count) * batch * tokens
    linears = [(rows, width, 3 * width), (rows, width, width), (rows, width, 4 * width), (rows, 4 * width, width)]
    return Case(
        f"DiT block {width} wide, {heads} heads, N={tokens}, B={batch}",
        model,
        copy.deepcopy(model).double(),
        primals,
        vectors,
        {OURS: lambda: fd.jvp(model, primals, vectors), f"{OURS}, compiled": lambda: graph(primals, vectors)},
        {
            EAGER: per_tangent(partial(one_jvp, model), primals, vectors),
            f"{EAGER}, compiled": per_tangent(compiled, primals, vectors, compiled=True),
        },
        products(
            [*linears, (batch, width, 6 * width)], attention_products(count, batch * heads, tokens, width // heads)
        ),
        lambda tensor: tensor[:1],
    )


def errors_of(case: Case, result: Any, exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative, of the value and of the first two tangents."""
    value, tangents = result
    found = case.narrow(value), torch.stack([case.narrow(tangent) for tangent in tangents[:2]])
    one, two = (float((mine.double() - want).norm() / want.norm()) for mine, want in zip(found, exact, strict=True))
    return one, two


def check(case: Case) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """(relative errors, what is wrong with those not to time); ours may err twice as much as eager func.jvp."""
    exact = case.exact()
    errors: dict[str, tuple[float, float]] = {}
    problems: dict[str, str] = {}
    for name, call in (case.rivals | case.ours).items():  # eager func.jvp, the measure of all, comes first
        try:
            errors[name] = errors_of(case, call(), exact)
        except Exception as error:  # one that does not work here must not cost the others their numbers
            problems[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            continue
        measure = errors.get(EAGER, (0.01, 0.01))
        slack = torch.finfo(DTYPE).eps
        for mine, theirs in zip(errors[name], measure, strict=True):
            if not mine < 2 * theirs + slack:  # NaN is wrong, too
                problems[name] = f"relative error {mine:.1e}, {EAGER}'s {theirs:.1e}"
    return errors, problems


def record(case: Case, rounds: int) -> dict[str, Any]:
    """Errors, and medians of everything that is right, in rounds of a new random order each."""
    errors, problems = check(case)
    calls = {name: call for name, call in (case.ours | case.rivals).items() if name not in problems}
    calls["products alone"] = case.floor
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(SECONDS / seconds_of(call, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(calls[name], repeats[name]))
    return {
        "case": case.name,
        "tangents": len(case.vectors),
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "relative_errors": errors,
        "problems": problems,
    }


def run(rounds: int, budget: float, **sizes: dict[str, int]) -> list[dict[str, Any]]:
    """A record per case and K, those that are left when the budget is spent being skipped."""
    start, records = time.monotonic(), []
    for count in TANGENTS:
        for make in (attention, dit_block):
            if time.monotonic() - start > budget:
                print(f"skipped, no time left: {make.__name__}, K={count}")
                continue
            torch.manual_seed(0)
            torch.compiler.reset()
            records.append(record(make(count, **sizes.get(make.__name__, {})), rounds))
            print_record(records[-1])
            torch.cuda.empty_cache()
    return records


def print_record(found: dict[str, Any]) -> None:
    print(f"\n{found['case']}, K={found['tangents']}")
    ours = found["seconds"].get(OURS, float("nan"))
    for name, seconds in found["seconds"].items():
        print(f"  {name:24s}{seconds * 1e3:10.3f} ms  {seconds / ours:6.2f} x fastdensity's time")
    for name, problem in found["problems"].items():
        print(f"  NOT TIMED: {name}: {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which no case is begun")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    about = device_report()
    with torch.no_grad():
        records = run(options.rounds, options.budget)
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{slug}-jvp.json"
    path.write_text(json.dumps({"environment": about, "records": records}, indent=1) + "\n")
    print(f"written: {path}")
    return int(any(name.startswith((OURS, "fd.")) for found in records for name in found["problems"]))


if __name__ == "__main__":
    raise SystemExit(main())
