"""A chain of elementwise operations on duals in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdensity.chain_program import parse, result_shape
from fastdensity.ops.dual_operator import define
from fastdensity.reference import dual_chain as reference


def _empty_result(inputs: list[Tensor], is_dual: list[bool], program: str) -> Tensor:
    parse(program, tuple(is_dual))
    return torch.empty(result_shape(inputs, is_dual), dtype=inputs[0].dtype, device=inputs[0].device)


_run = define("dual_chain", "Tensor[] inputs, bool[] is_dual, str program", reference.dual_chain, _empty_result)


def dual_chain(inputs: list[Tensor], is_dual: list[bool], program: str) -> Tensor:
    """The last value of `program` with its tangents.

    Args:
        inputs: tensors of one floating dtype, each a dual (1 + K, *S_i) or plain (*S_i), of any strides. The S_i
            broadcast to S, aligned on the right.
        is_dual: says of each input which of the two it is; at least one is dual.
        program: steps in the language of `fastdensity.chain_program`, e.g. "add 0 1;gelu 2".

    Returns:
        The dual (1 + K, *S), contiguous. float16 and bfloat16 are computed in float32 and rounded once, at the end.

    Raises:
        ValueError: a step that does not exist or reads a value that does not exist yet; a result that depends on no
            dual; shapes that do not broadcast; different numbers of tangents.
        TypeError: different dtypes, or one that is not floating.
    """
    return _run(inputs, is_dual, program)
