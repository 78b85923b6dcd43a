"""Calls of the closed loop with memories of real runs: guided samples of a Gaussian, steered by the float64 reference.

The contract is in fastdensity/reference/track.py. Rows of a batch differ in everything that may differ: their quantile,
their place on the path, noise, and whether they are fresh.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdensity import rules
from fastdensity.reference import track as reference
from fastdensity.reference.rows import compute_dtype, flatten
from fastdensity.reference.track import MEMORY, PARAMETERS, Step, launch_torch

EPSILON_OF = {torch.float64: 2.2e-16, torch.float32: 1.2e-7}
# In float64 the eager result is the exact one itself, so its error says nothing: allow a chain of roundings. A decision
# divides small differences of the products, more so where noise was taken off them.
ROUNDINGS, AFTER_NOISE = {torch.float64: 512, torch.float32: 32}, 512
# of the memory, in nats: sums of terms as large as h ||eps||^2, which all but cancel
NATS = ("commanded_next", "realised_next", "commanded", "realised")
SDE_ROW, LIMITED_ROW, FRESH_ROW, STILL_ROW, TURNED_ROW = range(1, 6)  # where a batch has so many


@dataclass
class Call:
    """One call of the contract."""

    kind: str
    scheme: str
    operands: tuple[Tensor | None, ...]
    parameters: tuple[Any, ...]
    memory: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.operands[:4])

    def made(self, double: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's (eps, report, memory) in the call's own dtypes, or in float64 on these very numbers."""
        operands = tuple(None if o is None else o.double() if double else o for o in self.operands)
        return reference.track(self.kind, self.scheme, flatten(operands), self.parameters, self.memory)

    def number(self, name: str) -> Any:
        return self.parameters[PARAMETERS.index(name)]

    def with_parameters(self, **changes: Any) -> Call:
        pairs = zip(PARAMETERS, self.parameters, strict=True)
        return replace(self, parameters=tuple(changes.get(name, value) for name, value in pairs))

    def with_operands(self, make: Any) -> Call:
        return replace(self, operands=tuple(None if operand is None else make(operand) for operand in self.operands))

    def row(self, row: int) -> Call:
        """That row alone, in memory of its own."""
        alone = self.with_operands(lambda operand: operand[row : row + 1].clone())
        parameters = tuple(p[row : row + 1] if isinstance(p, Tensor) and p.numel() > 1 else p for p in self.parameters)
        return replace(alone, parameters=parameters, memory=self.memory[row : row + 1].clone())


def launch(call: Call, launcher: Any = launch_torch, eps: Tensor | None = None, **sizes: int) -> tuple[Tensor, ...]:
    """(eps, report, memory) of a backend, on new memory."""
    x = call.operands[0]
    assert x is not None
    if eps is None:
        eps = torch.empty(x.shape, dtype=call.dtype, device=x.device)
    report = torch.empty((x.shape[0], 4), dtype=torch.float64, device=x.device)
    memory = torch.empty_like(call.memory)
    launcher(call.kind, call.scheme, call.operands, call.parameters, call.memory, eps, report, memory, **sizes)
    return eps, report, memory


def launch_step(
    call: Call, rule: str, launcher: Any, noise: Tensor | None = None, key: Any = None, **sizes: int
) -> Any:
    """(out, the step's report, eps, report, memory) of a backend, on new memory full of NaN."""
    x, prediction = call.operands[:2]
    assert x is not None
    assert prediction is not None
    out = torch.full_like(x if rule == "step" else prediction, torch.nan)
    step_report = torch.full((x.shape[0], 4), torch.nan, dtype=call.dtype, device=x.device)
    step = Step(rule, noise, key, out, step_report)

    def with_step(*arguments: Any) -> None:
        launcher(*arguments, step, **sizes)

    return out, step_report, *launch(call, with_step)


