"""Checks at the boundary: every public function validates its arguments here, once, before any kernel runs.

Errors name the argument, what came and what was wanted. Values that live inside device tensors cannot be looked
at without a synchronisation; those turn up in the per-row flags of a result instead (`fastdensity.rules`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_interpreter_stack = torch._C._functorch.peek_interpreter_stack
_is_compiling = torch.compiler.is_compiling  # a compiler traces these checks, and knows no is_neg
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def describe(value: Any) -> str:
    """What came, in few words: 'a float32 tensor of shape (2, 3) on cpu' or 'str'."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r:.60}"


def check_state(name: str, value: Any) -> Tensor:
    """A floating tensor (B, *) of at least one dimension; TypeError or ValueError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {describe(value)}")
    if value.dim() == 0:
        raise ValueError(f"{name} must be batch first, (B, *), got a 0-dimensional tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    return value


def check_like(name: str, value: Any, state: Tensor, state_name: str) -> Tensor:
    """A floating tensor of the state's shape on the state's device; its dtype may differ."""
    if value.__class__ is not Tensor or value.dtype not in FLOATING or value.layout is not torch.strided:
        check_state(name, value)
    if value.shape != state.shape:
        raise ValueError(f"{name} must have the shape of {state_name}, {tuple(state.shape)}, got {describe(value)}")
    if not (value.is_cpu and state.is_cpu) and value.device != state.device:
        raise ValueError(f"{name} must be on {state.device} like {state_name}, got {describe(value)}")
    return value


def check_number(
    name: str, value: Any, state: Tensor, lowest: float = -math.inf, highest: float = math.inf, open_ends: bool = False
) -> float | Tensor:
    """A float, or a floating tensor of one number per row: shapes (), (1,) and (B,) are accepted.

    Python numbers are range-checked here; the values of a tensor are not read (see the module's note).
    """
    if type(value) is float and lowest < value < highest:
        return value
    if isinstance(value, Tensor):
        return _check_row_numbers(name, value, state)
    if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a number or a tensor of shape () or (B,), got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    inside = lowest < number < highest if open_ends else lowest <= number <= highest
    if not inside or not -math.inf < number < math.inf:
        opening, closing = ("(", ")") if open_ends else ("[", "]")
        raise ValueError(f"{name} must be finite and in {opening}{lowest}, {highest}{closing}, got {number}")
    return number


def _check_row_numbers(name: str, value: Tensor, state: Tensor) -> Tensor:
    count = value.numel()
    if value.dim() > 1 or (count != 1 and count != state.shape[0]):
        wanted = f"one number per row, shape ({state.shape[0]},)"
        raise ValueError(f"{name} must be a number or have {wanted}, got {describe(value)}")
    if not (value.is_cpu and state.is_cpu) and value.device != state.device:
        if value.dim() != 0 or value.device.type != "cpu":
            raise ValueError(f"{name} must be on {state.device} like the state, got {describe(value)}")
        value = value.to(state.device)
    if not _is_compiling() and value.is_neg():
        value = value.resolve_neg()
    dtype = value.dtype
    if dtype is torch.float32 or dtype is torch.float64:
        return value
    if value.is_complex() or dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {describe(value)}")
    return value.to(torch.float64)


def check_sample_ids(sample_ids: Any, state: Tensor) -> Tensor:
    """int64 ids (B,) on the state's device; None means 0 .. B-1."""
    rows = state.shape[0]
    if sample_ids is None:
        return torch.arange(rows, device=state.device)
    if not isinstance(sample_ids, Tensor) or sample_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"sample_ids must be an int64 or int32 tensor of shape ({rows},), got {describe(sample_ids)}")
    if sample_ids.shape != (rows,) or sample_ids.device != state.device:
        raise ValueError(f"sample_ids must have shape ({rows},) on {state.device}, got {describe(sample_ids)}")
    return sample_ids.to(torch.int64).contiguous()


