"""The variants of the closed loop's kernel that benchmarks/offline.py compiles."""

from __future__ import annotations

from typing import Any

from benchmarks.offline_dual import DualCase, Shape
from fastdensity.reference.track import MEMORY, PARAMETERS, Step

ROWS = 4


def _case(
    scheme: str,
    kind: str,
    state: str = "float32",
    prediction: str = "float32",
    columns: int = 16_384,
    uncond: bool = False,
    fresh: bool = False,
    wide: bool = True,
    rule: str = "none",
    noise: str = "none",
) -> DualCase:
    """q and shift are one per row, as in a loop with quantiles of its own; the other parameters are floats."""
    arithmetic = "float64" if "float64" in (state, prediction) else "float32"
    x, p, eps = (Shape(dtype, (ROWS, columns)) for dtype in (state, prediction, arithmetic))
    parameters: list[Any] = [0.5] * len(PARAMETERS)
    for name in ("q", "shift"):
        parameters[PARAMETERS.index(name)] = Shape("float64", (ROWS,))
    operands = (x, p, p if uncond else None, None if fresh else x, None if fresh else eps)
    # a thread's share of a tile is 64 bytes of each operand; a corrector has no use for the last x, which is not read
    read = (x, p, operands[2], None if scheme == "corrector" else operands[3], operands[4])
    due = 4 * sum(vector is not None and vector.dtype == arithmetic for vector in read) if wide else 0
    options = ["cfg"] * uncond + ["first call"] * fresh + [rule] * (rule != "none")
    options += [f"noise {noise}"] * (noise != "none")
    step: Any = None
    if rule != "none":
        key = (0, Shape("int64", (ROWS,)), 3) if noise == "drawn" else None
        made, numbers = x if rule == "step" else p, Shape(arithmetic, (ROWS, 4))
        step = Step._make((rule, x if noise == "given" else None, key, made, numbers))
    out: Any = (eps, Shape("float64", (ROWS, 4)), Shape("float64", (ROWS, len(MEMORY))))
    dtypes = state if state == prediction else f"{state}/{prediction}"
    return DualCase(
        "track",
        ", ".join([f"{scheme} {kind}", dtypes, f"D={columns}", *options]),
        (kind, scheme, operands, tuple(parameters), Shape("float64", (ROWS, len(MEMORY)))),
        out if step is None else (*out, step),
        due,
    )


def cases(target: str, brief: bool = False) -> list[DualCase]:
    """Every scheme and what an operand may be; the prediction types, which differ in a few scalars, on one target."""
    found = [
        _case("direct", "edm", uncond=True),
        _case("direct", "velocity", rule="step"),
        _case("direct", "edm", uncond=True, rule="step", noise="drawn"),
        _case("corrector", "velocity"),
        _case("direct", "edm", "float64", "float64", uncond=True),
        _case("direct", "edm", "float32", "bfloat16", uncond=True),
    ]
    if not brief or target == "sm_90":
        found += [
            _case("direct", "epsilon", fresh=True),
            _case("predictor", "v_prediction"),
            _case("direct", "sample", "bfloat16", "bfloat16"),
            _case("direct", "score", columns=3_001, wide=False),
            _case("direct", "velocity_to_data", columns=192, wide=False),
            _case("corrector", "epsilon", uncond=True),
            _case("corrector", "edm", rule="prediction"),
            _case("direct", "v_prediction", "bfloat16", "bfloat16", rule="step", noise="given"),
        ]
    return found
