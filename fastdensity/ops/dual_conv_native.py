"""The dual convolution on CPU: torch's convolution of the whole stack, then bias and activation in place.

torch's convolution is handed plain NCHW: at 64 to 320 channels of 16 x 16 and 32 x 32 pixels, with the conversion
there and back counted, channels-last was never ahead. A 1 x 1 convolution is a batched matrix product over the pixels,
which was as fast or faster everywhere (bfloat16: 1.1 to 1.5 times) and writes where it is told to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.ops.dual_chain_native import launch_cpu as launch_chain
from fastdensity.reference.dual_linear import epilogue


def _is_product(weight: Tensor, stride: list[int], padding: list[int], groups: int) -> bool:
    """Is every pixel of the result a matrix times the same pixel of x?"""
    return weight.shape[2:] == (1, 1) and list(stride) == [1, 1] and list(padding) == [0, 0] and groups == 1


def launch_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    out: Tensor,
) -> None:
    """Run on CPU memory, on torch's number of threads; the contract is that of `fastdensity.reference.dual_conv`.

    `out` may come back with the memory of torch's own result in place of its own: that saves a copy.
    """
    parts, batch, channels, height, width = out.shape
    images = x.contiguous().flatten(0, 1)
    if _is_product(weight, stride, padding, groups):
        matrix = weight.reshape(1, channels, -1).expand(parts * batch, -1, -1)
        torch.bmm(matrix, images.flatten(2), out=out.view(parts * batch, channels, height * width))
    else:
        found = torch.conv2d(images, weight.contiguous(), None, stride, padding, dilation, groups)
        if found.is_contiguous():
            out.set_(found.view(out.shape))  # type: ignore[call-overload]
        else:
            out.copy_(found.unflatten(0, (parts, batch)))
    if activation != "none":
        launch_chain(*epilogue(out, None if bias is None else bias[:, None, None], activation), out)
    elif bias is not None:
        out[0].add_(bias[:, None, None])  # the tangents of a sum with a constant are not touched
