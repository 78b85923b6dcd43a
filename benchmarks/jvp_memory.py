"""Peak memory of one jvp of attention, by the resident size of a process that does nothing else.

`python -m benchmarks.jvp_memory NAME TOKENS` prints bytes above what the process held just before the call.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastdensity.bench.memory import reset_peak, resident_peak

VARIANTS = ("fastdensity", "func.jvp", "vmap(jvp)")
ROOT = Path(__file__).parent.parent
WARM_TOKENS = 64
HEADS, SIZE = 8, 64


def peak_bytes(name: str, tokens: int) -> int:
    """Run the measurement in a new process."""
    command = [sys.executable, "-m", "benchmarks.jvp_memory", name, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout)


def measure(name: str, tokens: int) -> int:
    """The call is made once before, on few tokens, for what is loaded only once; the trace is made before, too."""
    import fastdensity as fd
    from benchmarks.jvp_cases import packed_attention
    from benchmarks.jvp_peers import helped, mapped_jvp, one_jvp

    def run(x: Tensor, vectors: Tensor) -> object:
        if name == "fastdensity":
            return fd.jvp(packed_attention, (x,), vectors)
        with helped():
            if name == "func.jvp":
                return one_jvp(packed_attention, (x,), vectors[0])
            return mapped_jvp(packed_attention, (x,), vectors)

    small, x = torch.randn(HEADS, 3, 1, WARM_TOKENS, SIZE), torch.randn(HEADS, 3, 1, tokens, SIZE)
    vectors = torch.randn(1, *x.shape)
    run(small, small[None])
    fd.trace_jvp(packed_attention, (x,))
    before = reset_peak()
    run(x, vectors)
    return resident_peak() - before


if __name__ == "__main__":
    with torch.no_grad():
        print(measure(sys.argv[1], int(sys.argv[2])))
