"""Launches flash attention with tangents: how many queries and keys a program holds, which variant of the kernel.

Every choice follows from dtype, widths and lengths, never from the batch: a head's result is the same bit for bit
whatever its batch-mates. Nothing here waits for the device.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdensity.triton_kernels.dual_attention_kernels import attend

MOST_PROGRAMS = 2**31 - 1
# Triton's interpreter multiplies the bit patterns of bfloat16; there its matrix products run in float32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
}


def _rows_dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if the elements of a row do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _strides(tensor: Tensor, is_dual: bool) -> tuple[int, ...]:
    """(plane, batch, head, row)."""
    strides = tensor.stride()[:-1]
    return strides if is_dual else (0, *strides)


def _vector(tensors: list[Tensor], strides: tuple[int, ...]) -> int:
    """How many elements can be loaded at once, 16 bytes at most: what divides every stride and address."""
    itemsize = tensors[0].element_size()
    vector = math.gcd(16 // itemsize, *strides)
    addresses = [0 if tensor.is_meta else tensor.data_ptr() for tensor in tensors]
    return math.gcd(vector, math.gcd(16, *addresses) // itemsize)


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[str, Tensor | None, tuple[int, ...]]:
    if mask is None:
        return "none", None, (0, 0, 0, 0)
    strides = mask.expand(shape).stride()
    if mask.dtype == torch.bool:
        return "bool", mask.view(torch.uint8), strides
    return "add", mask, strides


def _is_modern(device: torch.device) -> bool:
    """Do the matrix units read from shared memory, as Hopper's and later ones do? Others hold operands in registers."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


def blocks(
    itemsize: int,
    columns: int,
    tangents: int,
    modern: bool,
    padded: bool = False,
    masked: bool = False,
    ragged: bool = False,
) -> dict[str, int]:
    """Queries, keys, tangents and warps of a program, for rows of `columns` elements: what fits without spilling.

    Padded rows, masks, and keys that do not fill the last block of 64 take registers, too.
    """
    roomy = modern and not padded
    if itemsize == 2 and columns <= 64:
        group = 2 if roomy and tangents > 1 and not masked else 1
        keys = 64 if roomy and group == 1 and not masked and not ragged else 32 if modern or not masked else 16
        return {"GROUP": group, "QUERIES": 64, "KEYS": keys, "SLICE": columns, "num_warps": 4, "num_stages": 2}
    if itemsize == 2 and columns <= 128:
        if modern and masked and ragged:
            queries, keys, warps = 64, 16, 8
        elif roomy and not masked and not ragged:
            queries, keys, warps = 128, 32, 8
        else:
            queries, keys, warps = (64, 16, 4) if modern else (128, 16, 8)
        return {"GROUP": 1, "QUERIES": queries, "KEYS": keys, "SLICE": columns, "num_warps": warps, "num_stages": 2}
    # float32 at 64 columns with fewer warps or more queries: Triton 3.9 dies in an assertion of LLVM's vectoriser
    four_warps = (itemsize == 4 and 64 < columns <= 128) or (itemsize == 8 and columns <= 64)
    queries, warps = 32 if itemsize == 2 and columns <= 256 else 16, 4 if four_warps else 8
    return {"GROUP": 1, "QUERIES": queries, "KEYS": 16, "SLICE": 16, "num_warps": warps, "num_stages": 1}


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_dual: bool,
    key_dual: bool,
    value_dual: bool,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    modern: bool = True,
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """(number of programs, arguments, constants) of the kernel's launch."""
    planes, batch, heads, length, v_width = out.shape
    key_heads, keys, width = key.shape[-3:]
    tangents = planes - 1
    columns, v_columns = (max(16, triton.next_power_of_2(size)) for size in (width, v_width))
    kind, mask, mask_strides = _mask(mask, (batch, heads, length, keys))
    padded = (width, v_width) != (columns, v_columns)
    ragged = keys % 64 != 0
    sizes = blocks(out.element_size(), max(columns, v_columns), tangents, modern, padded, kind != "none", ragged)
    if sizes["SLICE"] > 16:
        sizes["SLICE"] = columns
    groups = triton.cdiv(tangents, sizes["GROUP"])
    programs = triton.cdiv(length, sizes["QUERIES"]) * groups * batch * heads
    if programs > MOST_PROGRAMS:
        raise ValueError(f"attention of shape {tuple(out.shape)} needs {programs} programs, more than {MOST_PROGRAMS}")
    query, key, value = (_rows_dense(tensor) for tensor in (query, key, value))
    strides = (*_strides(query, query_dual), *_strides(key, key_dual), *_strides(value, value_dual))
    vector = _vector([query, key, value], strides)
    groups_of_elements = [stride // vector for stride in strides]
    counts = (length, keys, heads, heads // key_heads, tangents, groups, out.stride(0))
    constants = {
        "Q_DUAL": query_dual, "K_DUAL": key_dual, "V_DUAL": value_dual, "MASK": kind, "CAUSAL": causal,
        "VECTOR": vector, "OPERAND": DTYPES[out.dtype], "ACC": tl.float64 if out.itemsize == 8 else tl.float32,
        "EVEN_KEYS": keys % sizes["KEYS"] == 0, "WIDTH": width, "COLUMNS": columns, "V_WIDTH": v_width,
        "V_COLUMNS": v_columns, **sizes,
    }  # fmt: skip
    return programs, (out, query, key, value, mask, scale, *counts, *groups_of_elements, *mask_strides), constants


def launch_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_dual: bool,
    key_dual: bool,
    value_dual: bool,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
) -> None:
    """Run on the caller's current stream; the contract is that of `fastdensity.reference.dual_attention`.

    `out` (1 + K, B, H, L, Ev) is contiguous and not empty. 16-bit operands are multiplied as they are and summed in
    float32; probabilities are rounded to their dtype before they meet the values.
    """
    if key.shape[-2] == 0:
        out.zero_()
        return
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        arguments = (query, key, value, query_dual, key_dual, value_dual, mask, causal, scale, out)
        programs, values, constants = plan(*arguments, modern=_is_modern(out.device))
        attend[programs,](*values, **constants)
