"""The benchmark of what the closed loop costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import track as benchmark


def test_the_benchmark_runs_and_refuses_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with torch.no_grad():
        records = benchmark.run(rounds=1, shapes=((2, 1, 4, 4),))
        benchmark.print_table(records)
        assert "of a step" in capsys.readouterr().out
        right = benchmark.variants((2, 1, 4, 4))
        wrong = {**right, "tracked": right["plain"]}
        with pytest.raises(SystemExit, match="tracked is wrong"):
            benchmark.check(wrong)
