"""Rules of the layers that networks are made of; each is one kernel on the stack."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from fastdensity.dual import runtime
from fastdensity.dual.functional import line_of
from fastdensity.dual.rewrite import Builder, Emitted, rule, shape_of
from fastdensity.ops.dual_attention import dual_attention
from fastdensity.ops.dual_conv import dual_conv2d
from fastdensity.ops.dual_linear import dual_linear
from fastdensity.ops.dual_norm import dual_group_norm, dual_layer_norm, dual_rms_norm
from fastdensity.ops.dual_softmax import dual_softmax

aten = torch.ops.aten


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by name, defaults filled in."""
    target: Any = node.target
    found = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


@rule("linear.default")
def linear(b: Builder, node: fx.Node, activation: str = "none") -> Emitted:
    """[x; t_1 .. t_K] W^T in one GEMM; bias and activation in its epilogue."""
    given = arguments_of(node)
    if b.dual(given["weight"]) or b.dual(given["bias"]):
        return NotImplemented
    return b.call(dual_linear, b.stacked(given["input"]), b.plain(given["weight"]), b.plain(given["bias"]), activation)


@rule("conv2d.default")
def conv2d(b: Builder, node: fx.Node, activation: str = "none", norm: fx.Node | None = None) -> Emitted:
    """Over the stack as more images; a batch norm behind it goes into its kernel."""
    given = arguments_of(node)
    if b.dual(given["weight"]) or b.dual(given["bias"]) or len(shape_of(given["input"])) != 4:
        return NotImplemented
    pairs = [_pair(b.plain(given[name])) for name in ("stride", "padding", "dilation")]
    weight, bias = b.plain(given["weight"]), b.plain(given["bias"])
    if norm is not None:
        folded = b.call(runtime.fold_batch_norm, weight, bias, *_batch_norm_parts(b, norm))
        weight, bias = (b.call(operator.getitem, folded, number) for number in range(2))
    return b.call(dual_conv2d, b.stacked(given["input"]), weight, bias, *pairs, given["groups"], activation)


def _batch_norm_parts(b: Builder, node: fx.Node) -> list[Any]:
    given = arguments_of(node)
    names = ("weight", "bias", "running_mean", "running_var")
    return [*(b.plain(given[name]) for name in names), given["eps"]]


def _pair(value: Any) -> list[Any]:
    return [value, value] if isinstance(value, int) else list(value) * (2 if len(value) == 1 else 1)


@rule("layer_norm.default")
def layer_norm(b: Builder, node: fx.Node, multiplier: Any = None, addend: Any = None) -> Emitted:
    """Layer norm; an adaptive one with its multiplier and addend in the same kernel."""
    given = arguments_of(node)
    size = math.prod(given["normalized_shape"])
    if b.dual(given["weight"]) or b.dual(given["bias"]):
        # no fallback: torch's jvp of this norm is wrong when nested
        norm = b.call(dual_layer_norm, b.stacked(given["input"]), size, None, None, given["eps"], None, None)
        parts = [b.stacked(item) if item is not None else None for item in (given["weight"], given["bias"])]
        return b.call(runtime.affine, norm, *parts)
    affine = b.plain(given["weight"]), b.plain(given["bias"])
    modulation = b.plain(multiplier), b.plain(addend)
    return b.call(dual_layer_norm, b.stacked(given["input"]), size, *affine, given["eps"], *modulation)


@rule("rms_norm.default")
def rms_norm(b: Builder, node: fx.Node, multiplier: Any = None, addend: Any = None) -> Emitted:
    """Root-mean-square norm, with what modulates it."""
    given = arguments_of(node)
    if b.dual(given["weight"]):
        return NotImplemented
    eps = given["eps"]
    if eps is None:
        eps = torch.finfo(torch.promote_types(given["input"].meta["val"].dtype, torch.float32)).eps  # as torch does
    size, weight = math.prod(given["normalized_shape"]), b.plain(given["weight"])
    return b.call(dual_rms_norm, b.stacked(given["input"]), size, weight, eps, b.plain(multiplier), b.plain(addend))


