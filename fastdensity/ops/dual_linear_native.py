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
    rows, results = x.reshape(product.numel() // columns, x.shape[-1]), product.view(-1, columns)
    if bias is not None and x.dtype.itemsize == 2:
        _product_of_halves(rows, weight, bias, results, rows.shape[0] // x.shape[0])
        bias = None
    else:
        torch.mm(rows, weight.t(), out=results)
    if activation != "none":
        launch_chain(*epilogue(product, bias, activation), out)
    elif bias is not None:
        out[0].add_(bias)  # the tangents of a sum with a constant are not touched


def _product_of_halves(rows: Tensor, weight: Tensor, bias: Tensor, out: Tensor, values: int) -> None:
    """Two products, the first with the bias, which is added before the one rounding: rounded without it, a value
    close to zero may change sign, and with that a tangent of relu comes or goes."""
    torch.addmm(bias, rows[:values], weight.t(), out=out[:values])
    torch.mm(rows[values:], weight.t(), out=out[values:])
