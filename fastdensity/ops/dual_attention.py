"""Scaled dot-product attention whose query, key and value may carry tangents."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.boundary import describe
from fastdensity.ops.dual_operator import define
from fastdensity.reference import dual_attention as reference


def _empty_result(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_dual: bool,
    key_dual: bool,
    value_dual: bool,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    planes = (query if query_dual else key if key_dual else value).shape[0]
    return query.new_empty((planes, *query.shape[-4:-1], value.shape[-1]))


_run = define(
    "dual_attention",
    "Tensor query, Tensor key, Tensor value, bool query_dual, bool key_dual, bool value_dual, "
    "Tensor? mask, bool causal, float scale",
    reference.dual_attention,
    _empty_result,
)


def dual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_dual: bool,
    key_dual: bool,
    value_dual: bool,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """O = softmax(scale Q K^T + mask) V and its tangents tO = tP V + P tV, without ever holding all scores.

    The tangents are those of the softmax's argument, tS = scale (tQ K^T + Q tK^T), pushed through
    tP = P (tS - rowsum(P tS)). What is plain has no tangent, and the product with it is never formed.

    Args:
        query: (B, H, L, E), or (1 + K, B, H, L, E) where query_dual.
        key: (B, Hk, S, E), or with 1 + K in front where key_dual. Hk divides H; head h attends to h // (H // Hk).
        value: (B, Hk, S, Ev), or with 1 + K in front where value_dual.
        query_dual: whether the query carries tangents; at least one of the three must.
        key_dual: whether the key does.
        value_dual: whether the value does.
        mask: None, bool (True: attend) or floating (added to the scores), broadcastable to (B, H, L, S).
        causal: query l attends to keys 0 .. l only, besides what the mask says.
        scale: what scores are multiplied by before the mask.

    Returns:
        A dual (1 + K, B, H, L, Ev), contiguous, of the query's dtype. Queries that may attend to nothing get zeros.

    Raises:
        ValueError: nothing is dual, or shapes or dtypes do not fit together.
    """
    _check(query, key, value, query_dual, key_dual, value_dual)
    if mask is not None:
        _check_mask(mask, (*query.shape[-4:-1], key.shape[-2]))
    return _run(query, key, value, query_dual, key_dual, value_dual, mask, causal, scale)


def _check(query: Tensor, key: Tensor, value: Tensor, query_dual: bool, key_dual: bool, value_dual: bool) -> None:
    planes: int | None = None
    for name, tensor, is_dual in (("query", query, query_dual), ("key", key, key_dual), ("value", value, value_dual)):
        wanted = "(1 + K, B, H, L, E)" if is_dual else "(B, H, L, E)"
        if tensor.dim() != 4 + is_dual:
            raise ValueError(f"{name} must be {wanted}, got {describe(tensor)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the query's dtype, {query.dtype}, got {describe(tensor)}")
        if is_dual and planes is not None and tensor.shape[0] != planes:
            raise ValueError(f"{name} must have {planes - 1} tangents like the others, got {describe(tensor)}")
        planes = tensor.shape[0] if is_dual else planes
    if planes is None:
        raise ValueError("one of query_dual, key_dual and value_dual must be true, got none")
    batch, heads, _, width = query.shape[-4:]
    key_batch, key_heads, keys, key_width = key.shape[-4:]
    if key_batch != batch or key_width != width:
        raise ValueError(f"key must be ({batch}, Hk, S, {width}) to fit the query, got {describe(key)}")
    if heads != 0 and (key_heads == 0 or heads % key_heads != 0):
        raise ValueError(f"key must have a number of heads that divides the query's {heads}, got {describe(key)}")
    if value.shape[-4:-1] != key.shape[-4:-1]:
        raise ValueError(f"value must be ({batch}, {key_heads}, {keys}, Ev) to fit the key, got {describe(value)}")


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask must be bool or floating, got {describe(mask)}")
    sizes = tuple(mask.shape)
    fits = len(sizes) <= 4 and all(have in (1, want) for have, want in zip(sizes[::-1], shape[::-1], strict=False))
    if not fits:
        raise ValueError(f"mask must be broadcastable to (B, H, L, S) = {tuple(shape)}, got {describe(mask)}")
