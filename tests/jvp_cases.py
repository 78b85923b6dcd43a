"""Functions of one float64 tensor x (2, 4, 6, 6), together calling every operator that has a dual rule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPE = (2, 4, 6, 6)
_made = torch.Generator().manual_seed(7)


def _plain(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_made, dtype=torch.float64)


CHANNELS, OTHER, SQUARE = _plain(4), _plain(4), _plain(6, 6)
KERNEL, KERNEL_1D, KERNEL_3D = _plain(8, 4, 3, 3), _plain(8, 24, 3), _plain(3, 4, 1, 3, 3)
GROUPED, BACK = _plain(4, 1, 3, 3), _plain(4, 2, 3, 3)
WIDE, BIAS = _plain(10, 6), _plain(10)
MASK = SQUARE > 0
ROWS = torch.tensor([1, 0, 1])

# name: (function, the treatment expected of its last node; None where several nodes matter)
SHAPES = {
    "view": lambda x: x.contiguous().view(2, -1).sin().view(2, 4, 36),
    "reshape": lambda x: x.mT.reshape(8, -1),
    "flatten": lambda x: x.flatten(1, 2).flatten(),
    "permute": lambda x: x.permute(3, -4, 1, 2).clone(),
    "as_strided": lambda x: x.contiguous().as_strided((2, 4, 6, 3), (144, 36, 6, 2), 1),
    "transpose": lambda x: x.transpose(-1, 1).movedim(0, 2).swapaxes(0, 1).swapdims(1, 2),
    "turn": lambda x: x[0, 0].t() + x[1, 1].T + x[0, 1].mT,
    "unsqueeze": lambda x: x.unsqueeze(-1).unsqueeze(0).squeeze(-1).squeeze((0,)),
    "squeeze": lambda x: x[:, :1, None].squeeze(),
    "select": lambda x: x.select(1, 2) * x[:, 0, -1, :, None],
    "slice": lambda x: x[:, 1:3, ::2, -4:],
    "unbind": lambda x: x.unbind(1)[0] * x.unbind(-1)[1][:, :, None].mean(1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)).unflatten(-1, (3, 2)),
    "roll": lambda x: x.roll((1, 2), (-1, 2)) + x.roll(1, 1),
    "flip": lambda x: x.flip((1, -1)).cumsum(-1) + x.cumsum(1),
    "index_select": lambda x: x.index_select(1, ROWS),
    "split": lambda x: torch.cat(x.split(3, -1)[::-1], -1) + torch.cat(x.split([1, 3], 1), 1),
    "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1] + x.narrow(1, 1, 2),
    "pieces": lambda x: x.tensor_split(2, 1)[0] + torch.unsafe_chunk(x, 2, 1)[1] + torch.unsafe_split(x, 2, 1)[0],
    "diagonal": lambda x: x.diagonal() .sum(-1) + x.diagonal(1, 2, 3).sum((0, 1))[:, None].sum(),
    "expand": lambda x: x[:, :1].expand(2, 4, 6, 6) * x + x[0].expand(2, -1, -1, -1),
    "broadcast_to": lambda x: x[0].broadcast_to(2, 4, 6, 6) + x[0, 0].broadcast_to(3, 6, 6).sum(0),
    "repeat": lambda x: x.repeat(2, 1, 1, 1, 2).tile(2).sum(0),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1).sum(1) + x.repeat_interleave(3).sum(),
    "cat": lambda x: torch.cat([x, SQUARE.expand(2, 1, 6, 6), x.sin()], 1),
    "concat": lambda x: torch.concat([x, x * 2], -1),
    "stack": lambda x: torch.stack([x, x.cos()], -1).sum(-1),
    "index": lambda x: x[ROWS, 1:] * x[:1, 1:] + x[:, ROWS][:, :, ROWS].sum(1, keepdim=True)[:1, :, :1],
    "index_two": lambda x: x[:, ROWS, ROWS],
    "index_gap": lambda x: x[ROWS, :, ROWS],
    "to": lambda x: x.to(torch.float32).to(torch.float64).type_as(x) * x.to(x.device).to(SQUARE),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2) .sum() + F.pixel_unshuffle(x, 2).square().sum(1),
    "triangles": lambda x: x.tril() * x.triu(-1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_by_number": lambda x: F.pad(x, (1, 1), value=2.0).square(),
    "pad_reflect": lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect")[..., 1:, 1:]
    + F.pad(x, (1, 1, 0, 0), mode="replicate")[..., :6, 1:] .sum(),
    "upsample": lambda x: F.interpolate(x, scale_factor=2.0) * F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "upsample_more": lambda x: F.interpolate(x, size=(9, 7), mode="bicubic")
    + F.interpolate(x, size=(9, 7), mode="nearest-exact")
    + F.interpolate(x, size=(9, 7), mode="bilinear", antialias=True),
    "upsample_1d_3d": lambda x: F.interpolate(x[:, 0], scale_factor=2.0).sum()
    + F.interpolate(x[:, :, None], scale_factor=2.0, mode="trilinear").square().sum()
    + F.interpolate(x[:, :, None], scale_factor=2.0).square(),
    "pool": lambda x: F.avg_pool2d(x, 2) * F.adaptive_avg_pool2d(x, 3) + F.avg_pool2d(x, 3, 2, 1),
    "pool_1d_3d": lambda x: F.avg_pool1d(x[:, 0], 2).sum() + F.avg_pool3d(x[:, :, None], (1, 2, 2)),
    "pool_adaptive_1d": lambda x: F.adaptive_avg_pool1d(x[:, 0], 3),
    "unfold": lambda x: x.unfold(-1, 3, 2).sum(-1) .sum() + F.unfold(x, 3),
    "in_place": lambda x: _in_place(x),
    "fill_diagonal": lambda x: (x[0, 0] @ x[1, 1]).fill_diagonal_(2.0) * x[0],
    "scatter": lambda x: torch.select_scatter(x, x[:, 0].sin(), 1, 2)
    * torch.slice_scatter(x, SQUARE[None, None].expand(2, 2, 6, 6), 1, 1, 3),
}  # fmt: skip

LINEAR = {
    "sum": lambda x: x.sum() * x + x.sum((1, -1), keepdim=True) + x.sum(-1)[..., None],
    "mean": lambda x: x.mean() * x + x.mean((1, 2), True) + x.mean(-1, keepdim=True),
    "matmul_plain": lambda x: x @ SQUARE + SQUARE @ x,
    "matmul_dual": lambda x: x @ x.mT.sin(),
    "matmul_ranks": lambda x: x[0, 0] @ x + x @ x[0, 1],
    "bmm": lambda x: torch.bmm(x[:, 0], x[:, 1]) + torch.bmm(x[0], SQUARE.expand(4, 6, 6)).sum(0),
    "mm": lambda x: torch.mm(x[0, 0], x[1, 1]) + torch.mm(SQUARE, x[0, 0]),
    "addmm": lambda x: torch.addmm(SQUARE[0], x[0, 0], SQUARE) + torch.addmm(x[0, 0], x[1, 0], SQUARE, beta=2),
    "baddbmm": lambda x: torch.baddbmm(SQUARE.expand(4, 6, 6), x[0], SQUARE.expand(4, 6, 6)),
    "einsum": lambda x: torch.einsum("bchw,hk->bcwk", x, SQUARE) + torch.einsum("bchw,bcwk->bchk", x, x.cos()).mT,
    "where": lambda x: torch.where(MASK, x, 2 * x.sin()) + torch.where(x > 0, x, SQUARE),
    "where_number": lambda x: torch.where(MASK, x, 0.5),
    "masked_fill": lambda x: x.masked_fill(MASK, 3.0).square(),
    "conv1d": lambda x: F.conv1d(x.reshape(2, 24, 6), KERNEL_1D, CHANNELS.repeat(2), padding=1),
    "conv3d": lambda x: F.conv3d(x[:, :, None], KERNEL_3D, padding=(0, 1, 1)),
    "conv_same": lambda x: (
        F.conv2d(x, KERNEL, padding="same") + F.conv1d(x[:, 0], KERNEL_1D[:, :6], padding="same").sum()
    ),
    "conv_transpose": lambda x: F.conv_transpose2d(x, BACK, OTHER[:2], stride=2, padding=1),
    "conv_transpose_1d_3d": lambda x: (
        F.conv_transpose1d(x[:, :, 0], BACK[..., 0]).sum() + F.conv_transpose3d(x[:, :, None], BACK[:, :, None])
    ),
    "max": lambda x: x.max(-1)[0] * x.min(1, keepdim=True)[0][:, :, 0],
    "sort": lambda x: x.sort(1, descending=True)[0] * torch.sort(x, stable=True, dim=2)[0] + x.topk(6)[0],
    "topk": lambda x: x.topk(3, 2, largest=False)[0],
}

NETWORK = {
    "linear": lambda x: F.linear(x, WIDE, BIAS),
    "linear_silu": lambda x: F.silu(F.linear(x, WIDE, BIAS)),
    "linear_gelu": lambda x: F.gelu(F.linear(x, WIDE)) + F.gelu(F.linear(x, WIDE, BIAS), approximate="tanh"),
    "linear_more": lambda x: F.relu(F.linear(x, WIDE)) + torch.tanh(F.linear(x, WIDE)) + F.softplus(F.linear(x, WIDE)),
    "geglu": lambda x: _geglu(F.linear(x, WIDE, BIAS)),
    "dual_weights": lambda x: F.linear(x, x[0, 0], x[0, 1, 0]),
    "conv2d": lambda x: F.conv2d(x, KERNEL, CHANNELS.repeat(2), 2, 1),
    "conv2d_grouped": lambda x: F.silu(F.conv2d(x, GROUPED, CHANNELS, groups=4, dilation=2)),
    "layer_norm": lambda x: F.layer_norm(x * x, (6,), SQUARE[0], SQUARE[1]) + F.layer_norm(x, (4, 6, 6)),
    "modulated": lambda x: F.layer_norm(x, (6,)) * (1 + SQUARE[0]) + SQUARE[1],
    "modulated_rows": lambda x: (
        F.layer_norm(x, (6,)) * CHANNELS[:2, None, None, None].expand(2, 1, 1, 6)
        + OTHER[:2, None, None, None].expand(2, 1, 1, 6)
    ),
    "dual_affine": lambda x: F.layer_norm(x, (6,), x[0, 0, 0], x[0, 0, 1]),
    "rms_norm": lambda x: F.rms_norm(x * x, (6,), SQUARE[0]) + F.rms_norm(x, (6,), eps=1e-3),
    "group_norm": lambda x: F.silu(F.group_norm(x, 2, CHANNELS, OTHER)) + F.group_norm(x, 4),
    "batch_norm": lambda x: F.batch_norm(x, CHANNELS, OTHER.abs() + 1, OTHER, CHANNELS),
    "instance_norm": lambda x: F.instance_norm(x) + F.instance_norm(x, OTHER, OTHER**2 + 1, use_input_stats=False),
    "softmax": lambda x: x.softmax(-1) + x.softmax(1) * torch.softmax(x, 0),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()),
    "attention_text": lambda x: F.scaled_dot_product_attention(x, SQUARE.expand(2, 4, 6, 6), SQUARE.expand(2, 4, 6, 6)),
    "attention_masked": lambda x: F.scaled_dot_product_attention(x, x, x, SQUARE[None, None], scale=0.3),
    "attention_causal": lambda x: F.scaled_dot_product_attention(x[:, 0], x[:, 1], x[:, 2], is_causal=True),
}

ELEMENTWISE = {
    "unary": lambda x: (-x).silu() if hasattr(x, "silu") else F.silu(-x),
    "chain": lambda x: torch.tanh(x.square() + 1.5) * torch.sigmoid(x) - x.exp().log(),
    "roots": lambda x: (x.square() + 1).sqrt() + (x.square() + 2).rsqrt() + torch.reciprocal(x.square() + 3),
    "trigonometry": lambda x: x.sin() * x.cos() + x.abs(),
    "numbers": lambda x: 2 - x / 3 + 1 / (x.square() + 1) + (x - 2) * 0.5 + torch.rsub(x, 2),
    "alpha": lambda x: torch.add(x, SQUARE, alpha=2) + torch.sub(SQUARE, x, alpha=3),
    "powers": lambda x: x**2 + x**3 + (x.abs() + 1) ** 0.5 + (x.abs() + 1) ** -0.5 + (x.abs() + 1) ** -1,
    "activations": lambda x: F.relu(x) + F.leaky_relu(x, 0.2) + F.softplus(x) + F.gelu(x)
    + F.gelu(x, approximate="tanh"),
    "division": lambda x: x / (x.square() + 1) + SQUARE / (x.square() + 1),
    "broadcast": lambda x: x * CHANNELS[:, None, None] + x[:, :1] * x[0, 0] + x[0, 0, 0],
    "mish": lambda x: F.mish(x) + F.softplus(x, 2.0),
    "twice": lambda x: x.sin() * x.sin() + x.sin(),
}  # fmt: skip

# operators that torch.func.jvp computes node by node
FALLBACK = {
    "logsumexp": lambda x: x.logsumexp(-1),
    "power": lambda x: (x.abs() + 1) ** 2.5,
    "cumprod": lambda x: x.cumprod(-1),
    "elu": F.elu,
    "attention_broadcast": lambda x: F.scaled_dot_product_attention(x[:, :1], x, x[:1]),
    "log_sigmoid": lambda x: F.logsigmoid(30 * x),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "amax": lambda x: x.amax(-1),
    "glu": lambda x: F.glu(x, 1),
    "softplus_beta": lambda x: F.softplus(x, 2.0, 3.0),
    "masked_fill_dual": lambda x: torch.addcmul(x, x.sin(), x.cos()),
}


def _geglu(projected: Tensor) -> Tensor:
    half, gate = projected.chunk(2, dim=-1)
    return half * F.gelu(gate)


def _in_place(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = y[:, 1] * 3
    y[:, :, 2:4].mul_(0.5)
    y.add_(1).relu_()
    z = y.clone()
    z[0].sub_(x[1])
    return z + y


ALL = {**SHAPES, **LINEAR, **NETWORK, **ELEMENTWISE}
