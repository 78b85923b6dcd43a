"""The divergence benchmark on small networks: every rival finds what the definition says, from the same probes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from benchmarks import divergence, divergence_cases, divergence_peers
from benchmarks.divergence_cases import Case
from fastdensity.digits import load_digits_flow

RIVALS = ("score_sde, VJP", "torchcfm, vmap(vjp)", "func.jvp", "VJP, one forward pass", "vmap(jvp)")
EXACT_RIVALS = ("torchcfm, vmap(jacrev)", "vmap(jvp)")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.last = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(nn.functional.silu(self.norm(self.first(x)))) * time[:, None, None, None].cos() - x


@pytest.fixture(autouse=True)
def without_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def case() -> Case:
    module = Small().requires_grad_(False)
    return Case("small", module, torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.2, 0.3]), exact=True)


@pytest.mark.parametrize("name", [*RIVALS, *divergence_peers.PACKAGES])
@pytest.mark.parametrize("count", [1, 3])
def test_rivals_find_the_same_from_the_same_probes(case: Case, name: str, count: int) -> None:
    if name in divergence_peers.PACKAGES:
        pytest.importorskip(name)
    peers = divergence_peers.estimates(case, count)
    if count == 1 and name not in peers:
        pytest.skip("takes several probes")
    probes = divergence.probes_of(case, count)
    assert set(probes.unique().tolist()) == {-1.0, 1.0}
    expected = divergence_peers.forms(case, probes).mean(0)
    assert torch.allclose(divergence_peers.ours(case, count)(), expected, rtol=1e-4)
    with divergence_peers.given(name, probes):
        assert torch.allclose(peers[name]().double(), expected, rtol=1e-4)
    assert not torch.allclose(peers[name]().double(), expected, rtol=1e-4)  # probes of its own


@pytest.mark.parametrize("name", [*EXACT_RIVALS, *divergence_peers.PACKAGES])
def test_exact_rivals(case: Case, name: str) -> None:
    if name in divergence_peers.PACKAGES:
        pytest.importorskip(name)
    wide = case.double()
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x, t: wide.module(x[None], t[None])[0]))(wide.x, wide.time)
    expected = jacobians.reshape(3, 32, 32).diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(divergence_peers.ours_exact(case)(), expected, rtol=1e-4)
    assert torch.allclose(divergence_peers.exacts(case)[name]().double(), expected, rtol=1e-4)


def test_records_hold_times_memory_errors_and_the_target(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    records = [divergence.estimate_record(case, 2, 1, compiled=False), divergence.exact_record(case, 1)]
    present = {name for name in divergence_peers.PACKAGES if find_spec(name)}
    assert set(records[0]["median_seconds"]) == {"fastdensity", *RIVALS, *present}
    assert set(records[1]["median_seconds"]) == {"fastdensity", *EXACT_RIVALS, *present}
    for record in records:
        assert set(record["peak_bytes"]) == set(record["median_seconds"])
        assert all(error < 1e-4 for error in record["relative_errors"].values())
        assert record["targets"][0]["reached"] > 0
    json.dumps(records)
    divergence.print_table(records)
    assert "small, exact" in capsys.readouterr().out


def test_gate_refuses_to_time_a_wrong_result(case: Case) -> None:
    expected = divergence_peers.ours_exact(case)()
    wrong = {"fastdensity": lambda: expected * 1.01}
    with pytest.raises(SystemExit, match="fastdensity is wrong"):
        divergence.gate(wrong, expected, None)

    def fails() -> Tensor:
        raise IndexError("no images\n here")

    peers = {
        "fastdensity": lambda: expected,
        "fails": fails,
        "half": lambda: expected / 2,
        "short": lambda: expected[:1],
    }
    errors, failed = divergence.gate(peers, expected, None)
    assert failed["fails"] == "IndexError: no images here"
    assert failed["half"].startswith("wrong: relative error 5.0e-01")
    assert failed["short"].startswith("ValueError: shape")
    assert errors["fastdensity"] == 0.0


def test_products_to_one_per_cent_of_a_local_denoiser() -> None:
    torch.manual_seed(0)
    case = Case("patches", divergence_cases.PatchDenoiser(16), torch.randn(4, 1, 8, 8), torch.zeros(4))
    found = divergence.products_record(case, trials=40)
    assert found["products"]["colour"] <= 9 < found["products"]["rademacher"]
    assert found["relative_errors"]["colour"] < 0.012
    predicted = found["relative_error_of_one_sign_probe"] / found["products"]["colour"] ** 0.5
    assert found["relative_errors"]["rademacher"] == pytest.approx(predicted, rel=0.25)
    json.dumps(found)


def test_the_patch_denoiser_is_the_posterior_mean() -> None:
    torch.manual_seed(0)
    denoiser = divergence_cases.PatchDenoiser(16, sigma=0.7)
    x = torch.randn(1, 1, 5, 5)
    patches = denoiser.kernels[:, 0] * 0.7**2
    distances = (x[0, 0, 1:4, 1:4] - patches).square().sum((1, 2)) / (2 * 0.7**2)
    expected = (torch.softmax(-distances, 0) * patches[:, 1, 1]).sum()
    torch.testing.assert_close(denoiser(x, torch.zeros(1))[0, 0, 2, 2], expected)


def test_the_digits_drift_is_the_flow_s() -> None:
    case = divergence_cases.digits(1.0, batch=2)
    torch.testing.assert_close(case.fn(case.x), load_digits_flow().drift(case.x, 1.0), rtol=1e-5, atol=1e-6)
