"""Programs for `dual_chain` in plain torch, random problems, and the tolerance of a kernel; for the tests of chains."""

from __future__ import annotations

import random

import torch
from torch.nn import functional

from fastdensity.chain_program import STEPS
from fastdensity.reference.dual_chain import dual_chain as reference

TORCH = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "scale": torch.mul, "shift": torch.add,
    "neg": torch.neg, "silu": functional.silu, "gelu": functional.gelu, "relu": torch.relu, "tanh": torch.tanh,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid,
    "softplus": functional.softplus, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "square": torch.square, "reciprocal": torch.reciprocal, "sin": torch.sin, "cos": torch.cos,
    "leaky_relu": functional.leaky_relu, "abs": torch.abs,
}  # fmt: skip
POSITIVE = ("log", "sqrt", "rsqrt", "reciprocal", "div")  # where an argument near zero would swamp a tolerance


def plain_torch(program, values):
    """The program as anybody would write it; nothing here knows of fastdensity's parser or rules."""
    values = list(values)
    for text in program.split(";"):
        name, *words = text.split()
        arity, has_constant = STEPS[name]
        arguments = [values[int(word)] for word in words[:arity]] + [float(word) for word in words[arity:]]
        values.append(TORCH[name](*arguments))
        assert len(arguments) == arity + has_constant
    return values[-1]


def eager(inputs, is_dual, program):
    """(1 + K, *S) by torch.func.jvp of the plain function, tangent by tangent, in the inputs' dtype."""

    def function(*duals):
        given = iter(duals)
        values = [next(given) if dual else tensor for tensor, dual in zip(inputs, is_dual, strict=True)]
        return plain_torch(program, values)

    duals = [tensor.contiguous() for tensor, dual in zip(inputs, is_dual, strict=True) if dual]
    primals = tuple(dual[0] for dual in duals)
    parts = []
    for k in range(1, duals[0].shape[0]):
        value, tangent = torch.func.jvp(function, primals, tuple(dual[k] for dual in duals))
        parts = [*(parts or [value]), tangent]
    return torch.stack(parts)


def assert_as_good_as_eager(result, inputs, is_dual, program):
    """Norm-wise against float64: at most twice eager's error at the same dtype, or two roundings."""
    exact = reference([tensor.double() for tensor in inputs], is_dual, program)
    other = eager(inputs, is_dual, program)
    assert result.shape == exact.shape
    assert result.dtype == inputs[0].dtype
    assert result.is_contiguous()
    epsilon = torch.finfo(result.dtype).eps
    for mine, theirs, wanted in zip(result.double(), other.double(), exact, strict=True):
        size = wanted.norm()
        assert (mine - wanted).norm() <= 2 * (theirs.expand(wanted.shape) - wanted).norm() + 2 * epsilon * size


def one_step_program(name):
    """Each step alone, on input 0 (and 1)."""
    arity, has_constant = STEPS[name]
    return f"{name} 0{' 1' if arity == 2 else ''}{' 0.3' if has_constant else ''}"


def random_program(seed, inputs, is_dual, steps):
    """Steps whose values stay within a few units: what could blow up is squashed first."""
    choose = random.Random(seed)
    texts, dual = [], list(is_dual)

    def push(text, *values):
        texts.append(text)
        dual.append(any(dual[value] for value in values))
        return len(dual) - 1

    for number in range(steps):
        name = choose.choice(list(STEPS))
        arity, has_constant = STEPS[name]
        values = [choose.randrange(len(dual)) for _ in range(arity)]
        if number == steps - 1:
            values[0] = choose.choice([value for value, is_one in enumerate(dual) if is_one])
        if name in POSITIVE:
            values[-1] = push(f"shift {push(f'square {values[-1]}', values[-1])} 0.5", values[-1])
        values[0] = push(f"tanh {values[0]}", values[0]) if name in ("exp", "mul", "square") else values[0]
        constant = f" {choose.uniform(-2, 2)!r}" if has_constant else ""
        push(f"{name} {' '.join(map(str, values))}{constant}", *values)
    if not dual[-1]:
        push(f"add 0 {len(dual) - 1}", 0)
    return ";".join(texts)


def random_inputs(shapes, is_dual, tangents=2, dtype=torch.float32):
    return [
        torch.randn((1 + tangents, *shape) if dual else shape, dtype=torch.float64).to(dtype)
        for shape, dual in zip(shapes, is_dual, strict=True)
    ]
