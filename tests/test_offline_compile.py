"""What compilers make of the GPU kernels, on a machine without a GPU.

Triton's compiler and assembler run in processes of their own (`benchmarks.offline`): a process that interprets cannot
compile. nvcc compiles the CUDA sources where it is installed.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.offline import MATRIX_INSTRUCTIONS, ROOMS, TARGETS, Resources, measure_all
from fastdensity.reference import track_model, track_rule
from fastdensity.reference.track import MEMORY

ROOT = Path(__file__).parent.parent
CUDA_SOURCES = sorted(ROOT.glob("csrc/*.cu"))
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100a")
# what the variants of each room must compile between them
KERNELS = {
    "rows": {"whole_rows", "partial_sums", "finish_rows"},
    "probe": {"choose_rows", "sum_probes", "finish_forms", "write_probes"},
    "track": {"track_rows"},
    "dual_conv": {"conv_tiles", "conv_pixels"},
    "dual_chain": {"chain_tiles"},
    "dual_linear": {"linear_tiles"},
    "dual_norm": {"whole_rows", "split_rows"},
    "dual_softmax": {"whole_rows", "long_rows"},
    "dual_attention": {"attend"},
    "trace_linear": {"choose_rows", "probe_tiles", "form_tiles", "add_partials"},
}
MATRIX_ROOMS = ["dual_conv", "dual_linear", "dual_attention", "trace_linear"]
# bytes a block may have: A100, H100, B200, MI300
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Resources]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return measure_all(list(TARGETS), brief=True)


@pytest.fixture
def mine(kernels, room, target) -> list[Resources]:
    found = [kernel for kernel in kernels if (kernel.room, kernel.target) == (room, target)]
    assert {kernel.kernel for kernel in found} == KERNELS[room]
    return found


def test_every_launcher_is_compiled_here():
    files = ROOT.glob("triton_kernels/*.py")
    assert {file.stem for file in files if re.search(r"def \w+_triton\(", file.read_text())} == set(ROOMS)


by_room = pytest.mark.parametrize("room", ROOMS)
by_target = pytest.mark.parametrize("target", TARGETS)


@needs_triton
@by_target
@by_room
def test_no_kernel_spills_or_uses_a_stack(mine):
    assert [kernel for kernel in mine if kernel.spills or kernel.stack] == []


@needs_triton
@by_target
@by_room
def test_operands_are_read_16_bytes_at_a_time(mine):
    assert any(kernel.wide_loads_due for kernel in mine)
    assert [kernel for kernel in mine if kernel.loads["16"] < kernel.wide_loads_due] == []


@needs_triton
@by_target
def test_rows_are_read_in_no_other_way(kernels, target):
    for kernel in kernels:
        if (kernel.room, kernel.target) == ("rows", target) and "bfloat16" not in kernel.variant:
            # what is left are numbers per row: a quantile, a sample id, partial sums
            assert kernel.wide_loads_due > 0
            assert kernel.loads["8"] + kernel.loads["4"] <= 4, kernel


@needs_triton
@by_target
@pytest.mark.parametrize("room", MATRIX_ROOMS)
def test_products_of_halves_run_on_matrix_units(mine, target):
    products = [kernel for kernel in mine if kernel.expects_mma]
    assert products
    wanted = set(MATRIX_INSTRUCTIONS[target])
    assert [kernel for kernel in products if not wanted & set(kernel.mma)] == []


@needs_triton
@by_target
@by_room
def test_shared_memory_suffices(mine, target):
    assert [kernel for kernel in mine if kernel.shared > SHARED_MEMORY[target]] == []


@needs_triton
def test_float32_products_keep_float32(kernels):
    """TF32 has 10 bits: on NVIDIA's matrix units float32 would be that."""
    singles = [kernel for kernel in kernels if "float32" in kernel.variant and kernel.target.startswith("sm_")]
    singles = [kernel for kernel in singles if "bfloat16" not in kernel.variant]
    assert singles
    assert [kernel for kernel in singles if kernel.mma] == []


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


def _kernels_of_the_loop_compiled() -> list[int]:
    """The same for the closed loop, its parameters floats or of each row."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime import driver

    from benchmarks import offline
    from fastdensity.triton_kernels.track import plan

    driver.set_active(offline._driver("sm_90"))
    counts = []
    for rows, columns, offset, value in ((4, 1024, 0, 0.5), (1, 1024, 0, 0.0), (3, 516, 0, 16.0), (3, 1024, 1, -1.0)):
        vector = torch.zeros(rows * columns + offset)[offset:].view(rows, columns)
        memory, report, eps = (
            torch.zeros(rows, len(MEMORY)).double(),
            torch.zeros(rows, 4).double(),
            torch.zeros(rows, columns),
        )
        numbers = (*[value] * 6, torch.zeros(rows), *[value] * 5)
        operands = (vector, vector, None, vector, vector)
        (launch,) = plan("velocity", "direct", operands, numbers, memory, eps, report, memory).launches
        launch.kernel.run(*launch.arguments, grid=(launch.grid,), warmup=True, **launch.constants)
        counts.append(sum(len(caches[0]) for caches in launch.kernel.device_caches.values()))
    return counts


@needs_triton
@pytest.mark.parametrize("compiled", [_kernels_compiled, _kernels_of_the_loop_compiled])
def test_one_kernel_serves_all_values_batches_and_alignments(compiled):
    """A value that Triton specialised on would compile again; another kernel could also round another way."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(compiled).result() == [1, 1, 1, 1]


def _constants_of_the_loop() -> set[float]:
    """The float64 numbers in the code of the closed loop's kernel, as the front end of Triton leaves them."""
    os.environ.pop("TRITON_INTERPRET", None)
    from benchmarks import offline

    found: set[float] = set()
    for case in offline.cases("track", "sm_90"):
        for launch in case.launches("sm_90"):
            code = offline._compile(launch, "sm_90").asm["ttir"]
            for text in re.findall(r"arith\.constant (\S+) : f64", code):
                found.add(struct.unpack(">d", bytes.fromhex(text[2:]))[0] if text.startswith("0x") else float(text))
    return found


@needs_triton
def test_the_loops_numbers_are_float64():
    """Triton makes float32 of a number that meets `tl.where` or `tl.maximum`; its interpreter does not."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_constants_of_the_loop).result()
    model, rule = track_model, track_rule
    expected = {*model.NODES, *model.WEIGHTS, model.NARROW, model.WIDEST, model.EDGE, rule.SAME_PLACE}
    expected |= {rule.SHORTEST, rule.NEAREST, 1e-3, 1e-12, 1.0 / 3.0}
    assert expected <= found
    rounded = {number for number in found if number == float(torch.tensor(number).float())}
    assert {number for number in rounded if number * 1024 % 1 != 0 and number != math.inf} == set()


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
