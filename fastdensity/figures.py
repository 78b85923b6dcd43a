"""Pictures: a grid of guided samples, curves of log density and detail against q, the histogram of score alignment.

Needs the extra `fastdensity[figures]` (matplotlib, pillow), which is imported when a function is called.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdensity.boundary import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_COMPRESSION = 9
LOG_DENSITY_COLOUR, DETAIL_COLOUR = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito (2008)
ALIGNED_COLOUR, MISALIGNED = LOG_DENSITY_COLOUR, (DETAIL_COLOUR, "not aligned")
ALIGNMENT_BINS = 80
DOTS_PER_INCH = 160
GRID_WIDTH, CURVES_SIZE, ALIGNMENT_SIZE = 8.0, (8.0, 3.2), (6.0, 3.2)  # inches
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8}


def grey_levels(images: Tensor) -> Tensor:
    """[-1, 1] to uint8 0..255 of the same shape, rounded and clipped; on the CPU."""
    return ((images.detach().cpu().double() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def png_bytes(image: Tensor, levels: int = 256) -> int:
    """Bytes of the 8-bit grey PNG of an image (H, W) or (1, H, W) in [-1, 1], compression level 9: its detail.

    The measure of Karczewski et al. 2025 (arXiv 2502.05807, section 4): what compresses badly has much detail. First
    the image is cut into `levels` equal bins of grey, whose numbers are the pixels: give the levels that the data had,
    or the noise that dequantised them fills the file. A PNG of next to nothing already takes about 70 bytes. Sizes are
    comparable on one machine; versions of zlib differ a bit.

    Raises:
        TypeError: image is no floating tensor. ValueError: another shape, no pixels, non-finite pixels, or levels not
            in [2, 256]. ImportError: pillow is not installed.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise TypeError(f"image must be a floating torch.Tensor, got {describe(image)}")
    if image.dim() == 3 and image.shape[0] == 1:
        image = image[0]
    if image.dim() != 2 or image.numel() == 0:
        raise ValueError(f"image must have shape (H, W) or (1, H, W), got {describe(image)}")
    if not bool(image.isfinite().all()):
        raise ValueError("image must have finite pixels")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels must be in [2, 256], got {levels}")
    bins = ((image.detach().cpu().double() + 1.0) * (levels / 2)).floor().clamp(0, levels - 1).to(torch.uint8)
    buffer = io.BytesIO()
    picture = _import("PIL.Image", "pillow").fromarray(bins.numpy())
    picture.save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getbuffer().nbytes


