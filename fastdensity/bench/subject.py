"""What is benched: the embedded digits at a log-SNR, or a user's own function and states."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdensity.boundary import describe
from fastdensity.digits import LAM_NOISE, load_digits_flow
from fastdensity.experiment import make_latents
from fastdensity.flow import Flow
from fastdensity.sampling import sample

STEPS_PER_UNIT = 2.5  # of log-SNR, on the way from noise to the states that are benched
LEAST_STEPS = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """fn(x, *args) at states x (B, *), by a name for tables and files."""

    name: str
    fn: Callable[..., Any]
    x: Tensor
    args: tuple[Any, ...] = ()

    @property
    def columns(self) -> int:
        """Elements of a sample."""
        return self.x.shape[1:].numel()


def digits_subject(
    lam: float, samples: int, seed: int, device: torch.device | str = "cpu", checkpoint: str | Path | None = None
) -> Subject:
    """The drift of the digits flow at log-SNR lam, at states that its own ODE leads to from seeded latents.

    Raises:
        ValueError: lam is below where sampling starts, or the checkpoint is no digits network.
    """
    if not lam >= LAM_NOISE:
        raise ValueError(f"lam must be at least {LAM_NOISE:g}, where sampling starts, got {lam:g}")
    flow = load_digits_flow(checkpoint, device)
    return Subject(
        f"digits, lam = {lam:g}", flow.drift, digits_states(flow, lam, samples, seed), (_rows(lam, samples),)
    )


def digits_states(flow: Flow, lam: float, samples: int, seed: int) -> Tensor:
    """(samples, 1, 8, 8) of the flow at log-SNR lam, on the flow's device."""
    device = next(parameter.device for parameter in flow.model.parameters())  # type: ignore[attr-defined]
    latents = make_latents(samples, seed, float(flow.schedule.sigma(LAM_NOISE)), device)
    if lam == LAM_NOISE:
        return latents
    steps = max(LEAST_STEPS, round(STEPS_PER_UNIT * (lam - LAM_NOISE)))
    return sample(flow, latents, torch.linspace(LAM_NOISE, lam, steps + 1, dtype=torch.float64), solver="dpmpp_2m").x


def _rows(lam: float, samples: int) -> Tensor:
    """A log-SNR for each row, as a tensor: a graph traced for one number would not serve the next."""
    return torch.full((samples,), lam, dtype=torch.float64)


def factory_subject(
    path: str,
    samples: int,
    seed: int,
    shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
    checkpoint: str | Path | None = None,
) -> Subject:
    """What the factory `package.module:name` returns when called: fn, or (fn, x).

    fn(x) takes states (B, *) and returns as many; x (B, *) are states of the user's, of which the first `samples` are
    taken. Without x, states of `shape` are drawn from N(0, I). Modules are moved to the device and put in evaluation
    mode. The working directory is searched, too. A factory is called without arguments, or with the checkpoint's path
    where one is given: what it loads from there is its own affair.

    Raises:
        ValueError: no such module or name in it, it fails when imported or called, or returns something else; it takes
            no checkpoint, or needs one.
    """
    made = _call_factory(path, () if checkpoint is None else (str(checkpoint),))
    fn, x = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not callable(fn):
        raise ValueError(f"{path}() must return a callable fn(x), or (fn, x), got {describe(made)}")
    if x is None:
        if shape is None:
            raise ValueError(f"{path}() returns no states x: return (fn, x), or give their shape")
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, *shape, generator=generator)
    elif shape is not None:
        raise ValueError(f"{path}() returns states of its own: give no shape")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{path}() must return states x as a floating tensor (B, *), got {describe(x)}")
    if isinstance(fn, nn.Module):
        fn = fn.to(device).eval()
    return Subject(path, fn, x[:samples].detach().to(device))


def _call_factory(path: str, arguments: tuple[str, ...]) -> Any:
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"model must be given as package.module:factory, got {path!r}")
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does
        raise ValueError(f"module {module_name!r} cannot be imported: {_said(error)}") from error
    finally:
        sys.path.remove("")
    factory: Any = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        what = "nothing" if factory is None else f"no function but {describe(factory)}"
        raise ValueError(f"module {module_name!r} has {what} named {name!r}: it must be a factory")
    _check_takes(factory, path, arguments)
    try:
        return factory(*arguments)
    except Exception as error:
        raise ValueError(f"{path}() fails: {_said(error)}") from error


def _check_takes(factory: Callable[..., Any], path: str, arguments: tuple[str, ...]) -> None:
    """ValueError if the factory cannot be called with these arguments; one that hides its signature is just called."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        wanted = "take one argument, the checkpoint's path" if arguments else "be callable without arguments"
        hint = "" if arguments else "; with --checkpoint FILE it is called as factory(path)"
        raise ValueError(f"factory {path}{signature} must {wanted}{hint}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