def assert_step_as_good_as_eager(
    call: Call, rule: str, found: Any, noise: Tensor | None = None, key: Any = None
) -> None:
    """As `assert_as_good_as_eager`, for what is made with the eta decided on."""
    out, report, *decided = found
    assert_as_good_as_eager(call, *decided)
    results = []
    for double in (True, False):
        operands = flatten(tuple(None if o is None else o.double() if double else o for o in call.operands))
        shaken = None if noise is None else noise.flatten(1).double() if double else noise.flatten(1)
        numbers = call.made(double)[1]
        results.append(reference.follow(rule, call.kind, operands, shaken, key, call.parameters, numbers))
    (exact, exact_report), (eager, eager_report) = results
    assert torch.equal(report[:, 3].double(), exact_report[:, 3].double())
    after_noise = call.memory[:, MEMORY.index("noise")] > 0
    stored = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(out.dtype, EPSILON_OF[call.dtype])
    guided = exact_report[:, 3] == 0
    for index, row in enumerate(guided.tolist()):
        roundings = ROUNDINGS[call.dtype] * (AFTER_NOISE if after_noise[index] else 1)
        if row:
            vectors = (vector[index] for vector in (out.flatten(1), eager, exact))
            _assert_close("out", *vectors, roundings * stored * exact[index].abs().max())
            numbers = (found[index, :3] for found in (report, eager_report, exact_report))
            largest = exact_report[index, :3].abs().max() + 1.0
            _assert_close("report", *numbers, roundings * EPSILON_OF[call.dtype] * largest)


