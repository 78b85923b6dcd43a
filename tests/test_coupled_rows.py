"""Functions whose rows depend on each other: fd.divergence refuses them, whichever way the dependence runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import comb

import pytest
import torch
from mixtures import largest_error, normals
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fastdensity as fd
from fastdensity.traces import apart

COUNTED: Counter[int] = Counter()


class Calls(nn.Module):
    """A function as a module, whose graphs no other test has seen; its calls are counted where no trace looks."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        COUNTED[id(self)] += 1
        return self.function(x, *args)


def shifted(x: Tensor, by: int) -> Tensor:
    moved = torch.cat([torch.zeros_like(x[:1]).expand(abs(by), -1), x, torch.zeros_like(x[:1]).expand(abs(by), -1)])
    return moved[: x.shape[0]] if by > 0 else moved[2 * -by :]


def attention(x: Tensor, causal: bool) -> Tensor:
    heads = x[None, None]
    return scaled_dot_product_attention(heads, heads, heads, is_causal=causal)[0, 0]


COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of earlier rows": lambda x: x.cumsum(0) * 1.0,
    "sum of later rows": lambda x: x.flip(0).cumsum(0).flip(0) * 1.0,
    "row before": lambda x: 2.0 * x + shifted(x, 1),
    "row after": lambda x: 2.0 * x + shifted(x, -1),
    "faint": lambda x: x + 1e-6 * shifted(x, 1),
    "last row": lambda x: torch.sin(x) - 0.5 * x[-1:],
    "first row": lambda x: torch.sin(x) - 0.5 * x[:1],
    "mean": lambda x: torch.tanh(x) - 1e-3 * x.mean(0),
    "causal attention": lambda x: attention(x, True),
    "attention": lambda x: attention(x, False),
    "values without derivative": lambda x: x * x.sign().sum(0),
}
OVER_DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "turned by two": lambda x: x * x.roll(2, 0),
    "turned by three": lambda x: x + x.roll(-3, 0),
    "two rows before": lambda x: x + shifted(x, 2),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("rows", [1, 2, 7, 70])
def test_coupling_in_either_direction_is_refused(name: str, rows: int) -> None:
    with pytest.raises(ValueError, match="fn couples the rows of a batch"):
        fd.divergence(Calls(COUPLED[name]), normals(rows, 12), method="exact")


@pytest.mark.parametrize("name", OVER_DISTANCES)
@pytest.mark.parametrize("rows", [4, 7, 64, 70, 300])
def test_coupling_over_a_distance_is_refused(name: str, rows: int) -> None:
    """The check of two rows let a turn by two pass, which is none of two rows."""
    with pytest.raises(ValueError, match="fn couples the rows of a batch"):
        fd.divergence(Calls(OVER_DISTANCES[name]), normals(rows, 12), method="exact")


def test_a_batch_that_hides_the_coupling_vouches_for_no_other() -> None:
    """A turn by two of two rows is none."""
    model, x = Calls(OVER_DISTANCES["turned by two"]), normals(70, 12)
    assert largest_error(fd.divergence(model, x[:2], method="exact").div, 2.0 * x[:2].sum(1)) < 1e-14
    for rows in (7, 70):
        with pytest.raises(ValueError, match="fn couples the rows"):
            fd.divergence(model, x[:rows], method="exact")


@pytest.mark.parametrize("name", [*COUPLED, "turned by two"])
@pytest.mark.parametrize("rows", [2, 7, 70])
def test_coupling_is_refused_in_a_batch_in_one_piece(name: str, rows: int) -> None:
    """torch.func.jvp takes the whole batch, whose halves are changed in turn."""
    if name == "turned by two" and rows == 2:
        pytest.skip("no turn")
    with pytest.raises(ValueError, match="fn couples the rows of a batch"):
        fd.divergence(Calls({**COUPLED, **OVER_DISTANCES}[name]), normals(rows, 12), forward="torch")


