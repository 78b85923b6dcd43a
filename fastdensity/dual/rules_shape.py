"""Rules of operators that move elements about.

On a stack `(1 + K, *shape)` they are what they were, one dimension further in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastdensity.dual import runtime
from fastdensity.dual.rewrite import RULES, Builder, Emitted, rule, shape_of

aten = torch.ops.aten


def shifted(dim: int) -> int:
    """A dimension of the value as one of the stack; counted from the end it stays what it is."""
    return dim if dim < 0 else dim + 1


def _dims(dims: Any) -> list[int]:
    return [shifted(dim) for dim in ([dims] if isinstance(dims, int) else dims)]


@rule("view.default", "reshape.default", "_unsafe_view.default")
def reshape(b: Builder, node: fx.Node) -> Emitted:
    """Strides of the stack differ from the value's, so a view is a reshape here."""
    return b.call(aten.reshape.default, b.stacked(node.args[0]), [b.count, *b.plain(node.args[1])])


@rule("flatten.using_ints", "flatten.default")
def flatten(b: Builder, node: fx.Node) -> Emitted:
    """Dimensions of the value only: the first of the stack stays."""
    given: tuple[int, ...] = node.args[1:]
    start, end = given + (0, -1)[len(given) :]
    return b.call(aten.flatten.using_ints, b.stacked(node.args[0]), shifted(start), shifted(end))


@rule("contiguous.default", "clone.default")
def same(b: Builder, node: fx.Node) -> Emitted:
    """Layout is no part of a value: what needs dense memory makes it so."""
    return b.stacked(node.args[0])


@rule("permute.default")
def permute(b: Builder, node: fx.Node) -> Emitted:
    """The first dimension of the stack stays where it is."""
    dims: Any = node.args[1]
    rank = len(dims)
    return b.call(aten.permute.default, b.stacked(node.args[0]), [0, *(dim % rank + 1 for dim in dims)])


@rule("transpose.int", "movedim.int", "swapaxes.default", "swapdims.default")
def transpose(b: Builder, node: fx.Node) -> Emitted:
    """Two dimensions change places, or one moves."""
    return b.call(node.target, b.stacked(node.args[0]), shifted(node.args[1]), shifted(node.args[2]))


@rule("t.default", "numpy_T.default", "mT.default")
def turn(b: Builder, node: fx.Node) -> Emitted:
    """Transposes of matrices."""
    if len(shape_of(node.args[0])) < 2:
        return b.stacked(node.args[0])
    return b.call(aten.transpose.int, b.stacked(node.args[0]), -2, -1)


@rule(
    "unsqueeze.default", "squeeze.dim", "squeeze.dims", "select.int", "slice.Tensor", "unbind.int", "unflatten.int",
    "roll.default", "flip.default", "cumsum.default", "index_select.default",
)  # fmt: skip
def along(b: Builder, node: fx.Node) -> Emitted:
    """Operators whose second argument names a dimension, or several; roll names them third."""
    arguments = list(b.plain(node.args))
    position = 2 if node.target is aten.roll.default else 1
    if len(arguments) == position:
        if position == 2:  # a roll of the flattened tensor
            return NotImplemented
        arguments.append(0)
    arguments[0] = b.stacked(node.args[0])
    dims = arguments[position]
    arguments[position] = shifted(dims) if isinstance(dims, int) else _dims(dims)
    return b.call(node.target, *arguments, **b.plain(node.kwargs))


@rule(
    "split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default", "narrow.default", "diagonal.default",
    "tensor_split.sections", "unsafe_chunk.default", "unsafe_split.Tensor",
)  # fmt: skip
def pieces(b: Builder, node: fx.Node) -> Emitted:
    """Operators that name a dimension third (narrow second), 0 where they do not say."""
    arguments = list(b.plain(node.args))
    arguments[0] = b.stacked(node.args[0])
    if node.target is aten.diagonal.default:
        arguments = [*arguments, *(0, 0, 1)[len(arguments) - 1 :]]
        arguments[2:4] = _dims(arguments[2:4])
    elif node.target is aten.narrow.default:
        arguments[1] = shifted(arguments[1])
    else:
        arguments = [*arguments, *(0,)[len(arguments) - 2 :]]
        arguments[2] = shifted(arguments[2])
    return b.call(node.target, *arguments)


@rule("squeeze.default")
def squeeze(b: Builder, node: fx.Node) -> Emitted:
    """Every dimension of size one, but not the first of a stack of one."""
    dims = [dim + 1 for dim, size in enumerate(shape_of(node.args[0])) if isinstance(size, int) and size == 1]
    return b.call(aten.squeeze.dims, b.stacked(node.args[0]), dims)


@rule("expand.default", "repeat.default", "broadcast_to.default", "tile.default")
def expand(b: Builder, node: fx.Node) -> Emitted:
    """Sizes are those of the value; missing ones go behind the first of the stack."""
    sizes = list(b.plain(node.args[1]))
    rank = max(len(sizes), len(shape_of(node.args[0])))
    sizes = [1] * (rank - len(sizes)) + sizes if node.target is aten.tile.default else sizes
    first = b.count if node.target in (aten.expand.default, aten.broadcast_to.default) else 1
    return b.call(node.target, b.aligned(node.args[0], len(sizes)), [first, *sizes])


