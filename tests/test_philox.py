"""Random numbers: the published known answers, the same bits in C++, normals that are normal."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import fastdensity as fd
from fastdensity._backend import native, use
from fastdensity.reference.philox import _box_muller, normals, philox

FULL = 2**32 - 1
# Random123's kat_vectors for philox4x32-10: counter, key (low word first), result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL, FULL, FULL, FULL), (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    words = philox(tuple(torch.tensor([word]) for word in counter), seed)
    assert tuple(int(word) for word in words) == expected
    assert native().philox_words(*counter, seed) == expected


def drawn(dtype, seed, ids, step, columns):
    """The kernel's own noise: a step of a zero state along a zero prediction adds nothing but noise."""
    zero = torch.zeros(len(ids), columns, dtype=dtype)
    options = {"alpha": 1.0, "sigma": 1.0, "alpha_next": 1.0, "sigma_next": 1.0, "noise_scale": 1.0}
    return fd.guided_step(zero, zero, seed=seed, sample_ids=torch.tensor(ids), step=step, **options).sample


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 2049])
def test_kernel_noise_is_the_reference_stream(columns):
    ids = [0, 1, 2**31, 2**32 - 1, 2**32 + 1]
    expected = normals(2**62 + 5, torch.tensor(ids), 2**32 - 1, columns)
    assert torch.equal(expected[1], expected[4])  # ids count modulo 2^32, as documented
    got = drawn(torch.float64, 2**62 + 5, ids, 2**32 - 1, columns)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15)


def test_float_normals_are_within_four_ulp():
    expected = normals(11, torch.arange(64), 2, 40_000)
    got = drawn(torch.float32, 11, list(range(64)), 2, 40_000)
    ulp = torch.nextafter(expected.float().abs(), torch.tensor(torch.inf)) - expected.float().abs()
    assert ((got.double() - expected).abs() / ulp).max() <= 4
    assert expected.abs().max() > 4.5


@pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, FULL - 1, FULL])
def test_extreme_words(word):
    """The ends of the uniform: |z| stays finite and both halves of the logarithm agree with float64."""
    first, second = _box_muller(torch.tensor([word]), torch.tensor([FULL - word]))
    uniform = Fraction(2 * word + 1, 2**33)
    log_uniform = math.log1p(float(uniform - 1)) if uniform > 0.5 else math.log(float(uniform))
    assert (first**2 + second**2).item() == pytest.approx(-2 * log_uniform, rel=1e-13)


def test_moments_and_independence():
    z = normals(3, torch.arange(200), 0, 5000)
    count = z.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean().item() - moment) < 5 * (variance / count) ** 0.5
    neighbours = (z[:, :-1] * z[:, 1:]).mean()
    assert abs(neighbours.item()) < 5 / count**0.5
    other_step = normals(3, torch.arange(200), 1, 5000)
    assert abs((z * other_step).mean().item()) < 5 / count**0.5


def test_backends_draw_the_same():
    results = []
    for name in ("cpu", "torch"):
        with use(name):
            results.append(drawn(torch.float32, 7, [3, 9], 4, 1001))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
