"""Layer, root-mean-square and group norms of dual tensors: reference, operator, C++ kernels."""

from __future__ import annotations

import math

import pytest
import torch
from dual_norm_cases import DTYPES, Case, assert_as_good_as_eager, distance, group, layer, random

from fastdensity._backend import use
from fastdensity.ops.dual_norm import dual_group_norm, dual_layer_norm, dual_rms_norm

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch"])
KINDS = (
    lambda: layer(3, (2, 3, 8), 8, rows=2),
    lambda: layer(3, (2, 3, 8), 8, rows=2, rms=True),
    lambda: group(3, (2, 6, 5), 3),
)
EACH_KIND = pytest.mark.parametrize("make", KINDS, ids=["layer", "rms", "group"])


def cases():
    """Every option, sizes around the lanes (64), the chunks (2,048) and the blocks (16,384) of the CPU kernels."""
    yield layer(2, (3, 7), 7, affine=False)
    yield layer(4, (2, 3, 5, 7), 35, rows=2)
    yield layer(3, (4, 1), 1, rows=4)
    for size in (15, 16, 63, 64, 65, 127, 384, 2_047, 2_049, 5_000):
        yield layer(3, (6, size), size, affine=size % 2 == 0, rows=(None, 1, 2, 3, 6)[size % 5], rms=size % 3 == 0)
    yield layer(2, (3, 40_000), 40_000, rows=1)
    yield layer(9, (150, 256), 256, rows=75)
    for shape, groups in (((2, 6), 2), ((3, 8, 1), 8), ((2, 4, 3, 3), 2), ((1, 6, 33, 65), 2), ((5, 32, 16, 16), 8)):
        yield group(3, shape, groups, activation="silu" if len(shape) > 3 else "none")
    yield group(2, (2, 4, 9), 1, affine=False)
    yield group(2, (2, 4, 9), 4, affine=False, activation="none")


def options(case: Case, position: int, value: object) -> Case:
    changed = list(case.arguments)
    changed[position] = value
    return Case(case.name, case.x, tuple(changed))


