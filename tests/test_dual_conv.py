"""The dual convolution: its reference against torch.func, its CPU kernel against the reference, its derivatives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dual_conv_cases import (
    ACTIVATIONS,
    DTYPES,
    GEOMETRIES,
    Geometry,
    assert_as_good_as_eager,
    by_torch,
    random_arguments,
)

from fastdensity._backend import use
from fastdensity.ops.dual_conv import dual_conv2d
from fastdensity.reference import dual_conv as reference

SMALL = Geometry(channels=4, outputs=4, groups=2, size=(4, 3), stride=(2, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_reference_is_the_jvp_of_the_layer(geometry, activation):
    for bias in (False, True):
        arguments = random_arguments(geometry, torch.float64, bias=bias, activation=activation)
        torch.testing.assert_close(reference.dual_conv(*arguments), by_torch(arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_kernel(geometry, dtype):
    for number, activation in enumerate(ACTIVATIONS):
        for bias in (False, True):
            arguments = random_arguments(geometry, dtype, 1 + number, bias=bias, activation=activation)
            assert_as_good_as_eager(arguments, dual_conv2d(*arguments))


def test_the_backend_torch_rounds_once():
    for dtype in DTYPES:
        arguments = random_arguments(Geometry(), dtype)
        with use("torch"):
            assert_as_good_as_eager(arguments, dual_conv2d(*arguments))


@pytest.mark.parametrize("window", [1, 3])
def test_sizes_of_a_network(window):
    """More elements than one chunk of the kernel, a chunk that ends inside a plane, many tangents, two threads."""
    geometry = Geometry(24, 20, (window, window), padding=(window // 2,) * 2, size=(17, 13))
    arguments = random_arguments(geometry, tangents=9, batch=3)
    single = dual_conv2d(*arguments)
    assert_as_good_as_eager(arguments, single)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(dual_conv2d(*arguments), single)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_does_not_depend_on_the_batch(dtype):
    sizes = (Geometry(size=(8, 8)), Geometry(16, 8, size=(4, 4)), Geometry(16, 8, (1, 1), padding=(0, 0)))
    for geometry in (*sizes, Geometry(6, 6, groups=6)):
        arguments = random_arguments(geometry, dtype, batch=11)
        whole = dual_conv2d(*arguments)
        for first, count in ((0, 1), (4, 3), (10, 1)):
            part = dual_conv2d(arguments[0][:, first : first + count], *arguments[1:])
            if geometry.groups == 1 and dtype in (torch.float32, torch.float64):  # the kernels for small images
                assert torch.equal(part, whole[:, first : first + count])
            # else it is for torch's convolution to say, which picks an algorithm by the batch
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(part, whole[:, first : first + count], rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("geometry", [Geometry(16, 20, size=(8, 8)), Geometry(5, 20, size=(8, 7))], ids=str)
def test_threads_share_images_or_outputs(geometry):
    """More threads than groups of images: channels of the result are cut, and no bit shows it."""
    for batch in (3, 40):
        arguments = random_arguments(geometry, tangents=1, batch=batch)
        threads, found = torch.get_num_threads(), []
        try:
            for number in (1, 2, 3, 16):
                torch.set_num_threads(number)
                found.append(dual_conv2d(*arguments))
        finally:
            torch.set_num_threads(threads)
        assert_as_good_as_eager(arguments, found[0])
        assert all(torch.equal(other, found[0]) for other in found[1:])


def test_zeros_of_a_tile_stay_zeros():
    """Winograd's sums of a pixel alone: where nothing reaches a tile, exact zeros; next to it at most roundings."""
    x, weight = torch.zeros(2, 1, 8, 8, 8), torch.randn(8, 8, 3, 3)
    x[:, :, 0, 1, 1] = 1.0
    y = dual_conv2d(x, weight, None, [1, 1], [1, 1], [1, 1], 1, "none")
    assert not y[..., 4:, :].any()
    assert not y[..., 4:].any()
    expected = torch.nn.functional.conv2d(x[0], weight, padding=1)
    torch.testing.assert_close(y[0], expected, rtol=1e-6, atol=1e-6)


def test_silu_over_the_whole_range():
    """A 1 x 1 window of weight 1 is the activation alone: exp's reduction, both signs, large and tiny arguments."""
    for dtype, tolerance in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        value = torch.cat((torch.linspace(-104, 104, 40_001), torch.logspace(-30, 2, 999), torch.zeros(1)))
        value = torch.cat((value, -value)).to(dtype)
        x = torch.stack((value, torch.ones_like(value)))[:, None, None, None]
        y = dual_conv2d(x, torch.ones(1, 1, 1, 1, dtype=dtype), None, [1, 1], [0, 0], [1, 1], 1, "silu").double()
        z = value.double()
        s, other = z.sigmoid(), (-z).sigmoid()
        assert ((y[0, 0, 0, 0] - z * s).abs() <= tolerance * (z * s).abs() + 1e-30).all()
        assert ((y[1, 0, 0, 0] - s * (1 + z * other)).abs() <= 2 * tolerance).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_non_finite_pixel_stays_in_its_image_and_its_tangents(activation):
    arguments = random_arguments(Geometry(), tangents=2, batch=3, activation=activation)
    clean = dual_conv2d(*arguments)
    arguments[0][0, 1, 2, 3, 3] = float("nan")
    arguments[0][2, 0, 2, 3, 3] = float("inf")
    broken = dual_conv2d(*arguments)
    assert not broken[0, 1].isfinite().all()
    assert not broken[2, 0].isfinite().all()
    torch.testing.assert_close(broken[:, 2], clean[:, 2])
    torch.testing.assert_close(broken[:2, 0], clean[:2, 0])


