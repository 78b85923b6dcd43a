"""fd.divergence on a CUDA device: the CPU's numbers, since probes are the same."""

from __future__ import annotations

import pytest
import torch
from mixtures import normals
from torch import nn

import fastdensity as fd
from fastdensity.traces.options import DISTRIBUTIONS, METHODS

pytestmark = pytest.mark.gpu
COUNT = {"exact": 1, "hutchinson": 6, "hutchpp": 9, "xtrace": 8, "colour": 6}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 24)).double()


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    model, x = network(), normals(5, 24)
    wanted = fd.divergence(model, x, method=method, num_matvecs=COUNT[method])
    found = fd.divergence(model.cuda(), x.cuda(), method=method, num_matvecs=COUNT[method])
    torch.testing.assert_close(found.div.cpu(), wanted.div, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.std_err.cpu(), wanted.std_err, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions(distribution: str) -> None:
    model, x = network(), normals(5, 24)
    options = {"num_matvecs": 7, "distribution": distribution, "identity": 0.5}
    wanted = fd.divergence(model, x, **options)
    found = fd.divergence(model.cuda(), x.cuda(), **options)
    torch.testing.assert_close(found.div.cpu(), wanted.div, rtol=1e-6, atol=1e-6)


def test_tolerance() -> None:
    model, x = network().cuda(), normals(5, 24).cuda()
    found = fd.divergence(model, x, reltol=1e-3)
    assert bool(found.converged.all())
    exact = fd.divergence(model, x, method="exact")
    torch.testing.assert_close(found.div, exact.div, rtol=1e-9, atol=1e-9)
