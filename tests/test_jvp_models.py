"""fd.jvp on real networks: right, without fallbacks, with live parameters, and compilable."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jvp_models import (
    CASES,
    Case,
    VelocityMLP,
    dit,
    forward_mode,
    in_dtype,
    mlp,
    pixart,
    randomise,
    resnet,
    unet,
)
from torch import Tensor, nn

import fastdensity as fd
from fastdensity.dual import cache

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
Tensors = tuple[Tensor, Tensor]
FALL_BACK = {"MLP of many activations"}  # elu and the like have no kernel of their own


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    # weights of seed 0 make the bfloat16 derivatives of the conditional U-Net a matter of single roundings
    torch.manual_seed(1 if request.param == "UNet2DConditionModel" else 0)
    made = CASES[request.param]()
    made.name = request.param
    return made


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    return float((got.double() - truth).norm() / truth.norm())


def assert_as_near(got: Tensors, by_torch: Tensors, truth: Tensors, dtype: torch.dtype) -> None:
    """No further from the truth than twice torch's own distance; in float64, there."""
    for ours, theirs, exact in zip(got, by_torch, truth, strict=True):
        assert ours.dtype == theirs.dtype
        bound = 1e-12 if dtype is torch.float64 else 2 * error(theirs, exact) + 2 * torch.finfo(dtype).eps
        assert error(ours, exact) < bound


def traces_of(model: nn.Module) -> int:
    return sum(vars(model)[cache.STORE].traces.values())


# -- numbers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_tangents(case: Case, dtype: torch.dtype) -> None:
    """Three directions at once and one, three samples and two, from one trace, as near the truth as torch is."""
    call, inputs, vectors = case.at(dtype)
    with case.precision(dtype):
        ours = fd.jvp(call, inputs, vectors)
        fewer = fd.jvp(call, tuple(item[:2] for item in inputs), vectors[:1, :2])
        theirs = forward_mode(call, inputs, vectors)
    value, tangents = case.truth
    assert tangents.norm() > 0.01 * value.norm()
    assert_as_near(ours, theirs, case.truth, dtype)
    assert_as_near(fewer, (theirs[0][:2], theirs[1][:1, :2]), (value[:2], tangents[:1, :2]), dtype)
    assert traces_of(case.models[inputs[0].dtype]) == (2 if case.autocast and dtype is torch.bfloat16 else 1)


def test_samples_do_not_depend_on_each_other(case: Case) -> None:
    call, inputs, vectors = case.at(torch.float32)
    together = fd.jvp(call, inputs, vectors)
    other = tuple(torch.cat([item[1:], item[:1]]) for item in inputs)
    turned = fd.jvp(call, other, torch.cat([vectors[:, 1:], vectors[:, :1]], 1))
    for whole, moved in zip(together, (turned[0][None], turned[1]), strict=True):
        torch.testing.assert_close(moved.roll(1, 1).reshape(whole.shape), whole, rtol=1e-4, atol=1e-5)


def test_nothing_falls_back(case: Case) -> None:
    call, inputs, _ = case.at(torch.float32)
    explained = fd.explain(call, inputs)
    assert bool(explained.fallbacks) == (case.name in FALL_BACK), explained.summary()


# -- what changes between calls ---------------------------------------------------------------------------------------
def assert_right(case: Case, model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    """`model` as it is now, against torch."""
    call = case.call(model)
    inputs = tuple(item.to(dtype) if item.is_floating_point() else item for item in case.inputs)
    vectors = case.vectors.to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for got, wanted in zip(fd.jvp(call, inputs, vectors), forward_mode(call, inputs, vectors), strict=True):
        assert error(got, wanted.double()) < tolerance


def optimizer_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def load_state(model: nn.Module) -> None:
    model.load_state_dict({name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()})


def assign_state(model: nn.Module) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()}, assign=True)


def new_parameter(model: nn.Module) -> None:
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


@pytest.mark.parametrize("make", [mlp, dit])
def test_parameters_are_read_at_every_call(make: Callable[[], Case]) -> None:
    case = make()
    model = in_dtype(case.model, torch.float64)
    assert_right(case, model)
    for change in (optimizer_step, load_state, new_parameter, assign_state):
        before = fd.jvp(case.call(model), *_double(case))[1]
        change(model)
        assert_right(case, model)
        assert error(before, fd.jvp(case.call(model), *_double(case))[1]) > 1e-3
    assert traces_of(model) == 1


def _double(case: Case) -> tuple[tuple[Tensor, ...], Tensor]:
    inputs = tuple(item.double() if item.is_floating_point() else item for item in case.inputs)
    return inputs, case.vectors.double()


