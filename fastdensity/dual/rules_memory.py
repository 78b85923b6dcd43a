"""Rules of operators that read or write memory by its address."""

from __future__ import annotations

import torch
from torch import fx

from fastdensity.dual import runtime
from fastdensity.dual.functional import line_of
from fastdensity.dual.rewrite import RULES, Builder, Emitted, rule

aten = torch.ops.aten


@rule("as_strided.default")
def as_strided(b: Builder, node: fx.Node) -> Emitted:
    """Of each row of the stack, made contiguous; what fn itself does not lay out so has no like in a stack."""
    read, size, stride, *offset = node.args
    value = read.meta["val"] if isinstance(read, fx.Node) else None
    if value is None or not value.is_contiguous() or value.storage_offset() != 0:
        raise NotImplementedError(
            f"as_strided reads a tensor that is not contiguous from the start of its memory, at {line_of(node)}; its "
            "dual lies in other memory: use unfold, reshape or indexing, or call contiguous() before"
        )
    rows = b.call(aten.contiguous.default, b.stacked(read))
    return b.call(runtime.as_strided, rows, *b.plain((size, stride, *offset)))


def fill_diagonal(b: Builder, node: fx.Node) -> Emitted:
    """Tangents are zero where a number is written."""
    return b.call(runtime.fill_diagonal_dual, b.stacked(node.args[0]), *b.plain(node.args[1:]))


RULES[runtime.fill_diagonal] = fill_diagonal
