"""The Triton dual convolution in Triton's interpreter; run by tests/test_dual_conv_triton.py with TRITON_INTERPRET=1.

The interpreter truncates where a GPU rounds to bfloat16: half the tolerance that `assert_as_good_as_eager` leaves.
"""

from __future__ import annotations

import pytest
import torch
from dual_conv_cases import (
    ACTIVATIONS,
    DTYPES,
    GEOMETRIES,
    Geometry,
    assert_as_good_as_eager,
    random_arguments,
)

from fastdensity._backend import use
from fastdensity.ops.dual_conv import dual_conv2d

WIDE = Geometry(40, 36, size=(5, 4))  # more than one block of channels, none of them full


@pytest.fixture(autouse=True)
def by_triton():
    with use("triton"):
        yield


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_kernel(geometry, activation):
    arguments = random_arguments(geometry, activation=activation)
    assert_as_good_as_eager(arguments, dual_conv2d(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        WIDE,
        Geometry(40, 70, (1, 1), padding=(0, 0), size=(5, 4)),
        Geometry(36, 40, groups=2, size=(4, 3)),
        Geometry(6, 12, groups=6),
    ],
    ids=str,
)
def test_dtypes_and_blocks(geometry, dtype):
    for activation, bias in (("silu", True), ("none", True), ("relu", False)):
        arguments = random_arguments(geometry, dtype, bias=bias, activation=activation)
        assert_as_good_as_eager(arguments, dual_conv2d(*arguments))


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("tangents", [1, 3, 4, 5, 7])
def test_tangents_in_several_programs(tangents, activation):
    for geometry in (Geometry(size=(3, 4)), Geometry(6, 6, groups=6, size=(3, 4))):
        arguments = random_arguments(geometry, tangents=tangents, batch=1, activation=activation)
        assert_as_good_as_eager(arguments, dual_conv2d(*arguments))


def test_several_tiles_of_pixels():
    arguments = random_arguments(Geometry(3, 4, size=(11, 13)), tangents=1, batch=3)
    assert_as_good_as_eager(arguments, dual_conv2d(*arguments))


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(6, 6, groups=6)], ids=str)
def test_a_sample_does_not_depend_on_the_batch(geometry):
    arguments = random_arguments(geometry, batch=5)
    whole = dual_conv2d(*arguments)
    assert torch.equal(dual_conv2d(arguments[0][:, 3:4], *arguments[1:]), whole[:, 3:4])


def test_a_non_finite_pixel_stays_in_its_image():
    arguments = random_arguments(Geometry(), batch=3)
    clean = dual_conv2d(*arguments)
    arguments[0][0, 1, 2, 3, 3] = float("nan")
    broken = dual_conv2d(*arguments)
    assert not broken[0, 1].isfinite().all()
    assert torch.equal(broken[:, ::2], clean[:, ::2])


def test_any_strides():
    arguments = random_arguments(Geometry())
    x, weight, bias, *rest = arguments
    expected = dual_conv2d(*arguments)
    last = x.flatten(0, 1).to(memory_format=torch.channels_last).view_as(x)
    spread = torch.stack((bias, bias), 1)[:, 0]
    assert torch.equal(dual_conv2d(last, weight.to(memory_format=torch.channels_last), spread, *rest), expected)
    assert torch.equal(dual_conv2d(torch._neg_view(-x), weight, bias, *rest), expected)
