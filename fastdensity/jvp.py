"""Batched Jacobian-vector products: any network as its fused dual.

    out, tangents = fd.jvp(model, (x, t), vectors)      # vectors (K, B, *): K directions at once

The network is traced once for each kind of arguments and rewritten so that each layer pushes its value and the K
tangents through one kernel; what does not depend on x (times, text, modulation) carries no tangent. Forward mode:
Wengert 1964; the dual of attention in Lu and Song 2024 (sCM, arXiv 2410.11081, appendix).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fastdensity.boundary import FLOATING, describe

if TYPE_CHECKING:  # tracing needs torch.export and torch._dynamo, which take a second to import: on the first call
    from fastdensity.dual.cache import Dual
    from fastdensity.dual.table import Explanation


def jvp(fn: Callable[..., Tensor], primals: Any, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """fn(*primals) and its derivatives along K directions of the first primal.

    Args:
        fn: a module or function of tensors that returns one tensor. It is traced once per kind of arguments (shapes,
            dtypes, devices, strides of what is not contiguous; new batch sizes reuse a trace where the code allows)
            and grad mode, and never called again: what it reads must come from its arguments, from tensors it closes
            over, or from modules, whose parameters are read anew at each call. A changed attribute, hook or submodule
            is noticed, and fn traced again; class attributes and globals of other files are not watched. The gradient
            of a potential may be taken by torch.func.grad, and then costs what torch.func.jvp costs.
        primals: tuple (x, ...) of fn's arguments; x (B, *) floating, the others tensors, numbers, None, or containers
            of these. A single tensor stands for (x,).
        vectors: (K, B, *), of x's dtype and device, K >= 1.

    Returns:
        (out, tangents): out (B', *), tangents (K, B', *); tangents[k] = (d fn / d x) vectors[k].

    Raises:
        ValueError: vectors of another shape or K = 0; fn returns no floating tensor, overwrites its input, branches on
            values of tensors (the message names the line), or keeps a tensor that it makes where no trace may.
        TypeError: arguments of the wrong type or dtype.
        NotImplementedError: fn uses an operator that has no forward derivative (named, with its line), or takes a
            gradient by torch.autograd in a way that no graph holds.

    Under grad mode the result is differentiable once more, through plain torch operators; call it under
    `torch.no_grad` (or `inference_mode`) where that is not wanted, which is faster. In training mode dropout draws one
    mask for the value and its tangents.
    """
    from fastdensity.dual.cache import find

    primals = _check_primals(primals)
    _check_vectors(vectors, primals[0])
    dual, tensors = find(fn, primals)
    return dual.run(fn, primals, vectors, tensors)


def trace_jvp(fn: Callable[..., Tensor], primals: Any) -> fx.GraphModule:
    """The dual graph that `jvp` runs: a GraphModule `(primals, vectors) -> (out, tangents)`.

    It holds fn's modules themselves, not copies, so later parameter updates are seen; tensors that fn closes over are
    bound as they are now. It can be compiled with fullgraph=True and captured in a CUDA graph; compiled, it refuses a
    dual level of torch.autograd.forward_ad around it, whose tangents compilers drop. It is traced in the grad mode of
    this call, and unlike `jvp` does not notice another one, or changed attributes: trace again after those. Arguments
    and errors: see `jvp`.
    """
    return _graph_of(fn, primals).bound_graph(fn)


def explain(fn: Callable[..., Tensor], primals: Any) -> Explanation:
    """What becomes of each node of fn's graph, as a table: print it, or read its `rows`.

    Each row names the operator, how it is treated ("plain": carries no tangent; a rule; "in NAME": taken into another
    node's kernel; "fallback": torch.func.jvp of that node), its floating-point operations and the user's line.
    Arguments and errors: see `jvp`.
    """
    from fastdensity.dual.table import explanation

    return explanation(_graph_of(fn, primals))


def _graph_of(fn: Callable[..., Tensor], primals: Any) -> Dual:
    from fastdensity.dual.cache import Dual, find

    dual, _ = find(fn, _check_primals(primals))
    if not isinstance(dual, Dual):
        raise NotImplementedError(
            "fn calls fd.jvp itself, or a transform of torch.func, and no graph holds that; trace the inner function, "
            "or call fd.jvp(fn, ...)"
        )
    return dual


def _check_primals(primals: Any) -> tuple[Any, ...]:
    if isinstance(primals, Tensor):
        primals = (primals,)
    if not isinstance(primals, (tuple, list)) or not primals:
        raise TypeError(f"primals must be a tuple of fn's arguments, the first a tensor, got {describe(primals)}")
    x = primals[0]
    if not isinstance(x, Tensor):
        raise TypeError(f"the first of primals must be a tensor, got {describe(x)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"the first of primals must be float32, float64, bfloat16 or float16, got {describe(x)}")
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        raise TypeError(f"the first of primals must be a dense (strided) tensor with numbers, got {_kind(x)}")
    return tuple(primals)


def _check_vectors(vectors: Any, x: Tensor) -> None:
    if not isinstance(vectors, Tensor):
        raise TypeError(f"vectors must be a tensor of shape (K, {_sizes(x)}), got {describe(vectors)}")
    if vectors.layout is not torch.strided or vectors.is_nested:
        raise TypeError(f"vectors must be a dense (strided) tensor of shape (K, {_sizes(x)}), got {_kind(vectors)}")
    if vectors.dim() != x.dim() + 1 or vectors.shape[1:] != x.shape:
        raise ValueError(f"vectors must have shape (K, {_sizes(x)}), K directions of x, got {describe(vectors)}")
    if vectors.shape[0] == 0:
        raise ValueError("vectors holds no direction: K must be at least 1, got 0")
    if vectors.dtype is not x.dtype:
        raise TypeError(f"vectors must have the dtype of the first primal, {x.dtype}, got {describe(vectors)}")
    if vectors.device != x.device:
        raise ValueError(f"vectors must be on {x.device} like the first primal, got {describe(vectors)}")


def _sizes(x: Tensor) -> str:
    return ", ".join(map(str, x.shape))


def _kind(tensor: Tensor) -> str:
    """What this is, if it is no dense tensor with numbers."""
    return "a nested tensor" if tensor.is_nested else f"layout {tensor.layout} on {tensor.device}"
