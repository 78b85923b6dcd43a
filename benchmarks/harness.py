"""Timing that can be believed on a shared machine; it lives in the package, for `fastdensity bench`."""

from __future__ import annotations

from fastdensity.bench.timing import LOAD_LIMIT, Timing, Variant, measure

__all__ = ["LOAD_LIMIT", "Timing", "Variant", "measure"]
