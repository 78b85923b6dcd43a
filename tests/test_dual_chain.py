"""Chains of elementwise operations on duals: the reference, the compiled kernel, and every transform of torch."""

from __future__ import annotations

import math

import pytest
import torch
from dual_chain_cases import (
    assert_as_good_as_eager,
    eager,
    one_step_program,
    plain_torch,
    random_inputs,
    random_program,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdensity._backend import use
from fastdensity.chain_program import STEPS, parse
from fastdensity.ops.dual_chain import dual_chain
from fastdensity.ops.dual_chain_native import launch_cpu
from fastdensity.reference.dual_chain import dual_chain as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GEGLU = "add 0 2;add 1 3;gelu 5;mul 4 6"


def positive(tensor):
    return torch.cat([tensor[:1].abs() + 0.3, tensor[1:]])


def inputs_for(name, dtype=torch.float32, shape=(5, 133)):
    """Two duals of which the first, or for a quotient the second, is positive where the step needs it."""
    first, second = random_inputs([shape, shape], [True, True], dtype=dtype)
    if name in ("log", "sqrt", "rsqrt", "reciprocal"):
        first = positive(first)
    if name == "div":
        second = positive(second)
    return [first, second] if STEPS[name][0] == 2 else [first]


@pytest.mark.parametrize("name", STEPS)
def test_reference_is_forward_mode_differentiation(name):
    inputs = inputs_for(name, torch.float64)
    is_dual = [True] * len(inputs)
    program = one_step_program(name)
    torch.testing.assert_close(
        reference(inputs, is_dual, program), eager(inputs, is_dual, program), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_every_step_in_every_dtype(name, dtype):
    inputs = inputs_for(name, dtype)
    is_dual = [True] * len(inputs)
    program = one_step_program(name)
    assert_as_good_as_eager(dual_chain(inputs, is_dual, program), inputs, is_dual, program)


@pytest.mark.parametrize("is_dual", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_plain_operands_cost_no_tangent_and_change_none(name, is_dual):
    inputs = random_inputs([(4, 70), (70,)], is_dual)
    inputs[1] = inputs[1].abs() + 0.5 if not is_dual[1] else positive(inputs[1])
    program = f"{name} 0 1"
    assert_as_good_as_eager(dual_chain(inputs, list(is_dual), program), inputs, is_dual, program)


SHAPES = st.lists(st.sampled_from([1, 2, 3, 5]), min_size=0, max_size=4)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), shape=SHAPES, flags=st.integers(1, 7), steps=st.integers(1, 7), data=st.data())
def test_random_programs_over_random_broadcasts(seed, shape, flags, steps, data):
    torch.manual_seed(seed)
    is_dual = [bool(flags >> i & 1) for i in range(3)]
    shapes = []
    for _ in range(3):
        kept = shape[data.draw(st.integers(0, len(shape))) :]
        shapes.append(tuple(1 if data.draw(st.booleans()) else size for size in kept))
    program = random_program(seed, 3, is_dual, steps)
    inputs = random_inputs(shapes, is_dual, dtype=torch.float64)
    result = dual_chain(inputs, is_dual, program)
    torch.testing.assert_close(result, reference(inputs, is_dual, program), rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_are_followed_and_nothing_is_copied_wrongly(dtype):
    base = random_inputs([(6, 4, 9)], [True], dtype=dtype)[0]
    projection = random_inputs([(6, 300)], [True], dtype=dtype)[0]
    cases = [
        ([base.transpose(1, 3), base.transpose(1, 3).contiguous()], "mul 0 1;silu 2"),
        ([base[:, :, ::2, 1:], base[:, 1:2, :2, 3:4]], "add 0 1;tanh 2"),
        (list(projection.chunk(2, -1)), "gelu 1;mul 0 2"),
        ([base.expand(3, 6, 4, 9)[:, :, :1].expand(3, 6, 4, 9), base], "sub 0 1"),
    ]
    for inputs, program in cases:
        is_dual = [True, True]
        result = dual_chain(inputs, is_dual, program)
        assert_as_good_as_eager(result, inputs, is_dual, program)
        assert torch.equal(result, dual_chain([tensor.contiguous() for tensor in inputs], is_dual, program))


@pytest.mark.parametrize("columns", [1, 3, 16, 511, 1023, 1024, 1025, 3000])
def test_row_lengths_around_the_block(columns):
    inputs = random_inputs([(7, columns), (columns,), (7, 1)], [True, False, True])
    program, is_dual = "add 0 1;silu 3;mul 4 2", [True, False, True]
    assert_as_good_as_eager(dual_chain(inputs, is_dual, program), inputs, is_dual, program)


@pytest.mark.parametrize(
    "program", ["silu 0", "mul 0 0", "add 0 1;exp 2", "div 1 0", "shift 0 1.5", "add 0 1", "neg 0"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_may_lie_where_the_first_input_lay(program, dtype):
    inputs = random_inputs([(9, 200), (200,)], [True, False], dtype=dtype)
    inputs[0] = positive(inputs[0])
    wanted = dual_chain(inputs, [True, False], program)
    launch_cpu(inputs, [True, False], program, inputs[0])
    assert torch.equal(inputs[0], wanted)


def test_a_row_depends_on_no_other_row_and_on_no_thread_count():
    inputs = random_inputs([(64, 1500), (1500,)], [True, False])
    inputs[0][0, 1] *= 1e9  # beyond the range of the fast sine
    program, is_dual = "add 0 1;sin 2;gelu 3;mul 4 0", [True, False]
    whole = dual_chain(inputs, is_dual, program)
    for row in (0, 2, 63):
        alone = dual_chain([inputs[0][:, row : row + 1], inputs[1]], is_dual, program)
        assert torch.equal(alone[:, 0], whole[:, row])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(dual_chain(inputs, is_dual, program), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [name for name in STEPS if STEPS[name][0] == 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_values_are_torchs(name, dtype):
    x = torch.tensor(
        [0.0, -0.0, math.nan, math.inf, 1e-40, 1e-30, 3.0, -3.0, 88.0, -80.0, 1e4, 20.0, 20.5], dtype=dtype
    )
    x = x[x > 0] if name in ("log", "sqrt", "rsqrt") else x[x.abs() < math.inf] if "gelu" in name else x
    program = one_step_program(name)
    stacked = torch.stack([x, torch.full_like(x, 1.5)])
    result = dual_chain([stacked], [True], program)
    wanted = reference([stacked.double()], [True], program).to(dtype)
    finite = wanted.isfinite()
    torch.testing.assert_close(result[finite], wanted[finite], rtol=5e-6, atol=3e-38)
    assert torch.equal(result[0].isnan(), eager([stacked], [True], program)[0].isnan())


@pytest.mark.parametrize("name", [name for name in STEPS if STEPS[name][0] == 1])
def test_nan_of_any_payload_stays_nan(name):
    bits = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FC001FF, 0x7F800001, 0x7FFFFFFF])
    nan = torch.cat((bits, bits - 2**31)).to(torch.int32).view(torch.float32)
    result = dual_chain([torch.stack([nan, torch.ones_like(nan)])], [True], one_step_program(name))
    assert result[0].isnan().all()


def test_relu_stops_infinite_tangents():
    stacked = torch.tensor([[-1.0, 0.0, 2.0], [math.inf, math.nan, math.inf]])
    assert dual_chain([stacked], [True], "relu 0").tolist() == [[0.0, 0.0, 2.0], [0.0, 0.0, math.inf]]


def test_empty_tensors():
    assert dual_chain([torch.zeros(3, 0, 4)], [True], "silu 0").shape == (3, 0, 4)
    assert dual_chain([torch.zeros(2, 5, 1), torch.zeros(0)], [True, False], "add 0 1").shape == (2, 5, 0)


def test_scalars():
    stacked = torch.tensor([2.0, 1.0, 3.0])
    assert dual_chain([stacked], [True], "square 0").tolist() == [4.0, 4.0, 12.0]


def test_half_types_are_rounded_once():
    inputs = random_inputs([(400,)], [True], dtype=torch.bfloat16)
    program = "shift 0 1.0;silu 1;scale 2 0.37;tanh 3;mul 4 0"
    wanted = reference([inputs[0].float()], [True], program).bfloat16()
    assert (dual_chain(inputs, [True], program) != wanted).float().mean() < 0.01


# torch's transforms


def test_nested_forward_mode():
    x, v, w = torch.randn(3, 5, 4, dtype=torch.float64).unbind()
    program = "silu 0;mul 1 0;gelu 2"

    def dual(z):
        return dual_chain([torch.stack([z, v])], [True], program)[1]

    def plain(z):
        return torch.func.jvp(lambda y: plain_torch(program, [y]), (z,), (v,))[1]

    for mine, theirs in zip(torch.func.jvp(dual, (x,), (w,)), torch.func.jvp(plain, (x,), (w,)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_vmap():
    batch = torch.randn(4, 3, 5, 6)
    bias = torch.randn(6)
    result = torch.vmap(lambda dual: dual_chain([dual, bias], [True, False], "add 0 1;gelu 2"))(batch)
    wanted = torch.stack([dual_chain([dual, bias], [True, False], "add 0 1;gelu 2") for dual in batch])
    torch.testing.assert_close(result, wanted)


def test_backward():
    dual = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    program = "add 0 1;softplus 2;mul 3 0;tanh 4"
    assert torch.autograd.gradcheck(lambda a, b: dual_chain([a, b], [True, False], program), (dual, bias))


def test_compiled_whole():
    inputs = random_inputs([(6, 10), (10,)], [True, False])
    call = torch.compile(
        lambda a, b: dual_chain([a * 2, b], [True, False], "add 0 1;silu 2") + 1, fullgraph=True, backend="aot_eager"
    )
    wanted = dual_chain([inputs[0] * 2, inputs[1]], [True, False], "add 0 1;silu 2") + 1
    torch.testing.assert_close(call(*inputs), wanted)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_operator_is_a_good_citizen():
    inputs = random_inputs([(6, 10), (10,)], [True, False])
    torch.library.opcheck(torch.ops.fastdensity.dual_chain.default, (inputs, [True, False], "add 0 1;silu 2"))


def test_torch_backend_agrees():
    inputs = random_inputs([(6, 10)] * 2 + [(10,)] * 2, [True, True, False, False])
    is_dual = [True, True, False, False]
    with use("torch"):
        wanted = dual_chain(inputs, is_dual, GEGLU)
    torch.testing.assert_close(dual_chain(inputs, is_dual, GEGLU), wanted)


# the language


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("", "unknown step"), ("cube 0", "unknown step"), ("add 0", "2 values"), ("silu 0 1", "1 value"),
        ("scale 0", "a constant"), ("silu 2", "reads value 2"), ("silu -1", "reads value -1"),
        ("silu 0;silu 3", "reads value 3"), ("scale 0 x", "no number"), ("silu 0.5", "no number"),
        ("silu 1", "no dual"), ("silu 0;", "unknown step"),
    ],
)  # fmt: skip
def test_wrong_programs_are_named(program, words):
    inputs = random_inputs([(3,), (3,)], [True, False])
    with pytest.raises(ValueError, match=words):
        dual_chain(inputs, [True, False], program)


def test_wrong_inputs_are_named():
    dual = torch.zeros(3, 4)
    for inputs, is_dual, error, words in (
        ([dual, torch.zeros(4).double()], [True, False], TypeError, "one floating dtype"),
        ([dual.long()], [True], TypeError, "floating"),
        ([dual, torch.zeros(5)], [True, False], ValueError, "broadcast"),
        ([dual, torch.zeros(4, 4)], [True, True], ValueError, "one number of tangents"),
        ([dual[:1]], [True], ValueError, r"\(1 \+ K"),
        ([dual], [False], ValueError, "at least one"),
        ([dual], [True, False], ValueError, "2 for 1"),
    ):
        with pytest.raises(error, match=words):
            dual_chain(inputs, is_dual, "scale 0 2.0" if len(inputs) == 1 else "add 0 1")


def test_constants_survive_their_repr():
    for constant in (0.1, -1e-30, 1e300, math.pi):
        assert parse(f"scale 0 {constant!r}", (True,)).steps[0].constant == constant
