"""Philox4x32-10 and the normals made of it, in torch: the reference of `csrc/philox.h` and of Triton's twin.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter-based generator: the number
at (seed, sample id, step, element) is a pure function of these, so a row's noise depends neither on its
batch-mates nor on how the row was cut into chunks.

Layout: the key is the 64-bit seed; the counter is (element // 4, stream, step, sample id), 32 bits each. The
four words of one counter give four consecutive elements, two Box-Muller pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

STREAM_NOISE = 0x4E000000  # the noise of stochastic steps; probes use streams of their own
ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 overflows, so the multiplier goes in 16-bit halves."""
    low_part = (multiplier & 0xFFFF) * word
    high_part = (multiplier >> 16) * word + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits (held in int64) for each counter; `seed` is the 64-bit key."""
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(MULTIPLIER_0, word_0)
        high_1, low_1 = _multiply(MULTIPLIER_1, word_2)
        word_0, word_1, word_2, word_3 = high_1 ^ word_1 ^ key_0, low_1, high_0 ^ word_3 ^ key_1, low_0
        key_0, key_1 = (key_0 + WEYL_0) & MASK, (key_1 + WEYL_1) & MASK
    return word_0, word_1, word_2, word_3


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two words: u = (word + 1/2) / 2^32 never is 0 or 1, so |z| <= 6.77 and finite."""
    uniform = (radius_word.double() + 0.5) * 2.0**-32
    # log(u) near u = 1 from 1 - u, which is exact
    rest = (2.0**32 - 0.5 - radius_word.double()) * 2.0**-32
    log_uniform = torch.where(uniform < 0.5, torch.log(uniform), torch.log1p(-rest))
    radius = torch.sqrt(-2.0 * log_uniform)
    # (word + 1/2) / 2^32 of a turn, reduced to an eighth of a turn on integers so that zeros are exact to an ulp
    quarter = ((angle_word >> 29) + 1) >> 1
    offset = (angle_word - (quarter << 30)).double() + 0.5
    angle = offset * (torch.pi * 2.0**-31)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    quarter = quarter & 3
    swap = (quarter & 1) == 1
    rotated_cosine = torch.where(swap, -sine, cosine)
    rotated_sine = torch.where(swap, cosine, sine)
    sign = torch.where(quarter >= 2, -1.0, 1.0)
    return radius * sign * rotated_cosine, radius * sign * rotated_sine


def normals(seed: int, sample_ids: Tensor, step: int, columns: int, stream: int = STREAM_NOISE) -> Tensor:
    """Standard normals (B, columns) in float64 for `sample_ids` (B,); element j of a row is fixed by its key."""
    device = sample_ids.device
    blocks = torch.arange((columns + 3) // 4, device=device, dtype=torch.int64)
    rows = (sample_ids.to(torch.int64) & MASK)[:, None].expand(-1, blocks.numel())
    counter = (
        blocks[None].expand_as(rows),
        torch.full_like(rows, stream),
        torch.full_like(rows, step & MASK),
        rows,
    )
    word_0, word_1, word_2, word_3 = philox(counter, seed)
    pairs = (*_box_muller(word_0, word_1), *_box_muller(word_2, word_3))
    return torch.stack(pairs, dim=-1).flatten(1)[:, :columns]
