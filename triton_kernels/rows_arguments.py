"""The numbers of a call as Triton takes them: exact in float64, and never a reason to compile again.

Triton types a Python float as float32 and specialises on integers. A float therefore travels as its float64 bit
pattern in an int64, and is turned back by `fastdensity.triton_kernels.rows_scalars.row_number`.
"""

from __future__ import annotations

import math
import struct
from statistics import NormalDist
from typing import Any

from torch import Tensor

from fastdensity import rules
from fastdensity.reference.rows import Parameter
from fastdensity.triton_kernels.rows_kernels import NUMBERS
from fastdensity.triton_kernels.rows_scalars import BIT_PATTERN_KEY

QUANTILE = rules.STEP_PARAMETERS.index("q")
_normal = NormalDist()


def _bits(number: float) -> int:
    (pattern,) = struct.unpack("q", struct.pack("d", number))
    return int(pattern) ^ BIT_PATTERN_KEY.value


def _number(parameter: Parameter, rows: int) -> tuple[int | Tensor, bool]:
    """What a kernel takes for one parameter, and whether each row has its own."""
    if not isinstance(parameter, Tensor):
        return _bits(parameter), False
    per_row = parameter.shape == (rows,) and (rows == 1 or parameter.stride(0) != 0)
    return (parameter.contiguous() if per_row else parameter), per_row


def _quantile_term(q: float, columns: int) -> float:
    """sqrt(2 D) ndtri(q); NaN, which the kernel flags, outside (0, 1). Algorithm AS 241, as in the kernel."""
    return math.sqrt(2.0 * columns) * _normal.inv_cdf(q) if 0.0 < q < 1.0 else math.nan


def pack(parameters: tuple[Parameter, ...], quantile: int, rows: int, columns: int) -> tuple[list[int | Tensor], int]:
    """What a kernel takes for each parameter, and the bits of those that are one per row.

    A float at position `quantile` becomes the term that it adds to `shift`, so that kernels need not find it.
    """
    pairs = []
    for index, parameter in enumerate(parameters):
        if index == quantile and not isinstance(parameter, Tensor):
            parameter = _quantile_term(parameter, columns)
        pairs.append(_number(parameter, rows))
    return [number for number, _ in pairs], sum(per_row << index for index, (_, per_row) in enumerate(pairs))


def pack_numbers(rule: str, parameters: tuple[Parameter, ...], rows: int, columns: int) -> tuple[list[Any], int]:
    """The ten numbers of a row kernel (None where the rule has fewer), and the bits of those that are one per row."""
    numbers, per_row = pack(parameters, QUANTILE, rows, columns)
    return [*numbers, *[None] * (len(NUMBERS) - len(numbers))], per_row
