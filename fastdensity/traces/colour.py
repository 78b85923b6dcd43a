"""Colour probing: probes that live on elements far from each other (Tang and Saad, "A probing method for computing the
diagonal of a matrix inverse", 2012; here for the trace, with random signs).

The elements of a sample are parted into colours. For signs z, and z_c equal to z on colour c and 0 elsewhere, the sum
over colours of z_c'J z_c is the trace plus the terms z_i J_ij z_j between different elements of one colour: it is
unbiased for any partition, and as accurate as J is local.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.sums import row_dot
from fastdensity.traces import lattice
from fastdensity.traces.products import Products
from fastdensity.traces.result import Trace, mean_and_error


def colour(
    products: Products, num_matvecs: int, num_colours: int | None = None, distribution: str = "rademacher"
) -> Trace:
    """Sweeps over all colours, each with fresh signs, as many as `num_matvecs` allows.

    Args:
        products: the Jacobians; `products.shape` says which elements are neighbours, see `sample_colours`.
        num_matvecs: the largest number of products. num_colours: the largest number of colours, default `num_matvecs`.
            Of the numbers up to it the one with the most distant elements is taken.
        distribution: of the probes. Any but "rademacher" adds the variance of the squares on the diagonal.

    Returns:
        The traces, with the products and colours really used; std_err is the sweeps' (k-1), NaN for one sweep.

    Raises:
        ValueError: num_colours is not in [1, num_matvecs].
    """
    wanted = num_matvecs if num_colours is None else num_colours
    if not 1 <= wanted <= num_matvecs:
        raise ValueError(f"num_colours must be in [1, num_matvecs = {num_matvecs}], got {num_colours}")
    colours = sample_colours(products.shape, wanted).to(products.device)
    used = usable_colours(products.shape, wanted)
    sweeps = [
        _sweep(products, colours, used, products.probes(sweep, 1, distribution)[0])
        for sweep in range(num_matvecs // used)
    ]
    div, std_err = mean_and_error(torch.stack(sweeps))
    return Trace(div, std_err, used * len(sweeps), used)


def _sweep(products: Products, colours: Tensor, used: int, signs: Tensor) -> Tensor:
    """The sum over colours of z_c'J z_c (R,) in float64; as many colours at a time as fit a call.

    Of the products with z_c only the elements of colour c are looked at.
    """
    images = torch.empty_like(signs)
    for begin in range(0, used, products.tangents):
        numbers = torch.arange(begin, min(begin + products.tangents, used), device=products.device)
        masks = colours == numbers[:, None]
        found = products.apply(masks[:, None] * signs)
        here = masks.any(0)
        index = (colours[here] - begin).expand(1, products.rows, -1)
        images[:, here] = found[:, :, here].gather(0, index)[0]
    return row_dot(signs, images)


def sample_colours(shape: tuple[int, ...], num_colours: int) -> Tensor:
    """The colour of every element of a flat sample, int64 (n,); numbers 0 .. usable_colours(shape, num_colours) - 1.

    A sample is (n,), n places on a line, or (C, L), (C, H, W), (C, T, H, W): channels first. Further dimensions count
    as channels. Each channel has colours of its own, a lattice's; where there are too few, channels share them.
    """
    channels, grid, each = _layout(shape, num_colours)
    numbers = torch.arange(channels)[:, None]
    if num_colours < channels:
        return (numbers % num_colours).expand(channels, math.prod(grid)).flatten()
    return (numbers * each + lattice.colours(grid, each).flatten()).flatten()


def usable_colours(shape: tuple[int, ...], num_colours: int) -> int:
    """How many colours `sample_colours` uses: at most `num_colours`."""
    channels, _, each = _layout(shape, num_colours)
    return min(num_colours, channels * each)


def _layout(shape: tuple[int, ...], num_colours: int) -> tuple[int, tuple[int, ...], int]:
    """Channels, the grid of one channel, and the colours of one channel."""
    split = 0 if len(shape) <= 1 else max(1, len(shape) - 3)
    channels, grid = math.prod(shape[:split]), shape[split:]
    return channels, grid, lattice.usable(grid, max(1, num_colours // max(1, channels)))
