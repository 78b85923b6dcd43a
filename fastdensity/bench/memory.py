"""Peak memory of a call. On a CPU it is the resident size of the process, which only the system knows.

Memory that was freed but is still held by the C library would hide a call's own: it is given back before. On a GPU
torch's allocator counts.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def peak_bytes(
    call: Callable[[], object], device: torch.device | None = None, repeats: int = 2, warm: bool = True
) -> int:
    """The most that a call needs above what was held just before it: the largest of `repeats`, after one to warm up."""
    if warm:
        call()
    return max(_one_peak(call, device) for _ in range(repeats))


def _one_peak(call: Callable[[], object], device: torch.device | None) -> int:
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device)) - before
    _give_back()
    before = reset_peak()
    call()
    return resident_peak() - before


def reset_peak() -> int:
    """Bytes now resident, which the peak starts from; where the system does not let it, the peak so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()


def resident_peak() -> int:
    """The most that was resident. getrusage knows it too, but also what the parent held before this process began."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _give_back() -> None:
    """glibc keeps freed memory resident; other C libraries have no such function, nor need it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
