"""Sizes in 64 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wide(number):
    """In 64 bits. A size of 1 is a constant to the compiler, a Python number that has no `.to`."""
    return tl.zeros([], tl.int64) + number