def test_reference_is_the_jvp_of_torch():
    for case in cases():
        if case.x.shape[1:].numel() // case.x.shape[1] > 1 or case.name != "dual_group_norm":
            torch.testing.assert_close(case.reference(), case.eager(), rtol=1e-12, atol=1e-12, msg=str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_as_good_as_eager(dtype):
    for case in cases():
        assert_as_good_as_eager(case.to(dtype), case.to(dtype).op())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@EACH_KIND
def test_plain_tensors_of_other_dtypes(make, dtype):
    case = make()
    mixed = Case(case.name, case.x.to(dtype), case.to(torch.float32).arguments)
    wanted = Case(case.name, mixed.x.double(), mixed.to(torch.float64).arguments).reference()
    assert distance(mixed.op(), wanted) < torch.finfo(dtype).eps
    in_double = Case(case.name, case.x.float(), case.arguments).op()  # plain tensors in float64 beside a float32 x
    assert in_double.dtype is torch.float32
    assert distance(in_double, case.reference()) < 1e-6


@pytest.mark.parametrize("size", [100, 3_000])
def test_a_large_mean_costs_no_digits(size):
    for case in (layer(3, (4, size), size, affine=False), group(3, (2, 4, size // 2), 2, activation="none")):
        shifted = Case(case.name, (case.x + 1e4).float(), case.to(torch.float32).arguments)
        wanted = Case(case.name, shifted.x.double(), case.arguments).reference()
        assert distance(shifted.op(), wanted) < 5e-7


def test_sums_over_long_rows_keep_their_digits():
    case = layer(2, (1, 600_000), 600_000, affine=False, rms=True)
    positive = Case(case.name, case.x.abs(), case.arguments)
    wanted = positive.reference()
    assert distance(positive.to(torch.float32).op(), wanted) < 2e-7


def test_silu_far_from_zero():
    bias = torch.linspace(-150, 150, 4_000, dtype=torch.float64)
    x = random(2, 1, 4_000, 8)
    case = Case("dual_group_norm", x, (4_000, None, bias, 1e-5, "silu"))
    got, wanted = case.to(torch.float32).op(), case.to(torch.float32).to(torch.float64).reference()
    torch.testing.assert_close(got.double(), wanted, rtol=5e-5, atol=5e-6)
    assert got.isfinite().all()


def test_exponential_of_silu_is_accurate():
    # weight 1, groups of two opposite elements and a fixed spread: y = bias + 1 and bias - 1 exactly
    bias = torch.linspace(-80, 20, 20_001).double()
    x = torch.tensor([1.0, -1.0]).expand(2, 1, 20_001, 2).contiguous()
    got = dual_group_norm(x, 20_001, None, bias.float(), 0.0, "silu")[0, 0].double()
    y = (bias.float()[:, None] + torch.tensor([1.0, -1.0])).double()
    wanted = y * torch.sigmoid(y)
    error = (got - wanted).abs() / wanted.abs().clamp(min=1e-300)
    assert error[wanted.abs() > 1e-30].max() < 5e-7


@EACH_KIND
def test_rows_do_not_depend_on_their_batch_or_the_threads(make):
    case = make().to(torch.float32)
    whole = case.op()
    halved = (a[:1] if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in case.arguments)
    alone = Case(case.name, case.x[:, :1], tuple(halved)).op()
    assert torch.equal(alone, whole[:, :1])


def test_threads_and_blocks_change_no_bits():
    results = []
    threads = torch.get_num_threads()
    for case in (layer(3, (2, 50, 384), 384, rows=2), group(3, (4, 32, 24, 24), 8)):
        single = case.to(torch.float32)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(single.op())
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[-1], results[-2])
        assert torch.equal(results[-1], results[-3])


@EACH_KIND
@BACKENDS
def test_any_strides(make, backend):
    case = make()
    with use(backend):
        expected = case.op()
        strided = Case(case.name, case.x.transpose(0, -1).contiguous().transpose(0, -1), case.arguments)
        assert not strided.x.is_contiguous()
        torch.testing.assert_close(strided.op(), expected, rtol=1e-13, atol=1e-14)
        spread = [a.repeat_interleave(2, -1)[..., ::2] if isinstance(a, torch.Tensor) else a for a in case.arguments]
        torch.testing.assert_close(Case(case.name, case.x, tuple(spread)).op(), expected, rtol=1e-13, atol=1e-14)
        negative = torch._neg_view(-case.x)
        torch.testing.assert_close(Case(case.name, negative, case.arguments).op(), expected, rtol=1e-13, atol=1e-14)


def test_modulation_of_one_row_each_and_of_different_lengths():
    case = layer(3, (6, 20), 20, rows=6)
    each = options(case, 4, random(2, 20))
    wanted = each.reference()
    for row in range(6):
        multiplier, addend = each.arguments[4][row // 3], each.arguments[5][row]
        one = dual_layer_norm(each.x[:, row], 20, *each.arguments[1:4], multiplier, addend)
        torch.testing.assert_close(wanted[:, row], one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(each.op(), wanted, rtol=1e-12, atol=1e-12)


def test_a_value_without_tangents_and_constant_rows():
    case = layer(1, (4, 50), 50)
    torch.testing.assert_close(case.op()[0], case.plain(case.x[0]), rtol=1e-12, atol=1e-12)
    constant = dual_layer_norm(torch.full((2, 3, 300), 7.1), 300)
    assert torch.equal(constant, torch.zeros(2, 3, 300))


@EACH_KIND
def test_nan_and_infinity_stay_in_their_row(make):
    for special in (math.nan, math.inf):
        case = make()
        expected = case.op()
        case.x[0, 0, 0, 0] = special
        got = case.op()
        rest = got[:, 1:]
        assert torch.equal(rest, expected[:, 1:])
        assert got[0, 0].isnan().any()


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_empty(shape, backend):
    x = torch.zeros(shape)
    size, channels = shape[2], shape[2]
    with use(backend):
        assert dual_layer_norm(x, size, torch.ones(size), None, 1e-5, torch.ones(1, size)).shape == x.shape
        assert dual_rms_norm(x, size).shape == x.shape
        assert dual_group_norm(x, 1, torch.ones(channels), activation="silu").shape == x.shape
        assert dual_group_norm(torch.zeros(2, 2, 4, 0), 2).shape == (2, 2, 4, 0)


def written_out_layer_norm(x, shape, weight, bias, eps):
    """torch's own is wrong in nested forward mode: it takes mean and variance for constants."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


@EACH_KIND
def test_nested_forward_mode(make, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "layer_norm", written_out_layer_norm)
    case = make()
    direction = random(*case.x.shape)
    value, tangent = torch.func.jvp(lambda x: Case(case.name, x, case.arguments).op(), (case.x,), (direction,))
    torch.testing.assert_close(value, case.reference(), rtol=1e-12, atol=1e-12)

    def second(k):  # the derivative of (x, v) -> d plain(x) v along the direction, by torch alone
        inner = lambda x, v: torch.func.jvp(case.plain, (x,), (v,))[1]  # noqa: E731
        return torch.func.jvp(inner, (case.x[0], case.x[k]), (direction[0], direction[k]))[1]

    first = torch.func.jvp(case.plain, (case.x[0],), (direction[0],))[1]
    wanted = torch.stack([first, *(second(k) for k in range(1, case.x.shape[0]))])
    torch.testing.assert_close(tangent, wanted, rtol=1e-10, atol=1e-10)


@EACH_KIND
def test_forward_mode_nested_twice(make):
    case = make()
    direction = random(*case.x.shape)

    def first(s):
        return torch.func.jvp(
            lambda x: Case(case.name, x, case.arguments).op(), (case.x + s * direction,), (direction,)
        )

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    second = torch.func.jvp(lambda s: first(s)[1], (zero,), (one,))[1]
    step = 1e-5
    torch.testing.assert_close(second, (first(step)[1] - first(-step)[1]) / (2 * step), rtol=1e-5, atol=1e-5)


@EACH_KIND
def test_derivatives_along_plain_tensors(make):
    case = make()
    place = next(i for i, argument in enumerate(case.arguments) if isinstance(argument, torch.Tensor))
    weight, direction = case.arguments[place], random(*case.arguments[place].shape)
    got = torch.func.jvp(lambda w: options(case, place, w).op(), (weight,), (direction,))[1]
    wanted = torch.func.jvp(lambda w: options(case, place, w).eager(), (weight,), (direction,))[1]
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    step = 1e-6
    beyond, before = options(case, place, weight + step * direction), options(case, place, weight - step * direction)
    torch.testing.assert_close(got, (beyond.op() - before.op()) / (2 * step), rtol=1e-6, atol=1e-7)


@EACH_KIND
def test_vmap(make):
    case = make()
    batch = random(4, *case.x.shape)
    got = torch.vmap(lambda x: Case(case.name, x, case.arguments).op())(batch)
    wanted = torch.stack([Case(case.name, x, case.arguments).op() for x in batch])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@EACH_KIND
def test_backward(make):
    case = make()
    tensors = [case.x, *(a for a in case.arguments if isinstance(a, torch.Tensor))]
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]

    def call(x, *plain):
        left = iter(plain)
        arguments = (next(left) if isinstance(a, torch.Tensor) else a for a in case.arguments)
        return Case(case.name, x, tuple(arguments)).op()

    assert torch.autograd.gradcheck(call, tensors)


@EACH_KIND
def test_compile_and_operator_checks(make):
    case = make().to(torch.float32)
    compiled = torch.compile(lambda x: Case(case.name, x * 2, case.arguments).op() + 1, fullgraph=True, backend="eager")
    wanted = Case(case.name, case.x * 2, case.arguments).op() + 1
    torch.testing.assert_close(compiled(case.x), wanted)
    operator = getattr(torch.ops.fastdensity, case.name).default
    torch.library.opcheck(operator, (case.x, *case.arguments))


def test_compiled_by_inductor():
    case = layer(3, (2, 3, 8), 8, rows=2).to(torch.float32)
    compiled = torch.compile(lambda x: (Case(case.name, x * 2, case.arguments).op() + 1).relu(), fullgraph=True)
    wanted = (Case(case.name, case.x * 2, case.arguments).op() + 1).relu()
    torch.testing.assert_close(compiled(case.x), wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dual_layer_norm(x, 5), "size must be a product of trailing dimensions"),
        (lambda x: dual_layer_norm(x, 16), "size must be a product of trailing dimensions"),
        (lambda x: dual_layer_norm(x, 8, torch.ones(7)), "weight must have 8 elements, got a float32 tensor"),
        (lambda x: dual_layer_norm(x, 8, None, torch.ones(9)), "bias must have 8 elements"),
        (lambda x: dual_layer_norm(x, 8, multiplier=torch.ones(12)), "multiplier must have M rows of 8 elements"),
        (lambda x: dual_rms_norm(x, 8, addend=torch.ones(4, 8)), "addend must have .* M a divisor of the 6 rows"),
        (lambda x: dual_rms_norm(x, 8, torch.ones(8, device="meta")), "weight must be on cpu like x"),
        (lambda x: dual_group_norm(x[0, 0], 1), r"x must be a dual of shape \(1 \+ K, B, C, \*\)"),
        (lambda x: dual_group_norm(x, 2), "groups must divide the 3 channels of x, got 2"),
        (lambda x: dual_group_norm(x, 0), "groups must divide"),
        (lambda x: dual_group_norm(x, 3, torch.ones(8)), "weight must have 3 elements"),
        (lambda x: dual_group_norm(x, 3, activation="relu"), "activation must be one of none, silu, got 'relu'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 2, 3, 8))