def test_a_dead_unit_has_no_tangent():
    x = torch.tensor([-1.0, 0.0, 2.0, -3.0, 5.0, 7.0]).reshape(2, 1, 1, 1, 3)
    x[1, ..., 0] = float("inf")
    y = dual_conv2d(x, torch.ones(1, 1, 1, 1), None, [1, 1], [0, 0], [1, 1], 1, "relu")
    assert y.flatten().tolist() == [0.0, 0.0, 2.0, 0.0, 0.0, 7.0]


def test_any_strides():
    arguments = random_arguments(Geometry())
    x, weight, bias, *rest = arguments
    expected = dual_conv2d(*arguments)
    spread = torch.stack((bias, bias), 1)[:, 0]
    last = x.flatten(0, 1).to(memory_format=torch.channels_last).view_as(x)
    for other in (x.transpose(3, 4).contiguous().transpose(3, 4), last, x.flip(0).flip(0), torch._neg_view(-x)):
        for matrix in (weight, weight.to(memory_format=torch.channels_last)):
            for offset in (bias, spread, torch._neg_view(-bias)):
                result = dual_conv2d(other, matrix, offset, *rest)
                assert result.is_contiguous()
                torch.testing.assert_close(result, expected)


def test_arguments_are_left_alone():
    for geometry in GEOMETRIES[:3]:
        arguments = random_arguments(geometry)
        before = [argument.clone() for argument in arguments[:3]]
        dual_conv2d(*arguments)
        assert all(torch.equal(now, then) for now, then in zip(arguments[:3], before, strict=True))


def test_an_empty_batch():
    result = dual_conv2d(torch.randn(3, 0, 6, 7, 6), torch.randn(5, 6, 3, 3), None, [2, 1], [1, 0], [1, 1], 1, "silu")
    assert result.shape == (3, 0, 5, 4, 4)


WRONG = (
    ({"x": torch.randn(2, 6, 7, 6)}, "x must be a dual"),
    ({"x": torch.randn(1, 2, 6, 7, 6)}, "x must be a dual"),
    ({"x": torch.randn(2, 2, 6, 0, 6), "padding": [2, 2]}, "x must not be empty"),
    ({"weight": torch.randn(5, 6, 3)}, "weight must be"),
    ({"weight": torch.randn(5, 0, 3, 3)}, "weight must be"),
    ({"weight": torch.randn(5, 5, 3, 3)}, "groups must divide 6 channels"),
    ({"weight": torch.randn(5, 6, 3, 3).double()}, "weight must have the dtype"),
    ({"groups": 2}, "groups must divide"),
    ({"bias": torch.randn(6)}, "bias must have shape"),
    ({"bias": torch.randn(5).half()}, "bias must have the dtype"),
    ({"stride": [1]}, "stride must be two ints"),
    ({"stride": [0, 1]}, "stride must be two ints of at least 1"),
    ({"padding": [0, -1]}, "padding must be two ints of at least 0"),
    ({"dilation": [1, 0]}, "dilation must be"),
    ({"activation": "gelu"}, "activation must be one of none, relu, silu"),
    ({"padding": [0, 0], "dilation": [4, 1]}, "at least \\[9, 3\\] high and wide"),
)


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_errors_name_what_came_and_what_was_wanted(change, message):
    names = ("x", "weight", "bias", "stride", "padding", "dilation", "groups", "activation")
    named = dict(zip(names, random_arguments(Geometry()), strict=True))
    with pytest.raises(ValueError, match=message):
        dual_conv2d(**{**named, **change})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_through_the_op(activation):
    """The jvp of the op is that of torch's layer, differentiated twice; vmap and backward likewise."""
    arguments = random_arguments(SMALL, torch.float64, activation=activation)
    x, *rest = arguments
    direction = torch.randn_like(x)
    op = lambda dual: dual_conv2d(dual, *rest)  # noqa: E731
    twice = lambda dual: by_torch((dual, *rest))  # noqa: E731
    for got, expected in zip(
        torch.func.jvp(op, (x,), (direction,)), torch.func.jvp(twice, (x,), (direction,)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    stacked = torch.randn(3, *x.shape, dtype=x.dtype)
    expected = torch.stack([op(one) for one in stacked])
    torch.testing.assert_close(torch.vmap(op)(stacked), expected, rtol=1e-12, atol=1e-12)
    inner = [tensor.clone().requires_grad_() for tensor in arguments[:3]]
    assert torch.autograd.gradcheck(lambda *tensors: dual_conv2d(*tensors, *rest[2:]), inner)


def test_compiled():
    arguments = random_arguments(SMALL)
    compiled = torch.compile(partial(dual_conv2d), fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), dual_conv2d(*arguments))


def test_operator():
    for activation in ACTIVATIONS:
        arguments = random_arguments(SMALL, activation=activation)
        arguments[1].requires_grad_()
        torch.library.opcheck(torch.ops.fastdensity.dual_conv.default, arguments)
