"""The embedded digits: the network's derivatives, what its file must be, and that it is a density of digits."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastdensity as fd
from fastdensity.digits import (
    EMBEDDED,
    LAM_NOISE,
    DigitsNetwork,
    along_path,
    dequantise,
    load_digits_flow,
    save_digits_network,
)

TRAINING = Path(__file__).parents[1] / "examples" / "train_digits.py"
DIMENSION = 64


def network64() -> nn.Module:
    """The trained network in float64."""
    model = load_digits_flow().model
    assert isinstance(model, nn.Module)
    return model.double()


def batch(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 8, 8, generator=generator, dtype=dtype)
    return x, torch.linspace(-8.0, 8.0, rows, dtype=dtype)


def test_the_embedded_network_is_small_frozen_and_loads_without_drawing_random_numbers() -> None:
    before = torch.get_rng_state()
    flow = load_digits_flow()
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(flow.model, DigitsNetwork)
    assert sum(p.numel() for p in flow.model.parameters()) <= 480_000
    assert EMBEDDED.stat().st_size < 2_000_000
    assert not flow.model.training
    assert not any(p.requires_grad for p in flow.model.parameters())
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in flow.model.parameters())


def test_dequantised_levels_tile_the_interval() -> None:
    levels = torch.arange(17.0)
    lower, upper = dequantise(levels, torch.zeros(17)), dequantise(levels, torch.ones(17))
    assert lower[0] == -1.0
    assert upper[-1] == pytest.approx(1.0)
    assert torch.allclose(lower[1:], upper[:-1])


def test_the_network_knows_digits_it_was_not_trained_on() -> None:
    """The linear denoiser of the training digits' covariance reaches 223 nats of this loss on them."""
    training = runpy.run_path(str(TRAINING))
    held_out = training["load_digits"](0)[1]
    assert training["mean_loss"](load_digits_flow().model, held_out, repeats=8) < 180.0


