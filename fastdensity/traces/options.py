"""How a divergence is found: the options that `fastdensity.divergence`, `sample` and `log_prob` share."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from fastdensity.boundary import check_integer, describe
from fastdensity.traces.function import FORWARD_MODES

METHODS = ("exact", "hutchinson", "hutchpp", "xtrace", "colour")
DISTRIBUTIONS = ("rademacher", "normal", "sphere", "orthogonal", "hadamard")
MOST_MATVECS = 2**24 - 2
LEAST_MATVECS = {"hutchpp": 3, "xtrace": 2}


@dataclass(frozen=True, slots=True)
class DivergenceMethod:
    """The options of `fastdensity.divergence`; `seed` None means the caller's, `num_matvecs` 0 exact."""

    method: str = "hutchinson"
    num_matvecs: int = 1
    distribution: str = "rademacher"
    seed: int | None = None
    abstol: float | None = None
    reltol: float | None = None
    max_matvecs: int | None = None
    num_colours: int | None = None
    resphere: bool = True
    memory: int | None = None
    forward: str = "dual"

    def __post_init__(self) -> None:
        """ValueError or TypeError on a field out of range."""
        _check_choice("method of divergence", self.method, METHODS)
        _check_choice("distribution", self.distribution, DISTRIBUTIONS)
        _check_choice("forward", self.forward, FORWARD_MODES)
        check_integer("num_matvecs", self.num_matvecs, 0, MOST_MATVECS)
        for name, lowest in (("seed", 0), ("max_matvecs", 1), ("num_colours", 1), ("memory", 1)):
            value = getattr(self, name)
            if value is not None:
                check_integer(name, value, lowest, 2**63 - 1)
        for name in ("abstol", "reltol"):
            _check_tolerance(name, getattr(self, name))
        if not isinstance(self.resphere, bool):
            raise TypeError(f"resphere must be True or False, got {describe(self.resphere)}")
        least = LEAST_MATVECS.get(self.method, 1)
        if 0 < self.num_matvecs < least and not self.has_tolerance:
            raise ValueError(f"method {self.method!r} needs num_matvecs >= {least}, got {self.num_matvecs}")
        if self.max_matvecs is not None and self.max_matvecs < max(least, self.num_colours or 0):
            least = max(least, self.num_colours or 0)
            raise ValueError(f"method {self.method!r} needs max_matvecs >= {least} here, got {self.max_matvecs}")
        if self.num_colours is not None and self.method != "colour":
            raise ValueError(f"num_colours belongs to method 'colour', not to {self.method!r}")

    @property
    def has_tolerance(self) -> bool:
        """Is the number of products chosen by a wanted standard error?"""
        return self.abstol is not None or self.reltol is not None

    @staticmethod
    def parse(divergence: Any, default: str) -> DivergenceMethod:
        """A method by name, by a dict of this class's fields, or the default for None."""
        if divergence is None:
            return DivergenceMethod(default)
        if isinstance(divergence, DivergenceMethod):
            return divergence
        if isinstance(divergence, str):
            return DivergenceMethod(divergence, LEAST_MATVECS.get(divergence, 1))
        if not isinstance(divergence, dict):
            raise TypeError(f"divergence must be None, a method's name or a dict, got {describe(divergence)}")
        known = tuple(field.name for field in fields(DivergenceMethod))
        unknown = [key for key in divergence if key not in known]
        if unknown:
            raise ValueError(f"divergence takes the keys {', '.join(known)}, got {', '.join(map(repr, unknown))}")
        return DivergenceMethod(**divergence)


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {describe(value)}")


def _check_tolerance(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not 0.0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
