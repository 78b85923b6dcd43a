"""What surrounds a trace: the caller's modes put aside, torch's own messages, and the lines of the user's code."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.export._trace
from torch import fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from fastdensity.dual.lines import is_users, user_frames

SLOW_SECONDS = 3.0  # after this long, say that a trace is going on


@contextmanager
def quietly() -> Iterator[None]:
    """Outside every mode of the caller but grad mode, and without torch's advice on failures that are translated here.

    fn may ask for grad mode and for inference mode, and is told the caller's; the trace holds for these alone.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    names = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(_inference_mode_shown(inference))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(_without_partial_graphs())
        stack.enter_context(_lines_of_functions())
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _inference_mode_shown(enabled: bool) -> Iterator[None]:
    """What fn hears when it asks for inference mode; torch itself, which cannot trace in it, hears the truth."""
    original = torch.is_inference_mode_enabled

    def asked() -> bool:
        return enabled if is_users(sys._getframe(1).f_code.co_filename) else original()

    torch.is_inference_mode_enabled = asked
    try:
        yield
    finally:
        torch.is_inference_mode_enabled = original


@contextmanager
def _without_partial_graphs() -> Iterator[None]:
    """torch.export prints what it has of a graph to stderr when it fails; what is refused here is said in words."""
    torch.export._trace.print = lambda *words, **keywords: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del torch.export._trace.print  # type: ignore[attr-defined]


@contextmanager
def _lines_of_functions() -> Iterator[None]:
    """Nodes remember the lines of plain functions, too; torch keeps those of modules' forward methods only."""
    kind = fx.proxy.TracerBase
    original = getattr(kind, "_filter_traceback_frames", None)
    if original is None:
        yield
        return

    def keep(self: Any, summary: traceback.StackSummary) -> traceback.StackSummary:
        return traceback.StackSummary.from_list(user_frames(summary)[-3:])

    kind._filter_traceback_frames = keep
    try:
        yield
    finally:
        kind._filter_traceback_frames = original


@contextmanager
def progress() -> Iterator[None]:
    """One line on stderr when a trace takes long."""
    start = time.perf_counter()
    shown = threading.Event()

    def show() -> None:
        shown.set()
        print("fastdensity: tracing the network once for its dual ...", end="", file=sys.stderr, flush=True)

    timer = threading.Timer(SLOW_SECONDS, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if shown.is_set():
            print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
