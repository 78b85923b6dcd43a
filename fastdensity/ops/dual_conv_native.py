"""The dual convolution on CPU: one convolution of the whole stack, then bias and activation.

Small images go to kernels that hold one in each lane of a vector: csrc/dual_conv_simd.cpp, and for 3 x 3 windows on
even sizes csrc/dual_winograd_simd.cpp. The others go to torch's convolution, which is handed plain NCHW: at 64 to 320
channels of 16 x 16 and 32 x 32 pixels, with the conversion there and back counted, channels-last was never ahead. A
1 x 1 convolution is a batched matrix product over the pixels, which was as fast or faster everywhere (bfloat16: 1.1 to
1.5 times) and writes where it is told to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity._backend import DTYPE_NUMBERS, native
from fastdensity.ops.dual_chain_native import launch_cpu as launch_chain
from fastdensity.reference.dual_linear import epilogue

_native = native()
LANES = 16  # images that are taken together
SMALL_PRODUCTS = 1 << 19  # multiply-adds of one image
LANES_BYTES = 1 << 19  # of the images in lanes, which are read once for each few channels of the result


def _is_product(weight: Tensor, stride: list[int], padding: list[int], groups: int) -> bool:
    """Is every pixel of the result a matrix times the same pixel of x?"""
    return weight.shape[2:] == (1, 1) and list(stride) == [1, 1] and list(padding) == [0, 0] and groups == 1


def _are_small(x: Tensor, weight: Tensor, padding: list[int], groups: int, out: Tensor) -> bool:
    """Whether the kernel for small images is the faster one (docs/performance.md).

    Only an image's shape may decide: its bits shall not depend on how many there are.
    """
    if groups != 1 or x.dtype not in (torch.float32, torch.float64):
        return False
    height, width = x.shape[3:]
    products = weight.numel() * out.shape[3] * out.shape[4]
    lanes_bytes = x.shape[2] * height * (width + 2 * padding[1]) * LANES * x.element_size()
    return products <= SMALL_PRODUCTS and lanes_bytes <= LANES_BYTES


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
    if _is_product(weight, stride, padding, groups):
        _multiply(x, weight, out)
    elif _are_small(x, weight, padding, groups, out):
        _launch_small(x, weight, bias if activation == "none" else None, stride, padding, dilation, out)
        bias = bias if activation != "none" else None  # which the chain adds
    else:
        _convolve(x, weight, stride, padding, dilation, groups, out)
    if activation != "none":
        launch_chain(*epilogue(out, None if bias is None else bias[:, None, None], activation), out)
    elif bias is not None:
        out[0].add_(bias[:, None, None])  # the tangents of a sum with a constant are not touched


def _launch_small(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Tensor,
) -> None:
    """All but the activation."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    parts, batch, outputs, *out_size = out.shape
    _native.dual_conv_cpu(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        DTYPE_NUMBERS[x.dtype],
        parts * batch,
        batch,
        x.shape[2],
        outputs,
        x.shape[3:],
        out_size,
        weight.shape[2:],
        stride,
        padding,
        dilation,
        torch.get_num_threads(),
    )


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    parts, batch, channels, height, width = out.shape
    images = x.contiguous().flatten(0, 1)
    matrix = weight.reshape(1, channels, -1).expand(parts * batch, -1, -1)
    torch.bmm(matrix, images.flatten(2), out=out.view(parts * batch, channels, height * width))


def _convolve(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int, out: Tensor
) -> None:
    images = x.contiguous().flatten(0, 1)
    found = torch.conv2d(images, weight.contiguous(), None, stride, padding, dilation, groups)
    if found.is_contiguous():
        out.set_(found.view(out.shape))  # type: ignore[call-overload]
    else:
        out.copy_(found.unflatten(0, out.shape[:2]))
