"""Small functions that dual graphs call; torch code that every transform and compiler follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad


def size(tensor: Tensor, dim: int) -> int:
    """A size, asked in Python: vmap knows no rule for the operator of that name."""
    return tensor.shape[dim]


def overwrite(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What `target.copy_(source)` leaves in target."""
    return source.to(target.dtype).expand(target.shape)


def overwrite_dual(stacked: Tensor, target: Tensor) -> Tensor:
    """`overwrite` for a dual source."""
    return stacked.to(target.dtype).expand(stacked.shape[0], *target.shape)


def fill_diagonal(tensor: Tensor, number: float, wrap: bool = False) -> Tensor:
    """What `tensor.fill_diagonal_(number, wrap)` leaves in tensor."""
    return tensor.masked_fill(_diagonal(tensor, wrap), number)


def fill_diagonal_dual(stacked: Tensor, number: float, wrap: bool = False) -> Tensor:
    """`fill_diagonal` of a dual."""
    return masked_fill(stacked, _diagonal(stacked[0], wrap), number)


def _diagonal(like: Tensor, wrap: bool) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool).fill_diagonal_(True, wrap)


def stack(value: Tensor, tangents: Tensor) -> Tensor:
    """`(*shape)` and `(K, *shape)` to one dual `(1 + K, *shape)`."""
    if forward_ad._current_level >= 0 and not eager_transforms.JVP_NESTING and torch.compiler.is_compiling():
        raise RuntimeError(
            "a compiled graph drops the tangents of torch.autograd.forward_ad without a word; compile the whole of "
            "torch.func.jvp(...), or call the graph itself within the dual level"
        )
    return torch.cat([value.unsqueeze(0), tangents])


def promote(value: Tensor, count: int) -> Tensor:
    """A plain tensor as a dual whose tangents are zero."""
    return torch.cat([value.unsqueeze(0), value.new_zeros((count - 1, *value.shape))])


def without_grad(stacked: Tensor, line: str) -> Tensor:
    """What the user's code computed under torch.no_grad: forward mode goes on there, reverse mode must not."""
    if torch.is_grad_enabled() and stacked.requires_grad:
        raise RuntimeError(
            f"backward through a jvp cannot pass a torch.no_grad block, at {line}; call jvp under torch.no_grad, "
            "or leave the block out of fn"
        )
    return stacked


def add_to_value(stacked: Tensor, bias: Tensor, trailing: int = 0) -> Tensor:
    """stacked with `bias` added to its value; the bias stands before `trailing` dimensions."""
    bias = bias.reshape(*bias.shape, *(1,) * trailing)
    return torch.cat([(stacked[0] + bias).unsqueeze(0), stacked[1:]])


def unflatten_like(flat: Tensor, stacked: Tensor) -> Tensor:
    """The first dimension of `flat` split as the first two of `stacked`."""
    return flat.reshape(stacked.shape[0], stacked.shape[1], *flat.shape[1:])


