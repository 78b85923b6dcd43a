"""From checked arguments to a launch, and the same as a torch operator where torch has to see one.

Plain tensors go straight to the backend's launcher. Three kinds of call do not:
- under torch.compile or a dispatch mode, or with fake tensors, `torch.ops.fastdensity.rows` is called: it has a fake
  implementation, so graphs capture it whole;
- a tensor that carries a derivative (requires_grad, a forward-mode dual, any functorch transform) is computed by
  the torch reference, which torch differentiates, and torch.jit.trace records that. A kernel would drop the tangent
  without a word;
- negative views and rows that are not dense are made plain first.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastdensity._backend import launcher
from fastdensity.boundary import (
    DERIVATIVE,
    OPERATOR,
    check_out,
    check_overlaps,
    describe,
    has_derivative,
    route,
    wants_derivative,
)
from fastdensity.reference import rows as reference
from fastdensity.reference.rows import NoiseKey, Operands, Parameter

_is_compiling = torch.compiler.is_compiling


def run(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    out: Tensor | None,
    report: Tensor | Literal[True] | None,
    like_name: str,
) -> tuple[Tensor, Tensor | None]:
    """(out, report): the one entry of the family. `report` True allocates one, None skips it."""
    like = reference.result_like(rule, operands)
    everything = operands + parameters
    if noise_key is not None:
        everything = (*everything, noise_key[1])
    how = prepare(like, operands, everything, out, report, like_name)
    given_report = report if isinstance(report, Tensor) else None
    if how == OPERATOR:
        return _deliver(*_through_operator(rule, kind, operands, parameters, noise_key), out, given_report)
    if how == DERIVATIVE:
        return _through_reference(rule, kind, operands, parameters, noise_key, like)
    results = _launch(rule, kind, operands, parameters, noise_key, out, report, like)
    mark_written(out, given_report)
    return results


def prepare(
    like: Tensor,
    operands: Operands,
    everything: tuple[Any, ...],
    out: Tensor | None,
    report: Tensor | Literal[True] | None,
    like_name: str,
) -> int:
    """Checks what is to be written; says whether a kernel may run: PLAIN, OPERATOR or DERIVATIVE of the boundary."""
    given_report = report if isinstance(report, Tensor) else None
    if out is not None:
        check_out("out", out, like, like_name)
    if report is not None and report is not True:
        _check_report(report, like, operands)
    if _is_compiling():
        return OPERATOR
    how = route(everything)
    if out is not None or given_report is not None:
        _check_memory(out, given_report, everything, how)
    return how


def mark_written(*written: Tensor | None) -> None:
    """Autograd must notice that a tensor it may have saved is another one now."""
    for tensor in written:
        if tensor is not None and not tensor.is_inference():
            increment_version(tensor)


def new_result(like: Tensor) -> Tensor:
    """Dense memory for a result like this."""
    if like.is_contiguous():  # naming the format costs a fifth of the allocation
        return torch.empty_like(like)
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _check_memory(out: Tensor | None, report: Tensor | None, arguments: tuple[Any, ...], how: int) -> None:
    """What is to be written must be free to be written: no derivative in sight, no other argument's memory."""
    traced = (out is not None and has_derivative(out)) or (report is not None and has_derivative(report))
    if how == DERIVATIVE or traced:
        raise ValueError("out and report cannot be written where a derivative is asked; leave them away")
    if out is not None and out.__class__ is Tensor:
        check_overlaps("out", out, arguments, in_place=True)
    if report is not None and report.__class__ is Tensor:
        check_overlaps("report", report, (*arguments, out), in_place=False)


def _launch(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    out: Tensor | None,
    report: Tensor | Literal[True] | None,
    like: Tensor,
) -> tuple[Tensor, Tensor | None]:
    for operand in operands:
        if operand is not None and (operand.is_neg() or not operand.is_contiguous()):
            operands = _dense_rows(operands)
            break
    if out is None:
        out = new_result(like)
    if report is True:
        report = torch.empty((like.shape[0], 4), dtype=reference.compute_dtype(operands), device=like.device)
    if out.numel() == 0:
        return out, None if report is None else report.zero_()
    launch = launcher("rows", "cpu" if like.is_cpu else like.device.type)
    launch(rule, kind, operands, parameters, noise_key, out, report)
    return out, report


