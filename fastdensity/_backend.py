"""Which implementation of the kernels runs: one function, one environment variable.

FASTDENSITY_BACKEND = auto | cpu | triton | cuda | torch. `auto` (the default) takes the compiled C++ for CPU
tensors, and for CUDA tensors the compiled CUDA kernels, or Triton where the package was built without nvcc.
Nothing is tried and silently replaced: a backend that was asked for and is missing raises, with what to do.
The variable is read when an op first runs on a device, since reading it costs a tenth of a call; `use` changes it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

VARIABLE = "FASTDENSITY_BACKEND"
BACKENDS = ("cpu", "triton", "cuda", "torch")
WITH_CUDA = ("rows", "probe")  # what has kernels in CUDA C++
# torch's dtypes as csrc/ops.h numbers them
DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
Launcher = Callable[..., None]
_launchers: dict[tuple[str, str], Launcher] = {}


def requested() -> str:
    """The backend that the environment asks for; ValueError on an unknown name."""
    name = os.environ.get(VARIABLE, "auto")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def choose(device_type: str, op: str = "rows") -> str:
    """The backend of an op, or room, for tensors on 'cpu' or 'cuda': the requested one, or the best that works there.

    Dual ops have no CUDA C++: on GPUs they are Triton's.
    """
    name = requested()
    if name == "auto":
        if device_type == "cpu":
            name = "cpu"
        elif device_type == "cuda":
            name = "cuda" if op in WITH_CUDA and _cuda_problem() is None else "triton"
        else:
            name = "torch"  # mps, xpu, ...: the only implementation that exists for them
    problem = _problem(name, device_type)
    if problem is None and name == "cuda" and op not in WITH_CUDA:
        problem = f"{op} has no kernel in CUDA C++; use auto or triton"
    if problem is not None:
        raise RuntimeError(f"backend {name!r} cannot run on {device_type} tensors: {problem}")
    return name


def launcher(op: str, device_type: str, room: str | None = None) -> Launcher:
    """The function that launches `op` for tensors of this device; chosen on the first call, see `use`.

    `room` is the module's stem where several ops share one; the function is then called after the op.
    """
    found = _launchers.get((op, device_type))
    if found is None:
        found = _launchers[op, device_type] = _load(op, choose(device_type, room or op), room)
    return found


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block every op runs on backend `name` (or 'auto'); not for several threads at once."""
    previous = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    _launchers.clear()
    try:
        requested()
        yield
    finally:
        _launchers.clear()
        if previous is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = previous


def _load(op: str, backend: str, room: str | None) -> Launcher:
    stem = room or op
    module = {
        "cpu": f"fastdensity.ops.{stem}_native",
        "cuda": f"fastdensity.ops.{stem}_native",
        "triton": f"fastdensity.triton_kernels.{stem}",
        "torch": f"fastdensity.reference.{stem}",
    }[backend]
    return getattr(importlib.import_module(module), f"{op}_{backend}" if room else f"launch_{backend}")


def native() -> Any:
    """The compiled extension; ImportError with what to do where it was not built."""
    try:
        return importlib.import_module("fastdensity._native")
    except ImportError as error:
        raise ImportError(
            f"the compiled extension fastdensity._native does not load ({error}); reinstall with "
            f"`pip install .`, or set {VARIABLE}=torch to run the slow reference"
        ) from error


def _native_problem() -> str | None:
    try:
        native()
    except ImportError as error:
        return str(error)
    return None


def _cuda_problem() -> str | None:
    problem = _native_problem()
    if problem is not None:
        return problem
    if not native().has_cuda:
        return "built without CUDA kernels; reinstall where nvcc is present (-C cmake.define.FASTDENSITY_CUDA=ON)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _triton_problem() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return None
    return "no GPU that Triton can drive (TRITON_INTERPRET=1 runs its interpreter, for tests)"


def _problem(backend: str, device_type: str) -> str | None:
    if backend == "torch":
        return None
    if backend == "cpu":
        return _native_problem() if device_type == "cpu" else "its kernels read CPU memory; use triton or cuda"
    if backend == "cuda":
        return _cuda_problem() if device_type == "cuda" else "its kernels read GPU memory; use cpu"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a GPU (TRITON_INTERPRET=1 runs its interpreter, for tests)"
    return _triton_problem()


def report() -> dict[str, tuple[bool, str]]:
    """For each backend: does it work on this machine, and if not, why and what to do."""
    problems = {
        "cpu": _native_problem(),
        "triton": _triton_problem(),
        "cuda": _cuda_problem(),
        "torch": None,
    }
    return {name: (problem is None, problem or "ready") for name, problem in problems.items()}
