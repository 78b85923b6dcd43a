"""Linear layers on duals on CPU: torch's GEMM over the whole stack, then bias and activation in one pass in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.ops.dual_chain_native import launch_cpu as launch_chain
from fastdensity.reference.dual_linear import epilogue


def launch_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    """Write act(x W^T + b) and its tangents to `out`, contiguous; the contract of `fastdensity.reference.dual_linear`.

    Halves of a geglu product go through memory of their own; everything else is done where the product lies.
    """
    columns = weight.shape[0]
    product = x.new_empty((*x.shape[:-1], columns)) if activation == "geglu" else out
    torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=product.view(-1, columns))
    if activation == "none":
        if bias is not None:
            out[0].add_(bias)  # the tangents of a sum with a constant are not touched
        return
    launch_chain(*epilogue(product, bias, activation), out)
