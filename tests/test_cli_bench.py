"""`fastdensity bench divergence`, run as users run it: what it measures, writes and refuses. Nothing asserts a time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from fastdensity import cli
from fastdensity.bench.divergence import (
    Record,
    Reference,
    Variant,
    estimate_one,
    find_reference,
    mark_pareto,
    measure_error,
    variants,
)
from fastdensity.bench.memory import peak_bytes
from fastdensity.bench.plot import save_pareto
from fastdensity.bench.subject import Subject, digits_subject, factory_subject

RUN = CliRunner()
MATRIX = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
FACTORIES = """
import torch
A = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
def f(x): return (x.flatten(1) @ A.T.to(x.dtype)).reshape(x.shape)
def pair(): return f, torch.zeros(5, 3, 4, dtype=torch.float64)
def single(): return f
def module(): return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh())
def number(): return 3
def words(): return f, "states"
def broken(): raise OSError("no weights here")
def coupled(): return (lambda x: x - x.mean(0)), torch.ones(4, 3)
def tall(): return (lambda x: torch.cat([x, x], 1)), torch.ones(4, 3)
def loaded(path): return torch.nn.Linear(6, 6, bias=False).requires_grad_(False), torch.load(path)
class Network(torch.nn.Linear):
    def forward(self, x, t): return super().forward(x) * t[:, None]
def documented(path="weights.pt"):
    model = Network(6, 6).eval(); model.load_state_dict(torch.load(path))
    return (lambda x: model(x, torch.full((len(x),), 0.5))), torch.ones(3, 6)
constant = 5
"""


def linear(x: Tensor) -> Tensor:
    return x @ MATRIX.T


def bench(out: Path, *options: str) -> dict[str, Any]:
    result = RUN.invoke(cli.app, ["bench", "divergence", *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return json.loads((out / "divergence.json").read_text())


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, by a name that no other test has imported."""
    name = f"bench_factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


