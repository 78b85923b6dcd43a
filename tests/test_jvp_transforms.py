"""fd.jvp under torch's transforms and modes: right, or an error, never a silent zero.

torch's own second derivatives of layer_norm and batch_norm are wrong (their saved statistics carry no tangent, torch
2.13); where second order is compared with torch, the norm is written out.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdensity as fd


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def written_out(x, shape, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight + bias


class Block(nn.Module):
    """Every kind of layer that has a kernel, in few numbers: x (B, 8, 4, 4), t (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.group, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, t):
        h = x + self.conv(F.silu(self.group(x)))
        rows = h.flatten(2).mT
        q, k, v = self.qkv(self.norm(rows) * (1 + t[:, None, None])).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.gelu(self.out(a)).softmax(-1).mT.reshape(x.shape) + h


@pytest.fixture
def block():
    return Block().double().eval()


@pytest.fixture
def primals():
    return draw(3, 8, 4, 4), draw(3)


@pytest.fixture
def vectors():
    return draw(2, 3, 8, 4, 4)


def by_torch(fn, x, vectors):
    """K tangents by torch.func.jvp, with what it differentiates wrongly a second time written out."""
    original = F.layer_norm
    F.layer_norm = written_out
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.stack([torch.func.jvp(fn, (x,), (vector,))[1] for vector in vectors])
    finally:
        F.layer_norm = original


