"""What compilers make of the Triton kernels, without a GPU: registers, spills, load widths, matrix instructions.

`python -m benchmarks.offline` compiles the variants of every room for four targets and prints docs/kernels.md's table;
`--json` prints one JSON object per kernel and target, `--rooms` chooses. The variants are in benchmarks/offline_*.py.
Launch configurations are those of the package itself, on tensors without memory; a kernel is specialised as in a real
launch, under a driver that does nothing but name the target. Assembler and disassembler come with Triton.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# name -> Triton's (backend, architecture, threads per warp)
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# what multiplies matrices of 16-bit numbers there
MATRIX_INSTRUCTIONS = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTCHMMA", "HMMA"), "gfx942": ("MFMA",)}
# room -> the module that lists its variants: `cases(target, brief)`, the rooms' cases in a row where it lists several
OWN_LISTS = {room: f"benchmarks.offline_{room}" for room in ("rows", "probe", "track")}
ROOMS = OWN_LISTS | dict.fromkeys(
    ("dual_conv", "dual_chain", "dual_linear", "dual_norm", "dual_softmax", "dual_attention", "trace_linear"),
    "benchmarks.offline_dual_lists",
)


class Launch(NamedTuple):
    """`kernel[grid](*arguments, **constants)`, and what its machine code must show."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    wide_loads_due: int  # 16-byte load instructions at least
    expects_mma: bool = False


class Case(Protocol):
    """A call of a room; its text names it in tables. Sent to other processes, so it holds no tensors."""

    @property
    def room(self) -> str:
        """The room whose kernels it launches."""

    def launches(self, target: str) -> list[Launch]:
        """The kernels of the call, as the package launches them on this target; imports Triton."""


@dataclass(frozen=True)
class Resources:
    """One kernel on one target. Loads count instructions by the bytes each thread asks for; spills are instructions
    that reach local memory (NVIDIA) or spilled registers (AMD); stack is in bytes; `mma` names the kinds of
    matrix instructions."""

    target: str
    room: str
    kernel: str
    variant: str
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    loads: dict[str, int]
    mma: tuple[str, ...]
    instructions: int
    wide_loads_due: int
    expects_mma: bool


class _Code(NamedTuple):
    registers: int
    spills: int
    stack: int
    loads: dict[str, int]
    mma: tuple[str, ...]
    instructions: int


def cases(room: str, target: str, brief: bool = False) -> list[Case]:
    """The variants of a room, or few that stand for them; ValueError where the room is unknown."""
    if room not in ROOMS:
        raise ValueError(f"room must be one of {', '.join(ROOMS)}, got {room!r}")
    listed = import_module(ROOMS[room])
    found: list[Case] = [case for case in listed.cases(target, brief) if case.room == room]
    return found


def recorded(call: Callable[[], None]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, keywords) of every kernel that `call` launches; none of them runs."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        found.append((self, arguments, keywords))

    run = JITFunction.run
    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = run
    return found


@cache
def _driver(target: str) -> Any:
    """Enough of a Triton driver to specialise and compile for a target; it launches nothing."""
    from triton.backends.compiler import GPUTarget

    class NoDevice:
        get_current_device = staticmethod(lambda: list(TARGETS).index(target))
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget(*TARGETS[target]))

    return NoDevice()


def _compile(launch: Launch, target: str) -> Any:
    from triton.runtime import driver

    driver.set_active(_driver(target))
    return launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.constants)


def _tool(name: str, *arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia_code(cubin: bytes) -> _Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
        code = _tool("nvdisasm", "-c", file.name)
    names = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)
    loads = {"16": 0, "8": 0, "4": 0}
    for name in names:
        if name.startswith("LDG"):  # LDGSTS, straight to shared memory, included
            loads["16" if ".128" in name else "8" if ".64" in name else "4"] += 1
    spills = sum(name.startswith(("LDL", "STL")) for name in names)
    mma = tuple(sorted({name.split(".")[0] for name in names if re.match(r"(UTC)?[A-Z]G?MMA\b", name)}))
    stack = int(usage["STACK"]) + int(usage["LOCAL"])
    return _Code(int(usage["REG"]), spills, stack, loads, mma, len(names))


def _amd_code(code: str) -> _Code:
    def field(name: str) -> int:
        (value,) = re.findall(rf"\.{name}:\s+(\d+)", code)
        return int(value)

    loads = {str(4 * n): len(re.findall(rf"(?:global|buffer)_load_dwordx{n}\b", code)) for n in (4, 2)}
    loads["4"] = len(re.findall(r"(?:global|buffer)_load_(?:dword|[us]short)\b", code))
    instructions = sum(re.match(r"\t[a-z]", line) is not None for line in code.splitlines())
    mma = ("MFMA",) if "\tv_mfma_" in code else ()
    # scalar registers that do not fit are parked in vector registers, not in memory
    spills, stack = field("vgpr_spill_count"), field("private_segment_fixed_size")
    return _Code(field("vgpr_count"), spills, stack, loads, mma, instructions)


def measure(case: Case, target: str) -> list[Resources]:
    """Compile the kernels of a case and read what they use."""
    found = []
    for launch in case.launches(target):
        compiled = _compile(launch, target)
        assembled = compiled.asm
        code = _nvidia_code(assembled["cubin"]) if "cubin" in assembled else _amd_code(assembled["amdgcn"])
        found.append(
            Resources(
                target,
                case.room,
                launch.kernel.__name__,
                str(case),
                compiled.metadata.num_warps,
                **code._asdict(),
                shared=compiled.metadata.shared,
                wide_loads_due=launch.wide_loads_due,
                expects_mma=launch.expects_mma,
            )
        )
    return found


def _measure(job: tuple[Case, str]) -> list[Resources]:
    return measure(*job)


def _compile_here() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets cannot compile


def measure_all(
    targets: list[str], rooms: list[str] | None = None, brief: bool = False, processes: int = 2
) -> list[Resources]:
    """The variants of these rooms (all of them) on every target, compiled in `processes` processes of their own."""
    jobs = [(case, target) for room in rooms or ROOMS for target in targets for case in cases(room, target, brief)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_compile_here) as pool:
        return [row for found in pool.map(_measure, jobs, chunksize=2) for row in found]


def _cell(row: Resources | None) -> str:
    if row is None:
        return ""
    return ", ".join([str(row.registers), "/".join(str(count) for count in row.loads.values()), *row.mma])


def table(rows: list[Resources]) -> str:
    """Markdown: one line per kernel and variant; registers, 16/8/4-byte loads, matrix instructions of each target."""
    targets = list(dict.fromkeys(row.target for row in rows))
    cells: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in rows:
        cells.setdefault((row.variant, row.kernel), {})[row.target] = row
    lines = [
        f"| variant | kernel | {' | '.join(targets)} |",
        "|---|---|" + "---|" * len(targets),
    ]
    for (variant, kernel), by_target in cells.items():
        texts = [_cell(by_target.get(target)) for target in targets]
        lines.append(f"| {variant} | {kernel} | " + " | ".join(texts) + " |")
    spilling = [row for row in rows if row.spills or row.stack]
    lines.append(f"\n{len(rows)} kernels compiled; {len(spilling)} spill or use a stack.")
    lines += [f"- {row.kernel} of {row.variant} on {row.target}: {row.stack} bytes" for row in spilling]
    return "\n".join(lines)


def main() -> None:
    """Print the table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel and target")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--rooms", nargs="+", choices=list(ROOMS), default=list(ROOMS))
    options = parser.parse_args()
    rows = measure_all(options.targets, options.rooms)
    print("\n".join(json.dumps(asdict(row)) for row in rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
