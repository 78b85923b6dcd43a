"""Dual attention on CPU: one kernel for narrow heads; else torch's matrix products, the dual softmax of C++ in between.

The products go over chunks of the scores. A chunk is a block of queries of one head, or a few whole heads where these
are small; its scores and their tangents stay in the cache. Queries that share a key head (grouped-query attention) are
one longer block of queries to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdensity._backend import DTYPE_NUMBERS, native

_native = native()
CHUNK_BYTES = 4 * 2**20  # scores and their tangents that are held at a time
CAUSAL_BLOCKS = 4  # that are taken together under a causal mask: they reach as far as the last of them
LEAST_ROWS = 128  # of a block, below which matrix products are slow
NARROW_COLUMNS = 64  # of a head at most, for the kernel that keeps queries in the lanes of vectors
LANES = 16


def _dense(tensor: Tensor, is_dual: bool, dtype: torch.dtype, heads: int, rows: int) -> list[Tensor]:
    """[value, tangents ...], each (heads, rows, columns) in the dtype of the arithmetic."""
    dense = tensor.to(dtype).reshape(tensor.shape[0] if is_dual else 1, heads, rows, tensor.shape[-1])
    return list(dense.contiguous().unbind(0))


def _dense_mask(mask: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The mask as bool or in the scores' dtype, seen as (B, H, L, S); what is expanded has stride 0, and no memory."""
    for dimension, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dimension] > 1:
            mask = mask.narrow(dimension, 0, 1)
    return (mask if mask.dtype == torch.bool else mask.to(dtype)).expand(shape)


