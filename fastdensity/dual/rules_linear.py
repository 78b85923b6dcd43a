"""Rules of operators that are linear in each argument: sums, products of matrices, masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastdensity.dual import runtime
from fastdensity.dual.rewrite import Builder, Emitted, rule, shape_of
from fastdensity.dual.rules_shape import shifted

aten = torch.ops.aten


@rule("sum.default", "sum.dim_IntList", "mean.default", "mean.dim")
def total(b: Builder, node: fx.Node) -> Emitted:
    """Sums and means over dimensions of the value; over all of them where none is named."""
    rank = len(shape_of(node.args[0]))
    given: Any = node.args[1] if len(node.args) > 1 else None
    dims = list(range(1, rank + 1)) if not given and given != 0 else [shifted(dim) for dim in given]
    keep = node.args[2] if len(node.args) > 2 else False
    target = aten.sum.dim_IntList if "sum" in str(node.target) else aten.mean.dim
    if not dims:  # of a tensor without dimensions
        return NotImplemented
    return b.call(target, b.stacked(node.args[0]), dims, keep, **b.plain(node.kwargs))


@rule("matmul.default", "bmm.default", "mm.default")
def matmul(b: Builder, node: fx.Node) -> Emitted:
    """d(A B) = dA B + A dB; of one dual factor a single product over the stack."""
    left, right = node.args
    if min(len(shape_of(left)), len(shape_of(right))) < 2:
        return NotImplemented
    rank = max(len(shape_of(left)), len(shape_of(right)))
    left_stack, right_stack = b.aligned(left, rank), b.aligned(right, rank)
    if b.dual(left) and b.dual(right):
        return b.call(runtime.product, aten.matmul.default, left_stack, right_stack)
    return b.call(aten.matmul.default, left_stack, right_stack)


@rule("addmm.default", "baddbmm.default")
def addmm(b: Builder, node: fx.Node) -> Emitted:
    """beta * C + alpha * A B with a plain C and plain factors 1, as a linear layer is written out."""
    if node.kwargs or b.dual(node.args[0]) or (b.dual(node.args[1]) and b.dual(node.args[2])):
        return NotImplemented
    rank = len(shape_of(node.args[1]))
    product = b.call(aten.matmul.default, b.aligned(node.args[1], rank), b.aligned(node.args[2], rank))
    return b.call(runtime.add_to_value, product, b.plain(node.args[0]))


@rule("einsum.default")
def einsum(b: Builder, node: fx.Node) -> Emitted:
    """One more letter, in front, for the stack; with two dual factors the product rule."""
    equation, operands = str(node.args[0]), node.args[1]
    if isinstance(operands, (list, tuple)) and "->" in equation:
        duals = [b.dual(operand) for operand in operands]
        return b.call(runtime.einsum, equation, [b.plain(operand) for operand in operands], duals)
    return NotImplemented


@rule("where.self")
def where(b: Builder, node: fx.Node) -> Emitted:
    """The condition is plain; a branch without tangents joins with zeros."""
    condition, first, second = node.args
    if not all(isinstance(item, fx.Node) and isinstance(item.meta.get("val"), Tensor) for item in (first, second)):
        return NotImplemented
    rank = len(shape_of(node))
    parts = []
    for item in (first, second):
        stacked = b.aligned(item, rank, promote=True)
        if item.meta["val"].dtype != node.meta["val"].dtype:  # a stack has dimensions, and with them a say in promotion
            stacked = b.call(aten.to.dtype, stacked, node.meta["val"].dtype)
        parts.append(stacked)
    return b.call(aten.where.self, b.value(condition), *parts)


@rule("masked_fill.Scalar")
def masked_fill(b: Builder, node: fx.Node) -> Emitted:
    """The filled number is constant: the tangents are zero there."""
    rank = len(shape_of(node))
    return b.call(runtime.masked_fill, b.aligned(node.args[0], rank), b.value(node.args[1]), b.plain(node.args[2]))


@rule("dropout.default", "feature_dropout.default")
def dropout(b: Builder, node: fx.Node) -> Emitted:
    """Training mode: one mask for the value and its tangents (no-ops were dropped before)."""
    return b.call(runtime.dropout, node.target, b.stacked(node.args[0]), node.args[1])


@rule(
    "conv1d.default", "conv3d.default", "conv_transpose1d.default", "conv_transpose2d.input",
    "conv_transpose3d.input", "conv1d.padding", "conv2d.padding", "conv3d.padding",
)  # fmt: skip
def convolution(b: Builder, node: fx.Node) -> Emitted:
    """Convolutions but the usual one: torch's own over the stack as more images, the bias for the value only."""
    image, weight, *rest = node.args
    spatial = len(shape_of(weight)) - 2
    if b.dual(weight) or (rest and b.dual(rest[0])) or len(shape_of(image)) != spatial + 2:
        return NotImplemented
    bias = b.plain(rest[0]) if rest else None
    flat = b.call(aten.flatten.using_ints, b.stacked(image), 0, 1)
    out = b.call(node.target, flat, b.plain(weight), None, *b.plain(tuple(rest[1:])))
    stacked = b.call(runtime.unflatten_like, out, b.stacked(image))
    return stacked if bias is None else b.call(runtime.add_to_value, stacked, bias, spatial)


@rule("max.dim", "min.dim", "sort.default", "sort.stable", "topk.default")
def selection(b: Builder, node: fx.Node) -> Emitted:
    """The tangents follow the elements that were selected."""
    return b.call(
        runtime.select_elements, node.target, b.stacked(node.args[0]), *b.plain(node.args[1:]), **b.plain(node.kwargs)
    )
