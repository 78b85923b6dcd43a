"""The divergence as other packages compute it, each driven for real where it is a package; and as torch would.

All take one sample of probes per call, as their users' code does: k probes are k calls, whose mean is taken. Probes
are drawn through torch.randn_like by all, which is how the gate gives all of them the same.

- flow_matching: ODESolver.compute_likelihood, one Euler step of it, whose log density changes by the divergence.
- torchdyn: models.CNF with hutch_trace or autograd_trace, from the file itself: the package around it needs Lightning.
- zuko: FreeFormJacobianTransform with its integrator replaced by one evaluation. Its probes are normal, whose variance
  is larger: at equal products it is not even as accurate.
- torchcfm has no divergence of its own; its examples map a vector-Jacobian product (or jacrev) over the samples.
- score_sde (Song et al. 2021, appendix D.2): grad of sum(fn(x) eps), times eps, summed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdensity as fd
from benchmarks.divergence_cases import Case
from benchmarks.jvp_peers import NOTE as HELP
from benchmarks.jvp_peers import helped, mapped_jvp, one_jvp

Peer = Callable[[], Tensor]  # -> (B,)
One = Callable[[], Tensor]  # one probe
OURS = "fastdensity"
NOTE = f"forward mode and vmap: {HELP}; zuko's probes are normal, all others' signs"
PACKAGES = ("flow_matching", "torchdyn", "zuko")


def draw(x: Tensor) -> Tensor:
    """Random signs."""
    return torch.randn_like(x).sign()


@contextmanager
def given(name: str, probes: Tensor) -> Iterator[None]:
    """Where a peer finds `probes` (k, B, *) when it draws. flow_matching takes -1 where a normal is positive."""
    numbers = iter(-probes if name.startswith("flow_matching") else probes)

    def normal(like: Tensor) -> Tensor:
        return next(numbers).reshape(like.shape).to(like.dtype)

    with mock.patch.object(torch, "randn_like", normal):
        yield


def ours(case: Case, count: int) -> Peer:
    """The mean of `count` probes of seed 0."""
    return lambda: fd.divergence(case.module, case.x, case.time, num_matvecs=count).div


def ours_exact(case: Case) -> Peer:
    return lambda: fd.divergence(case.module, case.x, case.time, method="exact").div


def estimates(case: Case, count: int, compiled: bool = False) -> dict[str, Peer]:
    """Every rival's mean over `count` probes."""
    singles: dict[str, One] = {
        "score_sde, VJP": partial(_score_sde, case),
        "torchcfm, vmap(vjp)": partial(_torchcfm, case),
        "func.jvp": partial(_forward, case),
    }
    for package, single in (("flow_matching", _flow_matching), ("torchdyn", _torchdyn), ("zuko", _zuko)):
        if find_spec(package) is not None:
            singles[package] = single(case, False)
    found: dict[str, Peer] = {name: partial(_mean, single, count) for name, single in singles.items()}
    if count > 1:
        found["VJP, one forward pass"] = partial(_backwards, case, count)
        found["vmap(jvp)"] = partial(_mapped, case, count, mapped_jvp, False)
    if compiled:
        found["compile(vmap(jvp))"] = partial(_mapped, case, count, torch.compile(mapped_jvp, dynamic=False), True)
    return found


def exacts(case: Case) -> dict[str, Peer]:
    """Every rival's exact divergence."""
    found: dict[str, Peer] = {
        "torchcfm, vmap(jacrev)": partial(_torchcfm_exact, case),
        "vmap(jvp)": partial(_mapped_exact, case),
    }
    for package, single in (("flow_matching", _flow_matching), ("torchdyn", _torchdyn), ("zuko", _zuko)):
        if find_spec(package) is not None:
            found[package] = single(case, True)
    return found


def forms(case: Case, probes: Tensor) -> Tensor:
    """z.(J z) for each probe (k, B, *), (k, B) in float64, by torch.func.jvp in float64."""
    wide = case.double()
    with torch.no_grad(), helped():
        products = [one_jvp(wide.fn, (wide.x,), z)[1] for z in probes.double()]
    return torch.stack([_dot(z, product) for z, product in zip(probes.double(), products, strict=True)])


def _mean(one: One, count: int) -> Tensor:
    total = one()
    for _ in range(count - 1):
        total = total + one()
    return total / count


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(-(a.dim() - 1)).sum(-1)