class LowRank(nn.Module):
    """A linear layer with an adapter beside it."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer, self.scale = layer, 1.0
        self.down = nn.Linear(layer.in_features, rank, bias=False, dtype=layer.weight.dtype)
        self.up = nn.Linear(rank, layer.out_features, bias=False, dtype=layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * self.up(self.down(x))  # type: ignore[no-any-return]


def test_an_adapter_is_noticed() -> None:
    case = dit()
    model: Any = in_dtype(case.model, torch.float64)
    assert_right(case, model)
    block = model.transformer_blocks[0]
    adapted = block.attn1.to_q = LowRank(block.attn1.to_q)
    assert_right(case, model)
    adapted.scale = 0.5
    assert_right(case, model)


def test_fused_projections_are_noticed() -> None:
    case = pixart()
    model: Any = in_dtype(case.model, torch.float64)
    assert_right(case, model)
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn1.fused_projections
    assert_right(case, model)
    model.transformer_blocks[0].attn1.to_qkv.weight.mul_(0.5)
    assert_right(case, model)


def test_a_later_trace_leaves_earlier_ones_in_place() -> None:
    """torch.export puts copies of a module's tuples and lists in their place; nobody may see that."""
    case = resnet()
    vars(case.model)["shared"] = vars(case.model.stem)["shared"] = [1, 2]
    call, inputs, vectors = case.at(torch.float32)
    model: Any = case.models[torch.float32]
    shared, kernel = model.shared, model.stem[0].kernel_size
    for _ in range(2):
        fd.jvp(call, inputs, vectors)
        fd.jvp(call, tuple(item[:1] for item in inputs), vectors[:, :1])
    assert traces_of(model) == 2
    assert model.shared is model.stem.shared is shared
    assert model.stem[0].kernel_size is kernel


class FixedBatch(VelocityMLP):
    """`len(x)` and `x.view(3, ...)` make numbers of the batch size; no trace of them may serve another batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None].expand(len(x), 1)], dim=-1))  # type: ignore[no-any-return]


def test_a_trace_for_one_batch_size_serves_no_other() -> None:
    case = mlp()
    case.model = FixedBatch()
    call, inputs, vectors = case.at(torch.float64)
    for size in (3, 2, 3):
        fewer = tuple(item[:size] for item in inputs)
        got, wanted = fd.jvp(call, fewer, vectors[:, :size]), forward_mode(call, fewer, vectors[:, :size])
        assert max(error(ours, theirs) for ours, theirs in zip(got, wanted, strict=True)) < 1e-12
    assert traces_of(case.models[torch.float64]) == 2


def test_dtypes_change_between_calls() -> None:
    case = mlp()
    model = copy.deepcopy(case.model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        assert_right(case, model, dtype)
    assert_right(case, model.half(), torch.float16)
    assert_right(case, model.bfloat16(), torch.bfloat16)


# -- training mode ----------------------------------------------------------------------------------------------------
def with_dropout() -> Case:
    case = mlp()
    activations = nn.Sequential(nn.SiLU(), nn.Dropout(0.5)), nn.Sequential(nn.GELU(), nn.Dropout(0.2))
    case.model = VelocityMLP(activations=activations)
    randomise(case.model)
    return case


def dit_with_dropout() -> Case:
    case = dit()
    case.model = type(case.model).from_config({**case.model.config, "dropout": 0.4})  # type: ignore[attr-defined]
    randomise(case.model)
    return case


@pytest.mark.parametrize("make", [with_dropout, dit_with_dropout])
def test_one_dropout_mask_for_value_and_tangents(make: Callable[[], Case]) -> None:
    """With torch's seed fixed, jvp is the derivative of the network with that mask; eval() ends it."""
    case = make()
    model = in_dtype(case.model, torch.float64)
    call, (inputs, vectors) = case.call(model), _double(case)
    vectors[2] = 2 * vectors[0] - 3 * vectors[1]
    assert_right(case, model)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout is active: that is the point here
        fd.jvp(call, inputs, vectors)
        torch.manual_seed(1)
        out, tangents = fd.jvp(call, inputs, vectors)
        torch.manual_seed(2)
        other = fd.jvp(call, inputs, vectors)[0]
    assert error(tangents[2], 2 * tangents[0] - 3 * tangents[1]) < 1e-12
    assert error(other, out) > 0.01
    for number, vector in enumerate(vectors):
        torch.manual_seed(1)
        expected = forward_mode(call, inputs, vector[None])
        assert error(out, expected[0]) < 1e-12
        assert error(tangents[number], expected[1][0]) < 1e-12
    model.eval()
    assert_right(case, model)


# -- torch.compile ----------------------------------------------------------------------------------------------------
def block() -> Case:
    """One transformer block: norms, attention, a gated feed-forward layer."""
    attention = pytest.importorskip("diffusers.models.attention")
    model = attention.BasicTransformerBlock(16, 2, 8, cross_attention_dim=12, activation_fn="geglu")
    call = lambda model: lambda x, text: model(x, encoder_hidden_states=text)  # noqa: E731
    return Case(model, (torch.randn(3, 6, 16), torch.randn(3, 5, 12)), call)


@pytest.mark.parametrize(
    ("make", "backend"),
    [(mlp, "inductor"), (block, "inductor"), (dit, "aot_eager"), (unet, "aot_eager")],
    ids=lambda item: getattr(item, "__name__", item),
)
def test_the_dual_graph_compiles(make: Callable[[], Case], backend: str) -> None:
    case = make()
    call, inputs, vectors = case.at(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(fd.trace_jvp(call, inputs), fullgraph=True, backend=backend)
    for got, wanted in zip(compiled(inputs, vectors), fd.jvp(call, inputs, vectors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