@pytest.mark.parametrize("of", [0, 3, 17, 60])
@pytest.mark.parametrize("on", [0, 4, 17, 59])
def test_a_single_pair_of_rows_shows(of: int, on: int) -> None:
    """Row `of` depends on row `on` by a millionth, and nothing else depends on anything."""

    def fn(x: Tensor) -> Tensor:
        place = torch.arange(x.shape[0])[:, None]
        return torch.sin(x) + torch.where(place == of, 1e-6 * (x * (place == on)).sum(0), 0.0)

    found = apart.results_apart(apart.Function(fn), normals(61, 12), torch.arange(61))
    assert (found is None) == (of != on)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 7, 20, 35, 61])
def test_sets_tell_any_two_rows_apart_in_both_directions(count: int) -> None:
    sets = apart._sets(count, thorough=True).int()
    one_without_other = torch.einsum("si,sj->ij", sets, 1 - sets)
    assert bool((one_without_other + torch.eye(count, dtype=torch.int32) > 0).all())
    fewer = len(sets) - 1
    assert comb(fewer, fewer // 2) < count


def test_halves_of_a_large_batch() -> None:
    first, second = apart._sets(200, thorough=True)
    assert torch.equal(first, ~second)
    assert int(first.sum()) == 100


def test_how_many_rows_are_compared() -> None:
    """All that there are for cheap networks, two of the dearest; a larger batch pays for more."""
    assert apart.rows_compared(1000, 4, 1 << 20) == 61
    assert apart.rows_compared(1000, 4, 5) == 5
    assert apart.rows_compared(1 << 40, 1, 1 << 20) == apart.rows_compared(1 << 40, 1, 0) == 2
    assert apart.rows_compared(1 << 40, 400, 1 << 20) == 14
    count = apart.rows_compared(1 << 24, 4, 1 << 20)
    assert count * (1 + len(apart._sets(count, True))) <= 32


def test_the_question_is_asked_once() -> None:
    """fn itself is called when it is first seen; later on only its graph."""
    model = Calls(torch.sin)
    fd.divergence(model, normals(7, 12))
    first = COUNTED[id(model)]
    fd.divergence(model, normals(7, 12), num_matvecs=3)
    fd.divergence(model, normals(70, 12), method="exact")
    assert 3 < first < 30  # a trace and the questions of how it behaves
    assert COUNTED[id(model)] == first


# -- rows that do not couple, but cannot be cut -----------------------------------------------------------------------
@pytest.mark.parametrize("rows", [7, 70])
def test_arguments_that_are_mixed_keep_the_batch_in_one_piece(rows: int) -> None:
    """Blocks of 256 rows, most of them copies of the first, had another mean: of 70 rows 113 where 414 was right."""
    times = torch.arange(rows).double()
    found = fd.divergence(Calls(lambda x, t: x * t.mean()), normals(rows, 12), times, method="exact")
    assert largest_error(found.div, 12.0 * times.mean().expand(rows)) < 1e-14


@pytest.mark.parametrize("rows", [1, 7, 70, 300])
def test_the_place_of_a_row_may_count(rows: int) -> None:
    found = fd.divergence(Calls(lambda x: x * torch.arange(x.shape[0])[:, None]), normals(rows, 12), method="exact")
    assert found.div.tolist() == [12.0 * row for row in range(rows)]


def test_rows_of_their_own_are_not_refused() -> None:
    """Random numbers, tensors of the rows, and what each row does to itself."""
    torch.manual_seed(0)
    dropped = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5)).double()
    with pytest.warns(UserWarning, match="dropout is active"):
        fd.divergence(dropped, normals(7, 12))
    weight, scale = normals(7, 12, 12, seed=2), normals(7, 1, seed=3)
    found = fd.divergence(
        Calls(lambda x, w, s: torch.einsum("bij,bj->bi", w, x) * s), normals(7, 12), weight, scale, method="exact"
    )
    assert largest_error(found.div, weight.diagonal(dim1=1, dim2=2).sum(1) * scale[:, 0]) < 1e-12