class _Gaussian:
    """Data of independent normal coordinates, their variances between 0.01 and 1."""

    def __init__(self, rows: int, columns: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.variance = 10 ** (-2 * self.random(columns))
        self.x = self.normal(rows, columns)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def random(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=self.generator)

    def eps(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma[:, None] * x / (alpha[:, None] ** 2 * self.variance + sigma[:, None] ** 2)

    def prediction(self, kind: str, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What a perfect network of this type says, but for a small disturbance."""
        eps = self.eps(x, alpha, sigma) * (1 + 0.05 * self.normal(*x.shape))
        norm = torch.sqrt(sigma**2 + (alpha * 0.5) ** 2)
        along_x, along_p, scale = (
            torch.as_tensor(number, dtype=torch.float64).expand(len(x))[:, None]
            for number in rules.direction(kind, alpha, sigma, 0.5, norm)
        )
        return (eps / scale - along_x * x) / along_p


def _place(lam: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()


def random_call(
    kind: str = "epsilon",
    scheme: str = "direct",
    rows: int = 4,
    columns: int = 50,
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    cfg: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Call:
    """The call after `steps` steps of a run; row SDE_ROW took noise, row LIMITED_ROW asks for much too much.

    Row FRESH_ROW is fresh, its last vectors NaN; row STILL_ROW was here before; in row TURNED_ROW eps has turned away
    from the last eps. The state and the last one have `state_dtype`, or else `dtype`.
    """
    data = _Gaussian(rows, columns, seed)
    index = torch.arange(rows)
    lam = -3.0 + 0.5 * data.random(rows)
    q = 0.3 + 0.4 * data.random(rows)
    noise = torch.where(index == SDE_ROW, 0.3, 0.0).double()
    shift, zero, one = data.normal(rows), torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    memory = torch.zeros(rows, len(MEMORY), dtype=torch.float64)
    x, last_x, last_eps = data.x, None, None
    early = "predictor" if scheme == "corrector" else "direct"
    for step in range(steps + (scheme != "corrector")):
        if step == steps - (scheme == "corrector") and rows > LIMITED_ROW:
            shift[LIMITED_ROW] = 30.0 * columns
        (alpha, sigma), lam = _place(lam), lam + 0.4 + 0.6 * data.random(rows)
        alpha_end, sigma_end = _place(lam)
        step_to = (alpha_end * (1 - 0.1 * noise), sigma_end * (1 - 0.1 * noise))
        numbers = (alpha, sigma, *step_to, alpha_end, sigma_end, q, shift, one, noise, 0.5, zero)
        prediction = data.prediction(kind, x, alpha, sigma)
        if step == steps:
            break
        eps, report, memory = reference.track(kind, early, (x, prediction, None, last_x, last_eps), numbers, memory)
        last_x, last_eps = x, eps
        turn = (step_to[1] - step_to[0] * sigma / alpha) * (1 + report[:, 0])
        x = (step_to[0] / alpha)[:, None] * x + turn[:, None] * eps
        x = x + (noise * sigma_end)[:, None] * data.normal(rows, columns)
    if scheme == "corrector":
        numbers = (*(alpha_end, sigma_end) * 3, q, shift, one, zero, 0.5, zero)
        prediction = data.prediction(kind, x, alpha_end, sigma_end)
    elif scheme == "direct":  # as of a multistep solver, of Euler's in lam, in the last step; with noise ahead
        carry = 0.5 * data.random(rows)
        numbers = (
            alpha, sigma, alpha_end * (1 - 0.1 * data.random(rows)), sigma_end * (1 + 0.1 * data.random(rows)),
            alpha_end, sigma_end, q, shift, one, noise, 0.5, carry,
        )  # fmt: skip
    call = Call(kind, scheme, (x, prediction, None, last_x, last_eps), numbers, memory)
    if cfg:
        call = _with_cfg(call, data)
    if rows > STILL_ROW and scheme != "corrector":
        memory[STILL_ROW, 1], memory[STILL_ROW, 2] = memory[STILL_ROW, 3], memory[STILL_ROW, 4]
    if rows > TURNED_ROW and last_eps is not None:
        last_eps[TURNED_ROW] = 0.02 * last_eps[TURNED_ROW] + data.normal(columns)
    if rows > FRESH_ROW:
        call = _refreshed(call, FRESH_ROW)
    return _converted(call, dtype, state_dtype or dtype, device)


def _with_cfg(call: Call, data: _Gaussian) -> Call:
    """The same combined prediction, of two that differ."""
    x, prediction, _, *last = call.operands
    assert prediction is not None
    scale = 1.0 + 3.0 * data.random(len(prediction))
    uncond = prediction + 0.1 * data.normal(*prediction.shape)
    cond = uncond + (prediction - uncond) / scale[:, None]
    return replace(call, operands=(x, cond, uncond, *last)).with_parameters(cfg_scale=scale)


def _refreshed(call: Call, row: int) -> Call:
    call.memory[row] = 0.0
    for vector in call.operands[3:]:
        if vector is not None:
            vector[row] = torch.nan
    return call


def _converted(call: Call, dtype: torch.dtype, state_dtype: torch.dtype, device: str) -> Call:
    arithmetic = torch.float64 if torch.float64 in (dtype, state_dtype) else torch.float32
    dtypes = (state_dtype, dtype, dtype, state_dtype, arithmetic)
    operands = tuple(None if o is None else o.to(device, t) for o, t in zip(call.operands, dtypes, strict=True))
    parameters = tuple(p.to(device) if isinstance(p, Tensor) else p for p in call.parameters)
    return replace(call, operands=operands, parameters=parameters, memory=call.memory.to(device))


def assert_as_good_as_eager(call: Call, eps: Tensor, report: Tensor, memory: Tensor) -> None:
    """err(kernel) < 2 err(eager, same dtype) + a few roundings, for eps and for each number of a row; flags equal."""
    exact, exact_report, exact_memory = call.made(double=True)
    eager, eager_report, eager_memory = call.made()
    assert eps.dtype == eager.dtype == call.dtype
    assert report.dtype == memory.dtype == torch.float64
    unit = EPSILON_OF[call.dtype]
    _assert_close("eps", eps.flatten(1), eager, exact, 8 * unit * exact.abs().max())
    assert torch.equal(report[:, 3], exact_report[:, 3]), (report[:, 3], exact_report[:, 3])
    square = exact_report[:, 1].max()
    after_noise = call.memory[:, MEMORY.index("noise")] > 0
    for rows, roundings in ((~after_noise, ROUNDINGS[call.dtype]), (after_noise, AFTER_NOISE * ROUNDINGS[call.dtype])):
        if not rows.any():
            continue
        for index, name in enumerate(("eta - 1", "sq_norm", "deficit")):
            scale = (torch.ones_like(square), square, square)[index] + exact_report[:, index].abs().max()
            columns = (numbers[rows, index] for numbers in (report, eager_report, exact_report))
            _assert_close(name, *columns, roundings * unit * scale)
        for index, name in enumerate(MEMORY):
            scale = (square if name in NATS else 0.0) + exact_memory[:, index].abs().max()
            columns = (numbers[rows, index] for numbers in (memory, eager_memory, exact_memory))
            _assert_close(name, *columns, roundings * unit * scale)


def _assert_close(name: str, got: Tensor, eager: Tensor, exact: Tensor, tiny: Tensor) -> None:
    error, allowed = (got.double() - exact).abs().max(), 2 * (eager.double() - exact).abs().max() + tiny
    assert error <= allowed, (name, float(error), float(allowed))
