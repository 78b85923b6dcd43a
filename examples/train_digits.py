"""Trains the digits that come with the package, from scratch: a few minutes on two cores.

    python examples/train_digits.py [--out fastdensity/data/digits.safetensors] [--steps 4000] [--threads 1]

Needs the extra `fastdensity[train]`. The network predicts v = alpha eps - sigma x0 on the VP path. The loss is
||eps - eps_hat||^2 = alpha^2 ||v - v_hat||^2 with log-SNR uniform on [-10, 10]: times half the width of that interval
it is, up to a constant, the mean of -log p in nats (Kingma et al. 2021, eq. 15), so it trains the density itself.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from fastdensity.digits import EMBEDDED, DigitsNetwork, dequantise, save_digits_network
from fastdensity.schedules import VP

LAM_LOW, LAM_HIGH = -10.0, 10.0
BATCH = 256
HELD_OUT = 180
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 300, 0.02
AVERAGING = 0.998  # the mean of about the last 500 steps


def load_digits(seed: int) -> tuple[Tensor, Tensor]:
    """Grey levels 0..16 for training, (1617, 1, 8, 8), and held out, (180, 1, 8, 8)."""
    from sklearn import datasets

    levels = torch.tensor(datasets.load_digits().images, dtype=torch.float32)[:, None]
    order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(seed))
    return levels[order[HELD_OUT:]], levels[order[:HELD_OUT]]


def spread_log_snr(count: int, generator: torch.Generator) -> Tensor:
    """(count,) uniform on [LAM_LOW, LAM_HIGH], evenly spread: one shift for all, so that batches differ little."""
    fractions = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    return LAM_LOW + (LAM_HIGH - LAM_LOW) * fractions


def denoising_error(network: DigitsNetwork, clean: Tensor, lam: Tensor, noise: Tensor) -> Tensor:
    """||eps - eps_hat||^2, (B,), for clean digits noised to log-SNR lam."""
    alpha = torch.as_tensor(VP().alpha(lam))
    sigma = torch.as_tensor(VP().sigma(lam))
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    wanted = a * noise - s * clean
    return alpha.square() * (network(a * clean + s * noise, lam) - wanted).square().flatten(1).sum(1)


@torch.no_grad()
def mean_loss(network: DigitsNetwork, levels: Tensor, repeats: int = 40) -> float:
    """Mean of the loss, (LAM_HIGH - LAM_LOW)/2 ||eps - eps_hat||^2 in nats, over `repeats` noisings of every digit."""
    generator = torch.Generator().manual_seed(1)
    network.eval()
    total = 0.0
    for _ in range(repeats):
        lam = spread_log_snr(len(levels), generator)[torch.randperm(len(levels), generator=generator)]
        clean = dequantise(levels, torch.rand(levels.shape, generator=generator))
        noise = torch.randn(levels.shape, generator=generator)
        total += denoising_error(network, clean, lam, noise).mean().item()
    network.train()
    return total / repeats * (LAM_HIGH - LAM_LOW) / 2


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(training: Tensor, held_out: Tensor, steps: int, seed: int) -> DigitsNetwork:
    """The averaged network after `steps` steps of AdamW."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitsNetwork()
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    started, recent = time.perf_counter(), 0.0
    for step in range(steps):
        chosen = training[torch.randint(len(training), (BATCH,), generator=generator)]
        clean = dequantise(chosen, torch.rand(chosen.shape, generator=generator))
        lam, noise = spread_log_snr(BATCH, generator), torch.randn(clean.shape, generator=generator)
        loss = denoising_error(network, clean, lam, noise).mean()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        keep = min(AVERAGING, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)
        recent += loss.item() * (LAM_HIGH - LAM_LOW) / 2
        if (step + 1) % (steps // 8 or 1) == 0:
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1:5d}  {seconds:4.0f} s  loss {recent / (steps // 8 or 1):7.2f} nats  "
                f"held out {mean_loss(average, held_out):7.2f}",
                flush=True,
            )
            recent = 0.0
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded digits.")
    parser.add_argument("--out", type=Path, default=EMBEDDED)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more gain little on so small a network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training, held_out = load_digits(options.seed)
    network = train(training, held_out, options.steps, options.seed)
    save_digits_network(network, options.out, prediction_type="v_prediction")
    parameters = sum(p.numel() for p in network.parameters())
    print(
        f"wrote {options.out}: {parameters} parameters, {options.out.stat().st_size} bytes; denoising loss "
        f"{mean_loss(network, training[:HELD_OUT]):.2f} nats on training digits, "
        f"{mean_loss(network, held_out):.2f} on held-out digits"
    )


if __name__ == "__main__":
    main()
