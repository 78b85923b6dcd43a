"""Scaled dot-product attention of duals in torch, with whole score matrices: what every kernel must compute.

P = softmax(c Q K^T + mask), tS = c (tQ K^T + Q tK^T), tP = P (tS - rowsum(P tS)), tO = tP V + P tV. It is written
out in matmul and softmax, since torch's fused attention has no forward mode and is asked for one when derivatives nest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.reference.dual_softmax import softmax_tangents


def _split(tensor: Tensor, is_dual: bool, dtype: torch.dtype, repeats: int = 1) -> tuple[Tensor, Tensor | None]:
    """(value, tangents or None) in the dtype of the arithmetic, each head repeated for the queries that share it."""
    tensor = tensor.to(dtype)
    if repeats != 1:
        tensor = tensor.repeat_interleave(repeats, dim=-3)
    return (tensor[0], tensor[1:]) if is_dual else (tensor, None)


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _probabilities(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax of (B, H, L, S) where attention is allowed; rows that may attend to nothing are zero, as in torch."""
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    # replaced before the softmax, too: derivatives of NaN would stay NaN
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


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
    """Attention of (B, H, L, E) to (B, Hk, S, E), (B, Hk, S, Ev); duals have 1 + K in front. To (1 + K, B, H, L, Ev).

    16-bit types are computed in float32 and rounded once.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    repeats = query.shape[-3] // max(key.shape[-3], 1)
    q, tq = _split(query, query_dual, dtype)
    k, tk = _split(key, key_dual, dtype, repeats)
    v, tv = _split(value, value_dual, dtype, repeats)
    p = _probabilities((q @ k.mT) * scale, mask, causal)
    tangents = None if tv is None else p @ tv
    score_tangents = _add(None if tq is None else tq @ k.mT, None if tk is None else q @ tk.mT)
    if score_tangents is not None:
        tangents = _add(softmax_tangents(p, score_tangents * scale) @ v, tangents)
    assert tangents is not None
    return torch.cat([(p @ v)[None], tangents]).to(query.dtype)


def launch_torch(
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
    """Write the result into `out`."""
    out.copy_(dual_attention(query, key, value, query_dual, key_dual, value_dual, mask, causal, scale))
