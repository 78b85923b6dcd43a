"""Launches the probe kernels with Triton: how a row is cut, and how wide it is read.

Every choice follows from the row's length and the dtype, never from the batch.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdensity.reference.probe import feistel_rounds, hadamard_order, resolve
from fastdensity.triton_kernels import probe_kernels

TILE = 4096  # elements that a program holds at a time
ELEMENTS_PER_WARP = 1024
MOST_CHUNKS = 512  # partial sums of a pair
MOST_PROGRAMS = 2**31 - 1
PAIRS = 128  # whose rows of Sylvester's matrix one program chooses


def hadamard_rows(seed: int, ids: Tensor, step: int, first: int, count: int, columns: int, stream: int) -> Tensor:
    """The row of Sylvester's matrix of each pair of a probe and a sample, (count * B,); ids are dense int64."""
    pairs = count * ids.shape[0]
    rows = torch.empty(pairs, dtype=torch.int64, device=ids.device)
    arguments = (rows, ids, seed, step, stream, first, pairs, ids.shape[0])
    order = hadamard_order(columns)
    constants = {"ORDER": order, "ROUNDS": feistel_rounds(order), "PAIRS": PAIRS, "num_warps": 4}
    probe_kernels.choose_rows[-(-pairs // PAIRS),](*arguments, **constants, enable_fp_fusion=True)
    return rows


class _Work:
    """The launches that one call consists of share these."""

    def __init__(
        self, key: tuple[int, Tensor, int], first: int, memory: Tensor, distribution: str, stream: int,
        tile: int, most_chunks: int,
    ):  # fmt: skip
        count, samples, columns = memory.shape
        self.pairs, self.columns, self.device = count * samples, columns, memory.device
        self.distribution = resolve(distribution, columns)
        seed, ids, step = key
        ids = ids.to(torch.int64).contiguous()
        group = math.gcd(columns, 16 // memory.element_size())
        size = min(tile, max(triton.next_power_of_2(columns), 128))
        self.tiles = -(-columns // (size * most_chunks))
        self.chunks = -(-columns // (size * self.tiles))
        if self.pairs * self.chunks > MOST_PROGRAMS:
            raise ValueError(f"{self.pairs} probes of {columns} elements need more than {MOST_PROGRAMS} programs")
        rows = None
        if self.distribution == "hadamard":
            rows = hadamard_rows(seed, ids, step, first, count, columns, stream)
        order = hadamard_order(columns)
        self.arguments = (rows, ids, seed, step, stream, first, samples, columns // group, self.chunks, order)
        self.constants: dict[str, Any] = {
            "DISTRIBUTION": self.distribution, "DTYPE": tl.float64 if memory.dtype == torch.float64 else tl.float32,
            "VECTOR": group, "TILE": size, "TILES": self.tiles, "num_warps": max(size // ELEMENTS_PER_WARP, 1),
            "enable_fp_fusion": True,
        }  # fmt: skip

    def sums(self, products: Tensor | None) -> Tensor:
        """(z.products, z.z) of every chunk, (pairs, chunks, 2)."""
        sums = torch.empty((self.pairs, self.chunks, 2), dtype=torch.float64, device=self.device)
        grid = self.pairs * self.chunks
        probe_kernels.sum_probes[grid,](sums, products, *self.arguments, **self.constants)
        return sums

    def write(self, out: Tensor, sums: Tensor | None) -> None:
        chunks = triton.next_power_of_2(self.chunks)
        grid = self.pairs * self.chunks
        probe_kernels.write_probes[grid,](out, sums, *self.arguments, **self.constants, CHUNKS=chunks)

    def finish(self, out: Tensor, sums: Tensor) -> None:
        chunks = triton.next_power_of_2(self.chunks)
        constants = {"DISTRIBUTION": self.distribution, "CHUNKS": chunks, "num_warps": 1, "enable_fp_fusion": True}
        probe_kernels.finish_forms[self.pairs,](out, sums, self.columns, self.chunks, **constants)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_probes_triton(
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    dtype: torch.dtype,
    out: Tensor,
    tile: int = TILE,
    most_chunks: int = MOST_CHUNKS,
) -> None:
    """Write the probes into `out`, contiguous and not empty, on the caller's current stream."""
    with _on(out.device):
        work = _Work((seed, sample_ids, step), first, out, distribution, stream, tile, most_chunks)
        work.write(out, work.sums(None) if work.distribution == "sphere" else None)


def probe_forms_triton(
    products: Tensor,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    distribution: str,
    stream: int,
    out: Tensor,
    tile: int = TILE,
    most_chunks: int = MOST_CHUNKS,
) -> None:
    """Write the forms of not empty products into `out` (K, B), contiguous, on the caller's current stream.

    Products that begin off 16 bytes are copied: read narrower, they would be added up in another order.
    """
    products = products.contiguous()
    if products.data_ptr() % 16:
        products = products.clone()
    with _on(out.device):
        work = _Work((seed, sample_ids, step), first, products, distribution, stream, tile, most_chunks)
        work.finish(out, work.sums(products))
