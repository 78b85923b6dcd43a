"""Sums that do not depend on the batch around them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import normals

from fastdensity.sums import pairwise_sum, row_dot, row_sum


@given(rows=st.integers(1, 5), columns=st.integers(1, 70))
def test_sums_add_everything_once(rows: int, columns: int) -> None:
    values = torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns)
    assert torch.equal(pairwise_sum(values, 1), values.sum(1))
    assert torch.equal(pairwise_sum(values, 0), values.sum(0))
    assert torch.equal(row_dot(values.float(), values.float()), (values * values).sum(1))


def test_long_sums_do_not_depend_on_the_batch() -> None:
    """torch.sum cuts a single long row over threads, and several rows not."""
    values = normals(3, 100_003)
    assert torch.equal(row_sum(values)[:1], row_sum(values[:1]))
    torch.testing.assert_close(row_sum(values), values.sum(1), rtol=1e-12, atol=1e-12)
