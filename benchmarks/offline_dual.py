"""The variants of the dual kernels that benchmarks/offline.py compiles: calls of their launchers, spelled out.

A room adds its calls as a function of `DualCase`s, named in `LISTS`, and its name to `benchmarks.offline.ROOMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.offline import Launch, recorded

# What a launcher asks about the device, which here has no tensors: room -> function of its module -> target -> stand-in
DEVICE_QUESTIONS: dict[str, dict[str, Callable[[str], Callable[..., Any]]]] = {
    "dual_attention": {"_is_modern": lambda target: lambda device: target in ("sm_90", "sm_100")},
}


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
        """Whatever the launcher launches, in order."""
        module = import_module(f"fastdensity.triton_kernels.{self.room}")
        arguments = [_made(argument) for argument in self.arguments]
        answers: dict[str, Any] = {name: answer(target) for name, answer in DEVICE_QUESTIONS.get(self.room, {}).items()}
        with patch.multiple(module, **answers) if answers else nullcontext():
            calls = recorded(lambda: module.launch_triton(*arguments, self.out.tensor()))
        found = []
        for kernel, given, keywords in calls:
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


def dual_conv(target: str, brief: bool) -> list[DualCase]:
    """Windows of one and nine taps; the value alone, with one tangent and with three; every dtype; small groups."""
    found = [
        _conv("bfloat16", 1, 320, 320, 3, "silu", expects_mma=True),
        _conv("bfloat16", 3, 320, 320, 3, "silu", expects_mma=True),
        _conv("float32", 3, 128, 128, 3, "silu"),
        _conv("bfloat16", 3, 320, 320, 3, "silu", groups=320, wide_loads_due=0),
    ]
    if not brief or target == "sm_90":
        found += [
            _conv("bfloat16", 2, 320, 320, 3, "silu", expects_mma=True),
            _conv("bfloat16", 1, 320, 640, 1, "none", expects_mma=True),
            _conv("bfloat16", 1, 320, 320, 3, "none", stride=2, expects_mma=True),
            _conv("float16", 3, 320, 320, 1, "silu", expects_mma=True),
            _conv("float32", 1, 128, 128, 3, "relu"),
            _conv("float64", 3, 128, 128, 3, "silu"),
            _conv("float64", 1, 128, 128, 1, "none"),
        ]
    return found


def dual_softmax(target: str, brief: bool) -> list[DualCase]:
    """Rows that are held in registers, and rows that are walked."""
    shapes = [
        Shape(dtype, (4, 64, columns))
        for dtype, columns in (("float32", 16_384), ("float64", 8_192), ("bfloat16", 4_096), ("float32", 65_536))
    ]
    if brief and target != "sm_90":
        shapes = [shapes[0], shapes[3]]
    return [
        DualCase("dual_softmax", f"softmax, {shape.dtype}, D={shape.sizes[-1]}, K=3", (shape,), shape)
        for shape in shapes
    ]


def _attention(dtype: str, tangents: int, width: int, mask: bool = False, dual: bool = True, **due: Any) -> DualCase:
    query, key = Shape(dtype, (1 + tangents, 2, 8, 256, width)), Shape(dtype, (1 + tangents, 2, 8, 256, width))
    if not dual:
        key = Shape(dtype, key.sizes[1:])
    options = ", ".join([f"K={tangents}"] + ["masked"] * mask + ["cross"] * (not dual))
    return DualCase(
        "dual_attention",
        f"attention, {dtype}, width {width}, {options}",
        (query, key, key, True, dual, dual, Shape("bool", (2, 1, 256, 256)) if mask else None, False, 0.125),
        query,
        **due,
    )


def dual_attention(target: str, brief: bool) -> list[DualCase]:
    """Every tile of `blocks`: narrow and wide heads, halves and not, several tangents; masks; cross-attention."""
    found = [
        _attention("bfloat16", 1, 64, expects_mma=True),
        _attention("bfloat16", 4, 64, expects_mma=True),
        _attention("bfloat16", 2, 128, expects_mma=True),
        _attention("float32", 2, 64),
    ]
    if not brief or target == "sm_90":
        found += [
            _attention("bfloat16", 2, 64, mask=True, expects_mma=True),
            _attention("float16", 2, 128, dual=False, expects_mma=True),
            _attention("float64", 2, 64),
            _attention("float32", 2, 128),
        ]
    return found


LISTS: dict[str, Callable[[str, bool], list[DualCase]]] = {
    "dual_conv": dual_conv,
    "dual_softmax": dual_softmax,
    "dual_attention": dual_attention,
}


def cases(target: str, brief: bool = False) -> list[DualCase]:
    """The calls of all dual rooms, in full or a few that stand for them."""
    return [case for calls in LISTS.values() for case in calls(target, brief)]
