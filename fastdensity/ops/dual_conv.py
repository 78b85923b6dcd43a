"""The convolution of a dual: one convolution of 1 + K stacked images, with bias and activation behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.boundary import describe
from fastdensity.ops.dual_operator import define
from fastdensity.reference import dual_conv as reference


def _size(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    """Height and width of the result."""
    reach = [dilation[i] * (weight.shape[2 + i] - 1) for i in range(2)]
    return [(x.shape[3 + i] + 2 * padding[i] - reach[i] - 1) // stride[i] + 1 for i in range(2)]


def _empty_result(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    size = _size(x, weight, stride, padding, dilation)
    return torch.empty((*x.shape[:2], weight.shape[0], *size), dtype=x.dtype, device=x.device)


_run = define(
    "dual_conv",
    "Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, str activation",
    reference.dual_conv,
    _empty_result,
)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if x.dim() != 5 or x.shape[0] < 2:
        raise ValueError(f"x must be a dual (1 + K, B, C, H, W) with K >= 1, got {describe(x)}")
    channels = x.shape[2]
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(f"weight must be (O, C / groups, kh, kw) and not empty, got {describe(weight)}")
    if groups < 1 or channels != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide {channels} channels of x into {weight.shape[1]} each, and {weight.shape[0]} of the "
            f"result evenly, got {groups}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {describe(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} must have the dtype and device of x, {describe(x)}, got {describe(tensor)}")


def dual_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    """`act(conv2d(x) + bias)` and its tangents, `act'(...) conv2d(tangent)`.

    Args:
        x: (1 + K, B, C, H, W), the value and its K tangents.
        weight: (O, C / groups, kh, kw), plain.
        bias: (O,), plain, or None.
        stride: two ints, height first, as are `padding` (zeros on both sides) and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: the number of blocks of channels that are convolved separately.
        activation: "none", "relu" or "silu".

    Returns:
        (1 + K, B, O, H', W'), contiguous, in the dtype of x.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    _check_tensors(x, weight, bias, groups)
    for name, pair, lowest in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or pair[0] < lowest or pair[1] < lowest:
            raise ValueError(f"{name} must be two ints of at least {lowest}, height first, got {pair}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    size = _size(x, weight, stride, padding, dilation)
    if min(*size, *x.shape[3:]) < 1:
        reach = [dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in range(2)]
        raise ValueError(
            f"x must not be empty and at least {reach} high and wide with its padding {padding}, got {describe(x)}"
        )
    return _run(x, weight, bias, stride, padding, dilation, groups, activation)
