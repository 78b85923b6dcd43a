"""The variants of the dual kernels that benchmarks/offline.py compiles, room by room.

A room adds a function of `DualCase`s, named in `LISTS`, and its name to `benchmarks.offline.ROOMS`. A brief list stands
for the whole on each target; sm_90 gets a few more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.offline_dual import DualCase, Shape


def _conv(
    dtype: str,
    tangents: int,
    channels: int,
    outputs: int,
    window: int,
    activation: str,
    stride: int = 1,
    groups: int = 1,
    **due: Any,
) -> DualCase:
    size = 32 // stride
    options = ", ".join([f"stride {stride}"] * (stride > 1) + [f"{groups} groups"] * (groups > 1) + [activation])
    return DualCase(
        "dual_conv",
        f"{window} x {window}, {channels} to {outputs}, {dtype}, K={tangents}, {options}",
        (
            Shape(dtype, (1 + tangents, 4, channels, 32, 32)),
            Shape(dtype, (outputs, channels // groups, window, window)),
            Shape(dtype, (outputs,)),
            *((stride, stride), (window // 2, window // 2), (1, 1), groups, activation),
        ),
        Shape(dtype, (1 + tangents, 4, outputs, size, size)),
        **due,
    )


def dual_conv(target: str, brief: bool) -> list[DualCase]:
    """Windows of one and nine taps; the value alone, with one tangent and with three; every dtype; small groups."""
    found = [
        _conv("bfloat16", 1, 320, 320, 3, "silu", expects_mma=True),
        _conv("bfloat16", 3, 320, 320, 3, "silu", expects_mma=True),
        _conv("float32", 3, 128, 128, 3, "silu"),
        _conv("bfloat16", 3, 320, 320, 3, "silu", groups=320, wide_loads_due=0),
    ]
    if not brief or target == "sm_90":
        found += [
            _conv("bfloat16", 2, 320, 320, 3, "silu", expects_mma=True),
            _conv("bfloat16", 1, 320, 640, 1, "none", expects_mma=True),
            _conv("bfloat16", 1, 320, 320, 3, "none", stride=2, expects_mma=True),
            _conv("float16", 3, 320, 320, 1, "silu", expects_mma=True),
            _conv("float32", 1, 128, 128, 3, "relu"),
            _conv("float64", 3, 128, 128, 3, "silu"),
            _conv("float64", 1, 128, 128, 1, "none"),
        ]
    return found


def _chain(
    name: str,
    dtype: str,
    tangents: int,
    shape: tuple[int, ...],
    plain: dict[int, tuple[int, ...]],
    program: str,
    inputs: int,
    **due: Any,
) -> DualCase:
    """Input i has the shape `plain[i]` and no tangent, or is dual."""
    is_dual = [i not in plain for i in range(inputs)]
    dual = Shape(dtype, (1 + tangents, *shape))
    arguments = ([Shape(dtype, plain[i]) if i in plain else dual for i in range(inputs)], is_dual, program)
    return DualCase("dual_chain", f"chain, {name}, {dtype}, K={tangents}", arguments, dual, **due)


def dual_chain(target: str, brief: bool) -> list[DualCase]:
    """A bias before an activation, adaLN's gated residual, a squeeze-and-excite; many steps."""
    tokens = (8, 256, 1152)
    gated: dict[int, tuple[int, ...]] = {1: (8, 1, 1152)}
    found = [
        _chain("add and gelu", "bfloat16", 1, tokens, {1: (1152,)}, "add 0 1;gelu 2", 2),
        _chain("gated residual", "bfloat16", 3, tokens, gated, "mul 0 1;add 2 3", 3),
    ]
    if not brief or target == "sm_90":
        found += [
            _chain("add and gelu", "float32", 3, tokens, {1: (1152,)}, "add 0 1;gelu 2", 2),
            _chain("gated residual", "float32", 1, tokens, gated, "mul 0 1;add 2 3", 3),
            _chain("six steps", "float64", 3, tokens, {}, "tanh 0;mul 2 1;silu 3;add 4 0;square 5;div 6 1", 2),
        ]
    return found


