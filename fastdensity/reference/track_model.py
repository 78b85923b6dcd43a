"""What the closed loop knows of eps along a straight step: a local Gaussian, its spectrum fitted to two evaluations.

Where the local covariance is diagonal, with variances v, the predicted noise at noise level kappa is
eps_i = kappa (y_i - mean_i) / (v_i + kappa^2). If y moves by D eps_i per unit of kappa from kappa_0 on, then

    eps_i(kappa) = (A + B D) eps_i(kappa_0),   A = g (v + kappa_0^2) / kappa_0,   B = g (kappa - kappa_0),

g = kappa / (v + kappa^2), and log p gains D (A + B D) - (A + B D)^2 per unit of l, of ||eps(kappa_0)||^2, over -div u.
How ||eps||^2 is spread over v is found in two ways: `two_variances` for a step of which both ends are known, `band` for
one that lies ahead. All of it is float64 and elementwise over the rows. csrc/track_model.h and
triton_kernels/track_model.py are its twins; docs/few-steps.md says what it is worth.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Gauss-Legendre on (0, 1)
NODES = (0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970263)
WEIGHTS = (0.17392742256872693, 0.32607257743127307, 0.32607257743127307, 0.17392742256872693)
NARROW = 1e-3  # of what is possible: spreads below it are roundings
NARROWEST, WIDEST, HALVINGS = 1e-3, 40.0, 16  # of a band, in ln v; steps of the search for its width
EDGE = 1e-9


class Gain(NamedTuple):
    """Nats over -div u of a step, constant + linear D + square D^2, per unit of ||eps||^2 at its beginning."""

    constant: Tensor
    linear: Tensor
    square: Tensor

    def at(self, slope: Tensor) -> Tensor:
        """Of this slope."""
        return self.constant + slope * (self.linear + slope * self.square)

    def solved(self, wanted: Tensor) -> Tensor:
        """The slope nearest to 1 that gains what is wanted; where none does, the one that comes nearest to it."""
        missing = self.constant + self.linear + self.square - wanted
        rise = self.linear + 2.0 * self.square
        determinant = rise * rise - 4.0 * self.square * missing
        solvable = determinant > 0
        root = torch.sqrt(torch.where(solvable, determinant, 1.0))
        down = rise + torch.where(rise < 0, -root, root)
        usable = solvable & (down.abs() > 0)
        nearest = -rise / torch.where(self.square == 0, 1.0, 2.0 * self.square)
        there = ~solvable & (self.square != 0)
        other = torch.where(there, nearest, 0.0)
        return 1.0 + torch.where(usable, -2.0 * missing / torch.where(usable, down, 1.0), other)


def gain(variance: Tensor, kappa: Tensor, kappa_end: Tensor) -> Gain:
    """Of the straight step from kappa to kappa_end < kappa in a Gaussian of this variance."""
    h = torch.log(kappa / kappa_end)
    constant, linear, square = torch.zeros_like(h), torch.zeros_like(h), torch.zeros_like(h)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        here = kappa * torch.exp(-node * h)
        answer = here / (variance + here * here)
        a, b = answer * (variance + kappa * kappa) / kappa, answer * (here - kappa)
        constant = constant - weight * a * a
        linear = linear + weight * (a - 2.0 * a * b)
        square = square + weight * (b - b * b)
    return Gain(h * constant, h * linear, h * square)


class Part(NamedTuple):
    """One of two parts of ||eps||^2 at a step's end."""

    share: Tensor  # of ||eps||^2
    before: Tensor  # eps at the step's beginning, in units of eps at its end
    move: Tensor  # of y per unit of kappa, in units of eps at its end
    variance: Tensor


class Fit(NamedTuple):
    """A step that ended, explained: two parts, and `move` = offset + bend before for any variance between."""

    parts: tuple[Part, Part]
    mean: Tensor  # of `before`
    offset: Tensor
    bend: Tensor
    kappa: Tensor
    kappa_last: Tensor

    def before(self, variance: Tensor) -> Tensor:
        """eps at the step's beginning, in units of eps at its end."""
        step = self.kappa - self.kappa_last
        top = variance + self.kappa * (self.kappa - step * self.offset)
        bottom = self.kappa * (self.kappa_last + step * self.bend) + variance * self.kappa / self.kappa_last
        exists = bottom > 0
        return torch.where(exists, top / torch.where(exists, bottom, 1.0), self.mean)


