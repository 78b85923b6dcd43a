"""The variants of the dual kernels that benchmarks/offline.py compiles: calls of their launchers, spelled out.

A room adds its calls as a function of `DualCase`s, named in `LISTS`, and its name to `benchmarks.offline.ROOMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch

from benchmarks.offline import Launch, recorded


class Shape(NamedTuple):
    """A dense tensor without memory."""

    dtype: str
    sizes: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """On the meta device, where addresses are 0 and so aligned to anything."""
        return torch.empty(self.sizes, dtype=getattr(torch, self.dtype), device="meta")


@dataclass(frozen=True)
class DualCase:
    """One call of a room's `launch_triton(*arguments, out)`; what it launches is what is compiled.

    `wide_loads_due` and `expects_mma` hold for the kernels whose names are in `kernels`, or for all.
    """

    room: str
    name: str
    arguments: tuple[Any, ...]
    out: Shape
    wide_loads_due: int = 1
    expects_mma: bool = False
    kernels: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def launches(self, target: str) -> list[Launch]:
        """Whatever the launcher launches, in order; the target is only known to the driver."""
        module = import_module(f"fastdensity.triton_kernels.{self.room}")
        arguments = [_made(argument) for argument in self.arguments]
        found = []
        for kernel, given, keywords in recorded(lambda: module.launch_triton(*arguments, self.out.tensor())):
            due = not self.kernels or kernel.__name__ in self.kernels
            found.append(Launch(kernel, given, keywords, due * self.wide_loads_due, due and self.expects_mma))
        if not found:
            raise RuntimeError(f"{self.room} launched no kernel for {self.name}")
        return found


def _made(argument: Any) -> Any:
    if isinstance(argument, Shape):
        return argument.tensor()
    return [_made(item) for item in argument] if isinstance(argument, (list, tuple)) else argument


def _conv(
    dtype: str,
    tangents: int,
    channels: int,
    outputs: int,
    window: int,
    activation: str,
    stride: int = 1,
    groups: int = 1,
    **due: Any,
) -> DualCase:
    size = 32 // stride
    options = ", ".join([f"stride {stride}"] * (stride > 1) + [f"{groups} groups"] * (groups > 1) + [activation])
    return DualCase(
        "dual_conv",
        f"{window} x {window}, {channels} to {outputs}, {dtype}, K={tangents}, {options}",
        (
            Shape(dtype, (1 + tangents, 4, channels, 32, 32)),
            Shape(dtype, (outputs, channels // groups, window, window)),
            Shape(dtype, (outputs,)),
            *((stride, stride), (window // 2, window // 2), (1, 1), groups, activation),
        ),
        Shape(dtype, (1 + tangents, 4, outputs, size, size)),
        **due,
    )


def dual_conv(target: str) -> list[DualCase]:
    """Windows of one and nine taps; the value alone, with one tangent and with three; every dtype; small groups."""
    found = [
        _conv("bfloat16", 1, 320, 320, 3, "silu", expects_mma=True),
        _conv("bfloat16", 3, 320, 320, 3, "silu", expects_mma=True),
        _conv("bfloat16", 1, 320, 640, 1, "none", expects_mma=True),
        _conv("float32", 3, 128, 128, 3, "silu"),
        _conv("float64", 3, 128, 128, 3, "silu"),
        _conv("bfloat16", 3, 320, 320, 3, "silu", groups=320, wide_loads_due=0),
        _conv("bfloat16", 2, 320, 320, 3, "silu", expects_mma=True),
    ]
    if target == "sm_90":
        found += [
            _conv("bfloat16", 1, 320, 320, 3, "none", stride=2, expects_mma=True),
            _conv("float16", 3, 320, 320, 1, "silu", expects_mma=True),
            _conv("float32", 1, 128, 128, 3, "relu"),
            _conv("float64", 1, 128, 128, 1, "none"),
        ]
    return found


LISTS: dict[str, Callable[[str], list[DualCase]]] = {"dual_conv": dual_conv}


def cases(target: str) -> list[DualCase]:
    """The calls of all dual rooms."""
    return [case for calls in LISTS.values() for case in calls(target)]
