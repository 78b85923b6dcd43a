"""Cases in which fd.jvp once gave wrong numbers without a word: each against torch.func.jvp, or refused."""

from __future__ import annotations

import collections
import dataclasses
import threading

import pytest
import torch
from torch import nn

import fastdensity as fd
from fastdensity.dual import cache


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_right(fn, x, vectors):
    out, tangents = fd.jvp(fn, (x,), vectors)
    torch.testing.assert_close(out, fn(x), rtol=1e-11, atol=1e-12)
    wanted = torch.stack([torch.func.jvp(fn, (x,), (vector,))[1] for vector in vectors])
    torch.testing.assert_close(tangents, wanted, rtol=1e-11, atol=1e-12)


def _row_of_a_row(x):
    y = x * 2
    row = y[0]
    row[1].mul_(3)  # seen in row and in y
    return y + row


def _narrow_memory(x):
    y = x.float()
    y.clamp_(max=torch.full((6,), 0.3, dtype=torch.float64))  # y stays float32
    return y.double() * x


def _mask_in_place(x):
    y = x * 2
    y.gt_(0)  # ones and zeros of y's type
    return y * x


def _entries(x):
    y = torch.zeros(2, dtype=x.dtype)
    y[0], y[1] = x.sum(), x.mean()
    return y


def _rotary(x):
    pairs = torch.view_as_complex(x.reshape(4, 3, 2))
    angles = torch.polar(torch.ones(3, dtype=x.dtype), torch.arange(3, dtype=x.dtype))
    return torch.view_as_real(pairs * angles).flatten(1)


