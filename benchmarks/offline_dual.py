"""Calls of the dual rooms' launchers, spelled out on tensors without memory, for benchmarks/offline.py to compile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.offline import TARGETS, Launch, recorded

# What launchers ask about the device, which here has no tensors: room -> (its module, target) -> stand-ins in it
DEVICE_QUESTIONS: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "dual_attention": lambda module, target: {"_is_modern": lambda device: target in ("sm_90", "sm_100")},
    "dual_chain": lambda module, target: {"WARPS": 2 if _is_amd(target) else 4},
    "dual_linear": lambda module, target: {"plan": partial(module.plan, most_stages=2 if _is_amd(target) else 3)},
    "dual_norm": lambda module, target: {"plan": partial(module.plan, warp=TARGETS[target][2])},
    "track": lambda module, target: {"WARP": TARGETS[target][2]},
    "trace_linear": lambda module, target: {
        name: partial(getattr(module, name), most_stages=2 if _is_amd(target) else 3)
        for name in ("probe_plan", "form_plan")
    },
}


def _is_amd(target: str) -> bool:
    return TARGETS[target][0] == "hip"


class Shape(NamedTuple):
    """A dense tensor without memory."""

    dtype: str
    sizes: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """On the meta device, where addresses are 0 and so aligned to anything."""
        return torch.empty(self.sizes, dtype=getattr(torch, self.dtype), device="meta")


@dataclass(frozen=True)
class DualCase:
    """One call of a room's `function(*arguments, out)`; what it launches is what is compiled.

    `wide_loads_due` and `expects_mma` hold for the kernels whose names are in `kernels`, or for all.
    """

    room: str
    name: str
    arguments: tuple[Any, ...]
    out: Shape | tuple[Shape, ...]  # one or several, which the function takes last
    wide_loads_due: int = 1
    expects_mma: bool = False
    kernels: tuple[str, ...] = ()
    function: str = "launch_triton"

    def __str__(self) -> str:
        return self.name

    def launches(self, target: str) -> list[Launch]:
        """Whatever the launcher launches, in order."""
        module = import_module(f"fastdensity.triton_kernels.{self.room}")
        launch = getattr(module, self.function)
        arguments = [_made(argument) for argument in self.arguments]
        answers = DEVICE_QUESTIONS[self.room](module, target) if self.room in DEVICE_QUESTIONS else {}
        with patch.multiple(module, **answers) if answers else nullcontext():
            outs = self.out if isinstance(self.out, tuple) and not isinstance(self.out, Shape) else (self.out,)
            calls = recorded(lambda: launch(*arguments, *(_made(out) for out in outs)))
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
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*map(_made, argument))
    return [_made(item) for item in argument] if isinstance(argument, (list, tuple)) else argument
