"""Trace graphs: which ends of a network make their probes themselves, and that nothing else changes by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastdensity as fd
import fastdensity.dual.trace_graph as trace_graph
import fastdensity.traces.function as function_module
from fastdensity.dual.trace_graph import fused_ends
from fastdensity.ops.probe import probe_forms
from fastdensity.traces.function import Function
from fastdensity.traces.key import ProbeKey
from fastdensity.traces.products import JacobianProducts


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """Networks of tests are small, and their probes would be stored."""
    monkeypatch.setattr(trace_graph, "CPU_BYTES", 0)


def mlp(inputs=6, outputs=6, width=16):
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
    )


class Velocity(nn.Module):
    """A velocity field as they are written: the time is one more input."""

    def __init__(self, size=6, before=False):
        super().__init__()
        self.net, self.before = mlp(size + 1, size), before

    def forward(self, x, t):
        parts = [x, t[:, None]]
        return self.net(torch.cat(parts[::-1] if self.before else parts, dim=-1))


class OfImages(nn.Module):
    """Samples of any shape, flattened and put back."""

    def __init__(self):
        super().__init__()
        self.net = mlp(12, 12)

    def forward(self, x):
        return self.net(x.flatten(1)).view(x.shape)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        return self.last(functional.silu(self.first(x)))


class Wrapped(nn.Module):
    """Any of torch's operators around a network."""

    def __init__(self, forward, size=6):
        super().__init__()
        self.net, self._forward = mlp(size, size), forward

    def forward(self, x):
        return self._forward(self.net, x)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        with torch.no_grad():
            h = self.first(x)
        return self.last(torch.tanh(h))


BOTH, FIRST, LAST, NEITHER = {"first", "last"}, {"first"}, {"last"}, set()
NETWORKS = {
    "mlp": (mlp, (6,), BOTH),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False)), (6,), BOTH),
    "images": (OfImages, (3, 2, 2), BOTH),
    "one number": (lambda: mlp(1, 1), (1,), BOTH),
    "one layer": (lambda: nn.Linear(6, 6), (6,), LAST),
    "activation at the end": (lambda: nn.Sequential(mlp(), nn.Tanh()), (6,), FIRST),
    "norm at the beginning": (lambda: nn.Sequential(nn.LayerNorm(6), mlp()), (6,), LAST),
    "residual": (lambda: Wrapped(lambda net, x: x + net(x)), (6,), NEITHER),
    "scaled": (lambda: Wrapped(lambda net, x: net(x) / 3), (6,), FIRST),
    "input scaled": (lambda: Wrapped(lambda net, x: net(3 * x)), (6,), LAST),
    "two readers": (lambda: Wrapped(lambda net, x: net(torch.cat([x, x * x], 1)[:, :6])), (6,), LAST),
    "tokens": (mlp, (4, 6), NEITHER),
    "turned": (lambda: Wrapped(lambda net, x: net(x.mT.flatten(1)).view(x.shape)), (3, 2), LAST),
    "turned at the end": (lambda: Wrapped(lambda net, x: net(x.flatten(1)).view(x.mT.shape).mT), (3, 2), FIRST),
    "convolutions": (Convolutions, (2, 4, 4), NEITHER),
    "no_grad": (Frozen, (6,), LAST),
}  # fmt: skip


def products_of(fn, x, args=(), forward="dual", tangents=3, identity=None):
    key = ProbeKey(7, torch.arange(x.shape[0]) * 3, 2)
    return JacobianProducts(Function(fn, args, forward), x, key, tangents, identity)


def check(fn, x, args=(), **options):
    """Every distribution's forms are those of torch's forward mode, and so is the value."""
    for distribution in ("rademacher", "normal", "hadamard", "sphere", "orthogonal"):
        mine = products_of(fn, x, args, **options)
        theirs = products_of(fn, x, args, forward="torch", **options)
        with torch.no_grad():
            got, wanted = mine.forms(1, 5, distribution), theirs.forms(1, 5, distribution)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine.value, theirs.value)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 4])
def test_networks(name, batch):
    make, shape, ends = NETWORKS[name]
    torch.manual_seed(0)
    network, x = make().double(), torch.randn(batch, *shape, dtype=torch.float64)
    assert fused_ends(network, (x,)) == ends
    check(network, x)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_time_beside_the_input(batch):
    x, t = torch.randn(batch, 6, dtype=torch.float64), torch.rand(batch, dtype=torch.float64)
    for before, ends in ((False, BOTH), (True, LAST)):
        network = Velocity(before=before).double()
        assert fused_ends(network, (x, t)) == ends
        check(network, x, (t,))


def test_a_network_without_a_square_jacobian_has_no_ends():
    assert fused_ends(mlp(6, 5), (torch.randn(3, 6),)) == NEITHER
    with pytest.raises(ValueError, match="Jacobian is not square"):
        fd.divergence(mlp(6, 5), torch.randn(3, 6))


