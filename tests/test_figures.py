"""Pictures: what is drawn where, what detail measures, and that nothing half written stays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdensity.figures import (
    aligned_fraction,
    alignment_figure,
    grey_levels,
    png_bytes,
    save_curves,
    save_picture_grid,
)


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_grey_levels_span_the_interval_and_clip() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, -1 + 2 / 255])
    assert grey_levels(values).tolist() == [0, 0, 128, 255, 255, 1]


def test_detail_counts_the_bytes_of_the_png() -> None:
    """An incompressible picture takes its pixels and one filter byte a row, 57 bytes of frame, a few of deflate's."""
    assert 256 + 57 <= png_bytes(noise(16, 16)) <= 256 + 16 + 57 + 16
    flat = png_bytes(torch.zeros(16, 16))
    assert flat < 80
    stripes = torch.ones(16, 16)
    stripes[:, ::2] = -1
    assert flat < png_bytes(stripes) < png_bytes(noise(16, 16))
    assert png_bytes(noise(16, 16)[None]) == png_bytes(noise(16, 16).double())


def test_detail_does_not_see_what_lies_within_a_level() -> None:
    levels = torch.randint(0, 17, (8, 8), generator=torch.Generator().manual_seed(0)).double()
    within = [(levels + fraction) * 2 / 17 - 1 for fraction in (0.01, 0.99)]
    assert png_bytes(within[0], levels=17) == png_bytes(within[1], levels=17)
    assert png_bytes(within[0], levels=17) < png_bytes(within[0] + 0.1 * noise(8, 8))
    with pytest.raises(ValueError, match=r"levels must be in \[2, 256\], got 1"):
        png_bytes(within[0], levels=1)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(2, 8, 8), ValueError, r"image must have shape \(H, W\)"),
        (torch.zeros(0, 8), ValueError, "image must have shape"),
        (torch.zeros(8, 8, dtype=torch.uint8), TypeError, "floating"),
        (torch.full((8, 8), torch.nan), ValueError, "finite"),
    ],
)
def test_detail_refuses(image: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        png_bytes(image)


def test_the_grid_has_a_row_for_each_label_and_shows_the_first_columns(tmp_path: Path) -> None:
    images = torch.full((2, 20, 8, 8), -1.0)
    images[1, :16] = 0.5  # row 1 is grey where it is shown; columns from 16 on are not
    images[1, 16:] = -1.0
    save_picture_grid(tmp_path / "grid.png", images, ["black", "grey"])
    picture = numpy.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    middle = picture[:, picture.shape[1] // 3 : -20]
    upper, lower = middle[: len(middle) // 2], middle[len(middle) // 2 :]
    assert (upper == 0).mean() > 0.6
    assert (numpy.abs(lower.astype(int) - 191) <= 1).mean() > 0.6
    assert (lower == 0).mean() < 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_curves_do_not_depend_on_the_order_of_q(tmp_path: Path) -> None:
    q, log_prob, detail = [0.3, 0.5, 0.7], noise(3, 5), noise(3, 5)
    save_curves(tmp_path / "a.png", q, log_prob, detail)
    order = [2, 0, 1]
    save_curves(tmp_path / "b.png", [q[i] for i in order], log_prob[order], detail[order])
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    save_curves(tmp_path / "c.png", q, log_prob + noise(3, 1), detail)
    assert (tmp_path / "c.png").read_bytes() != first
    assert Image.open(io.BytesIO(first)).size == (1280, 512)


def test_one_sample_and_one_q_are_drawn_without_bars(tmp_path: Path) -> None:
    save_curves(tmp_path / "one.png", [0.4], noise(1, 1), noise(1, 1))
    save_picture_grid(tmp_path / "grid.png", noise(1, 1, 8, 8), ["q = 0.4"])
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "grid.png"}


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(Q, N, H, W\)"):
        save_picture_grid(tmp_path / "a.png", noise(2, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="one for each of 2 rows, got 1"):
        save_picture_grid(tmp_path / "a.png", noise(2, 3, 8, 8), ["a"])
    with pytest.raises(ValueError, match="columns must be at least 1"):
        save_picture_grid(tmp_path / "a.png", noise(2, 3, 8, 8), ["a", "b"], columns=0)
    with pytest.raises(ValueError, match=r"detail must have shape \(2, N\)"):
        save_curves(tmp_path / "a.png", [0.3, 0.4], noise(2, 5), noise(3, 5))
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        save_curves(tmp_path / "taken", [0.4], noise(1, 2), noise(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_histogram_of_alignment_counts_both_signs(tmp_path: Path) -> None:
    cosine = torch.tensor([0.9, 0.5, -0.3, torch.nan, 0.1])
    alignment_figure(tmp_path / "alignment.png", cosine)
    pixels = numpy.asarray(Image.open(tmp_path / "alignment.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (pixels == colour).all(axis=1).sum() > 100
    assert [path.name for path in tmp_path.iterdir()] == ["alignment.png"]
    fraction, error = aligned_fraction(torch.tensor([1.0, 2.0, -1.0, 3.0]))
    assert fraction == 0.75
    assert error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


@pytest.mark.parametrize("cosine", [torch.zeros(2, 2), torch.full((3,), torch.nan), torch.zeros(0)])
def test_the_histogram_refuses(tmp_path: Path, cosine: Tensor) -> None:
    with pytest.raises(ValueError, match="cosine must have shape"):
        alignment_figure(tmp_path / "alignment.png", cosine)
