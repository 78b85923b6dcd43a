"""Checks at the boundary: every public function validates its arguments here, once, before any kernel runs.

Errors name the argument, what came and what was wanted. Values that live inside device tensors cannot be looked
at without a synchronisation; those turn up in the per-row flags of a result instead (`fastdensity.rules`).
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_interpreter_stack = torch._C._functorch.peek_interpreter_stack


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
    if type(value) is Tensor and value.shape == state.shape and value.device == state.device:
        if value.dtype in FLOATING and value.layout is torch.strided:
            return value
    check_state(name, value)
    if value.shape != state.shape:
        raise ValueError(f"{name} must have the shape of {state_name}, {tuple(state.shape)}, got {describe(value)}")
    if value.device != state.device:
        raise ValueError(f"{name} must be on {state.device} like {state_name}, got {describe(value)}")
    return value


def check_number(
    name: str, value: Any, state: Tensor, lowest: float = -math.inf, highest: float = math.inf, open_ends: bool = False
) -> float | Tensor:
    """A float, or a floating tensor of one number per row: shapes (), (1,) and (B,) are accepted.

    Python numbers are range-checked here; the values of a tensor are not read (see the module's note).
    """
    if isinstance(value, Tensor):
        return _check_row_numbers(name, value, state)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number or a tensor of shape () or (B,), got {describe(value)}")
    number = float(value)
    inside = lowest < number < highest if open_ends else lowest <= number <= highest
    if not inside or not math.isfinite(number):
        opening, closing = ("(", ")") if open_ends else ("[", "]")
        raise ValueError(f"{name} must be finite and in {opening}{lowest}, {highest}{closing}, got {number}")
    return number


def _check_row_numbers(name: str, value: Tensor, state: Tensor) -> Tensor:
    rows = state.shape[0]
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, rows)):
        raise ValueError(f"{name} must be a number or have one number per row, shape ({rows},), got {describe(value)}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {describe(value)}")
    if value.device != state.device:
        if value.dim() != 0 or value.device.type != "cpu":
            raise ValueError(f"{name} must be on {state.device} like the state, got {describe(value)}")
        value = value.to(state.device)
    if value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float64)
    return value


def check_sample_ids(sample_ids: Any, state: Tensor) -> Tensor:
    """int64 ids (B,) on the state's device; None means 0 .. B-1."""
    rows = state.shape[0]
    if sample_ids is None:
        return torch.arange(rows, device=state.device)
    if not isinstance(sample_ids, Tensor) or sample_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"sample_ids must be an int64 tensor of shape ({rows},), got {describe(sample_ids)}")
    if sample_ids.shape != (rows,) or sample_ids.device != state.device:
        raise ValueError(f"sample_ids must have shape ({rows},) on {state.device}, got {describe(sample_ids)}")
    return sample_ids.to(torch.int64).contiguous()


def check_integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """A Python integer in [lowest, highest]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be in [{lowest}, {highest}], got {value}")
    return value


def check_out(out: Any, like: Tensor, like_name: str, operands: tuple[Tensor | None, ...]) -> Tensor:
    """`out` must be writable as it is: right shape, dtype, device, dense rows, no partial overlap with an operand."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {describe(out)}")
    if out.shape != like.shape or out.dtype != like.dtype or out.device != like.device:
        raise ValueError(f"out must be like {like_name}, {describe(like)}, got {describe(out)}")
    if out.requires_grad or out.is_neg() or out.is_conj():
        raise ValueError("out must be a plain tensor: no requires_grad, no negative view")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()} for shape {tuple(out.shape)}")
    if out.numel():
        begin, end = _extent(out)
        for operand in operands:
            if operand is not None and operand.numel() and operand.device == out.device:
                _check_overlap(out, operand, begin, end)
    return out


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a tensor touches."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _check_overlap(out: Tensor, operand: Tensor, begin: int, end: int) -> None:
    first, last = _extent(operand)
    same = first == begin and operand.dtype == out.dtype and operand.stride() == out.stride()
    if first < end and begin < last and not same:
        raise ValueError("out overlaps an input in part; pass the input itself to work in place, or separate memory")


def carries_derivatives(tensors: tuple[Any, ...]) -> bool:
    """Does torch want a derivative of, or a transform over, any of these? Kernels know no derivative.

    Such calls go to the torch reference, which torch differentiates: right in both modes and under vmap.
    """
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return True
    if forward_ad._current_level < 0 and _interpreter_stack() is None:
        return False
    return any(isinstance(t, Tensor) and _is_transformed(t) for t in tensors)


def _is_transformed(tensor: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
