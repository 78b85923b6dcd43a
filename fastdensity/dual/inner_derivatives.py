"""Derivatives that fn takes or defines itself, and what a trace makes of them.

torch.export records what torch.autograd.grad computes, as far as it can. It cannot see through the transforms of
torch.func, nor through an autograd.Function with a derivative of its own.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch._functorch import eager_transforms, vmap

from fastdensity.dual.lines import innermost, is_users
from fastdensity.dual.nested import NestedJvpError

autograd: Any = torch.autograd
_NESTINGS = (
    (eager_transforms, "grad_increment_nesting"),
    (eager_transforms, "jvp_increment_nesting"),
    (vmap, "vmap_increment_nesting"),
)


@contextmanager
def own_derivatives_refused() -> Iterator[None]:
    """A trace goes through the forward of an autograd.Function, and would lose the derivative that its author wrote."""
    base, thread = torch.autograd.Function, threading.get_ident()
    original = base.__dict__["apply"]

    def apply(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        if threading.get_ident() == thread and not cls.__module__.startswith("torch."):
            raise NotImplementedError(
                f"{cls.__name__} is an autograd.Function with a derivative of its own, which no graph holds, at "
                f"{innermost(traceback.extract_stack())}; write it in torch operators (a detach for what is not to be "
                "differentiated)"
            )
        return original.__get__(None, cls)(*arguments, **keywords)

    base.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        base.apply = original  # type: ignore[method-assign]


@contextmanager
def transforms_end_the_trace() -> Iterator[None]:
    """fn's own call of torch.func.grad, vjp, vmap and the like raises NestedJvpError: forward mode runs over fn then.

    Those inside torch (flex_attention makes its mask by vmap) stay as they are.
    """
    originals = [getattr(module, name) for module, name in _NESTINGS]
    for (module, name), original in zip(_NESTINGS, originals, strict=True):
        setattr(module, name, _ending(original, threading.get_ident()))
    try:
        yield
    finally:
        for (module, name), original in zip(_NESTINGS, originals, strict=True):
            setattr(module, name, original)


def _ending(original: Callable[..., Any], thread: int) -> Callable[..., Any]:
    def enter(*arguments: Any, **keywords: Any) -> Any:
        if threading.get_ident() == thread and is_users(_caller_of_transform(sys._getframe(1))):
            raise NestedJvpError
        return original(*arguments, **keywords)

    return enter


def _caller_of_transform(frame: FrameType | None) -> str:
    """The file of the innermost frame outside torch.func."""
    while frame is not None and "_functorch" in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_filename


class InnerGradientError(NotImplementedError):
    """fn runs torch.autograd backwards in a way that no graph can hold."""


@contextmanager
def gradients_noted() -> Iterator[list[str]]:
    """The lines of fn that ran torch.autograd backwards, for the error where no graph can hold that."""
    lines: list[str] = []
    thread, original = threading.get_ident(), autograd._engine_run_backward

    def run(*arguments: Any, **keywords: Any) -> Any:
        made = original(*arguments, **keywords)
        if threading.get_ident() == thread:
            lines.append(innermost(traceback.extract_stack()))
        return made

    autograd._engine_run_backward = run
    try:
        yield lines
    finally:
        autograd._engine_run_backward = original
