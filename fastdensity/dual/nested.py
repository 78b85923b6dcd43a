"""A jvp of a function that itself calls `fastdensity.jvp`, for score alignment without scores, or torch.func.

Second order: the gradient of a potential by torch.func.grad, say.

No graph holds transforms, so such a function is not traced. torch's forward mode runs over it, and over the inner dual
graph, whose ops then go through their torch references.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_state = threading.local()


class NestedJvpError(BaseException):
    """Raised out of a trace that meets a transform; no `except Exception` of the user's may end it on the way."""


@contextmanager
def inside_trace() -> Iterator[None]:
    """Within the block a call of `fastdensity.jvp` ends the trace."""
    _state.tracing = True
    try:
        yield
    finally:
        _state.tracing = False


def end_outer_trace() -> None:
    """Called by each jvp: raise if a trace is going on around it."""
    if getattr(_state, "tracing", False):
        raise NestedJvpError


class NestedDual:
    """In the place of a `fastdensity.dual.cache.Dual` for a function that cannot be traced for this reason."""

    def run(
        self, fn: Callable[..., Tensor], primals: tuple[Any, ...], vectors: Tensor, tensors: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """By vmap over torch.func.jvp."""

        def push(vector: Tensor) -> Any:
            return torch.func.jvp(lambda x: fn(x, *primals[1:]), primals[:1], (vector,))

        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(push, out_dims=(None, 0), randomness="same")(vectors)  # type: ignore[arg-type]