FUNCTIONS = {
    "fourier filter": lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2.0, n=6),
    "spectrum": lambda x: torch.fft.fft2(x).abs(),
    "rotary embedding": _rotary,
    "complex": lambda x: torch.complex(x, x * x),
    "imaginary number": lambda x: x / 2j,
    "row of a row": _row_of_a_row,
    "narrow memory": _narrow_memory,
    "mask in place": _mask_in_place,
    "entries": _entries,
    "no dimension: cumsum": lambda x: x.sum().cumsum(-1) * x,
    "no dimension: flip": lambda x: x.sum().flip(-1) * x,
    "no dimension: roll": lambda x: x.sum().roll(1) * x,
    "no dimension: max": lambda x: x.sum().max(-1)[0] * x,
    "no dimension: sort": lambda x: x.sum().sort(-1)[0] * x,
    "no dimension: sum": lambda x: x.sum().sum(-1) * x,
    "no dimension: squeeze": lambda x: x.sum().squeeze(-1) * x.sum().transpose(0, -1),
    "no dimension: flatten": lambda x: x.sum().flatten() * x,
    "where": lambda x: torch.where(x > 0, x[0, 0], torch.zeros(6)).double(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_right(name):
    assert_right(FUNCTIONS[name], draw(4, 6), draw(3, 4, 6))


class Adapted(nn.Module):
    """Its numbers stand where adapters and processors keep theirs."""

    def __init__(self):
        super().__init__()
        self.scaling, self.gains = {"default": 1.0}, [1.0, [2.0]]
        self.processor = collections.namedtuple("Processor", "inner")(Inner())
        self.hidden = [nn.Linear(6, 6).double()]

    def forward(self, x):
        return (
            self.hidden[0](x) * self.scaling["default"] * self.gains[0] * self.gains[1][0] * self.processor.inner.gain
        )


class Inner:
    def __init__(self):
        self.gain = 1.0


CHANGES = {
    "entry of a dictionary": lambda m: m.scaling.update(default=3.0),
    "item of a list": lambda m: m.gains.__setitem__(0, 3.0),
    "item of a list in a list": lambda m: m.gains[1].__setitem__(0, 3.0),
    "attribute of an object": lambda m: setattr(m.processor.inner, "gain", 3.0),
    "hidden module replaced": lambda m: m.hidden.__setitem__(0, nn.Linear(6, 6).double()),
    "parameter of a hidden module replaced": lambda m: setattr(m.hidden[0], "weight", nn.Parameter(draw(6, 6))),
    "parameter of a hidden module in place": lambda m: m.hidden[0].weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_below_attributes_are_seen(change):
    module, x, vectors = Adapted(), draw(4, 6), draw(2, 4, 6)
    assert_right(module, x, vectors)
    CHANGES[change](module)
    assert_right(module, x, vectors)


@dataclasses.dataclass(slots=True)
class Slotted:
    gain: float

    def __call__(self, x):
        return x * x * self.gain


def test_changes_of_slots_and_of_closed_over_containers_are_seen():
    x, vectors, slotted = draw(4, 6), draw(2, 4, 6), Slotted(2.0)
    ordered, default = collections.OrderedDict(gain=2.0), collections.defaultdict(float, gain=2.0)
    for gain in (2.0, 3.0):
        slotted.gain = ordered["gain"] = default["gain"] = gain
        assert_right(slotted, x, vectors)
        assert_right(lambda x: x * x * ordered["gain"], x, vectors)
        assert_right(lambda x: x * x * default["gain"], x, vectors)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 1


def test_a_derivative_of_the_users_own_is_refused():
    with pytest.raises(NotImplementedError, match=r"Straight is an autograd.Function .*test_jvp_review.py:\d+"):
        fd.jvp(lambda x: Straight.apply(x) * x, (draw(4, 6),), draw(1, 4, 6))
    torch.testing.assert_close(Straight.apply(torch.tensor(1.2)), torch.tensor(1.0))  # nothing is left behind


def test_default_eps_of_rms_norm_in_half_precision():
    """It is that of the arithmetic, float32, not the type's."""
    x, vectors = (draw(4, 6) * 1e-2).bfloat16(), draw(1, 4, 6).bfloat16()
    _, (got,) = fd.jvp(lambda x: nn.functional.rms_norm(x, (6,)), (x,), vectors)
    wanted = torch.func.jvp(lambda x: nn.functional.rms_norm(x, (6,)), (x,), (vectors[0],))[1]
    assert (got - wanted).double().norm() < 0.05 * wanted.double().norm()


@pytest.mark.parametrize("training", [False, True])
def test_operators_without_a_batching_rule(training):
    """torch's vmap has none for rrelu; its directions go one after the other, with one draw for all."""
    x, vectors = draw(4, 6), draw(3, 4, 6)
    for _ in range(3):
        torch.manual_seed(1)
        out, tangents = fd.jvp(lambda x: nn.functional.rrelu(x, training=training) * x, (x,), vectors)
        following = torch.rand(1)
        torch.manual_seed(1)
        wanted = nn.functional.rrelu(x, training=training) * x
        torch.testing.assert_close(following, torch.rand(1))
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(tangents, 2 * vectors * wanted / x)


def test_scripts_are_refused():
    with pytest.raises(TypeError, match=r"torch\.jit module"):
        fd.jvp(torch.jit.trace(nn.Linear(6, 6).double(), draw(4, 6)), (draw(4, 6),), draw(1, 4, 6))


def test_threads_keep_their_own_tensors():
    x, vectors = draw(4, 6), draw(1, 4, 6)

    def scaled(gain):
        return lambda x: x * gain

    dual, first = cache.find(scaled(torch.tensor(2.0)), (x,))
    again, second = cache.find(scaled(torch.tensor(5.0)), (x,))  # between another thread's look-up and its run
    assert again is dual
    torch.testing.assert_close(dual.run(None, (x,), vectors, first)[1], 2 * vectors)
    torch.testing.assert_close(dual.run(None, (x,), vectors, second)[1], 5 * vectors)
    wrong = []

    def work(gain):
        for _ in range(200):
            if not torch.equal(fd.jvp(scaled(torch.tensor(gain)), (x,), vectors)[1], gain * vectors):
                wrong.append(gain)

    threads = [threading.Thread(target=work, args=(gain,)) for gain in (1.0, 2.0, 4.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:fd.jvp has traced this function")
def test_the_table_of_functions_is_bounded(monkeypatch):
    monkeypatch.setattr(cache, "_MOST_GRAPHS", 4)
    for number in range(8):
        fd.jvp(lambda x: x * number, (draw(4, 6),), draw(1, 4, 6))  # noqa: B023
    assert len(cache._functions.exact) <= 4
    assert sum(map(len, cache._functions.general.values())) <= 4
