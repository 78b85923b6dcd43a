"""What compilers make of the GPU kernels, on a machine without a GPU.

Triton's compiler and assembler run in processes of their own (`benchmarks.offline`): a process that interprets cannot
compile. nvcc compiles the CUDA sources where it is installed.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.offline import TARGETS, Resources, measure_all

ROOT = Path(__file__).parent.parent
CUDA_SOURCES = sorted(ROOT.glob("csrc/*.cu"))
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100a")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Resources]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return measure_all(list(TARGETS))


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_or_uses_a_stack(kernels, target):
    mine = [kernel for kernel in kernels if kernel.target == target]
    assert {kernel.kernel for kernel in mine} == {"whole_rows", "partial_sums", "finish_rows"}
    assert [kernel for kernel in mine if kernel.spills or kernel.stack] == []


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_operands_are_read_16_bytes_at_a_time(kernels, target):
    mine = [kernel for kernel in kernels if kernel.target == target]
    assert [kernel for kernel in mine if kernel.loads["16"] < kernel.wide_loads_due] == []
    for kernel in mine:
        if "bfloat16" not in kernel.variant:
            # what is left are numbers per row: a quantile, a sample id, partial sums
            assert kernel.wide_loads_due > 0
            assert kernel.loads["8"] + kernel.loads["4"] <= 4, kernel


def _kernels_compiled() -> list[int]:
    """How many kernels exist after each of a series of launches that differ in values, batch and memory only."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastdensity.triton_kernels.rows import plan

    class NoDevice:
        """Enough of a Triton driver to choose and compile kernels; nothing is launched."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    driver.set_active(NoDevice())
    counts = []
    for rows, columns, offset, values, key in (
        (4, 1024, 0, (0.5, 0.6, 0.7, 0.8, 0.4, 0.1, 0.2, 1.0, 0.3, 0.5), (1, 0)),
        (1, 1024, 0, (0.0, 1.0, -0.0, 16.0, 0.5, 1e-310, 2.0**-1074, 3.0, 1e300, 0.5), (2**62 + 1, 2**32 - 1)),
        (3, 516, 0, (float("nan"), float("inf"), 0.1, 0.2, 0.9, -1.0, 0.0, 7.5, 0.0, 1.0), (16, 1)),
        (3, 1024, 1, (0.5, 0.6, 0.7, 0.8, 0.4, 0.1, 0.2, 1.0, 0.3, 0.5), (1, 0)),
    ):
        vector = torch.zeros(rows * columns + offset)[offset:].view(rows, columns)
        out, report = torch.zeros(rows, columns), torch.zeros(rows, 4)
        noise_key = (key[0], torch.zeros(rows, dtype=torch.int64), key[1])
        for launch in plan("step", "velocity", (vector, vector, None, None), values, noise_key, out, report).launches:
            launch.kernel.run(*launch.arguments, grid=(launch.grid,), warmup=True, **launch.constants)
            counts.append(sum(len(caches[0]) for caches in launch.kernel.device_caches.values()))
    return counts


@needs_triton
def test_one_kernel_serves_all_values_batches_and_alignments():
    """A value that Triton specialised on would compile again; another kernel could also round another way."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_kernels_compiled).result() == [1, 1, 1, 1]


@pytest.fixture(scope="module")
def cuda_compilations(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], subprocess.CompletedProcess]:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(job: tuple[Path, str]) -> subprocess.CompletedProcess:
        source, target = job
        output = folder / f"{source.stem}.{target}.cubin"
        options = ["-std=c++17", "-O3", "-Werror", "all-warnings", f"-arch={target}", "-cubin", "-o", str(output)]
        return subprocess.run([compiler, *options, str(source)], capture_output=True, text=True, check=False)

    jobs = [(source, target) for source in CUDA_SOURCES for target in CUDA_TARGETS]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(compile_one, jobs))
    return {(source.name, target): result for (source, target), result in zip(jobs, results, strict=True)}


@pytest.mark.skipif(not CUDA_SOURCES, reason="no CUDA sources in csrc")
@pytest.mark.parametrize("target", CUDA_TARGETS)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda source: source.name)
def test_cuda_sources_compile_without_warnings(cuda_compilations, source, target):
    result = cuda_compilations[source.name, target]
    assert result.returncode == 0, result.stderr[-4000:]