def save_picture_grid(path: str | Path, images: Tensor, labels: Sequence[str], columns: int = 16) -> None:
    """Writes a PNG of images (Q, N, H, W) in [-1, 1]: a row for each of Q labels, the first `columns` of N samples.

    Raises:
        ValueError: images of another shape, not one label for each row, columns < 1.
        ImportError: matplotlib is not installed. OSError: path cannot be written.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"images must have shape (Q, N, H, W), got {describe(images)}")
    if len(labels) != images.shape[0]:
        raise ValueError(f"labels must be one for each of {images.shape[0]} rows, got {len(labels)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    shown = grey_levels(images[:, :columns])
    rows, count, height, width = shown.shape
    cell = GRID_WIDTH / max(count, 8)
    with _figure(Path(path), (cell * count + 0.8, 1.15 * cell * rows * height / width + 0.1)) as figure:
        grid = figure.add_gridspec(rows, 1, hspace=0.12)
        for row in range(rows):
            axes = figure.add_subplot(grid[row])
            axes.imshow(_side_by_side(shown[row]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_yticks([(height - 1) / 2], [labels[row]])
            axes.set_xticks([])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)


def save_curves(path: str | Path, q: Sequence[float], log_prob: Tensor, detail: Tensor) -> None:
    """Writes a PNG of mean log p and mean detail against q: log_prob in nats and detail in bytes, (Q, N) each.

    Bars are the standard error of the mean over the N samples; with one sample there are none.

    Raises:
        ValueError: shapes that do not fit together. ImportError: matplotlib is not installed.
        OSError: path cannot be written.
    """
    for name, values in (("log_prob", log_prob), ("detail", detail)):
        if values.dim() != 2 or values.shape[0] != len(q) or values.numel() == 0:
            raise ValueError(f"{name} must have shape ({len(q)}, N), one row for each q, got {describe(values)}")
    with _figure(Path(path), CURVES_SIZE) as figure:
        left, right = figure.subplots(1, 2)
        _curve(left, q, log_prob, "mean log p  (nats)", LOG_DENSITY_COLOUR, "o")
        _curve(right, q, detail, "mean detail  (PNG bytes per sample)", DETAIL_COLOUR, "s")


def alignment_figure(path: str | Path, cosine: Tensor) -> None:
    """Writes a PNG: the histogram of cosine (N,), v.s / (||v|| ||s||) of each latent's score alignment.

    What lies above 0 is aligned; the title says which fraction does, with its standard error. Non-finite numbers are
    left out.

    Raises:
        ValueError: another shape, or nothing finite. ImportError: matplotlib is not installed.
        OSError: path cannot be written.
    """
    if not isinstance(cosine, Tensor) or cosine.dim() != 1 or not bool(cosine.isfinite().any()):
        raise ValueError(f"cosine must have shape (N,) and finite values, got {describe(cosine)}")
    values = cosine.detach().cpu().double()
    values = values[values.isfinite()]
    fraction, error = aligned_fraction(values)
    edges = torch.linspace(-1.0, 1.0, ALIGNMENT_BINS + 1, dtype=torch.float64)
    with _figure(Path(path), ALIGNMENT_SIZE) as figure:
        axes = figure.subplots()
        for part, colour, label in (
            (values[values > 0], ALIGNED_COLOUR, "aligned"),
            (values[values <= 0], *MISALIGNED),
        ):
            axes.hist(part.tolist(), bins=edges.tolist(), color=colour, label=f"{label}: {len(part)}")
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_xlim(-1.0, 1.0)
        axes.set_xlabel("cosine between the moved latent score and the score of the sample")
        axes.set_ylabel("latents")
        axes.set_title(f"{100 * fraction:.1f} % ± {100 * error:.1f} % of {len(values)} latents are aligned")
        axes.legend(frameon=False, loc="upper left")


def aligned_fraction(alignment: Tensor) -> tuple[float, float]:
    """The fraction of alignment (N,) above 0, and its standard error, sqrt(p (1 - p) / N)."""
    fraction = float((alignment > 0).double().mean())
    return fraction, math.sqrt(fraction * (1.0 - fraction) / alignment.shape[0])


def _side_by_side(images: Tensor) -> Any:
    """(N, H, W) uint8 in one strip, a white pixel column between neighbours."""
    padded = torch.nn.functional.pad(images, (0, 1), value=255)
    return padded.permute(1, 0, 2).flatten(1)[:, :-1].numpy()


def _curve(axes: Axes, q: Sequence[float], values: Tensor, label: str, colour: str, marker: str) -> None:
    order = sorted(range(len(q)), key=lambda index: q[index])
    values = values.detach().cpu().double()[order]
    count = values.shape[1]
    errors = values.std(dim=1).div(math.sqrt(count)).tolist() if count > 1 else None
    axes.errorbar(
        [q[index] for index in order], values.mean(dim=1).tolist(), yerr=errors,
        color=colour, marker=marker, markersize=5, linewidth=1.5, capsize=3,
    )  # fmt: skip
    if len(q) <= 9:
        axes.set_xticks([q[index] for index in order])
    axes.set_xlabel("q")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25, linewidth=0.6)


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure, of no window and not pyplot's, that is written when the block ends: whole, or not at all."""
    matplotlib = _import("matplotlib", "matplotlib")
    module = _import("matplotlib.figure", "matplotlib")
    partial = path.with_name(path.name + ".partial")
    with matplotlib.rc_context(STYLE):
        figure = module.Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        yield figure
        try:
            figure.savefig(partial, format="png")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _import(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"figures need {package} ({error}): pip install 'fastdensity[figures]'") from error
