"""The ends of a trace on CPU: probes, or products to be met by probes, in a block of memory that stays in the cache.

The blocks are whole probes, or a power of two of rows of one: a row's product is then always computed among as many
others, if the number of rows is a power of two, as that of `fastdensity.traces.blocks` is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdensity.ops import dual_linear_native as linear
from fastdensity.ops.dual_chain_native import launch_cpu as launch_chain
from fastdensity.ops.probe_native import make_probes_cpu, probe_forms_cpu
from fastdensity.reference.dual_linear import epilogue

SCRATCH_BYTES = 1 << 20


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
    rows, outputs = x.shape[0], weight.shape[0]
    product = x.new_empty((1 + count, rows, outputs)) if activation == "geglu" else out
    if bias is not None and x.dtype.itemsize == 2:  # one rounding of the value, see dual_linear_native
        torch.addmm(bias, x, weight.t(), out=product[0])
        bias = None
    else:
        _multiply(x, weight, product[0])
    ids, moved = sample_ids.to(torch.int64).contiguous(), weight[:, :columns]
    scratch: Tensor | None = None
    for probes, part in _blocks(count, rows, columns * x.element_size()):
        size = (probes.stop - probes.start, part.stop - part.start, columns)
        if scratch is None:
            scratch = x.new_empty(size)  # the first block is the largest
        z = scratch.view(-1)[: size[0] * size[1] * columns].view(size)
        make_probes_cpu(
            seed, ids[part], step, first + probes.start, size[0], columns, distribution, stream, x.dtype, z
        )
        target = product[1 + probes.start : 1 + probes.stop, part]
        _multiply(z.view(-1, columns), moved, target.view(-1, outputs))
    if activation != "none":
        launch_chain(*epilogue(product, bias, activation), out)
    elif bias is not None:
        out[0].add_(bias)


def dual_linear_trace_cpu(
    tangents: Tensor,
    weight: Tensor,
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    distribution: str,
    stream: int,
    out: Tensor,
) -> None:
    """Write the forms into `out` (K, B), contiguous; the contract of `fastdensity.reference.trace_linear`."""
    count, rows, inputs = tangents.shape
    outputs = weight.shape[0]
    if outputs == 0:
        out.zero_()
        return
    ids, tangents = sample_ids.to(torch.int64).contiguous(), tangents.contiguous()
    scratch: Tensor | None = None
    for probes, part in _blocks(count, rows, outputs * tangents.element_size()):
        size = (probes.stop - probes.start, part.stop - part.start, outputs)
        if scratch is None:
            scratch = tangents.new_empty(size)
        product = scratch.view(-1)[: size[0] * size[1] * outputs].view(size)
        given = tangents[probes, part].view(-1, inputs)
        if linear._onednn_is_faster(given, weight):
            product = linear._onednn_linear(given, weight, None, "none", [], "").view(size)
        else:
            torch.mm(given, weight.t(), out=product.view(-1, outputs))
        where = (seed, ids[part], step, first + probes.start, distribution, stream)
        probe_forms_cpu(product, *where, out[probes, part])


def _multiply(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    if linear._onednn_is_faster(rows, weight):
        out.copy_(linear._onednn_linear(rows, weight, None, "none", [], ""))
    else:
        torch.mm(rows, weight.t(), out=out)


def _blocks(count: int, rows: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """(probes, rows) of each block, the largest first: as much as the scratch memory holds, one row at least."""
    held = max(1, SCRATCH_BYTES // row_bytes)
    if held >= rows:
        planes = -(-count // -(-count // (held // rows)))  # blocks of about the same size
        for k in range(0, count, planes):
            yield slice(k, min(k + planes, count)), slice(0, rows)
        return
    size = 1 << (held.bit_length() - 1)
    for k in range(count):
        for row in range(0, rows, size):
            yield slice(k, k + 1), slice(row, min(row + size, rows))