def product(multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    """The dual of a bilinear product of two duals."""
    value = multiply(left[0], right[0])
    tangents = multiply(left[1:], right[:1]) + multiply(left[:1], right[1:])
    return stack(value, tangents)


def as_strided(stacked: Tensor, size: list[int], stride: list[int], offset: int | None = None) -> Tensor:
    """as_strided of each row of a contiguous stack."""
    last = (offset or 0) + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if last >= stacked[0].numel() and 0 not in size:
        raise ValueError(f"as_strided reads element {last} of a tensor of {stacked[0].numel()}, past its end")
    return torch.vmap(lambda row: row.as_strided(size, stride, offset))(stacked)


def einsum(equation: str, operands: list[Tensor], duals: list[bool]) -> Tensor:
    """torch.einsum on duals and plain tensors."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    letter = next(letter for letter in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQPONMLKJIHGFEDCBA" if letter not in equation)
    if sum(duals) == 1:
        dual_terms = [letter + term if dual else term for term, dual in zip(terms, duals, strict=True)]
        return torch.einsum(f"{','.join(dual_terms)}->{letter}{output}", operands)
    values = [operand[0] if dual else operand for operand, dual in zip(operands, duals, strict=True)]
    tangents = None
    for position, dual in enumerate(duals):
        if dual:
            moved = [letter + term if number == position else term for number, term in enumerate(terms)]
            parts = [operands[position][1:] if number == position else value for number, value in enumerate(values)]
            part = torch.einsum(f"{','.join(moved)}->{letter}{output}", parts)
            tangents = part if tangents is None else tangents + part
    assert tangents is not None
    return stack(torch.einsum(equation, values), tangents)


def masked_fill(stacked: Tensor, mask: Tensor, number: float) -> Tensor:
    """`value.masked_fill(mask, number)`, tangents zero where it is filled."""
    return stack(stacked[0].masked_fill(mask, number), stacked[1:].masked_fill(mask, 0))


def dropout(target: Callable[..., Tensor], stacked: Tensor, probability: float) -> Tensor:
    """Dropout in training mode, with one mask for the value and its tangents."""
    return stacked * target(torch.ones_like(stacked[0]), probability, True)


def select_elements(target: Callable[..., tuple[Tensor, Tensor]], stacked: Tensor, *rest: Any, **keywords: Any) -> Any:
    """max, min, sort or topk along a dimension: (dual values, indices)."""
    values, indices = target(stacked[0], *rest, **keywords)
    dim, keep = _selected_dim(target, rest, keywords)
    chosen = indices if values.dim() == stacked.dim() - 1 else indices.unsqueeze(dim)
    moved = chosen.unsqueeze(0).expand(stacked.shape[0] - 1, *chosen.shape)
    tangents = stacked[1:].gather(dim if dim < 0 else dim + 1, moved)
    if not keep and values.dim() != stacked.dim() - 1:
        tangents = tangents.squeeze(dim if dim < 0 else dim + 1)
    return stack(values, tangents), indices


def _selected_dim(target: Any, rest: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[int, bool]:
    name = target._schema.name.split("::")[1]
    if "dim" in keywords:
        return keywords["dim"], True
    if name in ("max", "min"):
        return rest[0], len(rest) > 1 and rest[1]
    position = 1 if name == "topk" or target._overloadname == "stable" else 0
    return (rest[position] if len(rest) > position else -1), True


def batch_norm(
    stacked: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """Batch norm with running statistics on (1 + K, B, C, *)."""
    gain, shift = _affine_of_batch_norm(weight, bias, mean, variance, eps)
    trailing = (1,) * (stacked.dim() - 3)
    scaled = stacked.to(gain.dtype) * gain.reshape(-1, *trailing)
    return add_to_value(scaled, shift, len(trailing)).to(stacked.dtype)


def fold_batch_norm(
    kernel: Tensor, offset: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kernel and bias of the convolution that does what the given one and a batch norm behind it do."""
    gain, shift = _affine_of_batch_norm(weight, bias, mean, variance, eps)
    if offset is not None:
        shift = shift + offset * gain
    return (kernel * gain.reshape(-1, *(1,) * (kernel.dim() - 1))).to(kernel.dtype), shift.to(kernel.dtype)


def _affine_of_batch_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(C,) factor and (C,) addend, in float32 or better."""
    wide = torch.promote_types(variance.dtype, torch.float32)
    gain = torch.rsqrt(variance.to(wide) + eps)
    if weight is not None:
        gain = gain * weight
    shift = -mean * gain
    return gain, shift if bias is None else shift + bias


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, probability: float
) -> Tensor:
    """Attention in training mode: one dropout mask on the probabilities, for the value and its tangents."""
    scores = product(torch.matmul, query * scale, key.mT)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril() if causal else mask
    if allowed is not None and allowed.dtype == torch.bool:
        scores = masked_fill(scores, ~allowed, -torch.inf)
    elif allowed is not None:
        scores = stack(scores[0] + allowed, scores[1:])
    probabilities = torch.softmax(scores[0], -1)
    weighted = probabilities * scores[1:].masked_fill(probabilities == 0, 0)
    tangents = weighted - probabilities * weighted.sum(-1, keepdim=True)
    dropped = dropout(torch.ops.aten.dropout.default, stack(probabilities, tangents), probability)
    return product(torch.matmul, dropped, value)


def affine(norm: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """norm * weight + bias where all three are duals; weight and bias over the last dimensions."""
    for factor, is_product in ((weight, True), (bias, False)):
        if factor is None:
            continue
        aligned = factor.reshape(factor.shape[0], *(1,) * (norm.dim() - factor.dim()), *factor.shape[1:])
        norm = product(torch.mul, norm, aligned) if is_product else norm + aligned
    return norm
