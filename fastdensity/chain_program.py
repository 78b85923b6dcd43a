"""The language of `dual_chain`: a chain of elementwise steps in one line of text.

    add 0 1;gelu 2;mul 3 1

Values are numbered: the inputs 0 .. n-1, then the result of each step n, n+1, ...; the last step is the result. A step
is a name, the numbers of the values that it reads, and for some a constant (a Python float by `repr`). A value is dual
if it is made of a dual; the others are plain and cost no tangent arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# name -> (values read, does a constant follow); the position is the step's number in csrc/dual_chain_simd.h
STEPS: dict[str, tuple[int, bool]] = {
    "add": (2, False),
    "sub": (2, False),
    "mul": (2, False),
    "div": (2, False),
    "scale": (1, True),
    "shift": (1, True),
    "neg": (1, False),
    "silu": (1, False),
    "gelu": (1, False),
    "gelu_tanh": (1, False),
    "relu": (1, False),
    "tanh": (1, False),
    "sigmoid": (1, False),
    "softplus": (1, False),
    "exp": (1, False),
    "log": (1, False),
    "sqrt": (1, False),
    "rsqrt": (1, False),
    "square": (1, False),
    "reciprocal": (1, False),
    "sin": (1, False),
    "cos": (1, False),
    "leaky_relu": (1, True),
    "abs": (1, False),
}
NUMBERS = {name: number for number, name in enumerate(STEPS)}
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what it does, the values that it reads (`right` repeats `left` for unary ones), its constant."""

    name: str
    left: int
    right: int
    constant: float


@dataclass(frozen=True, slots=True)
class Program:
    """Checked steps over `inputs` inputs, whether each value is dual, and the same as numbers for kernels."""

    inputs: int
    steps: tuple[Step, ...]
    is_dual: tuple[bool, ...]
    code: tuple[tuple[int, int, int, float], ...]


@lru_cache(maxsize=1024)
def parse(program: str, is_dual: tuple[bool, ...]) -> Program:
    """Read a program for inputs of which the given ones are dual; ValueError says which step is wrong and why."""
    dual = list(is_dual)
    if not any(dual):
        raise ValueError("is_dual: at least one input must be dual")
    steps = []
    for text in program.split(";"):
        step = _step(text, len(dual))
        steps.append(step)
        dual.append(dual[step.left] or dual[step.right])
    if not dual[-1]:
        raise ValueError(f"program: the result of {program!r} depends on no dual input")
    code = tuple((NUMBERS[step.name], step.left, step.right, step.constant) for step in steps)
    return Program(len(is_dual), tuple(steps), tuple(dual), code)


def _step(text: str, known: int) -> Step:
    name, *words = text.split() or [""]
    if name not in STEPS:
        raise ValueError(f"program: unknown step {text!r}, expected one of {', '.join(STEPS)}")
    arity, has_constant = STEPS[name]
    if len(words) != arity + has_constant:
        wanted = f"{arity} value{'s' * (arity > 1)}{' and a constant' * has_constant}"
        raise ValueError(f"program: step {text!r} must name {wanted}, got {len(words)} words")
    try:
        values = [int(word) for word in words[:arity]]
        constant = float(words[arity]) if has_constant else 0.0
    except ValueError as error:
        raise ValueError(f"program: step {text!r} holds a word that is no number ({error})") from None
    for value in values:
        if not 0 <= value < known:
            raise ValueError(f"program: step {text!r} reads value {value}, but only 0 to {known - 1} exist there")
    return Step(name, values[0], values[-1], constant)


def result_shape(inputs: list[Tensor], is_dual: list[bool]) -> tuple[int, ...]:
    """(1 + K, *S) of a chain over these inputs; ValueError or TypeError where they do not fit together."""
    if not inputs or len(inputs) != len(is_dual):
        raise ValueError(f"is_dual must say of each input whether it is dual: {len(is_dual)} for {len(inputs)} inputs")
    lead = None  # sizes may be symbols of a compiler: compared, never hashed
    for number, (tensor, dual) in enumerate(zip(inputs, is_dual, strict=True)):
        if tensor.dtype not in FLOATING or tensor.dtype != inputs[0].dtype:
            raise TypeError(f"inputs must share one floating dtype, got {tensor.dtype} after {inputs[0].dtype}")
        if dual and (tensor.dim() == 0 or tensor.shape[0] < 2):
            raise ValueError(f"inputs[{number}] must be a dual, (1 + K, *), got shape {tuple(tensor.shape)}")
        if dual and lead is not None and tensor.shape[0] != lead:
            raise ValueError(
                f"inputs must hold duals of one number of tangents, got {lead} and {tensor.shape[0]} planes"
            )
        lead = tensor.shape[0] if dual else lead
    assert lead is not None  # `parse` has seen a dual
    shapes = [tensor.shape[1:] if dual else tensor.shape for tensor, dual in zip(inputs, is_dual, strict=True)]
    if all(shape == shapes[0] for shape in shapes):
        return (lead, *shapes[0])
    sizes = _broadcast(shapes)
    if sizes is None:
        listed = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"inputs must broadcast against each other, got shapes {listed} (without tangents)")
    return (lead, *sizes)


def _broadcast(shapes: list[torch.Size]) -> list[int] | None:
    """What torch.broadcast_shapes says, which takes as long as a small chain; None where they do not fit together."""
    rank = max(map(len, shapes))
    found: list[int] = [1] * rank
    for shape in shapes:
        for position, size in enumerate(shape, rank - len(shape)):
            if found[position] == 1:
                found[position] = size
            elif size not in (1, found[position]):
                return None
    return found
