"""The attention kernel compiled without a GPU: it spills nothing, loads 16 bytes at once and uses the tensor cores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

pytest.importorskip("triton")

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
# target, dtype, width, tangents, mask, and the instruction of its matrix unit
CASES = (
    ("sm_80", torch.bfloat16, 72, 1, "bool", "HMMA"),
    ("sm_90", torch.bfloat16, 64, 1, "add", "HGMMA"),
    ("sm_90", torch.bfloat16, 64, 8, "bool", "HGMMA"),
    ("sm_90", torch.bfloat16, 72, 1, "add", "HGMMA"),
    ("sm_90", torch.float32, 64, 1, "none", "FFMA"),
)


def arguments_of(dtype, width, tangents, kind):
    """The call, as tensors that have no memory."""
    q, k, v = (torch.empty(1 + tangents, 2, 4, 1024, width, dtype=dtype, device="meta") for _ in range(3))
    mask = {
        "none": None,
        "bool": torch.empty(2, 1, 1024, 1024, dtype=torch.bool, device="meta"),
        "add": torch.empty(4, 1024, 1024, dtype=dtype, device="meta"),
    }[kind]
    return q, k, v, True, True, True, mask, True, 0.125, torch.empty_like(q)


def compiled(target, values, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.offline import TARGETS
    from fastdensity.triton_kernels.dual_attention_kernels import attend

    signature, fixed, attributes, options = {}, {}, {}, dict(constants)
    for place, (name, value) in enumerate(zip(attend.arg_names, values, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name], attributes[place,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif value is None or value == 1:
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = "fp64" if isinstance(value, float) else "i32"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    for name in attend.arg_names[len(values) :]:
        signature[name], fixed[name] = "constexpr", options.pop(name)
    source = ASTSource(attend, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def check(target, dtype, width, tangents, kind, instruction):
    from benchmarks.offline import _tool, nvidia_resources
    from fastdensity.triton_kernels.dual_attention import plan

    _, values, constants = plan(*arguments_of(dtype, width, tangents, kind), modern=target != "sm_80")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(target, values, constants).asm["cubin"])
        file.flush()
        _, spills, stack, loads, _ = nvidia_resources(file.name)
        code = _tool("nvdisasm", "-c", file.name)
    assert (spills, stack) == (0, 0), (target, dtype, width, kind)
    assert loads["16"] > 0
    assert re.search(rf"\b{instruction}\b", code)


def test_resources():
    """In a process that never interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == ["checked"] * len(CASES)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for case in CASES:
        check(*case)
        print("checked")