def test_digits(tmp_path: Path) -> None:
    options = ("--samples", "4", "--trials", "3", "--rounds", "1", "--distributions", "rademacher")
    methods = ("--methods", "exact,hutchinson,colour", "--matvecs", "4,8")
    found = bench(tmp_path, *options, *methods, "--lam", "0", "--lam", "3")
    assert [result["subject"] for result in found["results"]] == ["digits, lam = 0", "digits, lam = 3"]
    assert found["interrupted"] is False
    for result in found["results"]:
        assert result["reference"]["kind"] == "exact"
        records = {(record["family"], record["products"]): record for record in result["records"]}
        expected = {(family, count) for family in ("hutchinson, rademacher", "colour") for count in (4, 8)}
        assert set(records) == expected | {("exact", 64)}
        assert records["exact", 64]["rmse"] == 0.0
        assert all(record["median_seconds_per_sample"] > 0 for record in records.values())
        assert any(record["pareto"] for record in records.values())
        probed = records["hutchinson, rademacher", 8]
        assert 0.001 < probed["relative_rmse"] < 0.2
        assert 0.4 < probed["calibration"] < 2.5
        assert records["colour", 4]["calibration"] is None
    names = {"divergence.json", "pareto_digits_lam_0.png", "pareto_digits_lam_3.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    Image.open(tmp_path / "pareto_digits_lam_0.png").verify()


def test_a_factory_of_the_user(factories: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--methods", "hutchinson,exact", "--matvecs", "2", "--trials", "4", "--rounds", "0", "--samples", "3")
    found = bench(out, "--model", f"{factories}:pair", *options)
    result = found["results"][0]
    assert result["reference"]["rms"] == pytest.approx(abs(float(MATRIX.trace())))
    assert found["settings"]["samples"] == 3
    assert result["undisturbed"] is None
    assert not list(out.glob("*.png"))


@pytest.mark.parametrize("name", ["loaded", "documented"])
def test_a_checkpoint_of_the_user_goes_to_the_factory(factories: str, name: str, tmp_path: Path) -> None:
    weights = {"weight": torch.diag(torch.arange(6.0)), "bias": torch.zeros(6)}
    where = tmp_path / "mine.pt"
    torch.save(torch.ones(3, 6) if name == "loaded" else weights, where)
    options = ("--methods", "exact", "--matvecs", "2", "--trials", "1", "--rounds", "0")
    found = bench(tmp_path / "out", "--model", f"{factories}:{name}", "--checkpoint", str(where), *options)
    assert (found["settings"]["checkpoint"], found["settings"]["samples"]) == (str(where), 3)
    if name == "documented":
        assert found["results"][0]["reference"]["rms"] == pytest.approx(7.5)


def test_the_help_says_whose_checkpoints_it_takes() -> None:
    said = " ".join(RUN.invoke(cli.app, ["bench", "divergence", "--help"], env={"COLUMNS": "400"}).output.split())
    assert "handed to factory(path)" in said
    assert "this package's digits network only" in said


@pytest.mark.parametrize(("name", "shape"), [("single", "3,4"), ("module", "6")])
def test_states_are_drawn_for_a_factory_without(factories: str, name: str, shape: str) -> None:
    sizes = tuple(map(int, shape.split(",")))
    subject = factory_subject(f"{factories}:{name}", 4, 1, sizes)
    assert subject.x.shape == (4, *sizes)
    assert not torch.equal(subject.x, factory_subject(f"{factories}:{name}", 4, 2, sizes).x)


BAD = {
    "method": (("--methods", "hutchinson,magic"), "of exact, hutchinson, hutchpp, xtrace, colour, got 'magic'"),
    "distribution": (("--distributions", "cauchy"), "got 'cauchy'"),
    "matvecs": (("--matvecs", "4,-1"), "--matvecs must be whole numbers"),
    "no matvecs": (("--matvecs", "0"), "--matvecs must be whole numbers"),
    "samples": (("--samples", "0"), "--samples must be in [1, 65536], got 0"),
    "trials": (("--trials", "0"), "--trials must be in"),
    "lam": (("--lam", "high"), "--lam must be numbers, comma separated, got 'high'"),
    "lam too low": (("--lam", "-11"), "lam must be at least -10"),
    "lam nan": (("--lam", "nan"), "--lam must be finite"),
    "reference": (("--reference", "wiki"), "--reference must be one of auto, exact, long, got 'wiki'"),
    "device": (("--device", "toaster"), "--device must be cpu, cuda or cuda:INDEX"),
    "checkpoint": (("--checkpoint", "no/such.safetensors"), "checkpoint no/such.safetensors cannot be read"),
    "folder": (("--out", f"{__file__}/folder"), "cannot be written: Not a directory"),
    "no colon": (("--model", "package"), "package.module:factory, got 'package'"),
    "no module": (("--model", "no.such.module:make"), "'no.such.module' cannot be imported: ModuleNotFoundError"),
    "no factory": (("--model", "MODULE:nothing"), "has nothing named 'nothing'"),
    "no function": (("--model", "MODULE:constant"), "has no function but int 5 named 'constant'"),
    "broken": (("--model", "MODULE:broken"), "fails: OSError: no weights here"),
    "number": (("--model", "MODULE:number"), "must return a callable fn(x), or (fn, x), got int 3"),
    "words": (("--model", "MODULE:words"), "must return states x as a floating tensor (B, *), got str"),
    "no states": (("--model", "MODULE:single"), "returns no states x: return (fn, x), or give their shape"),
    "two shapes": (("--model", "MODULE:pair", "--shape", "3,4"), "states of its own: give no shape"),
    "lam of a model": (("--model", "MODULE:pair", "--lam", "1"), "--lam belongs to the digits"),
    "no use for it": (("--model", "MODULE:pair", "--checkpoint", "a.pt"), "must take one argument, the checkpoint's"),
    "need of it": (("--model", "MODULE:loaded"), "must be callable without arguments; with --checkpoint FILE"),
    "none there": (("--model", "MODULE:loaded", "--checkpoint", "a.pt"), "fails: FileNotFoundError"),
    "of another": (("--checkpoint", __file__), "truncated or no safetensors file"),
    "shape of digits": (("--shape", "3"), "--shape belongs to --model"),
    "coupled rows": (("--model", "MODULE:coupled"), "couples the rows of a batch"),
    "not square": (("--model", "MODULE:tall"), "its Jacobian is not square"),
    "nothing left": (("--methods", "xtrace", "--matvecs", "1"), "no method is left"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = BAD[case]
    out = ["--out", str(tmp_path / "out")]
    code = cli.main(["bench", "divergence", *out, *(option.replace("MODULE", factories) for option in options)])
    error = capsys.readouterr().err
    assert code == 2
    last = error.strip().splitlines()[-1]
    assert last.startswith("fastdensity: error: ")
    assert error.count("fastdensity: error") == 1
    assert "Traceback" not in error
    assert message in last
    assert not (tmp_path / "out" / "divergence.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert cli.main(["bench", "divergence", "--out", str(tmp_path / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdensity.bench.divergence.measure_cost", interrupt)
    options = ["--samples", "2", "--trials", "2", "--methods", "hutchinson", "--matvecs", "2", "--out", str(tmp_path)]
    result = RUN.invoke(cli.app, ["bench", "divergence", *options])
    assert result.exit_code == 130
    found = json.loads((tmp_path / "divergence.json").read_text())
    assert found["interrupted"] is True
    assert [record["median_seconds_per_sample"] for record in found["results"][0]["records"]] == [None, None]


# -- what is measured -------------------------------------------------------------------------------------------------
def test_error_bias_and_calibration_of_a_known_matrix() -> None:
    """Rademacher: Var = 2 (||S||^2 - sum S_ii^2) / k."""
    subject = Subject("matrix", linear, torch.zeros(200, 12, dtype=torch.float64))
    reference = find_reference(subject, "auto", 8, 0)
    record = measure_error(subject, Variant("hutchinson", 8, "rademacher"), reference, 10, 1)
    symmetric = (MATRIX + MATRIX.T) / 2
    variance = float(symmetric.square().sum() - symmetric.diagonal().square().sum()) * 2 / 8
    assert record.rmse == pytest.approx(math.sqrt(variance), abs=5 * record.rmse_error)
    assert record.rmse_error == pytest.approx(record.rmse / math.sqrt(2 * 2000), rel=0.25)
    assert abs(record.bias) < 4 * record.bias_error
    assert record.bias_error == pytest.approx(record.rmse / math.sqrt(2000), rel=0.05)
    assert record.calibration == pytest.approx(1.0, abs=0.1)
    assert record.relative == pytest.approx(record.rmse / abs(float(MATRIX.trace())))


def test_a_long_run_is_a_reference_whose_own_error_is_taken_out() -> None:
    """A reference as inexact as the estimate: the raw RMS would be sqrt(2) too large."""
    subject = Subject("matrix", linear, torch.zeros(400, 12, dtype=torch.float64))
    exact = find_reference(subject, "exact", 8, 0)
    rough = estimate_one(subject, Variant("hutchinson", 8, "rademacher"), 0, step=1)
    variant = Variant("hutchinson", 8, "rademacher")
    true = measure_error(subject, variant, exact, 8, 3)
    against = measure_error(subject, variant, Reference("rough", rough.div, rough.std_err), 8, 3)
    assert against.rmse == pytest.approx(true.rmse, rel=0.15)
    assert against.bias_error > true.bias_error


def test_large_samples_get_a_long_run() -> None:
    subject = Subject("zeros", lambda x: 2.0 * x, torch.zeros(2, 5_000))
    reference = find_reference(subject, "auto", 1, 0)
    assert reference.kind == "64 Rademacher probes"
    assert torch.equal(reference.div, torch.full((2,), 10_000.0, dtype=torch.float64))


def test_variants_that_make_no_sense_are_left_out_and_named() -> None:
    found, left_out = variants(["exact", "hutchpp", "xtrace", "colour"], ["normal"], [1, 3, 99], 10, sweeps=2)
    assert [(v.family, v.num_matvecs) for v in found] == [
        ("exact", 10), ("hutchpp, normal", 3), ("xtrace", 3), ("colour, 2 sweeps", 3),
    ]  # fmt: skip
    assert len(left_out) == 6
    assert left_out[0] == "hutchpp with 1: it needs 3 products"
    assert "exact is cheaper" in left_out[1]


def record(seconds: float | None, rmse: float, family: str = "colour") -> Record:
    times = None if seconds is None else (seconds, seconds, 1.1 * seconds)
    return Record(Variant(family, 4), 4, rmse, rmse / 2, rmse, 0.0, 0.1, None, times)


def test_pareto_front() -> None:
    records = [record(1, 5), record(2, 5), record(3, 2), record(1, 6), record(4, 0), record(None, 0), record(5, 0)]
    mark_pareto(records)
    assert [one.pareto for one in records] == [True, False, True, False, True, False, False]


def test_plot_needs_a_time_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record has a time"):
        save_pareto(tmp_path / "a.png", "title", [record(None, 1)])
    save_pareto(tmp_path / "b.png", "title", [record(1, 2), record(2, 1), record(3, 0, "exact")])
    Image.open(tmp_path / "b.png").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_memory_is_that_of_the_call() -> None:
    def fill(mebibytes: int) -> None:
        for _ in range(2):  # one after the other: the peak is one of them
            torch.ones(mebibytes << 18)

    assert 60 << 20 < peak_bytes(lambda: fill(64)) < 80 << 20
    assert peak_bytes(lambda: fill(4)) < 16 << 20


def test_digits_states_are_those_of_the_path() -> None:
    subject = digits_subject(2.0, 32, 0)
    assert subject.x.shape == (32, 1, 8, 8)
    noise = 1 / (1 + math.exp(2.0))
    assert noise < float(subject.x.square().mean()) < 1.2  # the data's own mean square is below 1
    torch.testing.assert_close(subject.x[:3], digits_subject(2.0, 3, 0).x, rtol=0, atol=1e-4)
