"""The dual ops on a CUDA device, where Triton runs them: against float64, alone and in a batch, and fd.jvp as a whole.

Problems are made, and results judged, on the CPU by the same functions as those of the other backends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import attention_cases
import dual_chain_cases
import dual_conv_cases
import dual_linear_cases
import dual_norm_cases
import pytest
import torch
from dual_conv_cases import Geometry
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdensity as fd
from fastdensity.ops.dual_attention import dual_attention
from fastdensity.ops.dual_chain import dual_chain
from fastdensity.ops.dual_conv import dual_conv2d
from fastdensity.ops.dual_linear import dual_linear
from fastdensity.ops.dual_norm import dual_group_norm, dual_layer_norm, dual_rms_norm
from fastdensity.ops.dual_softmax import dual_softmax

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
TANGENTS = pytest.mark.parametrize("tangents", [1, 3])


def on_device(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.to(DEVICE)
    return type(argument)(map(on_device, argument)) if isinstance(argument, (list, tuple)) else argument


def launch(op: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The op on the device, its result back on the CPU."""
    result = op(*on_device(arguments))
    assert result.device.type == torch.device(DEVICE).type
    return result.cpu()


@TANGENTS
@DTYPES
def test_chains(dtype, tangents):
    for program, shapes, is_dual in (
        ("add 0 1;gelu 2", [(3, 50, 96), (96,)], [True, False]),
        ("mul 0 1;add 2 3", [(3, 7, 37), (3, 1, 37), (3, 7, 37)], [True, False, True]),
        ("silu 0;tanh 1;mul 2 3;sub 4 0", [(5, 1, 300), (4, 300)], [True, True]),
    ):
        inputs = dual_chain_cases.random_inputs(shapes, is_dual, tangents, dtype)
        result = launch(dual_chain, inputs, is_dual, program)
        dual_chain_cases.assert_as_good_as_eager(result, inputs, is_dual, program)


@TANGENTS
@DTYPES
def test_linear_layers(dtype, tangents):
    for activation, rows, inputs, outputs in (("silu", (2, 100), 192, 136), ("geglu", (67,), 70, 42)):
        problem = dual_linear_cases.random_problem(tangents, rows, inputs, outputs, dtype)
        dual_linear_cases.assert_as_good_as_eager(launch(dual_linear, *problem, activation), *problem, activation)


def norms(tangents: int) -> list[dual_norm_cases.Case]:
    """Short rows, modulated and not; rows in blocks; groups with several channels."""
    planes = 1 + tangents
    return [
        dual_norm_cases.layer(planes, (4, 9, 384), 384, affine=False, rows=4),
        dual_norm_cases.layer(planes, (5, 37), 37, rms=True),
        dual_norm_cases.layer(planes, (2, 9_001), 9_001),
        dual_norm_cases.group(planes, (3, 64, 7, 5), 32),
    ]


@TANGENTS
@DTYPES
def test_norms(dtype, tangents):
    for case in norms(tangents):
        case = case.to(dtype)
        moved = dual_norm_cases.Case(case.name, case.x.to(DEVICE), on_device(case.arguments))
        dual_norm_cases.assert_as_good_as_eager(case, moved.op().cpu())


def softmax_by_torch(x: Tensor) -> Tensor:
    pairs = [torch.func.jvp(lambda value: torch.softmax(value, -1), (x[0],), (tangent,)) for tangent in x[1:]]
    return torch.stack([pairs[0][0], *(tangent for _, tangent in pairs)])


@TANGENTS
@DTYPES
@pytest.mark.parametrize("columns", [77, 20_001])
def test_softmax(columns, dtype, tangents):
    x = (3 * torch.randn(1 + tangents, 5, columns)).to(dtype)
    result, exact, eager = launch(dual_softmax, x), softmax_by_torch(x.double()), softmax_by_torch(x)
    slack = (64 if dtype is torch.float64 else 4) * torch.finfo(dtype).eps
    for mine, theirs, wanted in zip(result.double(), eager.double(), exact, strict=True):
        assert (mine - wanted).norm() < 2 * (theirs - wanted).norm() + slack * wanted.norm()


@TANGENTS
@DTYPES
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(64, 72, size=(9, 11)),
        Geometry(20, 36, (1, 1), padding=(0, 0), size=(6, 5)),
        Geometry(24, 24, stride=(2, 1), groups=24, size=(9, 8)),
    ],
    ids=str,
)
def test_convolutions(geometry, dtype, tangents):
    arguments = dual_conv_cases.random_arguments(geometry, dtype, tangents, batch=3)
    dual_conv_cases.assert_as_good_as_eager(arguments, launch(dual_conv2d, *arguments))


@TANGENTS
@DTYPES
@pytest.mark.parametrize(
    ("width", "length", "keys", "mask", "causal"),
    [(64, 256, 256, "none", True), (72, 200, 77, "bool", False), (40, 33, 130, "add", False)],
)
def test_attention(width, length, keys, mask, causal, dtype, tangents):
    problem = attention_cases.random_problem(
        2, 4, 2, length, keys, width, width, tangents=tangents, mask=mask, causal=causal, dtype=dtype
    )
    result = launch(dual_attention, *problem.arguments)
    if dtype is torch.float64:  # what it is held against is no more exact
        torch.testing.assert_close(result, attention_cases.by_func_jvp(problem), rtol=1e-12, atol=1e-12)
    else:
        attention_cases.assert_as_good_as_eager(problem, result)


def test_attention_to_plain_keys():
    problem = attention_cases.random_problem(2, 2, 2, 100, 77, 64, 64, duals=(True, False, False), dtype=torch.bfloat16)
    attention_cases.assert_as_good_as_eager(problem, launch(dual_attention, *problem.arguments))