def test_a_known_identity_is_taken_off():
    network, x = mlp().double(), torch.randn(4, 6, dtype=torch.float64)
    check(network, x, identity=torch.rand(4, dtype=torch.float64))


def test_weights_are_read_anew():
    network, x = mlp().double(), torch.randn(4, 6, dtype=torch.float64)
    check(network, x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(-1.5)
    check(network, x)
    network[0] = nn.Linear(6, 16).double()
    check(network, x)


def test_autocast_casts_as_it_did():
    network, x = mlp(), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused_ends(network, (x,)) == LAST  # x is rounded first, and z with it
        got = products_of(network, x).forms(0, 4, "rademacher")
    with torch.no_grad():
        exact = products_of(network, x).forms(0, 4, "rademacher")
    assert (got - exact).abs().max() < 0.05
    assert not torch.equal(got, exact)


def test_no_probe_is_made_for_the_whole_batch(monkeypatch):
    """Where both ends are fused, neither are the products."""

    def refuse(*arguments):
        raise AssertionError("a tensor of probes, or of products with them")

    network, x = mlp(), torch.randn(4, 6)
    monkeypatch.setattr("fastdensity.dual.trace_graph.make_probes", refuse)
    monkeypatch.setattr("fastdensity.dual.trace_graph.probe_forms", refuse)
    monkeypatch.setattr("fastdensity.traces.products.make_probes", refuse)
    monkeypatch.setattr("fastdensity.traces.products.probe_forms", refuse)
    monkeypatch.setattr(function_module, "jvp", refuse)
    with torch.no_grad():
        assert products_of(network, x).forms(0, 4, "normal").shape == (4, 4)
    with pytest.raises(AssertionError), torch.no_grad():
        products_of(network, x).forms(0, 4, "sphere")


@pytest.mark.parametrize("distribution", ["rademacher", "normal", "hadamard"])
def test_divergences_do_not_depend_on_the_batch(distribution):
    torch.manual_seed(0)
    network, x, t = Velocity(), torch.randn(7, 6), torch.rand(7)
    ids = torch.tensor([5, 9, 2, 100, 2**31, 7, 1])
    options = {"num_matvecs": 5, "distribution": distribution, "seed": 3, "identity": 0.5}
    assert fused_ends(network, (x, t)) == BOTH
    whole = fd.divergence(network, x, t, sample_ids=ids, **options)
    for rows in ([3], [6, 0, 3], [4, 3, 2, 1]):
        part = fd.divergence(network, x[rows], t[rows], sample_ids=ids[rows], **options)
        for name in ("value", "div", "std_err"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
    chunked = fd.divergence(network, x, t, sample_ids=ids, memory=1, **options)
    torch.testing.assert_close(chunked.div, whole.div, rtol=1e-6, atol=1e-6)


def test_few_probes_are_stored_on_cpu(monkeypatch):
    """What stays in the cache costs nothing to store."""
    made = []
    monkeypatch.setattr(trace_graph, "build", lambda traced: made.append(traced))
    for limit, graphs in ((3 * 4 * 6 * 4, 0), (3 * 4 * 6 * 4 - 1, 1)):
        monkeypatch.setattr(trace_graph, "CPU_BYTES", limit)
        with torch.no_grad():
            products_of(mlp(), torch.randn(4, 6)).forms(0, 3, "rademacher")
        assert len(made) == graphs


def test_a_derivative_goes_through():
    """Forms under a transform of the caller's: the ops' references."""
    network, x = mlp().double(), torch.randn(3, 6, dtype=torch.float64)

    def forms(x, forward="dual"):
        return products_of(network, x, forward=forward).forms(0, 2, "rademacher")

    v = torch.randn_like(x)
    mine, theirs = torch.func.jvp(forms, (x,), (v,)), torch.func.jvp(lambda x: forms(x, "torch"), (x,), (v,))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_jvp_inside_has_no_graph():
    network, x = mlp().double(), torch.randn(3, 6, dtype=torch.float64)

    def along_itself(x):
        return fd.jvp(network, (x,), x[None])[1][0]

    assert fused_ends(along_itself, (x,)) == NEITHER
    check(along_itself, x)


def test_forms_are_those_of_stored_products():
    """Bits of the probes: signs times products with integers are exact in any order."""
    layer, x = nn.Linear(40, 40), torch.zeros(3, 40)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-9, 9, (40, 40)))
    for distribution in ("rademacher", "hadamard"):
        products = products_of(layer, x)
        with torch.no_grad():
            stored = products.probes(2, 3, distribution) @ layer.weight.T
            key = products.key
            wanted = probe_forms(stored, key.seed, key.sample_ids, key.step, 2, distribution, key.stream)
            assert torch.equal(products.forms(2, 3, distribution), wanted)