def _linear(
    dtype: str, tangents: int, inputs: int, columns: int, activation: str, rows: int = 2_048, **due: Any
) -> DualCase:
    outputs = columns * (2 if activation == "geglu" else 1)
    return DualCase(
        "dual_linear",
        f"{inputs} to {columns}, {rows} rows, {dtype}, K={tangents}, {activation}",
        (
            Shape(dtype, (1 + tangents, rows, inputs)),
            Shape(dtype, (outputs, inputs)),
            Shape(dtype, (outputs,)),
            activation,
        ),
        Shape(dtype, (1 + tangents, rows, columns)),
        **due,
    )


def dual_linear(target: str, brief: bool) -> list[DualCase]:
    """Every tile: up to three tangents in a program, or two with a gate; more of them in several programs."""
    found = [
        _linear("bfloat16", 1, 1_152, 4_608, "silu", expects_mma=True),
        _linear("bfloat16", 2, 1_152, 4_608, "geglu", expects_mma=True),
        _linear("float32", 3, 1_024, 1_024, "silu"),
    ]
    if not brief or target == "sm_90":
        found += [
            _linear("bfloat16", 3, 1_152, 4_608, "gelu_tanh", expects_mma=True),
            _linear("float16", 2, 1_152, 1_152, "none", expects_mma=True),
            _linear("float32", 1, 1_024, 1_024, "geglu"),
            _linear("float64", 1, 1_024, 1_024, "gelu"),
        ]
    if not brief:
        found += [
            _linear("bfloat16", 1, 1_152, 4_608, "geglu", expects_mma=True),
            _linear("bfloat16", 8, 1_152, 1_152, "none", expects_mma=True),
            _linear("float32", 2, 1_024, 1_024, "geglu"),
            _linear("float64", 2, 1_024, 1_024, "geglu"),
        ]
    return found


def _row_norm(dtype: str, tangents: int, size: int, modulated: bool = True, rms: bool = False) -> DualCase:
    x, rows = Shape(dtype, (1 + tangents, 8, 256, size)), Shape(dtype, (8, size)) if modulated else None
    affine = None if modulated else Shape(dtype, (size,))
    kind = "rms" if rms else "layer"
    options = (size, affine, 1e-6) if rms else (size, affine, affine, 1e-6)
    name = f"{kind} norm, {dtype}, D={size}, K={tangents}" + ", modulated" * modulated
    return DualCase("dual_norm", name, (x, *options, rows, rows), x, function=f"dual_{kind}_norm_triton")


def _group_norm(dtype: str, tangents: int, channels: int, side: int, activation: str = "silu") -> DualCase:
    x, affine = Shape(dtype, (1 + tangents, 4, channels, side, side)), Shape(dtype, (channels,))
    name = f"group norm of {channels} x {side} x {side}, {dtype}, K={tangents}, {activation}"
    return DualCase("dual_norm", name, (x, 32, affine, affine, 1e-5, activation), x, function="dual_group_norm_triton")


def dual_norm(target: str, brief: bool) -> list[DualCase]:
    """Short rows that share a program, rows that fill it, rows in blocks; norms of rows and of groups of channels."""
    found = [
        _row_norm("bfloat16", 1, 384),
        _row_norm("float32", 3, 4_096),
        _group_norm("bfloat16", 3, 320, 64),
    ]
    if not brief or target == "sm_90":
        found += [
            _row_norm("bfloat16", 3, 1_152),
            _row_norm("float32", 1, 384, modulated=False),
            _row_norm("bfloat16", 1, 4_096, modulated=False, rms=True),
            _row_norm("float64", 1, 1_152),
            _group_norm("float32", 1, 128, 32),
        ]
    if not brief:
        found += [
            _row_norm("float32", 1, 16_384),
            _group_norm("bfloat16", 1, 320, 16, "none"),
            _group_norm("float64", 3, 320, 64),
        ]
    return found