def test_training_is_reproducible() -> None:
    training = runpy.run_path(str(TRAINING))
    digits, held_out = training["load_digits"](0)
    first, again = (training["train"](digits, held_out[:8], 3, 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other = training["train"](digits, held_out[:8], 3, 1)
    assert not torch.equal(first.stem.weight, other.stem.weight)


def test_training_learns() -> None:
    training = runpy.run_path(str(TRAINING))
    digits, held_out = training["load_digits"](0)
    trained = training["train"](digits, held_out[:8], 40, 0)
    assert training["mean_loss"](trained, held_out, 2) < 0.93 * training["mean_loss"](DigitsNetwork(), held_out, 2)


def test_rows_do_not_see_each_other() -> None:
    x, lam = batch(5)
    network = network64()
    alone = torch.cat([network(x[i : i + 1], lam[i : i + 1]) for i in range(5)])
    assert torch.allclose(network(x, lam), alone, rtol=1e-12, atol=1e-13)
    poisoned = x.clone()
    poisoned[2] = torch.nan
    others = [0, 1, 3, 4]
    assert torch.equal(network(poisoned, lam)[others], network(x, lam)[others])


def test_first_and_second_derivatives_agree_with_finite_differences() -> None:
    x, lam = batch(2)
    network = network64()
    x.requires_grad_(True)
    assert gradcheck(lambda y: network(y, lam), (x,), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(lambda y: network(y, lam), (x,), fast_mode=True, check_fwd_over_rev=True)


def test_vmapped_jvps_are_the_columns_of_the_jacobian() -> None:
    x, lam = batch(2)
    network = network64()
    vectors = torch.randn(3, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    products = torch.func.vmap(lambda v: torch.func.jvp(lambda y: network(y, lam), (x,), (v,))[1])(vectors)
    jacobian = torch.func.jacrev(lambda y: network(y, lam).flatten())(x).reshape(2, DIMENSION, 2, DIMENSION)
    expected = torch.einsum("bibj,kbj->kbi", jacobian, vectors.flatten(2))
    assert torch.allclose(products.flatten(2), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("schedule", [None, fd.VE(), fd.RectifiedFlow()], ids=["VP", "VE", "RectifiedFlow"])
def test_export_keeps_the_function(schedule: fd.VE | None) -> None:
    flow = load_digits_flow()
    network = (flow if schedule is None else along_path(flow, schedule)).model
    assert isinstance(network, nn.Module)
    x, lam = batch(3, torch.float32)
    exported = torch.export.export(network, (x, lam), strict=False).module()
    assert torch.equal(exported(x, lam), network(x, lam))


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("schedule", [fd.VE(), fd.RectifiedFlow()], ids=repr)
def test_another_path_carries_the_same_samples_and_density(schedule: fd.VE | fd.RectifiedFlow, track: bool) -> None:
    """At equal log-SNR x / alpha is the same on every path; log p differs by what stretches x, summed as it was."""
    guidance = fd.DensityGuidance(q=0.4, track=track)
    flow = fd.Flow(network64(), fd.VP(), "v_prediction")
    grid = torch.linspace(LAM_NOISE, 4.0, 5, dtype=torch.float64)
    noise = batch(2)[0]
    results = []
    for each in (flow, along_path(flow, schedule)):
        path = each.schedule
        latents = noise * path.sigma(LAM_NOISE)
        result = fd.sample(each, latents, grid, "ddim", guidance, log_prob=True, divergence="exact")
        by_steps = sum(3.5 * path.dlog_alpha(lam) for lam in grid[:-1].tolist())
        exactly = math.log(path.alpha(4.0) / path.alpha(LAM_NOISE))
        stretch = math.log(path.sigma(LAM_NOISE)) + (exactly if track else by_steps)
        assert result.log_prob is not None
        results.append((result.x / path.alpha(4.0), result.log_prob + DIMENSION * stretch))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-9)


def test_only_a_flow_in_log_snr_can_be_moved() -> None:
    network = load_digits_flow().model
    with pytest.raises(ValueError, match="log-SNR"):
        along_path(fd.Flow(network, fd.VP(), "v_prediction", time=lambda lam: lam / 2), fd.VE())
    with pytest.raises(TypeError, match="schedule"):
        along_path(load_digits_flow(), "ve")  # type: ignore[arg-type]


def test_a_saved_network_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = DigitsNetwork(fine=8, coarse=12, dense=5, condition=7).eval()
    nn.init.normal_(network.fine_in.conv_out.weight)
    save_digits_network(network, tmp_path / "small.safetensors", "epsilon")
    flow = load_digits_flow(tmp_path / "small.safetensors")
    assert flow.prediction_type == "epsilon"
    x, lam = batch(2, torch.float32)
    with torch.no_grad():
        assert torch.equal(flow.prediction(x, lam.double()), network(x, lam))


def changed(metadata: dict[str, str] | None = None, **tensors: Tensor | None) -> Callable[[Path], Any]:
    """Writes the embedded file with some metadata or tensors changed; None removes a tensor."""

    def write(path: Path) -> None:
        with safe_open(str(EMBEDDED), framework="pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = {**file.metadata(), **(metadata or {})}
        content |= {name.replace("__", "."): value for name, value in tensors.items() if value is not None}
        for name in [name.replace("__", ".") for name, value in tensors.items() if value is None]:
            del content[name]
        save_file(content, str(path), facts)

    return write


def sizes(**change: Any) -> dict[str, str]:
    return {"architecture": json.dumps({"fine": 16, "coarse": 48, "dense": 96, "condition": 48, **change})}


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "cannot be read"),
    "folder": (lambda path: path.mkdir(), "cannot be read|no safetensors file"),
    "empty": (lambda path: path.touch(), "truncated or no safetensors file"),
    "text": (lambda path: path.write_text("these are no weights\n" * 50), "truncated or no safetensors file"),
    "truncated": (lambda path: path.write_bytes(EMBEDDED.read_bytes()[:-1000]), "truncated or no safetensors file"),
    "foreign": (lambda path: save_file({"weight": torch.zeros(3)}, str(path)), "its format is None"),
    "version": (changed({"version": "2"}), "its version is '2', wanted '1'"),
    "schedule": (changed({"schedule": "ve"}), "its schedule is 've', wanted 'vp'"),
    "prediction": (changed({"prediction_type": "logits"}), "does not say what it predicts"),
    "no json": (changed({"architecture": "{"}), "architecture is no JSON"),
    "list": (changed({"architecture": "[1]"}), "architecture must give"),
    "huge": (changed(sizes(dense=10**9)), "dense must be"),
    "negative": (changed(sizes(fine=-4)), "fine must be"),
    "groups": (changed(sizes(coarse=47)), "coarse must be a multiple of 4"),
    "bool": (changed(sizes(dense=True)), "dense must be"),
    "other sizes": (changed(sizes(dense=95)), "must be float32"),
    "tensor missing": (changed(head__bias=None), "'head.bias' is missing"),
    "tensor too many": (changed(tail=torch.zeros(1)), "'tail' is not expected"),
    "half precision": (changed(head__bias=torch.zeros(1).half()), "'head.bias' must be float32"),
    "not finite": (changed(head__bias=torch.tensor([torch.nan])), "'head.bias' holds values that are not finite"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_checkpoint_is_named_with_what_is_wrong(tmp_path: Path, kind: str) -> None:
    write, message = BAD_FILES[kind]
    path = tmp_path / "weights.safetensors"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_digits_flow(path)
    assert str(path) in str(caught.value)
