"""What the divergence benchmark runs on: two networks for time, and local denoisers for products to a wanted error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import jvp_cases
from fastdensity.bench.subject import digits_states
from fastdensity.conversions import direction_coefficients
from fastdensity.digits import load_digits_flow
from fastdensity.flow import Flow


@dataclass
class Case:
    """module(x, time) -> like x, at x (B, *) and time (B,); `exact`: is the exact divergence compared, too?"""

    name: str
    module: nn.Module
    x: Tensor
    time: Tensor
    exact: bool = False
    slow_to_compile: bool = False

    @property
    def columns(self) -> int:
        return self.x.shape[1:].numel()

    def fn(self, x: Tensor) -> Tensor:
        return self.module(x, self.time)

    def flat(self, x: Tensor) -> Tensor:
        """The same on (B, n), for packages that know vectors only."""
        return self.fn(x.reshape(self.x.shape)).flatten(1)

    def double(self) -> Case:
        return Case(self.name, copy.deepcopy(self.module).double(), self.x.double(), self.time.double())


class Drift(nn.Module):
    """The flow's drift a x + c prediction(x, lam) at one log-SNR, in operators that every package can differentiate."""

    def __init__(self, flow: Flow, lam: float) -> None:
        super().__init__()
        alpha, sigma = float(flow.schedule.alpha(lam)), float(flow.schedule.sigma(lam))
        along_x, along_p = direction_coefficients(flow.prediction_type, alpha, sigma, flow.sigma_data)
        self.network = flow.model
        self.identity = float(flow.schedule.dlog_alpha(lam)) - sigma / 2 * along_x
        self.factor = -sigma / 2 * along_p

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        return self.identity * x + self.factor * self.network(x, lam)


class Sample(nn.Module):
    """A diffusers network without the class around its result."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.network(x, time, return_dict=False)[0]


def digits(lam: float = 0.0, batch: int = 64) -> Case:
    flow = load_digits_flow()
    x = digits_states(flow, lam, batch, seed=0)
    return Case(f"digits, lam = {lam:g}, B={batch}", Drift(flow, lam), x, torch.full((batch,), lam), exact=True)


def unet() -> Case:
    made = jvp_cases.unet()
    assert made.module is not None
    made.module.requires_grad_(False)
    x, time = made.primals
    return Case(made.name, Sample(made.module), x, time, slow_to_compile=True)


def makes() -> list[Callable[[], Case]]:
    return [digits, unet] if jvp_cases.has_diffusers() else [digits]


# -- denoisers: how many products to one per cent? --------------------------------------------------------------------
class LocalNetwork(nn.Module):
    """x / 2 and three 3 x 3 convolutions of random weights that keep the scale: an element sees a window of 7 x 7."""

    def __init__(self, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        sizes = (channels, width, width, channels)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        for parameter in self.layers.parameters():
            if parameter.dim() == 4:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = x
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden.tanh() if index else hidden)
        return x / 2 + hidden


class PatchDenoiser(nn.Module):
    """The posterior mean of a pixel, known its 3 x 3 patch plus noise sigma, if patches are drawn from a finite set.

    E[centre | patch] = sum_m w_m centre_m with w = softmax of -||patch - P_m||^2 / (2 sigma^2): in closed form two
    convolutions and a softmax, since ||patch||^2 is the same for all m.
    """

    def __init__(self, patches: int = 64, sigma: float = 1.0) -> None:
        super().__init__()
        smooth = functional.avg_pool2d(torch.randn(patches, 1, 5, 5), 3, stride=1) * 3
        self.kernels: Tensor
        self.register_buffer("kernels", smooth / sigma**2)
        self.register_buffer("offsets", -smooth.square().sum((1, 2, 3)) / (2 * sigma**2))
        self.register_buffer("centres", smooth[:, 0, 1, 1].reshape(1, patches, 1, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        weights = functional.conv2d(x, self.kernels, self.offsets, padding=1).softmax(1)  # type: ignore[arg-type]
        return functional.conv2d(weights, self.centres)  # type: ignore[arg-type]


def denoisers(size: int = 16, batch: int = 16) -> list[Case]:
    """The trained network at several log-SNR, and two local denoisers on `size` x `size`."""
    torch.manual_seed(0)
    cases = [digits(lam, batch) for lam in (-2.0, 0.0, 2.0, 4.0)]
    time = torch.zeros(batch)
    network, patches = LocalNetwork().requires_grad_(False), PatchDenoiser()
    states = torch.randn(batch, 1, size, size)
    cases.append(Case(f"three random 3 x 3 convolutions, {size} x {size}", network, states, time))
    cases.append(Case(f"closed-form denoiser of 3 x 3 patches, sigma = 1, {size} x {size}", patches, states, time))
    return cases
