"""Replayed graphs give what the graph gives, bit for bit, and forget nothing that may change between calls."""

from __future__ import annotations

import threading
from typing import Any

import jvp_models
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdensity as fd
from fastdensity.dual import arena, replay
from fastdensity.dual.cache import Dual, find
from fastdensity.dual.nearest import MOST_ELEMENTS, NEAREST

aten = torch.ops.aten


class Picture(nn.Module):
    """A little of everything: convolutions, norms, a time, a linear bottom, upsampling, a residual."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(2 * width, 1, 3, padding=1)
        self.down, self.norm = nn.Conv2d(width, width, 2, stride=2), nn.GroupNorm(4, width)
        self.inner, self.film = nn.Conv2d(width, width, 3, padding=1), nn.Linear(1, width)
        self.mix = nn.Linear(16 * width, 16 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = F.silu(self.norm(self.down(fine)))
        coarse = coarse + self.inner(coarse) * self.film(time[:, None])[:, :, None, None]
        coarse = coarse + self.mix(coarse.flatten(1)).view(coarse.shape)
        joined = torch.cat([fine, F.interpolate(coarse, scale_factor=2.0, mode="nearest")], 1)
        return x + self.head(F.silu(joined))


@pytest.fixture
def picture():
    return Picture().requires_grad_(False)


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


def arguments(rows: int = 3, count: int = 2) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (torch.randn(rows, 1, 8, 8), torch.randn(rows)), torch.randn(count, rows, 1, 8, 8)


def dual_of(fn: Any, primals: tuple[Any, ...]) -> Dual:
    dual = find(fn, primals)[0]
    assert isinstance(dual, Dual)
    return dual


def programs_of(fn: Any, primals: tuple[Any, ...]) -> list[replay.Program]:
    found = dual_of(fn, primals).replay._programs.values()
    return [program for program in found if isinstance(program, replay.Program)]


def by_graph(fn: Any, primals: tuple[Any, ...], vectors: Tensor) -> tuple[Tensor, Tensor]:
    dual, tensors = find(fn, primals)
    assert isinstance(dual, Dual)
    return dual.graph(primals, vectors, tensors)


def assert_as_the_graph(fn: Any, primals: tuple[Any, ...], vectors: Tensor) -> None:
    for got, expected in zip(fd.jvp(fn, primals, vectors), by_graph(fn, primals, vectors), strict=True):
        assert torch.equal(got, expected)


def replayed(fn: Any, rows: int = 3, count: int = 2) -> None:
    for _ in range(2):
        fd.jvp(fn, *arguments(rows, count))


def test_every_call_gives_what_the_graph_gives(picture):
    for _ in range(4):
        for rows, count in ((3, 2), (1, 1), (20, 1), (3, 5)):
            assert_as_the_graph(picture, *arguments(rows, count))
    assert len(programs_of(picture, arguments()[0])) == 3  # a single row has a trace of its own


@pytest.mark.parametrize("make", [jvp_models.mlp, jvp_models.resnet, jvp_models.dit], ids=lambda make: make.__name__)
def test_models(make):
    fn, primals, _ = make().at(torch.float32)
    for _ in range(4):
        primals = (torch.randn_like(primals[0]), *primals[1:])
        assert_as_the_graph(fn, primals, torch.randn(2, *primals[0].shape))
    assert programs_of(fn, primals)


def test_results_belong_to_the_caller(picture):
    replayed(picture)
    first = fd.jvp(picture, *arguments())
    kept = [tensor.clone() for tensor in first]
    for _ in range(3):
        fd.jvp(picture, *arguments())
    assert all(torch.equal(now, then) for now, then in zip(first, kept, strict=True))


def test_parameters_are_read_at_every_call(picture):
    replayed(picture)
    picture.inner.weight.mul_(2)
    assert_as_the_graph(picture, *arguments())
    picture.mix.weight = nn.Parameter(torch.randn(128, 128), requires_grad=False)
    picture.stem.weight = nn.Parameter(torch.randn(1, 8, 3, 3).transpose(0, 1), requires_grad=False)
    picture.norm.bias = nn.Parameter(torch._neg_view(torch.randn(8)), requires_grad=False)
    primals, vectors = arguments()
    expected = torch.func.jvp(lambda x: picture(x, primals[1]), (primals[0],), (vectors[0],))
    out, tangents = fd.jvp(picture, primals, vectors)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(tangents[0], expected[1])


def test_derivatives_go_to_the_graph(picture):
    replayed(picture)
    (x, time), vectors = arguments()
    with torch.enable_grad():
        x.requires_grad_()
        fd.jvp(picture, (x, time), vectors)[1].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    stacked = torch.randn(2, *vectors.shape)
    mapped = torch.vmap(lambda v: fd.jvp(picture, (x.detach(), time), v)[1])(stacked)
    torch.testing.assert_close(mapped[1], fd.jvp(picture, (x.detach(), time), stacked[1])[1])


def test_weights_that_want_a_gradient(picture):
    picture.requires_grad_()
    for _ in range(4):
        with torch.enable_grad():
            assert fd.jvp(picture, *arguments())[1].requires_grad
    replayed(picture)
    assert not fd.jvp(picture, *arguments())[1].requires_grad


def test_inference_mode_and_back(picture):
    for _ in range(3):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                fd.jvp(picture, *arguments())
    primals, vectors = arguments()
    with torch.inference_mode():
        got = fd.jvp(picture, primals, vectors)
    assert all(torch.equal(a, b) for a, b in zip(got, fd.jvp(picture, primals, vectors), strict=True))


def test_strides_and_signs_of_inputs(picture):
    replayed(picture)
    (x, time), vectors = arguments()
    expected = fd.jvp(picture, (x, time), vectors)
    for other in (x.mT.contiguous().mT, torch._neg_view(-x)):
        for along in (vectors, vectors.flip(0).flip(0), torch._neg_view(-vectors)):
            for _ in range(3):
                torch.testing.assert_close(fd.jvp(picture, (other, time), along), expected)


def test_threads_have_memory_of_their_own(picture):
    replayed(picture, rows=64)
    work = [arguments(64) for _ in range(4)]
    expected = [by_graph(picture, *each) for each in work]
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                got = fd.jvp(picture, *work[number])
                if not all(torch.equal(a, b) for a, b in zip(got, expected[number], strict=True)):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_sizes_that_depend_on_values_are_not_replayed():
    layer = nn.Linear(6, 6).requires_grad_(False)

    def chosen(x: Tensor, mask: Tensor) -> Tensor:
        return F.silu(layer(x)[:, mask] * 2 + 1)

    for size in (2, 5, 1, 6, 3):
        x, mask = torch.randn(3, 6), torch.arange(6) < size
        out, tangents = fd.jvp(chosen, (x, mask), torch.randn(2, 3, 6))
        torch.testing.assert_close(out, chosen(x, mask))
        assert tangents.shape == (2, 3, size)
    assert not programs_of(chosen, (x, mask))


def test_a_generator_of_random_numbers_is_no_hindrance():
    def fn(x: Tensor) -> Tensor:
        return x @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1))

    for _ in range(4):  # the graph holds one generator, whose numbers go on from call to call
        assert fd.jvp(fn, (torch.randn(3, 6),), torch.randn(2, 3, 6))[1].shape == (2, 3, 6)


def test_large_results_are_not_kept(picture, monkeypatch):
    monkeypatch.setattr(arena, "MOST_RESULTS", 1000)
    for _ in range(3):
        assert_as_the_graph(picture, *arguments())
    assert not programs_of(picture, arguments()[0])


def test_programs_are_few(picture):
    for rows in range(1, 3 * replay.MOST_PROGRAMS):
        replayed(picture, rows)
    assert len(dual_of(picture, arguments()[0]).replay._programs) <= replay.MOST_PROGRAMS


def test_results_that_are_alive_together_lie_apart(picture):
    primals, vectors = arguments()
    graph = dual_of(picture, primals).graph
    recorder = replay._Recorder(graph)
    recorder.run(primals, vectors, [])
    made = arena.arena_for(graph.graph, recorder.results)
    assert made is not None
    last = arena._last_reads(graph.graph, recorder.results)
    numbers = {node: number for number, node in enumerate(graph.graph.nodes)}
    with made.memory() as tensors:
        spans = {
            node: (tensors[i].data_ptr(), tensors[i].data_ptr() + tensors[i].nbytes) for node, i in made.numbers.items()
        }
    assert len(spans) > 5
    shared = 0
    for first in spans:
        for second in spans:
            if first is second or numbers[first] > numbers[second]:
                continue
            apart = spans[first][1] <= spans[second][0] or spans[second][1] <= spans[first][0]
            end = last[first]
            assert end is not None
            assert apart or end < numbers[second]
            shared += not apart
    assert shared


def test_what_is_returned_has_no_place(picture):
    """Through views, too: here the output is a slice of the last op's result."""
    primals, vectors = arguments()
    graph = dual_of(picture, primals).graph
    recorder = replay._Recorder(graph)
    recorder.run(primals, vectors, [])
    last = arena._last_reads(graph.graph, recorder.results)
    assert [node for node, end in last.items() if end is None] == [list(recorder.results)[-1]]


@pytest.mark.parametrize("target", NEAREST, ids=str)
def test_nearest(target):
    for shape in ((2, 3, 4, 4), (1, 2, 5, 3), (3, 1, 1, 7)):
        for size, factors in ((None, [2.0, 2.0]), ([9, 8], None), (None, [1.5, 0.7]), ([2, 2], None)):
            if size is None and factors is not None and min(int(n * f) for n, f in zip(shape[2:], factors)) < 1:  # noqa: B905
                continue
            for dtype in (torch.float32, torch.bfloat16):
                images = torch.randn(shape).to(dtype)
                for each in (images, images.to(memory_format=torch.channels_last), images.mT.contiguous().mT):
                    assert torch.equal(NEAREST[target](each, size, factors), target(each, size, factors))
    large = torch.randn(1, 1, 1024, MOST_ELEMENTS // 2048)
    assert torch.equal(NEAREST[target](large, None, [2.0, 2.0]), target(large, None, [2.0, 2.0]))
