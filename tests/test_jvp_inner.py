"""fd.jvp of functions that differentiate: by torch.func, which forward mode runs over, or by torch.autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdensity as fd

HERE = r".*test_jvp_inner\.py:\d+"


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64)


@pytest.fixture
def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()


TRANSFORMED = {
    "grad": lambda network: lambda x: torch.func.grad(lambda x: network(x).square().sum())(x),
    "vjp": lambda network: lambda x: torch.func.vjp(network, x)[1](network(x))[0],
    "jvp": lambda network: lambda x: torch.func.jvp(network, (x,), (x,))[1],
    "vmap": lambda network: lambda x: torch.vmap(network)(x),
    "jacobian": lambda network: lambda x: torch.func.jacrev(lambda x: network(x).sum(0))(x),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_of_torch_func(name, mode, network, x):
    fn, vectors = TRANSFORMED[name](network), torch.randn(2, 4, 6, dtype=torch.float64)
    with mode():
        for _ in range(2):
            out, tangents = fd.jvp(fn, (x,), vectors)
    wanted = torch.func.jvp(fn, (x,), (vectors[1],))
    torch.testing.assert_close((out, tangents[1]), wanted)


def test_no_graph_holds_a_transform(network, x):
    with pytest.raises(NotImplementedError, match=r"or a transform of torch\.func"):
        fd.trace_jvp(TRANSFORMED["grad"](network), (x,))
    torch.testing.assert_close(torch.func.grad(torch.sum)(x), torch.ones_like(x))  # nothing is left behind


def test_a_gradient_by_autograd_that_a_graph_holds(x):
    def fn(x):
        with torch.enable_grad():
            y = x.requires_grad_()
            return torch.autograd.grad(y.pow(3).sum(), y, create_graph=True)[0]

    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            _, (tangent,) = fd.jvp(fn, (x,), x[None])
        torch.testing.assert_close(tangent, 6 * x * x)


def test_a_gradient_by_autograd_that_no_graph_holds(network, x):
    def by_grad(x):
        with torch.enable_grad():
            y = x.requires_grad_()
            return torch.autograd.grad(network(y).square().sum(), y, create_graph=True)[0]

    def by_backward(x):
        with torch.enable_grad():
            y = x.clone().requires_grad_()
            network(y).square().sum().backward()
            return y.grad

    for fn, code in ((by_grad, "return torch.autograd.grad"), (by_backward, r"network\(y\).square\(\)")):
        with (
            torch.no_grad(),
            pytest.raises(NotImplementedError, match=rf"by torch.autograd.*{HERE}, `{code}.*func.grad"),
        ):
            fd.jvp(fn, (x,), x[None])


def test_an_error_of_fns_own_gradient_comes_through(network, x):
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        fd.jvp(lambda x: torch.autograd.grad(network(x).sum(), x)[0], (x,), x[None])


def test_a_detach_is_said_and_its_advice_works(network, x):
    with pytest.warns(
        UserWarning, match=rf"fn detaches what depends on its input, at {HERE}.*torch.func.grad\(potential"
    ):
        fd.jvp(lambda x: x * network(x.detach()).sum(), (x,), x[None])