def _dense_rows(operands: Operands) -> Operands:
    """Operands whose rows each lie densely in memory, whatever the stride between rows; copies where needed."""
    return tuple(None if operand is None else _dense(operand) for operand in operands)  # type: ignore[return-value]


def _dense(operand: Tensor) -> Tensor:
    if operand.is_neg():
        operand = operand.resolve_neg()
    if operand.is_contiguous():
        return operand
    expected = 1
    for size, stride in zip(reversed(operand.shape[1:]), reversed(operand.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return operand.contiguous()
        expected *= size
    return operand


def _check_report(report: Any, like: Tensor, operands: Operands) -> None:
    dtype = reference.compute_dtype(operands)
    if isinstance(report, Tensor) and (report.shape != (like.shape[0], 4) or report.dtype is not dtype):
        raise ValueError(f"report must be {dtype} of shape ({like.shape[0]}, 4), got {describe(report)}")
    check_out("report", report, report, "report")
    if report.device != like.device:
        raise ValueError(f"report must be on {like.device}, got {describe(report)}")


def _deliver(result: Tensor, numbers: Tensor, out: Tensor | None, report: Tensor | None) -> tuple[Tensor, Tensor]:
    if isinstance(report, Tensor):
        numbers = report.copy_(numbers)
    return (result if out is None else out.copy_(result)), numbers


def _through_reference(
    rule: str,
    kind: str,
    operands: Operands,
    parameters: tuple[Parameter, ...],
    noise_key: NoiseKey | None,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    result, numbers = reference.rows(rule, kind, reference.flatten(operands), parameters, noise_key)
    return result.reshape(like.shape), numbers


def _through_operator(
    rule: str, kind: str, operands: Operands, parameters: tuple[Parameter, ...], noise_key: NoiseKey | None
) -> tuple[Tensor, Tensor]:
    tensors = [parameter if isinstance(parameter, Tensor) else None for parameter in parameters]
    values = [0.0 if isinstance(parameter, Tensor) else parameter for parameter in parameters]
    seed, sample_ids, step = (0, None, 0) if noise_key is None else noise_key
    return torch.ops.fastdensity.rows(rule, kind, list(operands), tensors, values, sample_ids, seed, step)


_library = torch.library.Library("fastdensity", "DEF")
_library.define(
    "rows(str rule, str kind, Tensor?[] operands, Tensor?[] tensors, float[] values, "
    "Tensor? sample_ids, int seed, int step) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _unpack(call: tuple[Any, ...]) -> tuple[str, str, Operands, tuple[Parameter, ...], NoiseKey | None, Tensor]:
    rule, kind, operands, tensors, values, sample_ids, seed, step = call
    parameters = tuple(
        value if tensor is None else tensor.resolve_neg() for tensor, value in zip(tensors, values, strict=True)
    )
    noise_key = None if sample_ids is None else (seed, sample_ids, step)
    return rule, kind, tuple(operands), parameters, noise_key, reference.result_like(rule, operands)


def _rows_kernel(*call: Any) -> tuple[Tensor, Tensor]:
    rule, kind, operands, parameters, noise_key, like = _unpack(call)
    result, report = _launch(rule, kind, operands, parameters, noise_key, None, True, like)
    assert report is not None
    return result, report


def _rows_fake(*call: Any) -> tuple[Tensor, Tensor]:
    _, _, operands, _, _, like = _unpack(call)
    report = like.new_empty((like.shape[0], 4), dtype=reference.compute_dtype(operands))
    return torch.empty_like(like, memory_format=torch.contiguous_format), report


def _rows_autograd(*call: Any) -> tuple[Tensor, Tensor]:
    """Where torch may want a derivative: the reference, in operations torch knows; else on to the kernel."""
    rule, kind, operands, parameters, noise_key, like = _unpack(call)
    if not wants_derivative(operands + parameters):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fastdensity.rows(*call)
    return _through_reference(rule, kind, operands, parameters, noise_key, like)


_library.impl("rows", _rows_kernel, "CompositeExplicitAutograd")
_library.impl("rows", _rows_autograd, "Autograd")
torch.library.register_fake("fastdensity::rows", _rows_fake, lib=_library)
