"""Estimators of the trace of a Jacobian that is known only by its products with vectors."""

from __future__ import annotations

from fastdensity.traces.colour import colour
from fastdensity.traces.hutchpp import hutchpp
from fastdensity.traces.products import Products
from fastdensity.traces.result import Trace
from fastdensity.traces.xtrace import xtrace

__all__ = ["Products", "Trace", "colour", "hutchpp", "xtrace"]
