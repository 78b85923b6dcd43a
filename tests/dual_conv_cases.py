"""Dual convolutions for the tests of every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "silu")


@dataclass(frozen=True)
class Geometry:
    """Everything but the numbers; sizes differ from each other so that mixing two of them up shows."""

    channels: int = 6
    outputs: int = 5
    window: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int] = (7, 6)

    def __str__(self) -> str:
        window, stride, padding, dilation = (
            "x".join(map(str, pair)) for pair in (self.window, self.stride, self.padding, self.dilation)
        )
        return f"{self.channels}to{self.outputs}-k{window}-s{stride}-p{padding}-d{dilation}-g{self.groups}"


GEOMETRIES = (
    Geometry(),
    Geometry(window=(1, 1), padding=(0, 0)),
    Geometry(window=(1, 1), padding=(0, 0), stride=(2, 1)),
    Geometry(window=(1, 1), padding=(1, 0)),
    Geometry(window=(1, 1), padding=(0, 0), channels=4, outputs=6, groups=2),
    Geometry(window=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    Geometry(window=(3, 1), stride=(3, 2), padding=(2, 0), dilation=(2, 1), channels=4, outputs=6, groups=2),
    Geometry(channels=6, outputs=6, groups=6),
    Geometry(channels=4, outputs=8, groups=4, stride=(2, 2)),
    Geometry(window=(7, 6), padding=(0, 0)),
    Geometry(5, 7, window=(5, 3), padding=(2, 1), size=(3, 8)),  # strips of eight pixels, borders of two rows
    Geometry(3, 8, padding=(1, 1), size=(5, 4)),  # strips of four that fill a row
    Geometry(9, 13, size=(8, 8)),  # Winograd's tiles, outputs that are no multiple of those taken together
    Geometry(8, 10, padding=(0, 2), size=(8, 10)),  # tiles that are no multiple of four
)


def random_arguments(
    geometry: Geometry,
    dtype: torch.dtype = torch.float32,
    tangents: int = 2,
    batch: int = 2,
    bias: bool = True,
    activation: str = "silu",
) -> tuple[Any, ...]:
    """The arguments of `dual_conv2d`."""
    g = geometry
    x = torch.randn(1 + tangents, batch, g.channels, *g.size, dtype=dtype)
    weight = torch.randn(g.outputs, g.channels // g.groups, *g.window, dtype=dtype)
    offset = torch.randn(g.outputs, dtype=dtype) if bias else None
    return (x, weight, offset, list(g.stride), list(g.padding), list(g.dilation), g.groups, activation)


def plain(x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """The layer itself, in torch's words."""
    _, weight, bias, *geometry, activation = arguments
    result = torch.nn.functional.conv2d(x, weight, bias, *geometry)
    return {"none": lambda z: z, "relu": torch.relu, "silu": torch.nn.functional.silu}[activation](result)


def by_torch(arguments: tuple[Any, ...]) -> Tensor:
    """The dual by torch.func: one jvp per tangent."""
    x = arguments[0]
    pairs = [torch.func.jvp(lambda p: plain(p, arguments), (x[0],), (tangent,)) for tangent in x[1:]]
    return torch.stack([pairs[0][0], *(tangent for _, tangent in pairs)])


def to_double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)


def assert_as_good_as_eager(arguments: tuple[Any, ...], out: Tensor) -> None:
    """No further from float64's result than twice what torch at this dtype is, part by part; plus a rounding.

    A relu whose argument is zero to within rounding may fall either way; such elements are left out.
    """
    exact, eager = by_torch(to_double(arguments)), by_torch(arguments)
    assert out.shape == exact.shape
    assert out.dtype == arguments[0].dtype
    assert out.is_contiguous()
    assert out.isfinite().all()
    eps = torch.finfo(out.dtype).eps
    before = plain(arguments[0][0].double(), (*to_double(arguments)[:-1], "none"))
    sure = before.abs() > 8 * eps * before.abs().max() if arguments[-1] == "relu" else torch.ones_like(before).bool()
    assert sure.any()
    roundings = 16 if out.dtype == torch.float64 else 0.5  # torch in float64 is no measure of itself
    for got, torchs, true in zip(out.double(), eager.double(), exact, strict=True):
        allowed = 2 * (torchs - true)[sure].norm() + roundings * eps * true[sure].norm()
        assert (got - true)[sure].norm() <= allowed
