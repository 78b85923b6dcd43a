"""A small trained flow that comes with the package: 8 x 8 handwritten digits, for examples, tests and the command line.

The data are the 1,797 scans of scikit-learn's `load_digits`, 17 grey levels 0..16. They are dequantised, so that they
have a density: x = 2 (level + u) / 17 - 1 with u uniform in [0, 1), hence x in [-1, 1) and one level is 2/17 wide.
log p of the flow is the log density of that x, in nats, with a trace of Gaussian noise at the log-SNR it is read at.

Weights are a safetensors file whose metadata say what they are; `examples/train_digits.py` makes the shipped one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdensity.conversions import check_prediction_type, to_epsilon
from fastdensity.flow import Flow, check_schedule
from fastdensity.schedules import VP, Schedule

LEVELS = 17
LAM_NOISE, LAM_DATA = -10.0, 8.0  # where sampling starts and ends; the network was trained on [-10, 10]
EMBEDDED = Path(__file__).parent / "data" / "digits.safetensors"
FORMAT, VERSION, SCHEDULE = "fastdensity-digits", "1", "vp"
LARGEST_SIZE = 512  # a bound on hyper-parameters read from a file, before memory is asked for
SIZES = ("fine", "coarse", "dense", "condition")  # hyper-parameters of the network that its file names
GROUPS = 4
FREQUENCIES = 16


def dequantise(levels: Tensor, uniform: Tensor) -> Tensor:
    """2 (levels + uniform) / 17 - 1: grey levels 0..16 and uniforms in [0, 1), both of one shape, to x in [-1, 1)."""
    return (levels + uniform) * (2.0 / LEVELS) - 1.0


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions; the log-SNR scales and shifts what lies between them (FiLM, Perez et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(GROUPS, inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(condition, 2 * outputs)
        self.norm_out = nn.GroupNorm(GROUPS, outputs, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv_out.weight)  # every block starts as the identity

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, inputs, H, W) and (B, condition) to (B, outputs, H, W)."""
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv_in(functional.silu(self.norm_in(x)))
        hidden = functional.silu(self.norm_out(hidden) * (1 + scale) + shift)
        return self.skip(x) + self.conv_out(self.dropout(hidden))


class DigitsNetwork(nn.Module):
    """A U-Net on 8 x 8 and 4 x 4 pixels with one dense layer across the picture at the bottom.

    Called as network(x, lam) with x (B, 1, 8, 8) and the log-SNR lam (B,), both of the parameters' dtype; returns
    (B, 1, 8, 8). Smooth (SiLU), and no sample sees another one (no batch norm).

    Args:
        fine, coarse: channels at 8 x 8 and at 4 x 4, multiples of 4. dense: width of the dense layer.
        condition: width of the log-SNR embedding. dropout: probability in training.
    """

    def __init__(
        self, fine: int = 16, coarse: int = 48, dense: int = 96, condition: int = 48, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.sizes = dict(zip(SIZES, (fine, coarse, dense, condition), strict=True))
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.arange(1, FREQUENCIES + 1) * (math.pi / 24))
        self.embedding = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, condition), nn.SiLU(), nn.Linear(condition, condition), nn.SiLU()
        )
        self.stem = nn.Conv2d(1, fine, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(fine, 8, 8))  # digits are centred: where a pixel lies matters
        self.fine_in = ResidualBlock(fine, fine, condition, dropout)
        self.down = nn.Conv2d(fine, coarse, 2, stride=2)
        self.coarse_in = ResidualBlock(coarse, coarse, condition, dropout)
        self.dense_in = nn.Linear(coarse * 16, dense)
        self.dense_out = nn.Linear(dense, coarse * 16)
        self.coarse_out = ResidualBlock(coarse, coarse, condition, dropout)
        self.up = nn.Conv2d(coarse, fine, 1)
        self.fine_out = ResidualBlock(2 * fine, fine, condition, dropout)
        self.norm = nn.GroupNorm(GROUPS, fine)
        self.head = nn.Conv2d(fine, 1, 3, padding=1)

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        """The prediction, (B, 1, 8, 8), for noisy digits x (B, 1, 8, 8) at log-SNR lam (B,)."""
        angles = lam[:, None] * self.frequencies
        condition = self.embedding(torch.cat([angles.sin(), angles.cos()], dim=1))
        fine = self.fine_in(self.stem(x) + self.position, condition)
        coarse = self.coarse_in(self.down(fine), condition)
        dense = self.dense_out(functional.silu(self.dense_in(coarse.flatten(1))))
        coarse = self.coarse_out(coarse + dense.view(coarse.shape), condition)
        upsampled = functional.interpolate(self.up(coarse), scale_factor=2.0, mode="nearest")
        fine = self.fine_out(torch.cat([fine, upsampled], dim=1), condition)
        return self.head(functional.silu(self.norm(fine)))