def two_variances(
    square_last: Tensor, turn: Tensor, move: Tensor, move_last: Tensor, kappa: Tensor, kappa_last: Tensor, usual: Tensor
) -> Fit:
    """Two variances that explain a step: its products over ||eps||^2 at its end, where kappa < kappa_last.

    `before` has the mean `turn` and the mean square `square_last`, the move is linear in it, as its two products say.
    Gauss's rule of two points with these moments; where one of its points would want a variance below 0 or above
    infinity, Radau's, with a point at that bound. Where every variance would do, it is the `usual` one.
    """
    step = kappa - kappa_last
    spread = (square_last - turn * turn).clamp_min(0.0)
    mean_move, move_last = move / step, move_last / step
    told = spread > (NARROW * (kappa_last / kappa - 1.0)) ** 2
    plain = mean_move / turn
    bend = torch.where(told, (move_last - turn * mean_move) / torch.where(told, spread, 1.0), plain)
    bend = torch.minimum(torch.maximum(bend, -plain.abs()), 3.0 * plain.abs())
    offset, rise = mean_move - bend * turn, kappa_last + step * bend
    rises = rise > 0
    infinite = kappa_last / kappa  # `before` at this variance, and at none
    none = torch.where(rises, (kappa - step * offset) / torch.where(rises, rise, 1.0), infinite)
    telling = (infinite - none).abs() > NARROW * (infinite - 1.0)
    share, low, high = _two_points(turn, spread, torch.minimum(none, infinite), torch.maximum(none, infinite))
    parts = []
    for weight, before in ((share, low), (1.0 - share, high)):
        moved = offset + bend * before
        left = 1.0 - kappa * before / kappa_last
        left = torch.where(left.abs() > EDGE, left, torch.where(none < infinite, EDGE, -EDGE))
        variance = (kappa * (kappa_last * before + step * moved - kappa) / left).clamp_min(0.0)
        parts.append(Part(weight, before, moved, torch.where(telling, variance, usual)))
    return Fit((parts[0], parts[1]), turn, offset, bend, kappa, kappa_last)


def _two_points(mean: Tensor, spread: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of the low point, low, high) with this mean and variance, within bounds."""
    below, above = mean - least, most - mean
    inside = (below > EDGE) & (above > EDGE)
    below, above = torch.where(inside, below, 1.0), torch.where(inside, above, 1.0)
    spreads = spread > 0  # a root at 0 has no derivative
    root = torch.where(spreads, torch.sqrt(torch.where(spreads, spread, 1.0)), 0.0)
    share, low, high = torch.full_like(mean, 0.5), mean - root, mean + root
    bound = inside & (root > below)
    share = torch.where(bound, spread / (below * below + spread), share)
    low, high = torch.where(bound, least, low), torch.where(bound, mean + spread / below, high)
    beyond = inside & (high > most)
    share = torch.where(beyond, above * above / (above * above + spread), share)
    low, high = torch.where(beyond, mean - spread / above, low), torch.where(beyond, most, high)
    both = beyond & (low < least)
    share = torch.where(both, above / (above + below), share)
    low = torch.where(both, least, low)
    return share, torch.where(inside, low, mean), torch.where(inside, high, mean)


def band(answer: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest, width): variances spread evenly over ln(v / kappa^2) in this band explain two numbers of ||eps||^2.

    `answer`, in (0, 1), is its share of what pure noise would have, the mean of r = kappa^2 / (v + kappa^2); `fall`
    is half of how fast its logarithm falls with l: a single variance has fall = 1 - answer, a wide band less. With
    r_1 at the lowest v and r_2 at the highest, answer width = width - ln(r_1 / r_2), fall answer width = r_1 - r_2.
    """
    low, high = torch.full_like(answer, NARROWEST), torch.full_like(answer, WIDEST)
    for _ in range(HALVINGS):
        middle = torch.sqrt(low * high)
        too_wide = _excess(answer, fall, middle)[0] < 0
        low, high = torch.where(too_wide, low, middle), torch.where(too_wide, middle, high)
    width = torch.sqrt(low * high)
    excess, slope = _excess(answer, fall, width)
    # Newton's step, which derivatives go through
    width = (width - excess / torch.where(slope == 0, 1.0, slope)).clamp(NARROWEST, WIDEST)
    first = torch.expm1(-answer * width) / torch.expm1(-width)  # r_1
    first = first.clamp(EDGE, 1.0 - EDGE)
    return torch.log1p(-first) - torch.log(first), width


def _excess(answer: Tensor, fall: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """r_1 - r_2 - fall answer width where r_1 and r_2 are such that the first equation holds, and its derivative."""
    whole, part, rest = (-torch.expm1(-share * width) for share in (torch.ones_like(answer), answer, 1.0 - answer))
    first = part / whole
    bend = (answer * (1.0 - part) * whole - part * (1.0 - whole)) / (whole * whole)
    excess = first * rest - fall * answer * width
    return excess, bend * rest + first * (1.0 - answer) * (1.0 - rest) - fall * answer


def band_variances(lowest: Tensor, width: Tensor, kappa: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Some variances of the band, relative to kappa^2, each with its share of ||eps||^2."""
    variances = [kappa * kappa * torch.exp(lowest + node * width) for node in NODES]
    weights = [weight / (v + kappa * kappa) for v, weight in zip(variances, WEIGHTS, strict=True)]
    total = torch.stack(weights).sum(dim=0)
    return [(v, weight / total) for v, weight in zip(variances, weights, strict=True)]


def sum_of_gains(parts: Iterable[tuple[Tensor, Gain, Tensor, Tensor]]) -> Gain:
    """In eta, of (share, gain, per_eta, rest): shares of ||eps||^2 whose slopes are per_eta eta + rest."""
    terms = [
        (
            share * one.at(rest),
            share * per_eta * (one.linear + 2.0 * rest * one.square),
            share * per_eta * per_eta * one.square,
        )
        for share, one, per_eta, rest in parts
    ]
    constant, linear, square = (functools.reduce(torch.add, column) for column in zip(*terms, strict=True))
    return Gain(constant, linear, square)