def dual_softmax(target: str, brief: bool) -> list[DualCase]:
    """Rows that are held in registers, and rows that are walked."""
    shapes = [Shape(*row) for row in (("float32", (4, 64, 16_384)), ("float32", (4, 64, 65_536)))]
    if not brief or target == "sm_90":
        shapes += [Shape("float64", (4, 64, 8_192)), Shape("bfloat16", (2, 64, 4_096))]
    return [
        DualCase(
            "dual_softmax", f"softmax, {shape.dtype}, D={shape.sizes[-1]}, K={shape.sizes[0] - 1}", (shape,), shape
        )
        for shape in shapes
    ]


def _attention(
    dtype: str,
    tangents: int,
    width: int,
    mask: str = "",
    causal: bool = False,
    cross: bool = False,
    length: int = 256,
    **due: Any,
) -> DualCase:
    query = Shape(dtype, (1 + tangents, 2, 8, length, width))
    key = Shape(dtype, query.sizes[1:]) if cross else query
    given = {
        "": None,
        "bool": Shape("bool", (2, 1, length, length)),
        "added": Shape(dtype, (8, length, length)),
    }[mask]
    options = [
        f"K={tangents}",
        f"N={length}",
        *([f"{mask} mask"] if mask else []),
        *["causal"] * causal,
        *["cross"] * cross,
    ]
    return DualCase(
        "dual_attention",
        f"attention, {dtype}, d={width}, {', '.join(options)}",
        (query, key, key, True, not cross, not cross, given, causal, 0.125),
        query,
        **due,
    )


def dual_attention(target: str, brief: bool) -> list[DualCase]:
    """Every block: narrow, padded and wide heads, halves and not, one tangent and several; masks; cross-attention."""
    found = [
        _attention("bfloat16", 1, 64, causal=True, expects_mma=True),
        _attention("bfloat16", 3, 72, "bool", expects_mma=True),
        _attention("float32", 1, 64, wide_loads_due=0),  # operands come in slices of 16 columns, a number a thread
    ]
    if not brief or target == "sm_90":
        found += [
            _attention("bfloat16", 4, 64, expects_mma=True),
            _attention("bfloat16", 1, 72, expects_mma=True),
            _attention("float16", 1, 128, cross=True, expects_mma=True),
            _attention("float32", 3, 72),
            _attention("float64", 1, 64),
        ]
    if not brief:
        found += [
            _attention("bfloat16", 1, 64, "added", length=200, expects_mma=True),
            _attention("bfloat16", 1, 128, "bool", causal=True, expects_mma=True),
            _attention("bfloat16", 8, 256, expects_mma=True),
            _attention("float32", 1, 32, "bool"),
            _attention("float32", 1, 64, "bool", causal=True, length=200),
            _attention("float32", 1, 128),
        ]
    return found


def _trace_ends(
    dtype: str, tangents: int, inputs: int, columns: int, distribution: str, activation: str = "silu", **due: Any
) -> list[DualCase]:
    """The first layer, and the last of the same size."""
    rows, outputs = 2_048, columns * (2 if activation == "geglu" else 1)
    ids, weight, bias = Shape("int64", (rows,)), Shape(dtype, (outputs, inputs)), Shape(dtype, (outputs,))
    name = f"{inputs} to {columns}, {dtype}, K={tangents}, {distribution}"
    first = DualCase(
        "trace_linear",
        f"first layer, {name}, {activation}",
        (Shape(dtype, (rows, inputs)), weight, bias, activation, 1, ids, 0, 0, tangents, inputs, distribution, 0),
        Shape(dtype, (1 + tangents, rows, columns)),
        kernels=("probe_tiles",),
        function="dual_linear_probe_triton",
        **due,
    )
    weight, bias = Shape(dtype, (columns, inputs)), Shape(dtype, (columns,))
    last = DualCase(
        "trace_linear",
        f"last layer, {name}",
        (Shape(dtype, (1 + tangents, rows, inputs)), weight, bias, 1, ids, 0, 0, distribution, 0),
        (Shape(dtype, (rows, columns)), Shape("float64", (tangents, rows))),
        kernels=("form_tiles",),
        function="dual_linear_trace_triton",
        **due,
    )
    return [first, last]