def load_digits_flow(checkpoint: str | Path | None = None, device: str | torch.device = "cpu") -> Flow:
    """The flow of handwritten digits on the VP path, with weights frozen and in evaluation mode.

    Args:
        checkpoint: a file that `save_digits_network` wrote; None takes the one that comes with the package.
        device: where the weights go.

    Raises:
        ValueError: the file is missing, truncated, or not such a file; the message names it and says what is wrong.
        ImportError: safetensors is not installed.
    """
    path = EMBEDDED if checkpoint is None else Path(checkpoint)
    metadata, tensors = _read(path)
    _check_metadata(path, metadata)
    network = _network_of(path, metadata)
    _check_tensors(path, tensors, network.state_dict())
    network.load_state_dict(tensors)
    network.eval().requires_grad_(False)
    return Flow(network.to(device), VP(), prediction_type=metadata["prediction_type"])


def save_digits_network(network: DigitsNetwork, path: str | Path, prediction_type: str) -> None:
    """Writes the weights in fp32, with metadata that name the format, the architecture, the path and the prediction."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "schedule": SCHEDULE,
        "prediction_type": check_prediction_type(prediction_type),
        "architecture": json.dumps(network.sizes),
    }
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in network.state_dict().items()}
    Path(path).write_bytes(_safetensors().torch.save(tensors, metadata))  # save_file would make it unreadable to others


class NoiseOnPath(nn.Module):
    """The noise that a flow of one path predicts, for samples of another: called as (x (B, *), lam (B,)).

    x / alpha has the same law on every Gaussian path at equal log-SNR, and the noise in it is the same: x is rescaled
    by alpha_trained(lam) / alpha(lam), and the trained flow's noise is the answer. Nothing is approximated.
    """

    def __init__(self, flow: Flow, schedule: Schedule) -> None:
        super().__init__()
        self.network, self.prediction_type, self.sigma_data = flow.model, flow.prediction_type, flow.sigma_data
        self.trained, self.schedule = flow.schedule, schedule

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        """The predicted noise, (B, *)."""
        alpha, sigma = self.trained.alpha(lam), self.trained.sigma(lam)
        ratio = torch.as_tensor(alpha / self.schedule.alpha(lam))
        rescaled = x * ratio.reshape(-1, *[1] * (x.dim() - 1))
        prediction = self.network(rescaled, lam)
        return to_epsilon(prediction, rescaled, alpha, sigma, self.prediction_type, self.sigma_data)


def along_path(flow: Flow, schedule: Schedule) -> Flow:
    """The same distribution of data sampled along another Gaussian path; see `NoiseOnPath`.

    Raises:
        TypeError: schedule is no Schedule. ValueError: the flow's model takes another time than log-SNR.
    """
    if flow.time is not None:
        raise ValueError("flow must take log-SNR as its time (time=None) to be moved to another path")
    return Flow(NoiseOnPath(flow, check_schedule(schedule)), schedule, prediction_type="epsilon")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"the digits need safetensors ({error}): pip install 'fastdensity[cli]'") from error
    return safetensors


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the reader's own error class is a bare Exception
        raise ValueError(f"checkpoint {path} is truncated or no safetensors file: {error}") from error


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    for key, wanted in (("format", FORMAT), ("version", VERSION), ("schedule", SCHEDULE)):
        found = metadata.get(key)
        if found != wanted:
            raise ValueError(f"checkpoint {path} is not for this network: its {key} is {found!r}, wanted {wanted!r}")
    try:
        check_prediction_type(metadata.get("prediction_type"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} does not say what it predicts: {error}") from error


def _network_of(path: Path, metadata: dict[str, str]) -> DigitsNetwork:
    try:
        sizes = json.loads(metadata.get("architecture", ""))
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoint {path}: its architecture is no JSON ({error})") from error
    if not isinstance(sizes, dict) or set(sizes) != set(SIZES):
        raise ValueError(f"checkpoint {path}: its architecture must give {', '.join(SIZES)}, got {sizes!r:.100}")
    for name, size in sizes.items():
        step = GROUPS if name in ("fine", "coarse") else 1
        if type(size) is not int or not step <= size <= LARGEST_SIZE or size % step:
            raise ValueError(
                f"checkpoint {path}: {name} must be a multiple of {step} up to {LARGEST_SIZE}, got {size!r:.40}"
            )
    with torch.random.fork_rng(devices=[]):  # initial values are drawn, but not from the caller's random numbers
        return DigitsNetwork(**sizes)


def _check_tensors(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in sorted(set(found) ^ set(wanted)):
        raise ValueError(f"checkpoint {path}: tensor {name!r} is {'missing' if name in wanted else 'not expected'}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != torch.float32:
            shapes = f"float32 {tuple(wanted[name].shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"checkpoint {path}: tensor {name!r} must be {shapes}")
        if not tensor.isfinite().all():
            raise ValueError(f"checkpoint {path}: tensor {name!r} holds values that are not finite")
