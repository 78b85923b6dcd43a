"""Every dual rule against torch.func.jvp in float64, first and second order."""

from __future__ import annotations

import jvp_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdensity as fd
from fastdensity.dual.cache import find
from fastdensity.dual.rewrite import RULES

# operators that this torch version makes of none of the cases: other spellings of functions that are among them
SPELLINGS = {
    "aten._softmax.default", "aten._to_copy.default", "aten._unsafe_view.default", "aten.constant_pad_nd.default",
    "aten.contiguous.default", "aten.conv3d.padding", "aten.dropout.default", "aten.feature_dropout.default",
    "aten.reflection_pad2d.default", "aten.replication_pad2d.default", "aten.split.sizes", "aten.to.device",
    "aten.to.dtype_layout", "aten.to.other", "aten.type_as.default", "aten.upsample_bilinear2d.default",
    "aten.upsample_nearest2d.default",
}  # fmt: skip
EVERYTHING = {**jvp_cases.ALL, **jvp_cases.FALLBACK}


def by_torch(fn, x, vectors):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack([torch.func.jvp(fn, (x,), (vector,))[1] for vector in vectors])


def assert_near(got, wanted, tolerance):
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert (got - wanted).norm() <= tolerance * (1 + wanted.norm())


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", EVERYTHING)
def test_tangents_are_those_of_torch(name):
    fn, x, vectors = EVERYTHING[name], draw(*jvp_cases.SHAPE), draw(3, *jvp_cases.SHAPE)
    with torch.no_grad():
        out, tangents = fd.jvp(fn, (x,), vectors)
        assert_near(out, fn(x), 1e-12)
        # float32 stands between, in both
        assert_near(tangents, by_torch(fn, x, vectors), 1e-6 if name == "to" else 1e-12)


@pytest.mark.parametrize("name", [name for name in jvp_cases.ALL if name != "to"])
def test_second_order_agrees_with_differences(name):
    """torch.func.jvp over fd.jvp; torch's own second order is wrong for layer_norm and batch_norm (torch 2.13)."""
    fn, x, direction = EVERYTHING[name], draw(*jvp_cases.SHAPE), draw(*jvp_cases.SHAPE)
    vectors, step = draw(1, *jvp_cases.SHAPE), 1e-5

    def tangents(point):
        return fd.jvp(fn, (point,), vectors)[1]

    with torch.no_grad():
        got = torch.func.jvp(tangents, (x,), (direction,))[1]
        wanted = (tangents(x + step * direction) - tangents(x - step * direction)) / (2 * step)
    assert_near(got, wanted, 1e-5)


@pytest.mark.parametrize("name", jvp_cases.ALL)
def test_no_case_of_a_rule_falls_back(name):
    few = {"roll", "index_gap", "pad_by_number", "where_number", "addmm", "dual_weights", "repeat_interleave"}
    explained = fd.explain(EVERYTHING[name], (draw(*jvp_cases.SHAPE),))
    assert name in few or not explained.fallbacks, str(explained)


@pytest.mark.parametrize("name", jvp_cases.FALLBACK)
def test_what_has_no_rule_is_called_a_fallback(name):
    assert fd.explain(EVERYTHING[name], (draw(*jvp_cases.SHAPE),)).fallbacks


def test_the_cases_meet_every_rule():
    met = set()
    for fn in EVERYTHING.values():
        met |= {node.target for node in find(fn, (draw(*jvp_cases.SHAPE),))[0].traced.graph.nodes}
    missed = {str(target) for target in RULES if target not in met}
    assert missed <= SPELLINGS


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 4),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_shape_operators_on_any_shape(data, count, shape):
    rank = len(shape)
    dim = data.draw(st.integers(-rank, rank - 1))
    other = data.draw(st.integers(-rank, rank - 1))

    def fn(x):
        turned = x.transpose(dim, other).flip(dim).unsqueeze(other)
        return torch.cat([turned, turned.sin()], dim).sum(other, keepdim=True).flatten() * x.reshape(-1).sum()

    x, vectors = draw(*shape), draw(count, *shape)
    with torch.no_grad():
        assert_near(fd.jvp(fn, (x,), vectors)[1], by_torch(fn, x, vectors), 1e-12)
