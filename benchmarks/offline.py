"""What compilers make of the Triton kernels, without a GPU: registers, spills, load widths, instructions.

`python -m benchmarks.offline` compiles every variant below for four targets and prints docs/kernels.md's table;
`--json` prints one JSON object per kernel and target. The launch configurations are those of the package itself
(`fastdensity.triton_kernels.rows.plan` on tensors without memory); the assembler and the disassembler come with Triton.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity.reference.rows import Operands, Parameter, compute_dtype

# name -> Triton's (backend, architecture, threads per warp)
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
LONG_ROW = 196_608  # 3 x 256 x 256, more than is held in registers
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int64: "*i64"}


@dataclass(frozen=True)
class Variant:
    """A call of the rows contract: state and prediction dtypes, row length, and what is optional."""

    rule: str
    kind: str = "epsilon"
    state: str = "float32"
    prediction: str = "float32"
    columns: int = 4096
    uncond: bool = False
    noise: str = "none"
    rows: int = 4

    def __str__(self) -> str:
        dtypes = self.state if self.state == self.prediction else f"{self.state}/{self.prediction}"
        options = ["cfg"] * self.uncond + [f"noise {self.noise}"] * (self.noise != "none")
        kind = f" {self.kind}" if self.rule in ("prediction", "step") else ""
        return ", ".join([f"{self.rule}{kind}", dtypes, f"D={self.columns}", *options])


@dataclass(frozen=True)
class Resources:
    """One kernel on one target. Loads count instructions by the bytes each thread asks for; spills are instructions
    that reach local memory (NVIDIA) or spilled registers (AMD); stack is in bytes."""

    target: str
    kernel: str
    variant: str
    warps: int
    registers: int
    spills: int
    stack: int
    loads: dict[str, int]
    wide_loads_due: int
    instructions: int


def variants(target: str) -> list[Variant]:
    """Every rule and prediction type; the dtypes and both regimes on the type with the most arithmetic, EDM.

    Prediction types differ in a few scalar instructions, so all of them are compiled for one target only.
    """
    edm = partial(Variant, "step", "edm")
    found = []
    if target == "sm_90":
        found += [Variant("prediction", kind) for kind in rules.PREDICTION_TYPES]
        found += [Variant("step", kind, noise="drawn") for kind in rules.PREDICTION_TYPES]
    for state, prediction, longest in (
        ("float32", "float32", 16_384), ("float32", "bfloat16", 16_384), ("float64", "float64", 8_192),
    ):  # fmt: skip
        found += [
            Variant("drift", "epsilon", state, prediction, longest),
            edm(state, prediction, longest, uncond=True),
            edm(state, prediction, longest // 2, noise="drawn"),
            edm(state, prediction, LONG_ROW, uncond=True, noise="drawn"),
        ]
    return [
        *found,
        Variant("drift", columns=LONG_ROW),
        Variant("radius", columns=16_384),
        edm(columns=8_192, uncond=True, noise="given"),
        Variant("prediction", "edm", "bfloat16", "bfloat16", 16_384),
    ]


def _call(variant: Variant) -> tuple[Any, ...]:
    """The arguments of `plan`, as tensors that have no memory. q is a tensor: its quantile is found in the kernel."""

    def vector(dtype: str) -> Tensor:
        return torch.empty(variant.rows, variant.columns, dtype=DTYPES[dtype], device="meta")

    x, p = vector(variant.state), vector(variant.prediction)
    noise_key = None
    operands: Operands
    parameters: tuple[Parameter, ...]
    if variant.rule == "drift":
        operands, parameters = (x, p, None, p), (0.1, 0.2, 0.3)
    elif variant.rule == "radius":
        operands, parameters = (x, None, None, None), (5.0,)
    else:
        quantile = torch.empty(variant.rows, device="meta")
        operands = (x, p, p if variant.uncond else None, x if variant.noise == "given" else None)
        parameters = (0.1, 0.2, 0.3, 0.4, quantile, 0.6, 0.7, 0.8, 0.9, 0.5)
        if variant.noise == "drawn":
            noise_key = (1, torch.empty(variant.rows, dtype=torch.int64, device="meta"), 3)
    out = torch.empty_like(p if variant.rule == "prediction" else x)
    report = torch.empty(variant.rows, 4, dtype=compute_dtype(operands), device="meta")
    return variant.rule, variant.kind, operands, parameters, noise_key, out, report


def _type(name: str, argument: Any) -> str:
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    if argument is None:
        return "constexpr"
    return "i64" if name in ("seed", "step") or not -(2**31) <= argument < 2**31 else "i32"


def _compile(launch: Any, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: _type(name, argument) for name, argument in zip(names, launch.arguments, strict=False)}
    constants = {name: None for name, its_type in signature.items() if its_type == "constexpr"}
    options = dict(launch.constants)
    for name in names[len(launch.arguments) :]:
        signature[name], constants[name] = "constexpr", options.pop(name)
    source = ASTSource(launch.kernel, signature, constants)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _tool(name: str, *arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def nvidia_resources(cubin: str) -> tuple[int, int, int, dict[str, int], int]:
    """(registers, spill instructions, stack, loads by bytes, instructions) of the first kernel in a cubin file."""
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", cubin)))
    code = _tool("nvdisasm", "-c", cubin)
    names = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)
    loads = {"16": 0, "8": 0, "4": 0}
    for name in names:
        if name.startswith("LDG"):
            loads["16" if ".128" in name else "8" if ".64" in name else "4"] += 1
    spills = sum(name.startswith(("LDL", "STL")) for name in names)
    stack = int(usage["STACK"]) + int(usage["LOCAL"])
    return int(usage["REG"]), spills, stack, loads, len(names)


def _amd_resources(code: str) -> tuple[int, int, int, dict[str, int], int]:
    def field(name: str) -> int:
        (value,) = re.findall(rf"\.{name}:\s+(\d+)", code)
        return int(value)

    loads = {str(4 * n): len(re.findall(rf"(?:global|buffer)_load_dwordx{n}\b", code)) for n in (4, 2)}
    loads["4"] = len(re.findall(r"(?:global|buffer)_load_(?:dword|[us]short)\b", code))
    instructions = sum(re.match(r"\t[a-z]", line) is not None for line in code.splitlines())
    # scalar registers that do not fit are parked in vector registers, not in memory
    return field("vgpr_count"), field("vgpr_spill_count"), field("private_segment_fixed_size"), loads, instructions


def _wide_loads_due(launch: Any, warp: int) -> int:
    """How many 16-byte loads a thread makes at least if operands are read that wide; sums need one of them or more."""
    constants = launch.constants
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    vectors = [named[name] for name in ("v0", "v1", "uncond", "v2") if named[name] is not None]
    wide = sum(vector.element_size() * constants["VECTOR"] == 16 for vector in vectors)
    if launch.kernel.__name__ == "partial_sums":
        wide = int(wide == len(vectors))
    return wide * constants["TILE"] // (constants["num_warps"] * warp * constants["VECTOR"])


def measure(variant: Variant, target: str) -> list[Resources]:
    """Compile the one or two kernels of a variant and read what they use."""
    from fastdensity.triton_kernels.rows import plan

    warp = TARGETS[target][2]
    found = []
    for launch in plan(*_call(variant), warp=warp).launches:
        compiled = _compile(launch, target)
        if "cubin" in compiled.asm:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                numbers = nvidia_resources(file.name)
        else:
            numbers = _amd_resources(compiled.asm["amdgcn"])
        registers, spills, stack, loads, instructions = numbers
        due = _wide_loads_due(launch, warp)
        name, warps = launch.kernel.__name__, launch.constants["num_warps"]
        found.append(Resources(target, name, str(variant), warps, registers, spills, stack, loads, due, instructions))
    return found


def _measure(job: tuple[Variant, str]) -> list[Resources]:
    return measure(*job)


def _compile_here() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets cannot compile


def measure_all(targets: list[str], processes: int = 2) -> list[Resources]:
    """Every variant on every target, compiled in `processes` processes of their own."""
    jobs = [(variant, target) for target in targets for variant in variants(target)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_compile_here) as pool:
        return [row for found in pool.map(_measure, jobs, chunksize=2) for row in found]


def _cell(row: Resources | None) -> str:
    return "" if row is None else f"{row.registers}, {'/'.join(str(count) for count in row.loads.values())}"


def table(rows: list[Resources]) -> str:
    """Markdown: one line per kernel and variant; registers and 16/8/4-byte loads of each target."""
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
    options = parser.parse_args()
    rows = measure_all(options.targets)
    print("\n".join(json.dumps(asdict(row)) for row in rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