def _chunks(heads: int, rows: int, row_bytes: int, together: int) -> Iterator[tuple[slice, slice, int]]:
    """(heads, rows of each, blocks these rows are cut into) that are computed at a time.

    A block's scores fill at most CHUNK_BYTES. Blocks of one head come `together` at a time, one to a thread: torch
    takes them as a batch, so what a thread writes it reads again itself, which counts where cores share no cache.
    How rows are cut depends neither on the number of heads nor on that of threads.
    """
    if 2 * rows * row_bytes <= CHUNK_BYTES:
        group = CHUNK_BYTES // (rows * row_bytes)
        for head in range(0, heads, group):
            yield slice(head, min(head + group, heads)), slice(0, rows), 1
        return
    most = max(CHUNK_BYTES // row_bytes, LEAST_ROWS)
    block = -(-rows // -(-rows // most))
    block = min(-(-block // 16) * 16, rows)
    whole = rows - rows % block
    for head in range(heads):
        for row in range(0, whole, together * block):
            end = min(row + together * block, whole)
            yield slice(head, head + 1), slice(row, end), (end - row) // block
        if whole < rows:
            yield slice(head, head + 1), slice(whole, rows), 1


def launch_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_dual: bool,
    key_dual: bool,
    value_dual: bool,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
) -> None:
    """Run on CPU memory, on torch's number of threads; the contract is that of `fastdensity.reference.dual_attention`.

    `out` (1 + K, B, H, L, Ev) is contiguous and not empty.
    """
    batch, heads, length = out.shape[1:4]
    key_heads, keys = key.shape[-3:-1]
    if keys == 0:
        out.zero_()
        return
    columns = max(query.shape[-1], value.shape[-1])
    if mask is None and not causal and _is_narrow(heads // key_heads * length, columns):
        _launch_narrow(query, key, value, query_dual, key_dual, value_dual, scale, out)
        return
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    groups, rows = batch * key_heads, heads // key_heads * length
    q = _dense(query, query_dual, dtype, groups, rows)
    k = _dense(key, key_dual, dtype, groups, keys)
    v = _dense(value, value_dual, dtype, groups, keys)
    result = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype)
    o = result.view(out.shape[0], groups, rows, out.shape[-1]).unbind(0)
    planes = out.shape[0] if query_dual or key_dual else 1
    where: tuple[Any, ...] = (heads, length, causal, (0, False, 0, 0, 0, 0))
    if mask is not None:
        mask = _dense_mask(mask, dtype, (batch, heads, length, keys))
        where = (heads, length, causal, (mask.data_ptr(), mask.dtype == torch.bool, *mask.stride()))

    itemsize, threads = result.element_size(), torch.get_num_threads()
    together = min(threads, CAUSAL_BLOCKS) if causal else threads
    scratch = torch.empty(0, dtype=dtype)
    for head, row, blocks in _chunks(groups, rows, planes * keys * itemsize, together):
        reach = _reach(row, length, keys) if causal else keys
        batch_size = (head.stop - head.start) * blocks
        shape = (planes, batch_size, (row.stop - row.start) // blocks, reach)
        size = planes * shape[1] * shape[2] * reach
        if scratch.numel() < size:
            scratch = torch.empty(size, dtype=dtype)
        scores = scratch[:size].view(shape)
        s = scores.unbind(0)
        queries, outputs = ([_blocks(x[head, row], shape[2]) for x in tensors] for tensors in (q, o))
        all_keys, all_values = ([x[head, :reach].expand(batch_size, -1, -1) for x in tensors] for tensors in (k, v))
        _scores(s, queries, all_keys, scale)
        first = head.start * rows + row.start
        sizes = (planes - 1, shape[1] * shape[2], reach, first)
        _native.dual_attention_cpu(scores.data_ptr(), DTYPE_NUMBERS[dtype], *sizes, *where, threads)
        _outputs(outputs, s, all_values)
    if result is not out:
        out.copy_(result)


def _is_narrow(rows: int, columns: int) -> bool:
    """Whether the kernel for narrow heads is the faster one; only a head's shape may decide (docs/performance.md).

    Its vectors hold 16 of the rows that share a key head, the last of them what is left. Up to 8 columns, torch's
    products are so slow that half a vector is enough.
    """
    if columns <= 8:
        return rows >= LANES // 2
    return columns <= NARROW_COLUMNS and 5 * rows >= 4 * LANES * -(-rows // LANES)


def _launch_narrow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_dual: bool,
    key_dual: bool,
    value_dual: bool,
    scale: float,
    out: Tensor,
) -> None:
    """All of a call without mask, in one kernel that takes any strides but those of columns."""
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    tensors = [x.to(dtype) for x in (query, key, value)]
    tensors = [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]
    result = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype)
    operands = (
        (x.data_ptr(), dual, *(x.stride() if dual else (0, *x.stride()))[:4])
        for x, dual in zip(tensors, (query_dual, key_dual, value_dual), strict=True)
    )
    planes, batch, heads, length, value_width = out.shape
    sizes = (planes - 1, batch, heads, key.shape[-3], length, key.shape[-2], key.shape[-1], value_width)
    _native.dual_narrow_attention_cpu(
        *operands, result.data_ptr(), DTYPE_NUMBERS[dtype], *sizes, scale, torch.get_num_threads()
    )
    if result is not out:
        out.copy_(result)


def _blocks(rows: Tensor, size: int) -> Tensor:
    """(heads, rows, columns) as (heads x blocks, size, columns), nothing copied: several blocks are of one head."""
    return rows.reshape(-1, size, rows.shape[-1]) if rows.shape[1] != size else rows


def _reach(row: slice, length: int, keys: int) -> int:
    """How many keys the block of rows sees under a causal mask: those up to its last query."""
    within_a_head = row.start // length == (row.stop - 1) // length
    return min(keys, (row.stop - 1) % length + 1) if within_a_head else min(keys, length)


def _scores(s: tuple[Tensor, ...], q: list[Tensor], k: list[Tensor], scale: float) -> None:
    """S = scale Q K^T and tS = scale (tQ K^T + Q tK^T) into `s`; beta = 0 reads nothing of what was there."""
    torch.baddbmm(s[0], q[0], k[0].mT, beta=0, alpha=scale, out=s[0])
    for i, target in enumerate(s[1:], 1):
        if len(q) > 1:
            torch.baddbmm(target, q[i], k[0].mT, beta=0, alpha=scale, out=target)
        if len(k) > 1:
            torch.baddbmm(target, q[0], k[i].mT, beta=int(len(q) > 1), alpha=scale, out=target)


def _outputs(o: list[Tensor], p: tuple[Tensor, ...], v: list[Tensor]) -> None:
    """O = P V and tO = tP V + P tV into `o`."""
    torch.bmm(p[0], v[0], out=o[0])
    for i, target in enumerate(o[1:], 1):
        if len(p) > 1:
            torch.bmm(p[i], v[0], out=target)
        if len(v) > 1:
            torch.baddbmm(target, p[0], v[i], beta=int(len(p) > 1), out=target)
