"""The ends of a trace on CPU: probes, or the products that they meet, in a block of memory that stays in the cache.

4 MiB: smaller blocks have torch's product pack the weight more often, which costs more than the cache gives.

What fits there as a whole is one product like any other. Otherwise a block is some whole probes, or a power of two of
the rows of one: a row's product is then always computed among as many others if the number of rows is a power of two,
as that of `fastdensity.traces.blocks` is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdensity.ops.dual_chain_native import launch_cpu as launch_chain
from fastdensity.ops.dual_linear_native import launch_cpu as launch_linear
from fastdensity.ops.dual_linear_native import multiply
from fastdensity.ops.probe_native import make_probes_cpu, probe_forms_cpu
from fastdensity.reference.dual_linear import epilogue

SCRATCH_BYTES = 1 << 22


class Block(NamedTuple):
    """Some rows of some probes."""

    probes: slice
    rows: slice


def dual_linear_probe_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    out: Tensor,
) -> None:
    """Write the stack into `out`, contiguous; the contract of `fastdensity.reference.trace_linear`."""
    rows, inputs = x.shape
    ids = sample_ids.to(torch.int64).contiguous()

    def probes(block: Block, z: Tensor) -> Tensor:
        where = (seed, ids[block.rows], step, first + block.probes.start, len(z), columns)
        make_probes_cpu(*where, distribution, stream, x.dtype, z)
        return z

    whole = Block(slice(0, count), slice(0, rows))
    if (1 + count) * rows * inputs * x.element_size() <= SCRATCH_BYTES:
        stacked = x.new_zeros((1 + count, rows, inputs)) if columns < inputs else x.new_empty((1 + count, rows, inputs))
        stacked[0] = x
        if columns < inputs:
            stacked[1:, :, :columns] = probes(whole, x.new_empty((count, rows, columns)))
        else:
            probes(whole, stacked[1:])
        launch_linear(stacked, weight, bias, activation, out)
        return
    product = x.new_empty((1 + count, rows, weight.shape[0])) if activation == "geglu" else out
    bias = _value(x, weight, bias, product[0])
    for block, z in _blocks(x, count, rows, columns):
        target = product[1:][block.probes, block.rows].view(-1, weight.shape[0])
        multiply(probes(block, z).view(-1, columns), weight[:, :columns], target)
    if activation != "none":
        launch_chain(*epilogue(product, bias, activation), out)
    elif bias is not None:
        out[0].add_(bias)


def dual_linear_trace_cpu(
    stacked: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    distribution: str,
    stream: int,
    value: Tensor,
    forms: Tensor,
) -> None:
    """Write value (B, N) and forms (K, B), contiguous; the contract of `fastdensity.reference.trace_linear`."""
    planes, rows, inputs = stacked.shape
    outputs, ids = weight.shape[0], sample_ids.to(torch.int64).contiguous()

    def reduce(products: Tensor, block: Block) -> None:
        where = (seed, ids[block.rows], step, first + block.probes.start, distribution, stream)
        probe_forms_cpu(products, *where, forms[block.probes, block.rows])

    if planes * rows * outputs * stacked.element_size() <= SCRATCH_BYTES:
        product = stacked.new_empty((planes, rows, outputs))
        launch_linear(stacked, weight, bias, "none", product)
        value.copy_(product[0])
        reduce(product[1:], Block(slice(0, planes - 1), slice(0, rows)))
        return
    bias = _value(stacked[0], weight, bias, value)
    if bias is not None:
        value.add_(bias)
    tangents = stacked[1:].contiguous()
    for block, product in _blocks(stacked, planes - 1, rows, outputs):
        given = tangents[block.probes, block.rows].view(-1, inputs)
        multiply(given, weight, product.view(-1, outputs))
        reduce(product, block)


def _value(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor | None:
    """The product of the value, and what is left of the bias: 16-bit numbers round their sum with it once."""
    if bias is not None and x.dtype.itemsize == 2:
        torch.addmm(bias, x, weight.t(), out=out)
        return None
    multiply(x, weight, out)
    return bias


def _blocks(like: Tensor, count: int, rows: int, columns: int) -> Iterator[tuple[Block, Tensor]]:
    """Blocks that fit the scratch memory, one row at least, each with its part of it (probes, rows, columns)."""
    held = max(1, SCRATCH_BYTES // (columns * like.element_size()))
    if held >= rows:
        planes = -(-count // -(-count // (held // rows)))  # of about the same size
        found = [Block(slice(k, min(k + planes, count)), slice(0, rows)) for k in range(0, count, planes)]
    else:
        size = 1 << (held.bit_length() - 1)
        starts = range(0, rows, size)
        found = [Block(slice(k, k + 1), slice(r, min(r + size, rows))) for k in range(count) for r in starts]
    shapes = [(len(range(count)[block.probes]), len(range(rows)[block.rows]), columns) for block in found]
    memory = like.new_empty(math.prod(shapes[0]))  # the first is the largest
    for block, shape in zip(found, shapes, strict=True):
        yield block, memory[: math.prod(shape)].view(shape)