def check_distinct(sample_ids: Tensor) -> Tensor:
    """The ids of probes: equal ones, modulo 2^32, would get equal probes, whose errors do not average out."""
    repeated = sample_ids.shape[0] - (sample_ids & 0xFFFFFFFF).unique().shape[0]
    if repeated:
        raise ValueError(f"sample_ids must be distinct, got {repeated} repeated (they count modulo 2^32)")
    return sample_ids


def check_integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """An integer in [lowest, highest], Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    value = int(value)
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be in [{lowest}, {highest}], got {value}")
    return value


def check_out(name: str, out: Any, like: Tensor, like_name: str) -> Tensor:
    """A tensor to be written must be like `like`, plain and dense; see `check_overlaps` for its memory."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(out)}")
    if out.shape != like.shape or out.dtype is not like.dtype or out.device != like.device:
        raise ValueError(f"{name} must be like {like_name}, {describe(like)}, got {describe(out)}")
    if out.requires_grad or (not _is_compiling() and (out.is_neg() or out.is_conj())):
        raise ValueError(f"{name} must be a plain tensor: no requires_grad, no negative view")
    if not out.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {out.stride()} for shape {tuple(out.shape)}")
    return out


def check_overlaps(name: str, out: Tensor, others: tuple[Any, ...], in_place: bool) -> None:
    """`out` shares no memory with another argument; with `in_place` it may be the very same memory as one.

    Each kernel reads an element before it writes the same one, so only a shift between the two does harm.
    """
    begin = out.data_ptr()
    end = begin + out.nbytes
    for other in others:
        if other.__class__ not in _PLAIN_TYPES or (other is out and in_place):
            continue
        first = other.data_ptr()
        if first < end and not (other.is_contiguous() and first + other.nbytes <= begin):
            _check_overlap(name, out, other, in_place)


def _check_overlap(name: str, out: Tensor, other: Tensor, in_place: bool) -> None:
    first, begin = other.data_ptr(), out.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(other.shape, other.stride(), strict=True))
    if first + (reach + 1) * other.element_size() <= begin or not other.numel() or not out.numel():
        return
    same = in_place and first == begin and other.dtype == out.dtype and other.shape == out.shape
    if not same or not other.is_contiguous():
        wanted = "pass the input itself to work in place, or separate memory" if in_place else "give separate memory"
        raise ValueError(f"{name} overlaps another argument's memory; {wanted}")


PLAIN, DERIVATIVE, OPERATOR = range(3)
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}


def route(arguments: Sequence[Tensor | float | None]) -> int:
    """How these must be computed: by a kernel, by the reference, or through torch's dispatcher.

    DERIVATIVE: torch wants a derivative of, or a transform over, one of them. Kernels know no derivative, and would
    drop the tangent without a word; the torch reference is right in both modes, under vmap, and under torch.jit.trace.
    OPERATOR: a tensor subclass (fake tensors among them) or a dispatch mode has its own idea of what an operator
    does, and a tracer must see one: a kernel called past it would leave only uninitialised memory in the graph.
    """
    grad_enabled = torch.is_grad_enabled()
    transforms = _transforms_active()
    if _tracing_state() is not None:  # torch.jit.trace takes no operator with lists of optional tensors
        return DERIVATIVE
    if _dispatch_modes() > 0:
        return OPERATOR
    for argument in arguments:
        kind = argument.__class__
        if argument is None or kind is float:
            continue
        if kind not in _PLAIN_TYPES:
            return OPERATOR
        if grad_enabled and argument.requires_grad:  # type: ignore[union-attr]
            return DERIVATIVE
        if transforms and _is_transformed(argument):  # type: ignore[arg-type]
            return DERIVATIVE
    return PLAIN


def wants_derivative(arguments: tuple[Tensor | float | None, ...]) -> bool:
    """The DERIVATIVE of `route`, for tensors of any class: what the operator's autograd kernel asks."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return any(_is_transformed(tensor) for tensor in tensors)


def has_derivative(tensor: Tensor) -> bool:
    """Is this a dual, or wrapped by a functorch transform?"""
    return _transforms_active() and _is_transformed(tensor)


def _transforms_active() -> bool:
    return forward_ad._current_level >= 0 or _interpreter_stack() is not None


def _is_transformed(tensor: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
