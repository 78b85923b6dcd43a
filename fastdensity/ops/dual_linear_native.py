"""Linear layers on duals on CPU: torch's GEMM over the whole stack, then bias and activation in one pass in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdensity.ops.dual_chain_native import launch_cpu as launch_chain
from fastdensity.reference.dual_linear import epilogue

_onednn_linear: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
_FEW_ROWS = 256
_FRESH_BYTES = 1 << 25


def launch_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    """Write act(x W^T + b) and its tangents to `out`, contiguous; the contract of `fastdensity.reference.dual_linear`.

    Halves of a geglu product go through memory of their own; everything else is done where the product lies.
    """
    columns = weight.shape[0]
    sizes = (*x.shape[:-1], columns)
    rows = x.reshape(math.prod(sizes[:-1]), x.shape[-1])
    if _onednn_is_faster(rows, weight):
        product = _onednn_linear(rows, weight, None, "none", [], "").view(sizes)
        if activation != "geglu":
            product = out.set_(product)  # the memory that came with the product is as new as the one of `out`
    else:
        product = x.new_empty(sizes) if activation == "geglu" else out
        if bias is not None and x.dtype.itemsize == 2:
            _product_of_halves(rows, weight, bias, product.view(-1, columns), rows.shape[0] // x.shape[0])
            bias = None
        else:
            torch.mm(rows, weight.t(), out=product.view(-1, columns))
    if activation != "none":
        launch_chain(*epilogue(product, bias, activation), out)
    elif bias is not None:
        out[0].add_(bias)  # the tangents of a sum with a constant are not touched


def multiply(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """rows W^T of matrices into `out`, by the faster library."""
    if _onednn_is_faster(rows, weight):
        out.copy_(_onednn_linear(rows, weight, None, "none", [], ""))
    else:
        torch.mm(rows, weight.t(), out=out)


def _onednn_is_faster(rows: Tensor, weight: Tensor) -> bool:
    """torch.mm is MKL's product, where this is 1.1 to 1.2 times faster in float32 (docs/performance.md).

    It allocates its result; above 32 MiB that is new pages from the system at every call, and slower.
    """
    return (
        _onednn_linear is not None
        and rows.dtype is torch.float32
        and rows.shape[0] >= _FEW_ROWS
        and rows.shape[0] * weight.shape[0] * 4 <= _FRESH_BYTES
        and rows.is_contiguous()
        and weight.is_contiguous()
        and torch._C._get_mkldnn_enabled()
    )


def _product_of_halves(rows: Tensor, weight: Tensor, bias: Tensor, out: Tensor, values: int) -> None:
    """Two products, the first with the bias, which is added before the one rounding: rounded without it, a value
    close to zero may change sign, and with that a tangent of relu comes or goes."""
    torch.addmm(bias, rows[:values], weight.t(), out=out[:values])
    torch.mm(rows[values:], weight.t(), out=out[values:])