def trace_linear(target: str, brief: bool) -> list[DualCase]:
    """Both ends, each kind of probe in each width of a tile."""
    # Triton gives a thread 8 bytes of a 16-bit operand there, once three planes share a tile of weights
    narrow: dict[str, Any] = {"wide_loads_due": 0} if target == "gfx942" else {}
    found = [
        *_trace_ends("bfloat16", 1, 1_024, 1_024, "rademacher", expects_mma=True),
        *_trace_ends("bfloat16", 2, 1_024, 1_024, "hadamard", expects_mma=True, **narrow),
        *_trace_ends("float32", 3, 1_024, 1_024, "rademacher"),
    ]
    if not brief or target == "sm_90":
        found += [
            *_trace_ends("bfloat16", 1, 1_024, 1_024, "normal", expects_mma=True),
            *_trace_ends("bfloat16", 3, 1_024, 1_024, "rademacher", expects_mma=True),
            *_trace_ends("float32", 1, 1_024, 1_024, "normal"),
            *_trace_ends("float64", 1, 1_024, 1_024, "rademacher"),
        ]
    if not brief:
        found += [
            *_trace_ends("bfloat16", 8, 1_024, 1_024, "normal", "geglu", expects_mma=True),
            *_trace_ends("float16", 2, 1_024, 1_024, "hadamard", expects_mma=True),
            *_trace_ends("float32", 3, 1_024, 1_024, "hadamard"),
            *_trace_ends("float64", 3, 1_024, 1_024, "normal"),
        ]
    return found


def sizes_of_one(room: str) -> list[DualCase]:
    """A size of 1 is a constant to the compiler, which has no type to convert: one sample, one row, one channel."""
    due: dict[str, Any] = {"wide_loads_due": 0}
    image, one = Shape("float32", (2, 1, 1, 8, 8)), Shape("float32", (1,))
    row, head, many = Shape("float32", (2, 1, 64)), Shape("float32", (2, 1, 1, 1, 16)), Shape("float32", (64,))
    square = Shape("float32", (1, 1, 3, 3))
    found = {
        "dual_conv": [
            DualCase("dual_conv", "one", (image, square, one, (1, 1), (1, 1), (1, 1), 1, name), image, **due)
            for name in ("none", "silu")
        ],
        "dual_chain": [_chain("one", "float32", 1, (1, 64), {1: (64,)}, "add 0 1;silu 2", 2, **due)],
        "dual_linear": [
            _linear("float32", 1, 64, width, name, rows=1, **due) for width, name in ((1, "geglu"), (64, "silu"))
        ],
        "dual_norm": [
            DualCase(
                "dual_norm",
                "one row",
                (row, 64, many, many, 1e-6, None, None),
                row,
                function="dual_layer_norm_triton",
                **due,
            ),
            DualCase(
                "dual_norm", "one", (image, 1, one, one, 1e-5, "silu"), image, function="dual_group_norm_triton", **due
            ),
        ],
        "dual_softmax": [DualCase("dual_softmax", "one row", (row,), row, **due)],
        "dual_attention": [
            DualCase("dual_attention", "one", (head, head, head, True, True, True, None, False, 0.125), head, **due)
        ],
    }
    return found.get(room, [])


LISTS: dict[str, Callable[[str, bool], list[DualCase]]] = {
    "dual_conv": dual_conv,
    "dual_chain": dual_chain,
    "dual_linear": dual_linear,
    "dual_norm": dual_norm,
    "dual_softmax": dual_softmax,
    "dual_attention": dual_attention,
    "trace_linear": trace_linear,
}


def cases(target: str, brief: bool = False) -> list[DualCase]:
    """The calls of all dual rooms, in full or a few that stand for them."""
    found = [case for calls in LISTS.values() for case in calls(target, brief)]
    return found + [case for room in LISTS if target == "sm_90" for case in sizes_of_one(room)]