@rule("repeat_interleave.self_int")
def repeat_interleave(b: Builder, node: fx.Node) -> Emitted:
    """Without a dimension the value is flattened first."""
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if dim is None:
        flat = b.call(aten.flatten.using_ints, b.stacked(node.args[0]), 1, -1)
        return b.call(aten.repeat_interleave.self_int, flat, b.plain(node.args[1]), 1)
    return b.call(aten.repeat_interleave.self_int, b.stacked(node.args[0]), b.plain(node.args[1]), shifted(dim))


@rule("cat.default", "stack.default", "concat.default")
def join(b: Builder, node: fx.Node) -> Emitted:
    """Plain parts are joined as duals whose tangents are zero."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    items: Any = node.args[0]
    return b.call(node.target, [b.stacked(item) for item in items], shifted(dim))


@rule("select_scatter.default", "slice_scatter.default")
def scatter(b: Builder, node: fx.Node) -> Emitted:
    """One part of a tensor replaced by another."""
    target, source, *rest = node.args
    rest = [*b.plain(tuple(rest))] or [0]
    rest[0] = shifted(rest[0])
    return b.call(node.target, b.stacked(target), b.stacked(source), *rest, **b.plain(node.kwargs))


@rule("index.Tensor")
def index(b: Builder, node: fx.Node) -> Emitted:
    """Indexing by tensors. A gap between two of them moves the indexed dimension to the front, stack or not."""
    indices: Any = node.args[1]
    given = [number for number, item in enumerate(indices) if item is not None]
    if given and given != list(range(given[0], given[-1] + 1)):
        return NotImplemented
    return b.call(aten.index.Tensor, b.stacked(node.args[0]), [None, *b.plain(indices)])


@rule("to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "type_as.default")
def to(b: Builder, node: fx.Node) -> Emitted:
    """Another dtype or device; differentiation goes through it."""
    value = node.meta["val"]
    stacked = b.stacked(node.args[0])
    if shape_of(node.args[0]) is not None and node.args[0].meta["val"].device != value.device:
        stacked = b.call(torch.Tensor.to, stacked, value.device)
    return b.call(aten.to.dtype, stacked, value.dtype)


@rule("pixel_shuffle.default", "pixel_unshuffle.default", "tril.default", "triu.default")
def batched(b: Builder, node: fx.Node) -> Emitted:
    """Operators on the last dimensions that take any number before them."""
    return b.call(node.target, b.stacked(node.args[0]), *b.plain(node.args[1:]), **b.plain(node.kwargs))


@rule("constant_pad_nd.default", "pad.default")
def pad(b: Builder, node: fx.Node) -> Emitted:
    """Padding by zeros is linear; by another number it is for the value only."""
    rest = b.plain(node.args[2:])
    constant = node.target is aten.constant_pad_nd.default or not rest or rest[0] == "constant"
    number = next((item for item in rest if not isinstance(item, str) and item is not None), 0)
    if not constant or number != 0:
        return NotImplemented if constant else _images(b, node)
    return b.call(aten.constant_pad_nd.default, b.stacked(node.args[0]), b.plain(node.args[1]))


@rule(
    "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec", "upsample_bilinear2d.vec",
    "upsample_bicubic2d.vec", "upsample_trilinear3d.vec", "_upsample_nearest_exact2d.vec",
    "_upsample_bilinear2d_aa.vec", "upsample_nearest2d.default", "upsample_bilinear2d.default", "avg_pool1d.default",
    "avg_pool2d.default", "avg_pool3d.default", "adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default",
    "unfold.default", "im2col.default", "reflection_pad2d.default", "replication_pad2d.default",
)  # fmt: skip
def resampling(b: Builder, node: fx.Node) -> Emitted:
    """Linear maps of images: the stack is more images."""
    if node.target is aten.unfold.default:
        arguments = b.plain(node.args[1:])
        return b.call(node.target, b.stacked(node.args[0]), shifted(arguments[0]), *arguments[1:])
    return _images(b, node)


def _images(b: Builder, node: fx.Node) -> Emitted:
    flat = b.call(aten.flatten.using_ints, b.stacked(node.args[0]), 0, 1)
    out = b.call(node.target, flat, *b.plain(node.args[1:]), **b.plain(node.kwargs))
    return b.call(runtime.unflatten_like, out, b.stacked(node.args[0]))


def overwrite(b: Builder, node: fx.Node) -> Emitted:
    """`target.copy_(source)` made functional: the source in the target's shape and type."""
    stacked = b.aligned(node.args[1], len(shape_of(node)), promote=True)
    return b.call(runtime.overwrite_dual, stacked, b.value(node.args[0]))


RULES[runtime.overwrite] = overwrite