# -- a sample and its batch-mates -------------------------------------------------------------------------------------
WITH_BATCH: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    # the shape of a sample, and a function of a dual x and of `draw`, which makes plain tensors
    "chain": ((50, 96), lambda x, draw: dual_chain([x, draw(96)], [True, False], "add 0 1;gelu 2;mul 3 0")),
    "linear": ((50, 96), lambda x, draw: dual_linear(x, draw(72, 96), draw(72), "silu")),
    "layer norm": ((50, 96), lambda x, draw: dual_layer_norm(x, 96, draw(96), draw(96))),
    "rms norm of long rows": ((10_000,), lambda x, draw: dual_rms_norm(x, 10_000, draw(10_000))),
    "group norm": ((32, 9, 8), lambda x, draw: dual_group_norm(x, 8, draw(32), draw(32), activation="silu")),
    "softmax": ((50, 96), lambda x, draw: dual_softmax(x)),
    "conv": (
        (32, 9, 8),
        lambda x, draw: dual_conv2d(x, draw(40, 32, 3, 3), draw(40), [1, 1], [1, 1], [1, 1], 1, "silu"),
    ),
    "attention": ((2, 70, 72), lambda x, draw: dual_attention(x, x, x, True, True, True, None, False, 0.1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_BATCH)
def test_a_sample_does_not_see_its_batch(name, dtype):
    shape, call = WITH_BATCH[name]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    x = torch.randn(4, 5, *shape).to(DEVICE, dtype)
    whole = call(x, draw)
    assert whole.isfinite().all()
    for sample in (0, 3):
        assert torch.equal(call(x[:, sample : sample + 1].clone(), draw)[:, 0], whole[:, sample])


# -- fd.jvp -----------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """A convolution, attention and both norms, modulated by t: x (B, 32, 6, 6), t (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.group, self.conv = nn.GroupNorm(8, 32), nn.Conv2d(32, 32, 3, padding=1)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x + self.conv(F.silu(self.group(x)))
        rows = self.norm(h.flatten(2).mT) * (1 + t[:, None, None])
        q, k, v = self.qkv(rows).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.gelu(self.out(attended)).mT.reshape(x.shape) + h


class BlockProblem:
    """A block, its arguments and directions, on the CPU in float64; `moved` holds them on the device in a dtype."""

    def __init__(self, dtype: torch.dtype, tangents: int = 3) -> None:
        self.dtype, self.block = dtype, Block().double().eval().requires_grad_(False)
        for tensor in self.block.parameters():
            tensor.copy_(tensor.to(dtype))  # what is left to differ is the arithmetic
        self.primals = (torch.randn(4, 32, 6, 6).to(dtype).double(), torch.randn(4).to(dtype).double())
        self.vectors = torch.randn(tangents, 4, 32, 6, 6).to(dtype).double()

    def moved(self) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
        primals = tuple(primal.to(DEVICE, self.dtype) for primal in self.primals)
        return copy.deepcopy(self.block).to(DEVICE, self.dtype), primals, self.vectors.to(DEVICE, self.dtype)

    def by_torch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        block, (x, t) = copy.deepcopy(self.block).to(dtype), tuple(primal.to(dtype) for primal in self.primals)
        with sdpa_kernel(SDPBackend.MATH):
            pairs = [torch.func.jvp(lambda x: block(x, t), (x,), (vector,)) for vector in self.vectors.to(dtype)]
        return pairs[0][0], torch.stack([tangent for _, tangent in pairs])

    def check(self, found: tuple[Tensor, Tensor]) -> None:
        """At most twice the error of torch.func.jvp in the same dtype, or a few roundings."""
        slack = 8 * torch.finfo(self.dtype).eps
        for mine, theirs, wanted in zip(found, self.by_torch(self.dtype), self.by_torch(torch.float64), strict=True):
            assert mine.dtype == self.dtype
            error, allowed = (mine.cpu().double() - wanted).norm(), 2 * (theirs.double() - wanted).norm()
            assert error < allowed + slack * wanted.norm()


@TANGENTS
@DTYPES
def test_jvp(dtype, tangents):
    problem = BlockProblem(dtype, tangents)
    block, primals, vectors = problem.moved()
    with torch.no_grad():
        problem.check(fd.jvp(block, primals, vectors))


def test_jvp_compiled():
    problem = BlockProblem(torch.float32)
    block, primals, vectors = problem.moved()
    with torch.no_grad():
        graph = torch.compile(fd.trace_jvp(block, primals), fullgraph=True, dynamic=False)
        problem.check(graph(primals, vectors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_jvp_in_a_cuda_graph(dtype):
    first, second = BlockProblem(dtype), BlockProblem(dtype)
    block, primals, vectors = first.moved()
    with torch.no_grad():
        dual = fd.trace_jvp(block, primals)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            dual(primals, vectors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = dual(primals, vectors)
        graph.replay()
        first.check(captured)
        second_block, second_primals, second_vectors = second.moved()
        block.load_state_dict(second_block.state_dict())
        for place, new in zip((*primals, vectors), (*second_primals, second_vectors), strict=True):
            place.copy_(new)
        graph.replay()
        second.check(captured)


def test_jvp_does_not_wait_for_the_device():
    block, primals, vectors = BlockProblem(torch.float32).moved()
    with torch.no_grad():
        fd.jvp(block, primals, vectors)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fd.jvp(block, primals, vectors)
        finally:
            torch.cuda.set_sync_debug_mode("default")
