"""What a trace depends on, and what it leaves as it was: the caller's modes, strides, caches, parameters, stderr."""

from __future__ import annotations

import collections
import functools
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fastdensity as fd


@pytest.fixture
def x():
    return torch.randn(4, 6)


def assert_right(fn, x, count=2):
    vectors = torch.randn(count, *x.shape)
    out, tangents = fd.jvp(fn, (x,), vectors)
    torch.testing.assert_close(out, fn(x))
    torch.testing.assert_close(tangents[-1], torch.func.jvp(fn, (x,), (vectors[-1],))[1])


# -- what code may ask for --------------------------------------------------------------------------------------------
def _by_grad_mode(x):
    return x.sin() if torch.is_grad_enabled() else x.cos()


def _by_inference_mode(x):
    return x.sin() if torch.is_inference_mode_enabled() else x.cos()


def _by_default_dtype(x):
    return x * torch.ones(6).sin()


@pytest.mark.parametrize("fn", [_by_grad_mode, _by_inference_mode])
def test_branches_on_the_callers_mode(fn, x):
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            out, tangents = fd.jvp(fn, (x,), x[None])
            wanted = fn(x)
        torch.testing.assert_close(out, wanted)
        slope = x.cos() if torch.equal(wanted, x.sin()) else -x.sin()
        torch.testing.assert_close(tangents[0], slope * x)


def test_another_default_dtype(x):
    for dtype in (torch.float32, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert fd.jvp(_by_default_dtype, (x,), x[None])[0].dtype == dtype
        finally:
            torch.set_default_dtype(before)


def test_branches_on_strides(x):
    def fn(x):
        return x.sin() if x.is_contiguous() else x.cos()

    for _ in range(2):
        for layout in (x, torch.randn(6, 4).T, torch.randn(8, 6)[::2], torch.randn(6, 5).T):
            assert_right(fn, layout)


def test_branches_on_memory_format():
    def fn(x):
        return x.sin() if x.is_contiguous(memory_format=torch.channels_last) else x.cos()

    for rows in (4, 4, 5):
        images = torch.randn(rows, 3, 5, 2)
        for layout in (images, images.to(memory_format=torch.channels_last)):
            assert_right(fn, layout)


def test_as_strided_reads_the_memory_that_fn_sees(x):
    assert_right(lambda x: x.as_strided((3, 4), (4, 1), 2), x)
    assert_right(lambda x: torch.stft(x, 4, 2, window=torch.hann_window(4), return_complex=True).abs(), x)
    for other in (torch.randn(6, 4).T, torch.randn(8, 6)[::2]):
        with pytest.raises(
            NotImplementedError, match=r"as_strided reads a tensor that is not contig.*test_jvp_trace.py"
        ):
            fd.jvp(lambda x: x.as_strided((3, 4), (4, 1)), (other,), other[None])
    with pytest.raises(ValueError, match="reads element 25 of a tensor of 24, past its end"):
        fd.jvp(lambda x: x[:4].as_strided((2, 2), (24, 1)), (torch.randn(5, 6),), torch.randn(1, 5, 6))


# -- what fn keeps ----------------------------------------------------------------------------------------------------
TABLES: dict = {"inner": {}}
FEATURES: list = []
LATE = None


@functools.lru_cache(maxsize=4)
def _frequencies(count):
    return torch.arange(count) / 2, [torch.ones(count)]


@functools.cache
def _shifts(count):
    return torch.arange(count)


def _by_lru_cache(x):
    factors, (shifts,) = _frequencies(6)
    return x * factors + shifts * _shifts(6)


def _by_global_dictionary(x):
    if "table" not in TABLES["inner"]:
        TABLES["table"] = TABLES["inner"]["table"] = torch.arange(6), 1
    return x * TABLES["inner"]["table"][0] + TABLES["table"][0]


class Keeping(nn.Module):
    shared: ClassVar[dict] = {}

    def __init__(self):
        super().__init__()
        self.table, self.rows, self.entries = None, [], collections.OrderedDict()

    def forward(self, x):
        if self.table is None:
            self.table = self.shared["table"] = torch.arange(6)
            self.rows.append(torch.arange(6))
            self.entries["table"] = self.late = torch.arange(6)
        return x * self.table * self.rows[0] + self.entries["table"] * self.late * self.shared["table"]


class KeepingObject:
    table = None

    def __call__(self, x):
        if self.table is None:
            self.table = torch.arange(6)
        return x * self.table


def _hooked():
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, arguments, out: FEATURES.append(out))
    return layer


@pytest.mark.parametrize(
    "make", [lambda: _by_lru_cache, lambda: _by_global_dictionary, Keeping, KeepingObject, _hooked]
)
def test_caches_hold_no_fake_tensors(make, x):
    fn = make()
    FEATURES.clear()
    got = fd.jvp(fn, (x,), x[None])[0]
    assert not FEATURES
    out = fn(x)
    assert not isinstance(out, FakeTensor)
    torch.testing.assert_close(out, got)
    assert_right(fn, x)
    assert_right(fn, torch.randn(9, 6))


def test_what_cannot_be_taken_back_is_refused(x):
    def fn(x):
        global LATE
        if LATE is None:
            LATE = torch.arange(6)
        return x * LATE

    with pytest.raises(
        ValueError,
        match=r"fn keeps a tensor that it makes, of shape \(6,\), in 'LATE' of the globals of test_jvp_trace",
    ):
        fd.jvp(fn, (x,), x[None])


def test_a_trace_that_fails_leaves_no_fake_tensors_either(x):
    def fn(x):
        x = x * _shifts(6)
        return x if x.sum() > 0 else -x

    _shifts.cache_clear()
    with pytest.raises(ValueError, match="depends on the values"):
        fd.jvp(fn, (x,), x[None])
    assert type(_shifts(6)) is torch.Tensor


# -- modules ----------------------------------------------------------------------------------------------------------
def test_a_module_made_in_inference_mode(x):
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        module.extra = torch.ones(6)
        module.register_buffer("shift", torch.zeros(6))
    parameters = dict(module.named_parameters())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_right(module, x)
            assert_right(lambda x: module(x) * module.extra + module.shift, x)
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())


def test_data_of_another_shape(x):
    module = nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 6))
    with torch.no_grad():
        for width in (4, 5, 3):
            module[0].weight.data, module[0].bias.data = torch.randn(width, 6), torch.randn(width)
            module[2].weight.data = torch.randn(6, width)
            for _ in range(4):
                assert_right(module, x)


def test_a_refusal_prints_nothing(x, capfd):
    with pytest.raises(ValueError, match="depends on the values"):
        fd.jvp(lambda x: x * 2 if x.sum() > 0 else x, (x,), x[None])
    assert capfd.readouterr() == ("", "")