# -- recipes in torch -------------------------------------------------------------------------------------------------
def _score_sde(case: Case) -> Tensor:
    eps = draw(case.x)
    with torch.enable_grad():
        x = case.x.detach().requires_grad_()
        gradient = torch.autograd.grad((case.fn(x) * eps).sum(), x)[0]
    return _dot(gradient, eps)


def _backwards(case: Case, count: int) -> Tensor:
    """The same with the network evaluated once."""
    total = torch.zeros(case.x.shape[0])
    with torch.enable_grad():
        x = case.x.detach().requires_grad_()
        value = case.fn(x)
        for index in range(count):
            eps = draw(case.x)
            gradient = torch.autograd.grad((value * eps).sum(), x, retain_graph=index < count - 1)[0]
            total += _dot(gradient, eps)
    return total / count


def _torchcfm(case: Case) -> Tensor:
    def form(x: Tensor, eps: Tensor, time: Tensor) -> Tensor:
        pull: Any = torch.func.vjp(lambda at: case.module(at[None], time[None])[0], x)[1]
        return (pull(eps)[0] * eps).sum()

    with helped():  # under vmap, other attention falls back to a loop
        return torch.func.vmap(form)(case.x, draw(case.x), case.time)


def _torchcfm_exact(case: Case) -> Tensor:
    shape = case.x.shape[1:]

    def trace(x: Tensor, time: Tensor) -> Tensor:
        return torch.trace(torch.func.jacrev(lambda at: case.module(at.reshape(1, *shape), time[None])[0].flatten())(x))

    with helped():
        return torch.func.vmap(trace)(case.x.flatten(1), case.time)


def _forward(case: Case) -> Tensor:
    z = draw(case.x)
    with helped():
        return _dot(z, one_jvp(case.fn, (case.x,), z)[1])


def _mapped(case: Case, count: int, mapped: Callable[..., Any], compiled: bool) -> Tensor:
    probes = torch.stack([draw(case.x) for _ in range(count)])
    with helped(compiled):
        products = mapped(case.module, (case.x, case.time), probes)[1]
    return (probes * products).flatten(2).sum(2).mean(0)


def _mapped_exact(case: Case) -> Tensor:
    basis = torch.eye(case.columns).reshape(-1, 1, *case.x.shape[1:]).expand(-1, *case.x.shape)
    with helped():
        products = mapped_jvp(case.fn, (case.x,), basis)[1]
    return products.flatten(2).diagonal(dim1=0, dim2=2).sum(1)


# -- packages ---------------------------------------------------------------------------------------------------------
def _flow_matching(case: Case, exact: bool) -> Peer:
    from flow_matching.solver.ode_solver import ODESolver

    # its exact divergence indexes vectors only
    solver = ODESolver(velocity_model=lambda x, t: case.flat(x) if exact else case.fn(x))
    x, end = case.x.flatten(1) if exact else case.x, torch.tensor([1.0, 0.0])

    def run() -> Tensor:
        none = torch.zeros(x.shape[0])
        start = x.detach().clone()  # it asks for a gradient of what it is given
        change = solver.compute_likelihood(start, lambda _: none, None, "euler", time_grid=end, exact_divergence=exact)
        return -change[1]

    return run


def _torchdyn(case: Case, exact: bool) -> Peer:
    cnf = _torchdyn_cnf()
    trace = cnf.autograd_trace if exact else cnf.hutch_trace
    flow = cnf.CNF(_Net(case), trace, noise_dist=None if exact else object())
    zeros, flat = torch.zeros(case.x.shape[0], 1), case.x.flatten(1)

    def run() -> Tensor:
        if not exact:
            flow.noise = draw(flat)
        return -flow(torch.cat([zeros, flat], 1)).detach()[:, 0]

    return run


class _Net(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        return self.case.flat(x)


@lru_cache(maxsize=1)
def _torchdyn_cnf() -> Any:
    spec = find_spec("torchdyn")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "models" / "cnf.py"
    file = importlib.util.spec_from_file_location("torchdyn_models_cnf", path)
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


def _zuko(case: Case, exact: bool) -> Peer:
    import zuko.transforms

    transform = zuko.transforms.FreeFormJacobianTransform(lambda _, x: case.flat(x), exact=exact)
    flat = case.x.flatten(1)

    def once(f: Callable[..., Any], x: tuple[Tensor, ...], t0: Any, *_: Any) -> Any:
        return f(t0, *x)

    def run() -> Tensor:
        with mock.patch.object(zuko.transforms, "odeint", once):
            return transform.call_and_ladj(flat)[1]

    return run
