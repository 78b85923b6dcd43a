"""Score alignment: both forms against finite differences and each other; bits per dimension."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixtures import SCHEDULES, lam_grid, mixture
from torch import Tensor, nn

import fastdensity as fd
from fastdensity.alignment import align
from fastdensity.rules import PREDICTION_TYPES

FIRST, LAST = -3.0, 3.0


def network(flow: fd.GaussianMixture) -> fd.Flow:
    """The same flow as a network, whose derivatives are taken by forward mode."""
    return fd.Flow(lambda x, lam: flow.prediction(x, lam), flow.schedule, flow.prediction_type)


def by_differences(flow: fd.GaussianMixture, latents: Tensor, grid: Tensor) -> Tensor:
    """The derivative of log p of the sample along the latent's score."""
    step, score = 1e-5, flow.score(latents, FIRST)
    ahead, behind = (fd.sample(flow, latents + sign * step * score, grid).x for sign in (1, -1))
    return (flow.score(fd.sample(flow, latents, grid).x, LAST) * (ahead - behind)).sum(1) / (2 * step)


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_the_score(name: str) -> None:
    flow, grid = mixture(SCHEDULES[name]), lam_grid(FIRST, LAST, 40)
    latents = flow.sample(6, FIRST, seed=2)
    found = fd.score_alignment(flow, latents, grid)
    torch.testing.assert_close(found, by_differences(flow, latents, grid), rtol=1e-6, atol=1e-6)


def test_without_the_score_comes_to_the_same_as_steps_shrink() -> None:
    flow = mixture()
    latents = flow.sample(6, FIRST, seed=2)
    gaps = []
    for steps in (50, 100):
        grid = lam_grid(FIRST, LAST, steps)
        pair = [fd.score_alignment(flow, latents, grid, use_score=use_score) for use_score in (True, False)]
        gaps.append(float((pair[0] - pair[1]).abs().mean()))
    assert 1.8 < gaps[0] / gaps[1] < 2.2


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_network_of_any_kind_is_as_good_as_the_closed_form(kind: str) -> None:
    flow = mixture(prediction_type=kind)
    latents, grid = flow.sample(3, FIRST, seed=2), lam_grid(FIRST, LAST, 4)
    for use_score in (True, False):
        divergence = None if use_score else "exact"
        found = fd.score_alignment(network(flow), latents, grid, use_score=use_score, divergence=divergence)
        wanted = fd.score_alignment(flow, latents, grid, use_score=use_score)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_probes_are_right_on_average() -> None:
    flow = mixture(shape=(12,))
    latents, grid = flow.sample(1, FIRST, seed=2).expand(400, -1), lam_grid(FIRST, LAST, 4)
    exact = fd.score_alignment(flow, latents[:1], grid, use_score=False)
    found = fd.score_alignment(network(flow), latents, grid, use_score=False, sample_ids=torch.arange(400))
    error = float(found.std()) / 20.0
    assert error > 1e-3
    assert abs(float(found.mean() - exact)) < 3 * error
    options: dict[str, Any] = {"use_score": False, "divergence": {"method": "hutchinson", "num_matvecs": 8}}
    assert float(fd.score_alignment(network(flow), latents, grid, **options).std()) < 0.5 * float(found.std())
    other = fd.score_alignment(network(flow), latents[:2], grid, use_score=False, seed=1)
    assert not torch.equal(other, found[:2])


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + 0.1 * lam[:, None]))


def test_a_trained_networks_layers() -> None:
    """Linear layers in float32 and float64 agree; the cosine lies between -1 and 1 and has the value's sign."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Layers()
    latents, grid = mixture().sample(5, FIRST, seed=2), lam_grid(FIRST, LAST, 20)
    for divergence in (None, "exact"):
        use_score = divergence is None
        single = fd.score_alignment(fd.Flow(model.float(), fd.VP()), latents.float(), grid, use_score, divergence)
        double = fd.score_alignment(fd.Flow(model.double(), fd.VP()), latents, grid, use_score, divergence)
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-4)
    result = align(fd.Flow(model.double(), fd.VP()), latents, grid, True, None, None, 0)
    assert result.cosine is not None
    assert bool((result.cosine.abs() <= 1.0).all())
    assert torch.equal(result.cosine.sign(), result.value.sign())
    torch.testing.assert_close(result.x, fd.sample(fd.Flow(model.double(), fd.VP()), latents, grid).x)


@pytest.mark.parametrize("use_score", [True, False])
def test_a_row_does_not_know_the_others(use_score: bool) -> None:
    flow, ids = mixture(), torch.arange(30, 37)
    latents, grid = flow.sample(7, FIRST, seed=2), lam_grid(FIRST, LAST, 4)
    for one in (flow, network(flow)):
        together = fd.score_alignment(one, latents, grid, use_score=use_score, sample_ids=ids)
        alone = fd.score_alignment(one, latents[4:5], grid, use_score=use_score, sample_ids=ids[4:5])
        assert torch.equal(alone, together[4:5])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_score": 1}, TypeError, "use_score must be True or False"),
        ({"divergence": "exact"}, ValueError, "divergence is for use_score=False"),
        ({"grid": [1.0, 0.0]}, ValueError, "grid must increase strictly"),
        ({"latents": torch.zeros(2, 5, dtype=torch.float16)}, TypeError, "latents must be float32 or float64"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "sample_ids must have shape"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"flow": mixture(), "latents": torch.zeros(2, 5), "grid": [FIRST, LAST], **options}
    with pytest.raises(error, match=message):
        fd.score_alignment(**arguments)


def test_bits_per_dimension() -> None:
    """A uniform density over 256 grey levels takes 8 bits a pixel, whatever interval they were mapped to."""
    for scale in (1.0, 128.0, 256.0):
        log_prob = torch.full((3,), -64 * math.log(256.0 / scale), dtype=torch.float64)
        found = fd.bits_per_dimension(log_prob, 64, data_scale=scale)
        torch.testing.assert_close(found, torch.full((3,), 8.0, dtype=torch.float64), rtol=1e-14, atol=0)
    normal = torch.distributions.Normal(0.0, 2.0).log_prob(torch.tensor(1.0))
    assert float(fd.bits_per_dimension(normal, 1, data_scale=1.0)) == pytest.approx(float(-normal) / math.log(2.0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, 3, 1.0), TypeError, "log_prob must be a floating torch.Tensor"),
        ((torch.zeros(2), 0, 1.0), ValueError, "dimension must be in"),
        ((torch.zeros(2), 3.0, 1.0), TypeError, "dimension must be an int"),
        ((torch.zeros(2), 3, -1.0), ValueError, "data_scale must be positive and finite, got -1.0"),
        ((torch.zeros(2), 3, None), TypeError, "data_scale must be a number"),
    ],
)
def test_bits_per_dimension_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    log_prob, dimension, data_scale = arguments
    with pytest.raises(error, match=message):
        fd.bits_per_dimension(log_prob, dimension, data_scale=data_scale)
