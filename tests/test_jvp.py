"""fd.jvp as users call it: what it captures, when it traces again, what it keeps."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdensity as fd
from fastdensity.dual import cache


class Field(nn.Module):
    """A small velocity field of x (B, 6) and t (B,), with dropout and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 6)
        self.drop = nn.Dropout(0.5)
        self.scale = 1.0
        self.offset = torch.zeros(6, dtype=torch.float64)

    def forward(self, x, t=None):
        h = self.norm(F.silu(self.first(x)))
        if t is not None:
            h = h * (1 + t[:, None])
        return self.scale * self.last(self.drop(h)) + (x * x) * self.offset


@pytest.fixture
def field():
    return Field().double().eval()


@pytest.fixture
def traces(monkeypatch):
    """How often a network was traced."""
    counted = SimpleNamespace(count=0)
    original = cache.trace

    def trace(*arguments):
        counted.count += 1
        return original(*arguments)

    monkeypatch.setattr(cache, "trace", trace)
    return counted


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_right(fn, primals, vectors, got=None):
    """fd.jvp's answer against torch.func.jvp's, to float64."""
    out, tangents = fd.jvp(fn, primals, vectors) if got is None else got
    torch.testing.assert_close(out, fn(*primals), rtol=1e-11, atol=1e-12)
    for tangent, vector in zip(tangents, vectors, strict=True):
        wanted = torch.func.jvp(lambda x: fn(x, *primals[1:]), (primals[0].clone(),), (vector,))[1]
        torch.testing.assert_close(tangent, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_directions(field, count):
    assert_right(field, (draw(4, 6), draw(4)), draw(count, 4, 6))


def test_one_trace_serves_other_numbers_of_directions_and_rows(field, traces):
    for rows, count in ((4, 1), (4, 3), (9, 2), (2, 1)):
        assert_right(field, (draw(rows, 6), draw(rows)), draw(count, rows, 6))
    assert traces.count == 1
    assert_right(field, (draw(1, 6), draw(1)), draw(2, 1, 6))  # torch.export takes a batch of one for a constant
    assert traces.count == 2


def test_a_row_does_not_depend_on_the_others(field):
    x, t, vectors = draw(5, 6), draw(5), draw(2, 5, 6)
    out, tangents = fd.jvp(field, (x, t), vectors)
    alone, tangent = fd.jvp(field, (x[2:4], t[2:4]), vectors[:, 2:4])
    torch.testing.assert_close(alone, out[2:4], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(tangent, tangents[:, 2:4], rtol=1e-13, atol=1e-13)


def test_a_tensor_stands_for_a_tuple_of_one(field):
    x, vectors = draw(4, 6), draw(2, 4, 6)
    assert_right(field, (x,), vectors, got=fd.jvp(field, x, vectors))


def test_new_functions_of_the_same_code_share_a_trace(field, traces):
    x, vectors = draw(4, 6), draw(2, 4, 6)
    for _ in range(4):
        t = draw(4)
        assert_right(lambda x: field(x, t), (x,), vectors)  # noqa: B023
    for _ in range(3):
        assert_right(functools.partial(field, t=draw(4)), (x,), vectors)
    assert traces.count == 2


def test_python_numbers_are_constants_of_a_trace(field, traces):
    x, vectors = draw(4, 6), draw(2, 4, 6)
    for number in (1.0, 2.0, 1.0):
        assert_right(lambda x: field(x) * number, (x,), vectors)  # noqa: B023
    assert traces.count == 2


def test_tracing_again_and_again_is_said(field):
    x, vectors = draw(4, 6), draw(1, 4, 6)

    def trace_often():
        for number in range(16):
            fd.jvp(lambda x: x * number, (x,), vectors)  # noqa: B023

    with pytest.warns(UserWarning, match="has traced this function 16 times"):
        trace_often()


GLOBAL_FIELD = Field().double().eval()
GLOBAL_TIME = torch.full((4,), 0.5, dtype=torch.float64)


def test_globals_are_read_anew(traces, monkeypatch):
    x, vectors = draw(4, 6), draw(2, 4, 6)

    def fn(x):
        return GLOBAL_FIELD(x, GLOBAL_TIME)

    assert_right(fn, (x,), vectors)
    monkeypatch.setitem(globals(), "GLOBAL_TIME", draw(4))
    assert_right(fn, (x,), vectors)
    assert traces.count == 1
    monkeypatch.setitem(globals(), "GLOBAL_FIELD", Field().double().eval())
    assert_right(fn, (x,), vectors)


def test_methods_of_objects_that_hold_a_module(field):
    class Flow:
        def __init__(self, model, gain):
            self.model, self.gain = model, gain

        def velocity(self, x, t):
            return self.gain * self.model(x, t)

    flow, x, t, vectors = Flow(field, draw(6)), draw(4, 6), draw(4), draw(2, 4, 6)
    assert_right(flow.velocity, (x, t), vectors)
    flow.gain = draw(6)
    assert_right(flow.velocity, (x, t), vectors)
    field.first.weight.mul_(1.5)
    assert_right(flow.velocity, (x, t), vectors)


def test_primals_may_be_containers_numbers_and_none(field):
    def fn(x, extras, power, nothing):
        assert nothing is None
        return field(x, extras["t"][0]) ** power

    assert_right(fn, (draw(4, 6), {"t": [draw(4)]}, 3, None), draw(2, 4, 6))


def test_vectors_and_inputs_of_any_strides(field):
    x, vectors = draw(6, 8).T[::2], draw(6, 4, 3).permute(2, 1, 0)
    assert_right(field, (x,), vectors)
    assert_right(field, (draw(1, 6).expand(4, 6),), vectors)


def test_an_output_that_ignores_the_input_has_zero_tangents(field):
    constant = draw(3)
    out, tangents = fd.jvp(lambda x: constant * 2, (draw(4, 6),), draw(2, 4, 6))
    assert torch.equal(out, constant * 2)
    assert torch.equal(tangents, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(field, dtype):
    x, vectors = draw(4, 6), draw(2, 4, 6)
    low = copy.deepcopy(field).to(dtype)
    low.offset = low.offset.to(dtype)
    out, tangents = fd.jvp(low, (x.to(dtype),), vectors.to(dtype))
    assert out.dtype == tangents.dtype == dtype
    exact = copy.deepcopy(low).double()
    exact.offset = exact.offset.double()
    wanted = torch.stack([torch.func.jvp(exact, (x.to(dtype).double(),), (v.to(dtype).double(),))[1] for v in vectors])
    eager = torch.stack([torch.func.jvp(low, (x.to(dtype),), (v.to(dtype),))[1] for v in vectors])
    error, rival = ((item.double() - wanted).norm() for item in (tangents, eager))
    assert error < 2 * rival + 1e-3 * torch.finfo(dtype).eps * wanted.norm()


# -- what may change after a trace ------------------------------------------------------------------------------------
def _step(field):
    with torch.enable_grad():
        optimizer = torch.optim.SGD(field.parameters(), lr=0.3)
        field(draw(4, 6)).square().sum().backward()
        optimizer.step()


CHANGES = {
    "optimizer step": _step,
    "parameter replaced": lambda field: setattr(field.first, "weight", nn.Parameter(draw(16, 6))),
    "parameter's data": lambda field: setattr(field.first.weight, "data", draw(16, 6)),
    "state loaded": lambda field: field.load_state_dict(Field().double().state_dict()),
    "bias taken away": lambda field: setattr(field.last, "bias", None),
    "module swapped": lambda field: setattr(field, "first", nn.Sequential(nn.Linear(6, 16), nn.Tanh()).double()),
    "number": lambda field: setattr(field, "scale", 2.0),
    "tensor attribute": lambda field: setattr(field, "offset", draw(6)),
    "tensor attribute in place": lambda field: field.offset.add_(1),
    "attribute of a child": lambda field: setattr(field.norm, "eps", 0.5),
    "hook": lambda field: field.first.register_forward_hook(lambda module, arguments, out: out * 3),
    "pre-hook": lambda field: field.first.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 3,)),
    "forward patched": lambda field: setattr(field.last, "forward", lambda h: h[:, :6] * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(field, change):
    x, t, vectors = draw(4, 6), draw(4), draw(2, 4, 6)
    before = torch.cat([part.flatten() for part in fd.jvp(field, (x, t), vectors)])
    CHANGES[change](field)
    assert_right(field, (x, t), vectors)
    after = torch.cat([part.flatten() for part in fd.jvp(field, (x, t), vectors)])
    assert not torch.equal(before, after)


def test_values_of_parameters_do_not_cost_a_trace(field, traces):
    x, vectors = draw(4, 6), draw(2, 4, 6)
    fd.jvp(field, (x,), vectors)
    for change in ("optimizer step", "parameter replaced", "parameter's data", "state loaded"):
        CHANGES[change](field)
        assert_right(field, (x,), vectors)
    assert traces.count == 1


def test_another_dtype_of_the_module(field):
    x, vectors = draw(4, 6), draw(2, 4, 6)
    fd.jvp(field, (x,), vectors)
    field.float()
    field.offset = field.offset.float()
    with pytest.raises((RuntimeError, TypeError), match=r"dtype|float"):
        fd.jvp(field, (x,), vectors)
    out, _ = fd.jvp(field, (x.float(),), vectors.float())
    assert out.dtype == torch.float32


def test_training_mode_is_seen_and_its_dropout_said(field):
    x, vectors = draw(64, 6), draw(2, 64, 6)
    fd.jvp(field, (x,), vectors)
    field.train()
    with pytest.warns(UserWarning, match=r"dropout is active in fn, at .*test_jvp.py"):
        fd.jvp(field, (x,), vectors)
    torch.manual_seed(1)
    first = fd.jvp(field, (x,), vectors)
    torch.manual_seed(1)
    second = fd.jvp(field, (x,), torch.stack([vectors[0] + vectors[1], vectors[1]]))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(second[1][0], first[1].sum(0))  # one mask: linear in the vectors
    field.eval()
    assert_right(field, (x,), vectors)


def test_attention_dropout_has_one_mask():
    def fn(x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)

    x, vectors = draw(1, 2, 5, 4), draw(2, 1, 2, 5, 4)
    with pytest.warns(UserWarning, match="dropout is active"):
        fd.jvp(fn, (x,), vectors)
    step = 1e-6
    torch.manual_seed(2)
    _, tangents = fd.jvp(fn, (x,), vectors)
    sides = []
    for sign in (1, -1):
        torch.manual_seed(2)
        sides.append(fd.jvp(fn, (x + sign * step * vectors[0],), vectors)[0])
    torch.testing.assert_close(tangents[0], (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-7)


# -- what is kept -----------------------------------------------------------------------------------------------------
def test_graphs_die_with_their_module():
    field = Field().double().eval()
    fd.jvp(field, (draw(4, 6),), draw(1, 4, 6))
    gone = weakref.ref(field)
    del field
    gc.collect()
    assert gone() is None


def test_the_module_copies_and_pickles_as_before(field):
    keys = list(field.state_dict())
    x, vectors = draw(4, 6), draw(1, 4, 6)
    fd.jvp(field, (x,), vectors)
    assert list(field.state_dict()) == keys
    assert len(list(field.modules())) == 5
    for twin in (copy.deepcopy(field), pickle.loads(pickle.dumps(field))):
        twin.first.weight.mul_(2)
        assert_right(twin, (x,), vectors)
    assert_right(field, (x,), vectors)


def test_the_dual_graph_is_a_module_over_the_live_one(field):
    x, t, vectors = draw(4, 6), draw(4), draw(2, 4, 6)
    dual = fd.trace_jvp(field, (x, t))
    assert isinstance(dual, torch.fx.GraphModule)
    assert_right(field, (x, t), vectors, got=dual((x, t), vectors))
    assert {id(parameter) for parameter in dual.parameters()} == {id(parameter) for parameter in field.parameters()}
    field.first.weight.mul_(2)
    assert_right(field, (x, t), vectors, got=dual((x, t), vectors))


def test_the_dual_graph_binds_closed_over_tensors(field):
    t, x, vectors = draw(4), draw(4, 6), draw(2, 4, 6)
    dual = fd.trace_jvp(lambda x: field(x, t), (x,))
    wanted = fd.jvp(field, (x, t), vectors)
    torch.testing.assert_close(dual((x,), vectors), wanted)


def test_explain_says_what_became_of_each_node(field):
    explained = fd.explain(lambda x, t: field(x, t).logsumexp(-1), (draw(4, 6), draw(4)))
    treatments = {row.operator: row.treatment for row in explained.rows}
    assert treatments["aten.linear"] == "linear"
    assert treatments["aten.layer_norm"] == "layer_norm"
    assert treatments["aten.unsqueeze"] == "plain"
    assert [row.operator for row in explained.fallbacks] == ["aten.logsumexp"]
    assert explained.flops == 2 * 4 * (6 * 16 + 16 * 6)
    assert explained.tangent_flops == explained.flops
    assert "test_jvp.py" in str(explained)
    assert "fallbacks: aten.logsumexp" in str(explained)
