"""Bad input: a clear error or the documented behaviour, for every public function of the rows family."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdensity as fd
from fastdensity import rules
from fastdensity._backend import native, use

X = torch.randn(4, 6)
ENDS = {"alpha": 0.6, "sigma": 0.8, "alpha_next": 0.7, "sigma_next": 0.6}
HERE = {"alpha": 0.6, "sigma": 0.8}


def step(**changes):
    options = {"sample": X, "prediction": X, **ENDS, "q": 0.4, **changes}
    return fd.guided_step(options.pop("sample"), options.pop("prediction"), **options)


def drift(x=X, u=X, score=X, div=1.0, b=1.0, **options):
    return fd.guided_drift(x, u, score, div, b, **options)


def predict(prediction=X, sample=X, **options):
    return fd.guide_prediction(prediction, sample, **{**HERE, **options})


BAD_CALLS = [
    # (call, error, a part of the message: the argument, what came, what was wanted)
    (lambda: drift(x=np.zeros((4, 6))), TypeError, "x must be a torch.Tensor, got ndarray"),
    (lambda: drift(x=torch.tensor(1.0)), ValueError, "x must be batch first"),
    (lambda: drift(x=X.int()), TypeError, "x must be float32.*int32"),
    (lambda: drift(x=X.to(torch.complex64)), TypeError, "x must be float32.*complex64"),
    (
        lambda: drift(u=X[:3]),
        ValueError,
        r"u must have the shape of x, \(4, 6\), got a float32 tensor of shape \(3, 6\)",
    ),
    (lambda: drift(u=X[:, :5]), ValueError, "u must have the shape of x"),
    (lambda: drift(u=X[None]), ValueError, "u must have the shape of x"),
    (lambda: drift(u=None), TypeError, "u must be a torch.Tensor, got NoneType"),
    (lambda: drift(u=X.bool()), TypeError, "u must be float32"),
    (lambda: drift(score=X.to_sparse()), TypeError, "score must be a dense"),
    (lambda: drift(score=X.to("meta")), ValueError, "score must be on cpu"),
    (lambda: drift(div="3"), TypeError, "div must be a number"),
    (lambda: drift(div=float("nan")), ValueError, "div must be finite"),
    (lambda: drift(b=float("inf")), ValueError, "b must be finite"),
    (lambda: drift(div=torch.ones(3)), ValueError, r"div must be a number or have one number per row, shape \(4,\)"),
    (lambda: drift(div=torch.ones(4, 1)), ValueError, "div must be a number or have one number per row"),
    (lambda: drift(div=torch.ones(4, dtype=torch.complex64)), TypeError, "div must hold real numbers"),
    (lambda: drift(div=torch.ones(4, dtype=torch.bool)), TypeError, "div must hold real numbers"),
    (lambda: drift(div=torch.ones(4, device="meta")), ValueError, "div must be on cpu"),
    (lambda: drift(dt=True), TypeError, "dt must be a number"),
    (lambda: drift(out=np.zeros((4, 6))), TypeError, "out must be a torch.Tensor"),
    (lambda: drift(out=torch.zeros(4, 5)), ValueError, "out must be like u"),
    (lambda: drift(out=X.double()), ValueError, "out must be like u"),
    (lambda: drift(out=torch.zeros(6, 4).T), ValueError, "out must be contiguous"),
    (lambda: drift(out=torch.zeros(4, 6, requires_grad=True)), ValueError, "out must be a plain tensor"),
    (lambda: drift(report=torch.zeros(4, 3)), ValueError, r"report must be torch.float32 of shape \(4, 4\)"),
    (lambda: drift(report=torch.zeros(4, 4).double()), ValueError, "report must be torch.float32"),
    (lambda: drift(report="yes"), TypeError, "report must be a torch.Tensor"),
    (lambda: step(q=0.0), ValueError, r"q must be finite and in \(0.0, 1.0\), got 0.0"),
    (lambda: step(q=1.0), ValueError, "q must be finite and in"),
    (lambda: step(q=-0.1), ValueError, "q must be finite and in"),
    (lambda: step(q=1.5), ValueError, "q must be finite and in"),
    (lambda: step(q=float("nan")), ValueError, "q must be finite and in"),
    (lambda: step(q=None), TypeError, "q must be a number"),
    (lambda: step(q=torch.full((5,), 0.4)), ValueError, "q must be a number or have one number per row"),
    (lambda: step(alpha=-0.1), ValueError, "alpha must be finite and in"),
    (lambda: step(sigma=-1.0), ValueError, "sigma must be finite and in"),
    (lambda: step(alpha_next=float("inf")), ValueError, "alpha_next must be finite"),
    (lambda: step(sigma_next=-1e-9), ValueError, "sigma_next must be finite and in"),
    (lambda: step(alpha=0.0), ValueError, "alpha must be positive for prediction_type 'epsilon'"),
    (lambda: step(alpha=0.0, prediction_type="score"), ValueError, "alpha must be positive"),
    (lambda: step(sigma=0.0, prediction_type="sample"), ValueError, "sigma must be positive"),
    (lambda: step(alpha=0.0, sigma=0.0, prediction_type="velocity"), ValueError, "cannot both be 0"),
    (lambda: step(prediction_type="noise2"), ValueError, "prediction_type must be one of epsilon, sample"),
    (lambda: step(prediction_type=3), ValueError, "prediction_type must be one of"),
    (lambda: step(prediction_type="edm", sigma_data=0.0), ValueError, "sigma_data must be finite"),
    (lambda: step(prediction_type="edm", sigma_data=torch.ones(4)), TypeError, "sigma_data must be one positive"),
    (lambda: step(alpha=10**400), ValueError, "alpha must be finite"),
    (lambda: step(cfg_scale=2.0), ValueError, "cfg_scale needs the unconditional prediction"),
    (lambda: step(uncond=X[:2]), ValueError, "uncond must have the shape of sample"),
    (lambda: step(noise=X, seed=1), ValueError, "give either noise or seed"),
    (lambda: step(noise_scale=0.1), ValueError, "noise_scale needs noise"),
    (lambda: step(noise_scale=-0.1, seed=1), ValueError, "noise_scale must be finite and in"),
    (lambda: step(noise=X[:, :2]), ValueError, "noise must have the shape of sample"),
    (lambda: step(seed=-1), ValueError, "seed must be in"),
    (lambda: step(seed=2**63), ValueError, "seed must be in"),
    (lambda: step(seed=1.5), TypeError, "seed must be an int"),
    (lambda: step(seed=1, step=2**32), ValueError, "step must be in"),
    (lambda: step(seed=1, sample_ids=torch.arange(3)), ValueError, r"sample_ids must have shape \(4,\)"),
    (lambda: step(seed=1, sample_ids=[0, 1, 2, 3]), TypeError, "sample_ids must be an int64 or int32 tensor"),
    (lambda: step(seed=1, sample_ids=torch.ones(4)), TypeError, "sample_ids must be an int64 or int32 tensor"),
    (lambda: predict(sample=X[:2]), ValueError, "prediction must have the shape of sample"),
    (lambda: predict(alpha=-1.0), ValueError, "alpha must be finite"),
    (lambda: predict(shift=float("nan")), ValueError, "shift must be finite"),
    (lambda: fd.scale_prior(X, quantile=0.5, radius=1.0), ValueError, "either quantile or radius"),
    (lambda: fd.scale_prior(X, quantile=1.0), ValueError, "quantile must be finite and in"),
    (lambda: fd.scale_prior(X, sigma=-1.0), ValueError, "sigma must be finite and in"),
    (lambda: fd.scale_prior(X, radius=-1.0), ValueError, "radius must be finite and in"),
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_bad_call(number):
    call, error, message = BAD_CALLS[number]
    with pytest.raises(error, match=message):
        call()


def test_partial_overlap_is_refused():
    memory = torch.randn(5, 6)
    with pytest.raises(ValueError, match="out overlaps another argument"):
        drift(x=memory[:4], u=memory[:4], score=memory[:4], dt=0.1, out=memory[1:])
    same = memory[:4].clone()
    assert torch.equal(drift(x=same, dt=0.1, out=same), drift(x=memory[:4], dt=0.1))


def test_what_is_written_shares_no_memory():
    memory = torch.full((24,), 0.4)
    with pytest.raises(ValueError, match="out overlaps another argument"):
        step(q=memory[:4], out=memory.view(4, 6))
    square = torch.randn(4, 4)
    report = torch.empty(4, 4)
    with pytest.raises(ValueError, match="report overlaps another argument"):
        fd.guided_drift(square, square, square, 1.0, 1.0, out=report, report=report)
    with pytest.raises(ValueError, match="report overlaps another argument"):
        fd.guided_drift(square, square, square, 1.0, 1.0, report=square)
    one = torch.randn(12).as_strided((1, 6), (100, 1))  # the stride of a dimension of one element means nothing
    expected = step(sample=one.clone(), prediction=X[:1]).sample
    assert torch.equal(step(sample=one, prediction=X[:1], out=one.view(6)[None]).sample, expected)


def test_numbers_of_every_shape_and_sign_bit():
    """(), (1,), (B,) and strided numbers, and negative views of them: a kernel must read what torch would."""
    wide = torch.tensor([0.4, 0.9, 0.1, 0.2, 0.4, 0.9, 0.3, 0.2])
    expected = step(q=0.4).report
    for number in (wide[0], wide[:1], wide[:1].double(), torch.tensor([0.4]).expand(4)):
        torch.testing.assert_close(step(q=number).report, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(step(q=wide[::2]).report, step(q=wide[::2].clone()).report)
    negative = torch.complex(torch.zeros(4), torch.full((4,), -0.4)).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(step(q=negative).report, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(drift(div=negative), drift(div=negative.clone()))


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    with use(request.param):
        yield request.param


SPOILS = {
    "nan": lambda t: t[1].fill_(float("nan")),
    "one infinity": lambda t: t[1, 2].fill_(float("inf")),
    "zero": lambda t: t[1].zero_(),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("kind", rules.PREDICTION_TYPES)
def test_a_bad_row_is_reported_and_touches_no_other(spoil, kind, backend):
    x, p = torch.randn(4, 3000), torch.randn(4, 3000)
    good = fd.guided_step(x, p, **ENDS, q=0.4, prediction_type=kind)
    SPOILS[spoil](x)
    SPOILS[spoil](p)
    bad = fd.guided_step(x, p, **ENDS, q=0.4, prediction_type=kind)
    keep = [0, 2, 3]
    assert torch.equal(bad.sample[keep], good.sample[keep])
    assert torch.equal(bad.report[keep], good.report[keep])
    expected = rules.FLAG_ZERO_SCORE if spoil == "zero" else rules.FLAG_NON_FINITE
    assert bad.flags.tolist() == [0, expected, 0, 0]
    assert bad.eta[1] == 1
    if spoil == "zero":
        assert torch.equal(bad.sample[1], torch.zeros(3000))


def test_a_norm_beyond_the_type_counts_as_infinite(backend):
    """||eps||^2 = 9e38 is no float32, whatever the sums run in: the row is flagged, and steps unguided."""
    x = torch.full((2, 300), 1.0)
    x[1] = 3e18
    got = fd.guided_step(x, x, **ENDS, q=0.4)
    assert got.flags.tolist() == [0, rules.FLAG_NON_FINITE]
    assert torch.equal(got.sample[1], fd.guided_step(x, x, **ENDS).sample[1])


def test_zero_score_means_no_guidance(backend):
    u, s = torch.randn(3, 50), torch.randn(3, 50)
    s[1] = 0
    report = torch.empty(3, 4)
    w = fd.guided_drift(u, u, s, 1.0, 2.0, report=report)
    assert torch.equal(w[1], u[1])
    assert report[:, 3].tolist() == [0, rules.FLAG_ZERO_SCORE, 0]


def test_numbers_out_of_range_inside_tensors_leave_their_row_unguided(backend):
    x, p = torch.randn(6, 80), torch.randn(6, 80)
    q = torch.tensor([0.4, 0.0, 1.2, float("nan"), -3.0, 0.4])
    got = fd.guided_step(x, p, **ENDS, q=q)
    plain, guided = fd.guided_step(x, p, **ENDS), fd.guided_step(x, p, **ENDS, q=torch.full((6,), 0.4))
    assert got.flags.tolist() == [0, *[rules.FLAG_BAD_PARAMETER] * 4, 0]
    assert torch.equal(got.sample[1:5], plain.sample[1:5])
    assert torch.equal(got.sample[[0, 5]], guided.sample[[0, 5]])
    noisy = fd.guided_step(x, p, **ENDS, q=0.4, seed=1, noise_scale=torch.tensor([-0.1, 0.1, 0.1, 0.1, 0.1, 0.1]))
    assert noisy.flags.tolist() == [rules.FLAG_BAD_PARAMETER, 0, 0, 0, 0, 0]
    report = torch.empty(6, 4)
    scaled = fd.scale_prior(x, quantile=torch.tensor([0.5, 2.0, -1.0, 0.0, 1.0, 0.5]), report=report)
    assert report[:, 3].tolist() == [0, *[rules.FLAG_BAD_PARAMETER] * 4, 0]
    assert torch.equal(scaled[1:5], x[1:5])
    w = fd.guided_drift(x, x, p, torch.tensor([1.0, float("nan"), float("inf"), 1.0, 1.0, 1.0]), 1.0)
    assert torch.equal(w[1:3], x[1:3])
    assert not torch.equal(w[0], x[0])


@pytest.mark.parametrize("end", ["alpha", "sigma", "alpha_next", "sigma_next"])
def test_ends_of_the_path_pass_through_unguided(end, backend):
    """A rectified flow at pure noise or at data: log p's course diverges there, the plain step does not."""
    x, p = torch.randn(3, 40, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    path = {**ENDS, end: torch.tensor([0.6, 0.0, 0.6], dtype=torch.float64)}
    got = fd.guided_step(x, p, q=0.3, prediction_type="velocity", **path)
    assert got.flags.tolist() == [0, rules.FLAG_ENDPOINT, 0]
    a, s, a2, s2 = (torch.as_tensor(path[name], dtype=torch.float64).expand(3)[1] for name in ENDS)
    plain = a2 * (x[1] - s * p[1]) / (a + s) + s2 * (x[1] + a * p[1]) / (a + s)
    torch.testing.assert_close(got.sample[1], plain, rtol=1e-13, atol=1e-13)
    scalar = fd.guided_step(x, p, q=0.3, prediction_type="velocity", **{**ENDS, end: 0.0})
    assert torch.equal(scalar.sample[1], got.sample[1])


def test_a_step_that_does_not_exist_gives_nan_not_a_number(backend):
    """epsilon at alpha = 0 inside a tensor: x0 is unknown. The row says so and holds nothing plausible."""
    got = fd.guided_step(X, X, **{**ENDS, "alpha": torch.tensor([0.6, 0.0, 0.6, 0.6])}, q=0.4)
    assert not got.sample[1].isfinite().any()
    assert got.flags[1] & rules.FLAG_NON_FINITE
    assert got.flags[[0, 2, 3]].eq(0).all()


def test_python_numbers_and_tensors_agree(backend):
    as_numbers = step(q=0.3, uncond=X * 0.5, cfg_scale=2.0)
    tensors = {name: torch.full((4,), value, dtype=torch.float64) for name, value in ENDS.items()}
    options = {"q": torch.tensor(0.3, dtype=torch.float64), "uncond": X * 0.5, "cfg_scale": np.float32(2.0)}
    assert torch.equal(as_numbers.sample, step(**tensors, **options).sample)
    assert torch.equal(as_numbers.sample, step(q=0.3, uncond=X * 0.5, cfg_scale=2).sample)


def test_a_state_without_further_dimensions(backend):
    x, p = torch.randn(5), torch.randn(5)
    expected = fd.guided_step(x[:, None], p[:, None], **ENDS, q=0.4).sample[:, 0]
    assert torch.equal(fd.guided_step(x, p, **ENDS, q=0.4).sample, expected)
    torch.testing.assert_close(fd.guided_step(x.requires_grad_(), p, **ENDS, q=0.4).sample.detach(), expected)


def test_the_package_is_typed():
    folder = Path(fd.__file__).parent
    assert (folder / "py.typed").exists()
    stub = (folder / "_native.pyi").read_text()
    public = {name for name in dir(native()) if not name.startswith("_")}
    assert public <= {word.split("(")[0].split(":")[0] for word in stub.replace("def ", "").split()}


def test_unknown_backend_is_named():
    code = "import torch, fastdensity as fd; x = torch.ones(1, 2); fd.scale_prior(x)"
    for name, message in [("gpu", "must be one of auto"), ("cuda", "backend 'cuda' cannot run on cpu tensors")]:
        environment = {**os.environ, "FASTDENSITY_BACKEND": name}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert message in done.stderr


def test_import_is_light():
    """Nothing from the extras, and not Triton, is imported before it is needed; torch itself may load tqdm."""
    optional = ["matplotlib", "PIL", "typer", "rich", "safetensors", "sklearn", "triton", "tqdm"]

    def loaded_by(imports):
        code = f"import sys, {imports}; print(*sorted({{*{optional}}} & set(sys.modules)))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert loaded_by("fastdensity, fastdensity.digits, fastdensity.figures") == loaded_by("torch")
