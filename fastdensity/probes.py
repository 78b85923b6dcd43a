"""The random vectors that traces are estimated with, by themselves: `fd.probes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import FLOATING, check_integer, describe
from fastdensity.ops.probe import make_probes, orthogonal_probes
from fastdensity.reference.probe import DISTRIBUTIONS, MOST_COLUMNS, MOST_PROBES, STREAM_MEASURE

PROBE_DISTRIBUTIONS = (*DISTRIBUTIONS, "orthogonal")


def probes(
    seed: int,
    sample_ids: Tensor | Sequence[int],
    step: int,
    probe: int | Sequence[int],
    shape: int | Sequence[int],
    distribution: str = "rademacher",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The probe vectors z, E[z z^T] = I, whose forms z.(J z) estimate a trace (Hutchinson 1990).

    A number is a pure function of (seed, sample id, step, probe, element) by Philox4x32-10 (Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", 2011): a sample's probes depend neither on its batch-mates and their order nor
    on which probes are asked for together. Signs are the same bits on every device; normals agree to 4 units in the
    last place. These are the probes of the numbers that this package reports; those that steer a guided
    trajectory are others.

    Args:
        seed: 0 <= seed < 2^63.
        sample_ids: int64 or int32 (B,), on the device where the probes are wanted, or a sequence of ints (CPU). They
            count modulo 2^32.
        step: an int >= 0, modulo 2^32.
        probe: a number in [0, 2^24 - 2], or a range or sequence of them.
        shape: of one sample; an int means one dimension. n = its number of elements, up to 2^34.
        distribution: "rademacher": independent signs. "normal". "sphere": uniform on the sphere of radius sqrt(n).
            "orthogonal": uniform there, and orthogonal within every n consecutive probes (Haar; Yu et al., "Orthogonal
            random features", 2016); the work grows with the square of the probe's number within its n.
            "hadamard": randomly signed rows of a Hadamard matrix of the order N = 2^m >= n, in a random order, without
            replacement: orthogonal if n is a power of 2, and N consecutive probes (from a multiple of N on) give every
            trace exactly.
        dtype: float32, float64, bfloat16 or float16.

    Returns:
        (B, *shape) where `probe` is an int, else (K, B, *shape).

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
    """
    seed = check_integer("seed", seed, 0, 2**63 - 1)
    ids = _check_ids(sample_ids)
    step = check_integer("step", step, 0, 2**63 - 1)
    sizes = _check_shape(shape)
    if distribution not in PROBE_DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(PROBE_DISTRIBUTIONS)}, got {describe(distribution)}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {describe(dtype)}")
    columns = torch.Size(sizes).numel()
    numbers = _check_numbers(probe)
    made = []
    for first, count in _runs(numbers):
        if distribution == "orthogonal":
            made.append(orthogonal_probes(seed, ids, step, first, count, columns, STREAM_MEASURE, dtype))
        else:
            made.append(make_probes(seed, ids, step, first, count, columns, distribution, STREAM_MEASURE, dtype))
    out = torch.cat(made) if len(made) > 1 else made[0]
    return out.reshape(*(() if _is_number(probe) else (len(numbers),)), ids.shape[0], *sizes)


def _is_number(value: Any) -> bool:
    return not isinstance(value, (Sequence, Tensor))


def _check_ids(sample_ids: Any) -> Tensor:
    if isinstance(sample_ids, Sequence) and not isinstance(sample_ids, (str, bytes)):
        lowest, highest = -(2**63), 2**63 - 1
        return torch.tensor(
            [check_integer("each of sample_ids", number, lowest, highest) for number in sample_ids], dtype=torch.int64
        )
    if not isinstance(sample_ids, Tensor) or sample_ids.dtype not in (torch.int64, torch.int32):
        wanted = "an int64 or int32 tensor of shape (B,) or a sequence of ints"
        raise TypeError(f"sample_ids must be {wanted}, got {describe(sample_ids)}")
    if sample_ids.dim() != 1:
        raise ValueError(f"sample_ids must have shape (B,), got {describe(sample_ids)}")
    return sample_ids.to(torch.int64).contiguous()


def _check_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes, Tensor)) or not isinstance(shape, (Sequence, int)):
        raise TypeError(f"shape must be an int or a sequence of ints, got {describe(shape)}")
    given = shape if isinstance(shape, Sequence) else (shape,)
    sizes = tuple(check_integer("each size of shape", size, 0, MOST_COLUMNS) for size in given)
    if torch.Size(sizes).numel() > MOST_COLUMNS:
        raise ValueError(f"shape must have up to {MOST_COLUMNS} elements, got {sizes}")
    return sizes


def _check_numbers(probe: Any) -> list[int]:
    if _is_number(probe):
        return [check_integer("probe", probe, 0, MOST_PROBES - 1)]
    if isinstance(probe, (str, bytes, Tensor)):
        raise TypeError(f"probe must be an int, a range or a sequence of ints, got {describe(probe)}")
    return [check_integer("each probe", number, 0, MOST_PROBES - 1) for number in probe]


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers; (0, 0) where there are none."""
    if not numbers:
        yield 0, 0
        return
    begin = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[begin], i - begin
            begin = i