def assert_near(got, wanted, tolerance=1e-10):
    assert wanted.norm() > 1e-3
    assert (got - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
def test_grad_modes(block, primals, vectors, mode):
    wanted = by_torch(lambda x: block(x, primals[1]), primals[0], vectors).detach()
    with mode():
        x = primals[0] * 1.0  # made in the mode
        assert_near(fd.jvp(block, (x, primals[1]), vectors)[1].detach(), wanted)


def test_forward_over_jvp(block, primals, vectors):
    x, t = primals
    direction = draw(*x.shape)
    wanted = torch.func.jvp(lambda x: by_torch(lambda y: block(y, t), x, vectors), (x,), (direction,))[1]

    def ours(x):
        return fd.jvp(block, (x, t), vectors)[1]

    assert_near(torch.func.jvp(ours, (x,), (direction,))[1], wanted)
    assert_near(fd.jvp(ours, (x,), direction[None])[1][0], wanted)
    with forward_ad.dual_level():
        tangents = ours(forward_ad.make_dual(x, direction))
        assert_near(forward_ad.unpack_dual(tangents).tangent, wanted)


def test_linear_in_the_vectors_under_forward_mode(block, primals, vectors):
    other = draw(*vectors.shape)
    got = torch.func.jvp(lambda w: fd.jvp(block, primals, w)[1], (vectors,), (other,))[1]
    assert_near(got, by_torch(lambda x: block(x, primals[1]), primals[0], other))


def test_vmap(block, primals, vectors):
    x, t = primals
    states = draw(4, *x.shape)
    got = torch.func.vmap(lambda x: fd.jvp(block, (x, t), vectors)[1])(states)
    assert_near(got, torch.stack([by_torch(lambda x: block(x, t), state, vectors) for state in states]))
    got = torch.func.vmap(lambda vector: fd.jvp(block, (x, t), vector[None])[1][0])(vectors)
    assert_near(got, by_torch(lambda x: block(x, t), x, vectors))


def test_hessian_by_composed_transforms(block, primals):
    """The trace of a Hessian-vector product: jacrev over jvp, as score alignment without scores needs it."""
    x, t = primals
    vector = draw(*x.shape)

    def slope(x):
        return fd.jvp(lambda y: block(y, t).square().sum((1, 2, 3)), (x,), vector[None])[1][0].sum()

    def wanted(x):
        return by_torch(lambda y: block(y, t).square().sum((1, 2, 3)), x, vector[None])[0].sum()

    assert_near(torch.func.grad(slope)(x), torch.func.grad(wanted)(x))


def test_backward(block, primals, vectors):
    x, t = primals[0].clone().requires_grad_(), primals[1].clone().requires_grad_()
    inputs = [x, t, *block.parameters()]
    ours = torch.autograd.grad(fd.jvp(block, (x, t), vectors)[1].pow(3).sum(), inputs)
    wanted = torch.autograd.grad(by_torch(lambda x: block(x, t), x, vectors).pow(3).sum(), inputs, allow_unused=True)
    largest = max(gradient.norm() for gradient in wanted if gradient is not None)
    for got, gradient in zip(ours, wanted, strict=True):
        if gradient is not None:  # the last bias has no tangent, so no gradient, there or here
            assert (got - gradient).norm() < 1e-10 * largest


def test_no_grad_inside_of_fn_ends_backward_with_an_error(block, primals, vectors):
    def fn(x):
        with torch.no_grad():
            h = x.sin()
        return h * x

    x = primals[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"cannot pass a torch.no_grad block, at .*test_jvp_transforms"):
        fd.jvp(fn, (x,), vectors)
    with torch.no_grad():
        assert_near(fd.jvp(fn, (x,), vectors)[1], by_torch(lambda x: x.sin() * x, x.detach(), vectors))


def test_parameters_with_tangents(block, primals, vectors):
    parameters = dict(block.named_parameters())
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def ours(parameters):
        return fd.jvp(lambda x: functional_call(block, parameters, (x, primals[1])), primals[:1], vectors)[1]

    def theirs(parameters):
        return by_torch(lambda x: functional_call(block, parameters, (x, primals[1])), primals[0], vectors)

    got, wanted = (torch.func.jvp(fn, (parameters,), (directions,))[1] for fn in (ours, theirs))
    assert_near(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Measured against the whole network in that dtype."""
    block, x, t, vectors = (
        Block().eval(),
        draw(3, 8, 4, 4, dtype=torch.float32),
        torch.rand(3),
        torch.randn(2, 3, 8, 4, 4),
    )
    with torch.no_grad():
        before = fd.jvp(block, (x, t), vectors)
        with torch.autocast("cpu", dtype=dtype):
            out, tangents = fd.jvp(block, (x, t), vectors)
            assert out.dtype == block(x, t).dtype
        after = fd.jvp(block, (x, t), vectors)
        block.double()
        exact = by_torch(lambda x: block(x, t.double()), x.double(), vectors.double())
        block.to(dtype)
        rival = by_torch(lambda x: block(x, t.to(dtype)), x.to(dtype), vectors.to(dtype))
    assert torch.equal(before[1], after[1])  # no trace of autocast is left
    error = (tangents.double() - exact).norm()
    assert (before[1].double() - exact).norm() < error < 2 * (rival.double() - exact).norm()


def test_a_block_that_switches_autocast_itself(block):
    linear = nn.Linear(4, 4)

    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = linear(x)
        with torch.autocast("cpu", enabled=False):
            return linear(h.float())

    x, vectors = torch.randn(3, 4), torch.randn(2, 3, 4)
    with torch.no_grad():
        out, tangents = fd.jvp(fn, (x,), vectors)
        torch.testing.assert_close(out, fn(x))
        torch.testing.assert_close(tangents, torch.stack([torch.func.jvp(fn, (x,), (v,))[1] for v in vectors]))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_the_dual_graph_compiles_whole(block, primals, vectors, grad):
    with torch.set_grad_enabled(grad):
        dual = fd.trace_jvp(block, primals)
        out, tangents = torch.compile(dual, fullgraph=True, backend="aot_eager")(primals, vectors)
        assert_near(tangents, by_torch(lambda x: block(x, primals[1]), primals[0], vectors))
        assert_near(out, block(*primals))
        if grad:
            (got,) = torch.autograd.grad(tangents.pow(3).sum(), block.qkv.weight)
            wanted = torch.autograd.grad(fd.jvp(block, primals, vectors)[1].pow(3).sum(), block.qkv.weight)[0]
            assert_near(got, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_drops_no_tangent(backend):
    """torch's own compiled functions give none under a dual level of forward_ad (torch 2.13)."""
    x, vectors, layer = draw(4, 6), draw(2, 4, 6), nn.Linear(6, 6).double()
    dual = fd.trace_jvp(lambda x: layer(x).tanh(), (x,))

    def second(x):
        return torch.func.jvp(lambda x: dual((x,), vectors)[1], (x,), (x,))[1]

    wanted = second(x).detach()
    with torch.no_grad():
        whole, loose = (torch.compile(dual, fullgraph=full, backend=backend) for full in (True, False))
        assert_near(whole((x,), vectors)[1], dual((x,), vectors)[1])
        with forward_ad.dual_level():
            both = forward_ad.make_dual(x, x)
            with pytest.raises(Exception, match="drops the tangents of"):
                whole((both,), vectors)
            assert_near(forward_ad.unpack_dual(loose((both,), vectors)[1]).tangent, wanted)
        assert_near(torch.compile(second, fullgraph=True, backend=backend)(x), wanted)


def test_a_fallback_compiles(primals, vectors):
    dual = fd.trace_jvp(lambda x: x.logsumexp(-1).cumprod(-1), primals[:1])
    with torch.no_grad():
        _, tangents = torch.compile(dual, fullgraph=True, backend="aot_eager")(primals[:1], vectors)
        assert_near(tangents, by_torch(lambda x: x.logsumexp(-1).cumprod(-1), primals[0], vectors))


def test_compile_around_jvp(block, primals, vectors):
    """fd.jvp looks its graph up in Python: torch.compile runs that part as it is, and says so if it may not."""

    def fn(x, t, vectors):
        return fd.jvp(block, (x, t), vectors)[1] * 2

    wanted = 2 * by_torch(lambda x: block(x, primals[1]), primals[0], vectors)
    with torch.no_grad():
        assert_near(torch.compile(fn, backend="aot_eager")(*primals, vectors), wanted)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"compile fd\.trace_jvp"):
            torch.compile(fn, fullgraph=True, backend="aot_eager")(*primals, vectors)
    direction = draw(*primals[0].shape)

    def second(x, direction):
        return torch.func.jvp(lambda y: fd.jvp(block, (y, primals[1]), vectors)[1], (x,), (direction,))[1]

    assert_near(torch.compile(second, backend="aot_eager")(primals[0], direction), second(primals[0], direction))


def test_fake_tensors_and_make_fx(block, primals, vectors):
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        graph = make_fx(lambda x, v: fd.jvp(block, (x, primals[1]), v)[1])(primals[0], vectors)
        assert_near(graph(primals[0], vectors), by_torch(lambda x: block(x, primals[1]), primals[0], vectors))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = mode.from_tensor(primals[0]), mode.from_tensor(primals[1])
            out, tangents = fd.jvp(block, fakes, mode.from_tensor(vectors))
    assert out.shape == primals[0].shape
    assert tangents.shape == vectors.shape
