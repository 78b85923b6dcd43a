"""What became of each node of a network: the table of `fd.explain`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastdensity.dual.cache import Dual
from fastdensity.dual.functional import line_of
from fastdensity.dual.rewrite import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Row:
    """One node: its operator, its treatment, FLOPs of its value and of each tangent, and the user's line."""

    name: str
    operator: str
    treatment: str
    shape: tuple[Any, ...]
    flops: int
    tangent_flops: int
    line: str


@dataclass(frozen=True)
class Explanation:
    """The rows in the order of execution; `str()` prints a table."""

    rows: tuple[Row, ...]

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """The nodes that torch.func.jvp computes one by one."""
        return tuple(row for row in self.rows if row.treatment == "fallback")

    @property
    def flops(self) -> int:
        """Floating-point operations of the network itself."""
        return sum(row.flops for row in self.rows)

    @property
    def tangent_flops(self) -> int:
        """Floating-point operations that each tangent adds."""
        return sum(row.tangent_flops for row in self.rows)

    def __str__(self) -> str:
        heads = ("node", "operator", "treatment", "shape", "GFLOP", "per tangent", "line")
        cells: list[tuple[str, ...]] = [heads]
        for row in self.rows:
            numbers = tuple(f"{count / 1e9:.3f}" if count else "" for count in (row.flops, row.tangent_flops))
            shape = "x".join(map(str, row.shape))
            cells.append((row.name, row.operator, row.treatment, shape, *numbers, row.line))
        widths = [max(len(line[column]) for line in cells) for column in range(len(heads) - 1)]
        lines = [
            "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """One sentence: how many nodes went which way, and what they cost."""
        kinds = Counter("absorbed" if row.treatment.startswith("in ") else row.treatment for row in self.rows)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        names = sorted({row.operator for row in self.fallbacks})
        slow = f"; fallbacks: {', '.join(names)}" if names else "; no fallbacks"
        cost = f"{self.flops / 1e9:.3f} GFLOP, {self.tangent_flops / 1e9:.3f} more for each tangent"
        return f"{len(self.rows)} nodes ({counts}){slow}. {cost}."


def explanation(dual: Dual) -> Explanation:
    """The table of a dual graph."""
    depends = {record.node for record in dual.records if record.treatment != "plain"}
    depends |= {node for node in dual.traced.graph.nodes if dual.traced.sources.get(node.name) == ("primal", (0,))}
    return Explanation(tuple(_row(record.node, record.treatment, depends) for record in dual.records))


def _row(node: fx.Node, treatment: str, depends: set[fx.Node]) -> Row:
    flops = _flops(node)
    tangent = 0 if treatment == "plain" else flops * _products_per_tangent(node, depends)
    shape = tuple(int(size) if isinstance(size, int) else str(size) for size in shape_of(node))
    operator = str(node.target).removesuffix(".default")
    return Row(node.name, operator, treatment, shape, flops, int(tangent), line_of(node))


def _products_per_tangent(node: fx.Node, depends: set[fx.Node]) -> float:
    """How many products of the value's cost a tangent needs: one for each factor that carries one."""
    if node.target is aten.scaled_dot_product_attention.default:
        query, key, value = (item in depends for item in node.args[:3])
        return (query + key) / 2 + ((query or key) + value) / 2
    if node.target in _PRODUCTS:
        return sum(item in depends for item in node.args if isinstance(item, fx.Node))
    return 1


_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


def _flops(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    size = math.prod(hint(length) for length in value.shape)
    if node.target is aten.linear.default:
        return 2 * size * hint(shape_of(node.args[1])[1])
    if str(node.target).startswith("aten.conv") and len(shape_of(node.args[1])) > 2:  # conv2d, convolution, ...
        return 2 * size * math.prod(hint(length) for length in shape_of(node.args[1])[1:])
    if node.target is aten.scaled_dot_product_attention.default:
        *_, length, width = (hint(item) for item in shape_of(node.args[1]))
        return 2 * (size // hint(value.shape[-1])) * length * (width + hint(value.shape[-1]))
    if node.target in _PRODUCTS:
        return 2 * size * hint(shape_of(node.args[0])[-1])
    return 0


def hint(length: Any) -> int:
    """The size at which a symbolic dimension was traced."""
    return length if isinstance(length, int) else int(length.node.hint)


def operations(dual: Dual) -> int:
    """Floating-point operations of the network at the traced shapes; an elementwise one counts once an element."""
    return sum(_flops(node) + _elements(node) for node in dual.traced.graph.nodes)


def plane_bytes(dual: Dual) -> int:
    """The most memory that results hold at a time, of the value or of one tangent; views are counted like copies."""
    carries = {record.node for record in dual.records if record.treatment != "plain"}
    last_user = {used: node for node in dual.traced.graph.nodes for used in node.all_input_nodes}
    ends: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last_user.items():
        ends.setdefault(user, []).append(used)
    live = peak = 0
    for node in dual.traced.graph.nodes:
        live += _bytes(node) if node in carries else 0
        peak = max(peak, live)
        live -= sum(_bytes(used) for used in ends.get(node, ()) if used in carries)
    return peak


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(hint(length) for length in value.shape) if isinstance(value, Tensor) else 0


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return _elements(node) * value.element_size() if isinstance(value, Tensor) else 0
