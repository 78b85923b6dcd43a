"""`fastdensity align`: the fraction it prints and writes, bad input, interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastdensity as fd
from fastdensity import cli, cli_align, digits, experiment
from fastdensity.cli_options import BAD_INPUT, INTERRUPTED

STEPS = 20


def align(out: Path, *options: str) -> dict[str, Any]:
    assert cli.main(["align", "--steps", str(STEPS), "--out", str(out), *options]) == 0
    return json.loads((out / "alignment.json").read_text())


def test_counts_what_score_alignment_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = align(tmp_path, "--n", "20", "--seed", "3")
    flow = digits.load_digits_flow()
    latents = experiment.draw_latents(20, 3, float(flow.schedule.sigma(digits.LAM_NOISE)))
    grid = torch.linspace(digits.LAM_NOISE, digits.LAM_DATA, STEPS + 1, dtype=torch.float64)
    wanted = fd.score_alignment(flow, latents, grid)
    assert torch.allclose(torch.tensor(summary["alignment"], dtype=torch.float64), wanted, rtol=1e-3)
    assert summary["aligned_fraction"] == float((wanted > 0).double().mean())
    assert summary["latents"] == 20
    assert summary["interrupted"] is False
    assert f"aligned: {100 * summary['aligned_fraction']:.2f} %" in capsys.readouterr().out
    Image.open(tmp_path / "alignment.png").verify()


def test_a_latent_is_the_same_for_every_n(tmp_path: Path) -> None:
    few, many = (align(tmp_path / n, "--n", n) for n in ("3", "18"))
    assert few["cosine"] == many["cosine"][:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "0"], "--n must be in [1, 65536], got 0"),
        (["--schedule", "cosine"], "--schedule must be one of vp, ve, rectified-flow, got 'cosine'"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors cannot be read"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:INDEX"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["align", "--out", str(tmp_path / "out"), *options]) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_interruption_keeps_the_finished_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupt_the_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return align_latents(*arguments)

    align_latents = cli_align.align_latents
    monkeypatch.setattr(cli_align, "align_latents", interrupt_the_second)
    assert cli.main(["align", "--n", "40", "--steps", "5", "--out", str(tmp_path)]) == INTERRUPTED
    summary = json.loads((tmp_path / "alignment.json").read_text())
    assert summary["latents"] == experiment.BLOCK
    assert summary["interrupted"] is True
