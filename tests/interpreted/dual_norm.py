"""The Triton norms in Triton's interpreter; run by tests/test_dual_norm_triton.py with TRITON_INTERPRET=1.

The interpreter truncates where a GPU rounds to bfloat16: one more unit in the last place. Shapes are small, and the
limits between the regimes are lowered instead.
"""

from __future__ import annotations

import pytest
import torch
from dual_norm_cases import DTYPES, Case, assert_as_good_as_eager, distance, group, layer, random

from fastdensity._backend import use
from fastdensity.triton_kernels import dual_norm

WHOLE: dict[str, int] = {}
SPLIT = {"whole_row_bytes": 0, "block_bytes": 512}  # 128 float32 or 64 float64 a block
REGIMES = pytest.mark.parametrize("sizes", [WHOLE, SPLIT], ids=["whole", "split"])


def launch(case, sizes):
    return case.launch(getattr(dual_norm, f"{case.name}_triton"), **sizes)


def row_cases():
    for number, size in enumerate((1, 3, 15, 16, 64, 100, 128, 129, 260)):
        rows = (None, 1, 2, 4)[number % 4]
        yield layer(3, (4, size), size, affine=number % 3 > 0, rows=rows, rms=number % 2 == 0)
    yield layer(2, (2, 3, 5, 7), 35, rows=2)
    yield layer(4, (70, 8), 8, rows=35)


def group_cases():
    for shape, groups in (((2, 6), 2), ((3, 4, 1), 4), ((2, 4, 3, 3), 2), ((1, 4, 9, 9), 2), ((2, 8, 16), 1)):
        yield group(3, shape, groups, activation="silu" if len(shape) > 2 else "none")
    yield group(2, (2, 4, 33), 2, affine=False)


@REGIMES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_eager(dtype, sizes):
    for case in (*row_cases(), *group_cases())[
        slice(1, None, 2) if sizes else slice(None)
    ]:  # blocks take the interpreter long
        single = case.to(dtype)
        assert_as_good_as_eager(single, launch(single, sizes))


@REGIMES
def test_plain_tensors_of_other_dtypes(sizes):
    for case in (layer(3, (4, 150), 150, rows=2), group(3, (2, 4, 40), 2)):
        mixed = Case(case.name, case.x.half(), case.to(torch.float32).arguments)
        wanted = Case(case.name, mixed.x.double(), mixed.to(torch.float64).arguments).reference()
        assert distance(launch(mixed, sizes), wanted) < 5e-4


@REGIMES
def test_a_large_mean_costs_no_digits(sizes):
    for case in (layer(3, (2, 300), 300, affine=False), group(3, (1, 4, 150), 2, activation="none")):
        shifted = Case(case.name, (case.x + 1e4).float(), case.to(torch.float32).arguments)
        wanted = Case(case.name, shifted.x.double(), case.arguments).reference()
        assert distance(launch(shifted, sizes), wanted) < 1e-6


@REGIMES
def test_rows_do_not_depend_on_their_batch(sizes):
    for case in (layer(3, (5, 200), 200), group(3, (5, 4, 50), 2)):
        single = case.to(torch.float32)
        whole = launch(single, sizes)
        alone = Case(case.name, single.x[:, 3:4], single.arguments)
        assert torch.equal(launch(alone, sizes), whole[:, 3:4])


@REGIMES
def test_shared_tangents_change_no_bits(sizes):
    case = layer(6, (3, 140), 140, rows=3).to(torch.float32)
    results = [launch(case, {**sizes, "few_programs": few}) for few in (1, 6, 100)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@REGIMES
def test_unaligned_memory_changes_no_bits(sizes):
    case = layer(3, (4, 132), 132, rows=2).to(torch.float32)
    expected = launch(case, sizes)

    def moved(tensor):
        space = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return space[1:].view(tensor.shape).copy_(tensor)

    arguments = tuple(moved(a) if isinstance(a, torch.Tensor) else a for a in case.arguments)
    shifted = Case(case.name, moved(case.x), arguments)
    assert torch.equal(launch(shifted, sizes), expected)
    out = moved(torch.zeros_like(case.x))
    dual_norm.dual_layer_norm_triton(case.x, *case.arguments, out, **sizes)
    assert torch.equal(out, expected)


def test_silu_far_from_zero():
    bias = torch.linspace(-150, 150, 16, dtype=torch.float64)
    for sizes in (WHOLE, SPLIT):
        case = Case("dual_group_norm", random(2, 1, 16, 130), (2, None, bias, 1e-5, "silu")).to(torch.float32)
        torch.testing.assert_close(
            launch(case, sizes).double(), case.to(torch.float64).reference(), rtol=5e-5, atol=5e-6
        )


def test_operators_run_on_triton():
    for case in (layer(2, (2, 3, 8), 8, rows=2), layer(2, (3, 8), 8, rms=True), group(2, (2, 4, 5), 2)):
        with use("triton"):
            torch.testing.assert_close(case.op(), case.reference(), rtol=1e-11, atol=1e-11)
            strided = Case(case.name, case.x.transpose(0, -1).contiguous().transpose(0, -1), case.arguments)
            torch.testing.assert_close(strided.op(), case.reference(), rtol=1e-11, atol=1e-11)