@rule("group_norm.default")
def group_norm(b: Builder, node: fx.Node, activation: str = "none") -> Emitted:
    """Group norm, with SiLU in the same kernel."""
    given = arguments_of(node)
    if b.dual(given["weight"]) or b.dual(given["bias"]):
        return NotImplemented
    affine = b.plain(given["weight"]), b.plain(given["bias"])
    return b.call(dual_group_norm, b.stacked(given["input"]), given["num_groups"], *affine, given["eps"], activation)


@rule("batch_norm.default", "instance_norm.default")
def batch_norm(b: Builder, node: fx.Node) -> Emitted:
    """With running statistics an affine map per channel; with the batch's own, rows would depend on each other."""
    given = arguments_of(node)
    if given.get("use_input_stats") and not b.dual(given["weight"]) and not b.dual(given["bias"]):
        channels, parts = shape_of(node)[1], (b.plain(given["weight"]), b.plain(given["bias"]))
        return b.call(dual_group_norm, b.stacked(given["input"]), channels, *parts, given["eps"], "none")
    if given.get("training"):
        raise ValueError(
            f"batch_norm in training mode couples the rows of a batch, at {line_of(node)}; call model.eval()"
        )
    if any(b.dual(given[name]) for name in ("weight", "bias", "running_mean", "running_var")):
        raise NotImplementedError(f"{node.target} with parameters that depend on the input, at {line_of(node)}")
    return b.call(runtime.batch_norm, b.stacked(given["input"]), *_batch_norm_parts(b, node))


@rule("softmax.int", "_softmax.default")
def softmax(b: Builder, node: fx.Node) -> Emitted:
    """Softmax over any dimension; the kernel wants the last."""
    given = arguments_of(node)
    rank = len(shape_of(node))
    if rank == 0:
        return NotImplemented
    dim = given["dim"] % rank
    stacked = b.stacked(given["self"])
    if given.get("dtype") is not None:
        stacked = b.call(aten.to.dtype, stacked, given["dtype"])
    if dim == rank - 1:
        return b.call(dual_softmax, stacked)
    moved = b.call(aten.transpose.int, stacked, dim + 1, -1)
    return b.call(aten.transpose.int, b.call(dual_softmax, moved), dim + 1, -1)


@rule("scaled_dot_product_attention.default")
def attention(b: Builder, node: fx.Node) -> Emitted:
    """softmax(Q K^T c) V; factors that are plain (text) cost nothing."""
    given = arguments_of(node)
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if b.dual(mask) or not all(len(shape_of(item)) >= 2 for item in (query, key, value)):
        return NotImplemented
    scale = given["scale"]
    if scale is None:
        width: Any = shape_of(query)[-1]
        scale = 1.0 / math.sqrt(width)
    if given["dropout_p"]:
        pieces = [b.stacked(item) for item in (query, key, value)]
        options = (b.plain(mask), given["is_causal"], scale, given["dropout_p"])
        return b.call(runtime.attention_with_dropout, *pieces, *options)
    batches = {tuple(map(str, shape_of(item)[:-3])) for item in (query, key, value)}
    heads = [str(shape_of(item)[-3]) for item in (query, key, value) if len(shape_of(item)) > 2]
    if len(batches) > 1 or len(set(heads[1:])) > 1 or (len(set(heads)) > 1 and not given["enable_gqa"]):
        return NotImplemented  # torch broadcasts these
    ranks = {len(shape_of(item)) for item in (query, key, value)}
    if ranks == {4}:
        return _attention(b, [b.plain(item) for item in (query, key, value)], (query, key, value), given, scale)
    if len(ranks) != 1 or ranks == {2} or mask is not None or ranks != {3}:
        return NotImplemented
    parts = [b.call(aten.unsqueeze.default, b.plain(item), -3) for item in (query, key, value)]
    return b.call(aten.squeeze.dim, _attention(b, parts, (query, key, value), given, scale), -3)


def _attention(b: Builder, parts: list[Any], nodes: tuple[Any, ...], given: dict[str, Any], scale: float) -> Emitted:
    duals = [b.dual(item) for item in nodes]
    mask = b.plain(given["attn_mask"])
    return b.call(dual_attention, *parts, *duals, mask, given["is_causal"], scale)
