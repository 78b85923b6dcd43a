"""Shared fixtures. New memory is filled with NaN, so an element that nobody wrote shows up as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make_and_fill(*arguments: Any, **options: Any) -> Tensor:
        tensor = make(*arguments, **options)
        if type(tensor) is Tensor and not torch.compiler.is_compiling():
            tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(77)
        return tensor

    return make_and_fill


@pytest.fixture(autouse=True)
def new_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
