"""What the jvp benchmark runs on: models, their inputs, and the matrix products that none of them can avoid.

The floor of a case is its products alone, one GEMM over value and tangents for each linear layer and 2 + 4 K batched
products for an attention (4 + 8 K units of N^2 d operations), into memory that is there already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Variant

Function = Callable[..., Tensor]


@dataclass
class Target:
    """Against a floor: at most `ratio` times its time. Against the best rival: `ratio` times faster."""

    against: str  # "floor" or "best rival"
    ratio: float


@dataclass
class Case:
    """A function of primals (x, ...), differentiated by x along `count` directions."""

    name: str
    fn: Function
    primals: tuple[Tensor, ...]
    count: int
    module: nn.Module | None = None  # what fn calls; fn itself is rebuilt around a copy of it
    rebuild: Callable[[nn.Module], Function] = lambda module: module
    floors: dict[str, Variant] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    compiled: bool = True  # also against torch.compile
    slow_to_compile: bool = False  # for rivals: minutes
    exact_rows: int = 2  # how many samples are held against float64

    def vectors(self) -> Tensor:
        return torch.randn(self.count, *self.primals[0].shape)

    def double(self) -> tuple[Function, tuple[Tensor, ...]]:
        """The same function in float64, and the first samples."""
        fn = self.fn if self.module is None else self.rebuild(copy.deepcopy(self.module).double())
        return fn, tuple(_double(primal[: self.exact_rows]) for primal in self.primals)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def products(linears: list[tuple[int, int, int]], batched: list[tuple[int, int, int, int]]) -> Variant:
    """GEMMs [M, K] x [N, K]^T and batched ones [B, M, K] x [B, K, N], each with memory of its own."""
    calls: list[Variant] = []
    for rows, inner, columns in linears:
        operands = torch.randn(rows, inner), torch.randn(columns, inner).t()
        calls.append(partial(torch.mm, *operands, out=torch.empty(rows, columns)))
    for batch, rows, inner, columns in batched:
        operands = torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)
        calls.append(partial(torch.bmm, *operands, out=torch.empty(batch, rows, columns)))

    def run() -> None:
        for call in calls:
            call()

    return run


# -- MLP --------------------------------------------------------------------------------------------------------------
def mlp(count: int, width: int = 1_024, layers: int = 4, batch: int = 256) -> Case:
    """`layers` linear layers of `width`, SiLU between them."""
    parts: list[nn.Module] = []
    for layer in range(layers):
        parts += [nn.Linear(width, width)] + [nn.SiLU()] * (layer < layers - 1)
    model = nn.Sequential(*parts)
    floor = products([((1 + count) * batch, width, width)] * layers, [])
    targets = (Target("floor", 1.05),)
    name = f"MLP {layers} x {width:,}, B={batch}"
    return Case(name, model, (torch.randn(batch, width),), count, model, floors={"floor": floor}, targets=targets)


# -- DiT block --------------------------------------------------------------------------------------------------------
class DiTBlock(nn.Module):
    """Attention and MLP on tokens, each between a modulated norm and a gate (adaLN, Peebles and Xie 2023)."""

    def __init__(self, width: int, heads: int, ratio: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.widen = nn.Linear(width, ratio * width)
        self.narrow = nn.Linear(ratio * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, C) tokens and their conditioning vectors (B, C)."""
        factors = self.modulation(functional.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = factors
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.narrow(functional.gelu(self.widen(h), approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))


def dit_block(count: int, width: int = 384, heads: int = 6, tokens: int = 256, batch: int = 8) -> Case:
    model = DiTBlock(width, heads)
    rows, size = (1 + count) * batch * tokens, width // heads
    linears = [(rows, width, 3 * width), (rows, width, width), (rows, width, 4 * width), (rows, 4 * width, width)]
    batched = attention_products(count, batch * heads, tokens, size)
    floor = products([*linears, (batch, width, 6 * width)], batched)
    primals = (torch.randn(batch, tokens, width), torch.randn(batch, width))
    targets = (Target("best rival", 1.8 if count == 1 else 1.6), Target("floor", 1.25))
    name = f"DiT block {width} wide, {heads} heads, N={tokens}, B={batch}"
    return Case(name, model, primals, count, model, floors={"floor": floor}, targets=targets)


def attention_products(count: int, heads: int, tokens: int, size: int) -> list[tuple[int, int, int, int]]:
    """Scores S = Q K^T and S V, and for each tangent the two terms of both."""
    pair = [(heads, tokens, size, tokens), (heads, tokens, tokens, size)]
    return pair * (1 + 2 * count)


# -- networks of diffusers --------------------------------------------------------------------------------------------
def has_diffusers() -> bool:
    return find_spec("diffusers") is not None


def unet(size: int = 32, channels: tuple[int, int, int] = (64, 128, 128), batch: int = 4) -> Case:
    """UNet2DModel with attention on its two inner levels, small random weights."""
    from diffusers import UNet2DModel

    down = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up = ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    network: Any = UNet2DModel  # its type comes without nn.Module's methods
    model = network(
        sample_size=size, block_out_channels=channels, down_block_types=down, up_block_types=up, norm_num_groups=16
    ).eval()
    primals = (torch.randn(batch, 3, size, size), torch.full((batch,), 500.0))
    name = f"UNet2DModel {size} x {size}, channels {channels}, B={batch}"
    targets = (Target("best rival", 1.5),)
    return Case(name, _sample_of(model), primals, 1, model, _sample_of, targets=targets, slow_to_compile=True)


def _sample_of(module: nn.Module) -> Function:
    """The network's tensor, without the class around it."""
    return lambda *arguments: module(*arguments, return_dict=False)[0]


def deep_dit(blocks: int = 28, heads: int = 4, size: int = 16, batch: int = 2) -> Case:
    """DiT-XL/2 in depth, so narrow that Python takes the time."""
    from diffusers import DiTTransformer2DModel

    network: Any = DiTTransformer2DModel
    model = network(
        num_attention_heads=heads, attention_head_dim=size, num_layers=blocks, out_channels=8, sample_size=32
    ).eval()
    primals = (torch.randn(batch, 4, 32, 32), torch.full((batch,), 500), torch.arange(batch))
    return Case(f"DiTTransformer2DModel, {blocks} blocks", _sample_of(model), primals, 1, model, _sample_of)


# -- attention --------------------------------------------------------------------------------------------------------
def attention(tokens: int, batch: int = 8, heads: int = 1, size: int = 64) -> Case:
    """softmax(Q K^T / sqrt(d)) V of one tensor (B, 3, H, N, d) that holds Q, K and V."""
    primals = (torch.randn(batch, 3, heads, tokens, size),)
    floor = products([], attention_products(1, batch * heads, tokens, size))
    name = f"attention, B H={batch * heads}, d={size}, N={tokens:,}"
    targets = (Target("best rival", 2.0),)
    return Case(
        name, packed_attention, primals, 1, floors={"floor": floor}, targets=targets, compiled=False, exact_rows=1
    )


def packed_attention(x: Tensor) -> Tensor:
    query, key, value = x.unbind(1)
    return functional.scaled_dot_product_attention(query, key, value)
