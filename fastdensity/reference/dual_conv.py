"""A dual 2-d convolution with an optional bias and activation: the torch reference.

    z = conv(x_0) + b,  y_0 = f(z),  y_k = f'(z) conv(x_k)

Weights and bias are plain: they carry no tangent. f is none, relu (f' = 1 where z > 0, else 0) or silu,
z s with s = 1 / (1 + exp(-z)) and f' = s (1 + z (1 - s)).
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "silu")


def dual_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    """(1 + K, B, C, H, W), (O, C / groups, kh, kw) and (O,) or None to (1 + K, B, O, H', W'), rounded once."""
    geometry = (stride, padding, dilation, groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    kernel = weight.to(wide)
    primal = torch.nn.functional.conv2d(x[0].to(wide), kernel, None if bias is None else bias.to(wide), *geometry)
    images = x[1:].to(wide).flatten(0, 1)
    tangents = torch.nn.functional.conv2d(images, kernel, None, *geometry).reshape(-1, *primal.shape)
    if activation == "silu":
        sigmoid = primal.sigmoid()
        tangents = tangents * (sigmoid * (1 + primal * (1 - sigmoid)))
        primal = primal * sigmoid
    elif activation == "relu":
        tangents = torch.where(primal <= 0, 0.0, tangents)
        primal = primal.relu()
    return torch.cat((primal.unsqueeze(0), tangents)).to(x.dtype)


def launch_torch(
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
    """The backend `torch`."""
    out.copy_(dual_conv(x, weight, bias, stride, padding, dilation, groups, activation))
