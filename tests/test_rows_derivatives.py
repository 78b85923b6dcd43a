"""No route gives a silent zero tangent: forward mode, reverse mode, vmap, compile, fake tensors, inference mode."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from torch.autograd import forward_ad

import fastdensity as fd

ENDS = {"alpha": 0.6, "sigma": 0.8, "alpha_next": 0.7, "sigma_next": 0.6}


def functions():
    other = torch.randn(3, 7, dtype=torch.float64)
    third = torch.randn(3, 7, dtype=torch.float64)
    return {
        "drift": lambda x: fd.guided_drift(x, torch.sin(x), other, torch.ones(3).double(), 0.5, dt=0.1),
        "drift of score": lambda x: fd.guided_drift(other, third, x, 1.0, 0.5),
        "prediction": lambda x: fd.guide_prediction(x, other, alpha=0.6, sigma=0.8, q=0.3, prediction_type="velocity"),
        "step": lambda x: fd.guided_step(x, torch.cos(x), **ENDS, q=0.3, seed=1, noise_scale=0.1).sample,
        "step with cfg": lambda x: fd.guided_step(x, other, **ENDS, q=0.3, uncond=x * x, cfg_scale=3.0).sample,
        "radius": lambda x: fd.scale_prior(x, radius=2.0),
    }


NAMES = list(functions())


@pytest.fixture(params=NAMES)
def function(request):
    return functions()[request.param]


@pytest.fixture
def point():
    return torch.randn(3, 7, dtype=torch.float64) + 0.3


def finite_difference(function, x, tangent, step=1e-6):
    return (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)


def close(got, expected):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)


def test_func_jvp(function, point):
    tangent = torch.randn_like(point)
    out, got = torch.func.jvp(function, (point,), (tangent,))
    close(got, finite_difference(function, point, tangent))
    torch.testing.assert_close(out, function(point), rtol=1e-12, atol=1e-13)


def test_vmap_of_jvp(function, point):
    tangents = torch.randn(4, *point.shape, dtype=torch.float64)
    got = torch.func.vmap(lambda t: torch.func.jvp(function, (point,), (t,))[1])(tangents)
    close(got, torch.stack([finite_difference(function, point, t) for t in tangents]))


def test_nested_jvp(function, point):
    tangent = torch.randn_like(point)

    def first(x):
        return torch.func.jvp(function, (x,), (tangent,))[1]

    close(torch.func.jvp(first, (point,), (tangent,))[1], finite_difference(first, point, tangent, 1e-5))


def test_dual_level(function, point):
    tangent = torch.randn_like(point)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(function(forward_ad.make_dual(point, tangent))).tangent
        close(got, finite_difference(function, point, tangent))


def test_backward(function, point):
    assert torch.autograd.gradcheck(function, (point.requires_grad_(),))


@pytest.mark.parametrize("wrap", [torch.no_grad, torch.inference_mode])
def test_without_gradients(function, point, wrap):
    expected = function(point)
    with wrap():
        torch.testing.assert_close(function(point.requires_grad_() if wrap is torch.no_grad else point), expected)


@pytest.mark.parametrize("name", ["drift", "step"])
def test_compile(name, point):
    function, tangent = functions()[name], torch.randn(3, 7, dtype=torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(point), function(point), rtol=1e-12, atol=1e-13)
    jvp = torch.compile(lambda x: torch.func.jvp(function, (x,), (tangent,))[1], fullgraph=True, backend="aot_eager")
    close(jvp(point), finite_difference(function, point, tangent))
    point.requires_grad_()
    (expected,) = torch.autograd.grad(function(point).sum(), point)
    (got,) = torch.autograd.grad(compiled(point).sum(), point)
    torch.testing.assert_close(got, expected)


def test_out_and_derivatives_do_not_mix(point):
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="cannot be written where a derivative is asked"):
        fd.guided_drift(x, x, x, 1.0, 1.0, out=torch.empty(2, 5))


def test_fake_tensors_have_the_right_shape():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 3, 8, dtype=torch.bfloat16)
        result = fd.guided_step(x, x, **ENDS, q=0.4)
        assert result.sample.shape == (4, 3, 8)
        assert result.sample.dtype == torch.bfloat16
        assert result.report.shape == (4, 4)


def test_autocast_changes_nothing():
    x, p = torch.randn(4, 50), torch.randn(4, 50)
    expected = fd.guided_step(x, p, **ENDS, q=0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fd.guided_step(x, p, **ENDS, q=0.4)
    assert torch.equal(got.sample, expected.sample)


def test_operator_passes_torchs_own_checks():
    x = torch.randn(3, 7, dtype=torch.float64)
    arguments = ("drift", "epsilon", [x, x.sin(), None, x.cos()], [None] * 3, [1.0, 2.0, 0.1], None, 0, 0)
    torch.library.opcheck(torch.ops.fastdensity.rows, arguments)


def test_tracers_see_an_operator():
    """A graph recorded by make_fx or jit.trace computes the step; a kernel called past them would leave a hole."""
    x, p = torch.randn(4, 6), torch.randn(4, 6)

    def function(x, p):
        return fd.guided_step(x, p, **ENDS, q=0.4).sample

    expected = function(x + 1, p)
    graph = torch.fx.experimental.proxy_tensor.make_fx(function)(x, p)
    torch.testing.assert_close(graph(x + 1, p), expected)
    traced = torch.jit.trace(function, (x, p), check_trace=False)
    torch.testing.assert_close(traced(x + 1, p), expected)


def test_writing_out_is_seen_by_autograd():
    weight, buffer = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    loss = (weight * buffer).sum()
    with torch.no_grad():
        fd.guided_step(buffer.clone(), buffer.clone(), **ENDS, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_carries_a_derivative_is_not_written():
    x = torch.randn(4, 6)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.empty(4, 6), torch.ones(4, 6))
        with pytest.raises(ValueError, match="cannot be written where a derivative is asked"):
            fd.guided_step(x, x, **ENDS, out=dual)
    with pytest.raises(ValueError, match="cannot be written where a derivative is asked"):
        torch.func.vmap(lambda o: fd.guided_step(x, x, **ENDS, out=o).sample)(torch.zeros(2, 4, 6))


def test_vmap_over_sample_ids():
    x = torch.zeros(2, 5)
    ids = torch.tensor([[0, 1], [2, 3]])
    options = {**ENDS, "seed": 1, "noise_scale": 1.0}
    got = torch.func.vmap(lambda i: fd.guided_step(x, x, sample_ids=i, **options).sample)(ids)
    expected = fd.guided_step(torch.zeros(4, 5), torch.zeros(4, 5), **options).sample.reshape(2, 2, 5)
    torch.testing.assert_close(got, expected)


def test_compile_writes_a_given_out():
    x, p, out = torch.randn(4, 6), torch.randn(4, 6), torch.zeros(4, 6)
    compiled = torch.compile(
        lambda x, p, out: fd.guided_step(x, p, **ENDS, q=0.4, out=out).sample, fullgraph=True, backend="aot_eager"
    )
    compiled(x, p, out)
    torch.testing.assert_close(out, fd.guided_step(x, p, **ENDS, q=0.4).sample)
