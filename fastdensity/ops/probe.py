"""Probes of a trace: made, or multiplied with products J z and never stored.

The internal interface; `fastdensity.probes` is the public one. A probe's numbers depend on (seed, sample id, step,
probe, element, stream) alone, see `fastdensity.reference.probe`; signs are the same bits on every backend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.boundary import describe
from fastdensity.ops.dual_operator import define
from fastdensity.reference import probe as reference
from fastdensity.reference.probe import DISTRIBUTIONS, MOST_COLUMNS, MOST_PROBES
from fastdensity.sums import pairwise_sum


def _empty_probes(
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty((count, sample_ids.shape[0], columns), dtype=dtype, device=sample_ids.device)


def _empty_forms(
    products: Tensor, seed: int, sample_ids: Tensor, step: int, first: int, distribution: str, stream: int
) -> Tensor:
    return torch.empty(products.shape[:2], dtype=torch.float64, device=products.device)


_make = define(
    "make_probes",
    "SymInt seed, Tensor sample_ids, SymInt step, SymInt first, SymInt count, SymInt columns, str distribution, "
    "SymInt stream, ScalarType dtype",
    reference.make_probes,
    _empty_probes,
    room="probe",
)
_forms = define(
    "probe_forms",
    "Tensor products, SymInt seed, Tensor sample_ids, SymInt step, SymInt first, str distribution, SymInt stream",
    reference.probe_forms,
    _empty_forms,
    room="probe",
)


def make_probes(
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """Probes first .. first + count - 1 of each sample.

    Args:
        seed, step: integers, 0 <= seed < 2^63; step counts modulo 2^32.
        sample_ids: integers (B,), modulo 2^32, on the device where the probes are wanted.
        first, count: with first + count < 2^24.
        columns: the length n of a probe, up to 2^34.
        distribution: "rademacher", "normal", "sphere" or "hadamard".
        stream: STREAM_MEASURE or STREAM_STEER of `fastdensity.reference.probe`.
        dtype: float32, float64, bfloat16 or float16; normals are made in float32 for all but float64.

    Returns:
        (count, B, columns), contiguous.

    Raises:
        ValueError: an unknown distribution, too many probes or columns.
    """
    _check(distribution, first, count, columns)
    return _make(seed, sample_ids, step, first, count, columns, distribution, stream, dtype)


def probe_forms(
    products: Tensor, seed: int, sample_ids: Tensor, step: int, first: int, distribution: str, stream: int
) -> Tensor:
    """z_k . products[k] of each sample, with the probes z made in registers: one read of `products`, nothing stored.

    Args:
        products: (K, B, n), floating, any strides; products[k] goes with probe first + k.
        seed, sample_ids, step, first, distribution, stream: as in `make_probes`.

    Returns:
        (K, B) in float64. Linear in `products`, and differentiable by them in both modes.

    Raises:
        ValueError: products of another rank or number of samples; otherwise as `make_probes`.
    """
    if products.dim() != 3 or products.shape[1] != sample_ids.shape[0]:
        wanted = f"(K, B, n) with B = {sample_ids.shape[0]} sample ids"
        raise ValueError(f"products must be {wanted}, got {describe(products)}")
    _check(distribution, first, products.shape[0], products.shape[2])
    if products.shape[2] == 0:
        return products.double().sum(-1)
    return _forms(products, seed, sample_ids, step, first, distribution, stream)


def orthogonal_probes(
    seed: int, sample_ids: Tensor, step: int, first: int, count: int, columns: int, stream: int, dtype: torch.dtype
) -> Tensor:
    """Haar-distributed orthogonal probes of norm sqrt(n), (count, B, columns), in blocks of n.

    The work grows with the square of the number of probes from the beginning of the block; a call that begins within a
    block makes its beginning, too, which `OrthogonalProbes` keeps from one call to the next.

    Args: as in `make_probes`.

    Raises:
        ValueError: as `make_probes`.
    """
    return OrthogonalProbes(seed, sample_ids, step, columns, stream).take(first, count, dtype)


class OrthogonalProbes:
    """The probes of `orthogonal_probes` in parts, each made once if they are asked for in ascending order.

    Probe j of a block is the j-th normal probe, made orthogonal to those before it by Gram and Schmidt, twice, in
    float64: it depends on no later probe, nor on the rest of the batch, nor on what is asked for together.
    """

    def __init__(self, seed: int, sample_ids: Tensor, step: int, columns: int, stream: int) -> None:
        self._key, self._columns, self._stream = (seed, sample_ids, step), columns, stream
        self._block = 0
        self._basis: Tensor | None = None  # (m, B, n), of the block's first m probes

    def take(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Probes first .. first + count - 1, (count, B, n); ValueError as `make_probes`."""
        _check("normal", first, count, self._columns)
        if not count or not self._columns:
            return _empty_probes(*self._key, first, count, self._columns, "normal", self._stream, dtype)
        parts = []
        while count:
            block, begin = divmod(first, self._columns)
            end = min(begin + count, self._columns)
            part = self._basis_of(block, end)[begin:end]
            parts.append((part * math.sqrt(self._columns)).to(dtype))
            first, count = first + end - begin, count - (end - begin)
        return torch.cat(parts)

    def _basis_of(self, block: int, size: int) -> Tensor:
        """At least the first `size` vectors of a block."""
        basis = self._basis if block == self._block else None
        known = 0 if basis is None else len(basis)
        if size > known:
            begin = block * self._columns + known
            more = make_probes(*self._key, begin, size - known, self._columns, "normal", self._stream, torch.float64)
            basis = _orthonormal(more if basis is None else torch.cat([basis, more]), known)
            self._block, self._basis = block, basis
        assert basis is not None
        return basis


def _orthonormal(vectors: Tensor, known: int) -> Tensor:
    """Gram-Schmidt over the first dimension of (K, B, n), each sample for itself, from the `known`-th vector on.

    Both passes subtract the projections on all earlier vectors at once; twice is enough (Giraud, Langou, Rozloznik,
    "The loss of orthogonality in the Gram-Schmidt orthogonalization process", 2005). Overwrites its argument.
    """
    for k in range(known, vectors.shape[0]):
        vector, earlier = vectors[k], vectors[:k]
        for _ in range(2 if k else 0):
            overlaps = pairwise_sum(earlier * vector, -1)
            vector = vector - pairwise_sum(earlier * overlaps[..., None], 0)
        vectors[k] = vector / torch.sqrt(pairwise_sum(vector * vector, -1))[:, None]
    return vectors


def _check(distribution: str, first: int, count: int, columns: int) -> None:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if first < 0 or count < 0 or first + count > MOST_PROBES:
        raise ValueError(f"probes must be in [0, {MOST_PROBES - 1}], got {first} to {first + count - 1}")
    if columns > MOST_COLUMNS:
        raise ValueError(f"a sample may have up to {MOST_COLUMNS} elements, got {columns}")
