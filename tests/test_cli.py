"""The command line, run as users run it: what it writes, what it refuses, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastdensity import __main__, cli
from fastdensity.experiment import BLOCK, make_latents

RUN = CliRunner()
QUICK = ("--n", "3", "--steps", "6")


def sample(out: Path, *options: str) -> dict[str, numpy.ndarray]:
    result = RUN.invoke(cli.app, ["sample", *QUICK, *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return dict(numpy.load(out / "samples.npz"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, numpy.ndarray]]:
    """One run at three q that several tests look at."""
    out = tmp_path_factory.mktemp("cli") / "new" / "folder"
    return out, sample(out, "--n", "16", "--steps", "12", "--q", "0.65,0.35", "--q", "0.5")


def test_lower_q_has_lower_density_and_more_detail(run: tuple[Path, dict[str, numpy.ndarray]]) -> None:
    arrays = run[1]
    assert arrays["q"].tolist() == [0.35, 0.5, 0.65]
    log_prob, detail = arrays["log_prob"].mean(axis=1), arrays["detail"].mean(axis=1)
    # sqrt(D/2) ndtri(q) per unit of log-SNR, over 18 units, is -39 nats at q = 0.35
    assert log_prob[0] < log_prob[1] - 15
    assert log_prob[1] < log_prob[2] - 15
    assert detail[0] > detail[1] > detail[2]


def test_a_run_leaves_arrays_pictures_and_a_summary(run: tuple[Path, dict[str, numpy.ndarray]]) -> None:
    out, arrays = run
    names = {f"q_{q}.npz" for q in (0.35, 0.5, 0.65)} | {"samples.npz", "samples.png", "density.png", "summary.json"}
    assert {path.name for path in out.iterdir()} == names
    assert arrays["x"].shape == (3, 16, 1, 8, 8)
    assert all(numpy.isfinite(values).all() for values in arrays.values())
    assert (arrays["std_err"] == 0).all()
    for index, q in enumerate((0.35, 0.5, 0.65)):
        one = numpy.load(out / f"q_{q}.npz")
        assert float(one["q"]) == q
        assert all((one[name] == arrays[name][index]).all() for name in ("x", "images", "log_prob", "detail"))
    summary = json.loads((out / "summary.json").read_text())
    assert [row["q"] for row in summary["results"]] == [0.35, 0.5, 0.65]
    assert summary["results"][0]["mean_log_prob"] == pytest.approx(arrays["log_prob"][0].mean())
    assert summary["settings"]["solver"] == "dpmpp_2m"
    assert summary["interrupted"] is False
    for name in ("samples.png", "density.png"):
        Image.open(out / name).verify()


def test_the_same_seed_gives_the_same_bits_and_n_changes_no_sample(tmp_path: Path) -> None:
    few = sample(tmp_path / "few", "--q", "0.4")
    many = sample(tmp_path / "many", "--q", "0.4", "--n", str(BLOCK + 2))
    other = sample(tmp_path / "other", "--q", "0.4", "--seed", "1")
    for name in ("x", "log_prob", "detail"):
        assert (few[name][0] == many[name][0, :3]).all(), name
        assert (few[name] != other[name]).any(), name
    again = sample(tmp_path / "few", "--q", "0.4")
    assert all((again[name] == few[name]).all() for name in few)
    assert len(numpy.unique(many["x"][0].reshape(BLOCK + 2, -1), axis=0)) == BLOCK + 2


def test_latents_are_distinct_and_lie_at_the_median_radius() -> None:
    latents = make_latents(40, 0, 2.0)
    assert torch.allclose(latents.flatten(1).norm(dim=1), torch.full((40,), 2.0 * 63.3345**0.5), rtol=1e-5)
    normalised = latents.flatten(1) / latents.flatten(1).norm(dim=1, keepdim=True)
    assert (normalised @ normalised.T - torch.eye(40)).abs().max() < 0.6
    assert torch.equal(latents[:5], make_latents(5, 0, 2.0))


def test_every_path_leads_to_the_same_digits(tmp_path: Path) -> None:
    images = [
        sample(tmp_path / path, "--q", "0.4", "--solver", "ddim", "--schedule", path)["images"]
        for path in ("vp", "ve", "rectified-flow")
    ]
    assert numpy.abs(images[0] - images[1]).max() < 1e-3
    assert numpy.abs(images[0] - images[2]).max() < 1e-3


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_other_solvers_run(tmp_path: Path, solver: str) -> None:
    assert numpy.isfinite(sample(tmp_path, "--q", "0.5", "--solver", solver)["log_prob"]).all()


def test_the_reference_backend_gives_the_same_to_rounding(tmp_path: Path) -> None:
    before = os.environ.get("FASTDENSITY_BACKEND")
    compiled = sample(tmp_path / "auto", "--q", "0.4")
    reference = sample(tmp_path / "torch", "--q", "0.4", "--backend", "torch")
    assert numpy.allclose(compiled["x"], reference["x"], atol=2e-3)
    assert os.environ.get("FASTDENSITY_BACKEND") == before


BAD = {
    "n of zero": (("--n", "0"), r"--n must be in [1, 65536], got 0"),
    "n no number": (("--n", "many"), "'--n'"),
    "steps of zero": (("--steps", "0"), "--steps must be in"),
    "negative seed": (("--seed", "-1"), "--seed must be in"),
    "q of one": (("--q", "1.0"), "--q must be in (0, 1), got 1.0"),
    "q of zero": (("--q", "0.3,0"), "--q must be in (0, 1), got 0"),
    "q nan": (("--q", "nan"), "--q must be in (0, 1), got nan"),
    "q no number": (("--q", "0.3,high"), "got 'high'"),
    "q empty": (("--q", ""), "--q must be numbers"),
    "q twice": (("--q", "0.3,0.30"), "got 0.30 twice"),
    "solver": (("--solver", "rk4"), "--solver must be one of euler, ddim, heun, dpmpp_2m, got 'rk4'"),
    "schedule": (("--schedule", "cosine"), "--schedule must be one of vp, ve, rectified-flow, got 'cosine'"),
    "device": (("--device", "toaster"), "--device must be cpu, cuda or cuda:INDEX, got 'toaster'"),
    "meta device": (("--device", "meta"), "--device must be cpu, cuda or cuda:INDEX"),
    "backend": (("--backend", "numpy"), "--backend must be one of auto, cpu, triton, cuda, torch, got 'numpy'"),
    "cuda backend on cpu": (("--backend", "cuda"), "--backend cuda:"),
    "checkpoint": (("--checkpoint", "no/such.safetensors"), "checkpoint no/such.safetensors cannot be read"),
    "checkpoint of another kind": (("--checkpoint", __file__), "truncated or no safetensors file"),
    "folder under a file": (("--out", f"{__file__}/folder"), "cannot be written: Not a directory"),
    "unknown option": (("--colour", "red"), "--colour"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = BAD[case]
    code = cli.main(["sample", "--out", str(tmp_path), *options])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("fastdensity: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "--out", str(tmp_path), "--device", device]) == 2
    assert f"--device {device} is not there" in capsys.readouterr().err


def test_a_folder_that_nobody_may_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (Path("/proc/1/fastdensity"), tmp_path / "file"):
        (tmp_path / "file").touch()
        assert cli.main(["sample", "--out", str(folder)]) == 2
        assert f"--out {folder} cannot be written" in capsys.readouterr().err


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    for word in ("fastdensity", "triton", "numpy", "python", torch.__version__, "threads", "cpu", "cuda"):
        assert word in output


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__main__.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit, match=r"needs no-such-package: pip install 'fastdensity\[cli\]'"):
        __main__.main()


def test_ctrl_c_keeps_what_was_finished(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--n", "2", "--steps", "12", "--q", "0.35,0.4,0.45,0.5,0.55,0.6,0.65", "--out", str(out)]
    command = [sys.executable, "-m", "fastdensity", "sample", *options]

    def heed_interrupts() -> None:  # a suite that was started in the background passes on that they are ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heed_interrupts, **pipes) as process:
        deadline = time.monotonic() + 120
        while not (out / "q_0.35.npz").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "of 7 q finished and kept" in errors
    assert "0.35" in printed
    finished = json.loads((out / "summary.json").read_text())
    assert finished["interrupted"] is True
    count = len(finished["results"])
    assert 1 <= count < 7
    assert len(list(out.glob("q_*.npz"))) == count
    assert numpy.load(out / "samples.npz")["x"].shape == (count, 2, 1, 8, 8)
    assert (numpy.load(out / "q_0.35.npz")["x"] == numpy.load(out / "samples.npz")["x"][0]).all()
    assert not list(out.glob("*.partial"))
    Image.open(out / "samples.png").verify()
