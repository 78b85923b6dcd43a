"""Random probe vectors in torch: the oracle of `csrc/probe.h` and of Triton's twin.

Every element is a pure function of (seed, sample id, step, probe, element): a sample's probes depend neither on its
batch-mates nor on how the probes were cut into calls. The key of Philox is the 64-bit seed; its counter is (block,
number, step, sample id), 32 bits each, `number` being stream + probe:

- rademacher: element j is bit j % 32 of word (j // 32) % 4 of block j // 128; the sign is 1 - 2 bit.
- normal: elements 4 b .. 4 b + 3 are the Box-Muller normals of block b (`fastdensity.reference.philox`).
- sphere: the normals, scaled to the norm sqrt(n) (n = 1: the signs of rademacher).
- hadamard: z = d * H[row]. H is Sylvester's matrix of the order N = 2^m, the least with N >= n: its entry e of a row is
  negative where popcount(row & e) is odd. Probes are taken in sets of N: set s has signs d of its own, those of
  rademacher with the number stream + 0xFFFFFF - s, and a permutation of the rows of its own (`hadamard_rows`), so that
  a whole set gives every trace exactly (sum of z z^T = N I), and each of its probes is a Rademacher vector.

The probes of a stream have the numbers stream .. stream + 2^24 - 1, its permutations stream + 2^24 + set; streams lie
3 * 2^24 apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdensity.reference.philox import MASK, normals, philox
from fastdensity.sums import row_dot

STREAM_MEASURE = 0x50000000  # probes of reported numbers; + probe index below 2^24
STREAM_STEER = 0x53000000  # probes that enter the drift
DISTRIBUTIONS = ("rademacher", "normal", "sphere", "hadamard")
MOST_PROBES = 2**24 - 1  # numbers of a stream; the last one is that of Hadamard's signs
MOST_COLUMNS = 2**34  # 2^32 blocks of four normals
HADAMARD_SIGNS = 0xFFFFFF
HADAMARD_ROWS = 0x01000000
FEISTEL_ROUNDS, SMALL_FEISTEL_ROUNDS = 8, 24  # the latter where halves have fewer than four bits
SMALL_ORDER = 8
SIGNS_PER_COUNTER = 128


def resolve(distribution: str, columns: int) -> str:
    """What is drawn in fact: the sphere of one dimension is a sign."""
    return "rademacher" if distribution == "sphere" and columns == 1 else distribution


def hadamard_order(columns: int) -> int:
    """The exponent m of the least power of two 2^m >= columns."""
    return max(columns - 1, 0).bit_length()


def feistel_rounds(order: int) -> int:
    """How many rounds permute 2^order rows."""
    return SMALL_FEISTEL_ROUNDS if order < SMALL_ORDER else FEISTEL_ROUNDS


def _words(seed: int, sample_ids: Tensor, step: int, number: int, blocks: Tensor) -> Tensor:
    """Philox's words (B, *blocks, 4) of blocks (k,) or, one for each sample, (B, 1)."""
    rows = (sample_ids.to(torch.int64) & MASK)[:, None].expand(-1, blocks.shape[-1])
    counter = (blocks.expand_as(rows), torch.full_like(rows, number), torch.full_like(rows, step & MASK), rows)
    return torch.stack(philox(counter, seed), dim=-1)


def _bits(seed: int, sample_ids: Tensor, step: int, number: int, columns: int) -> Tensor:
    """Bits (B, columns) in int64."""
    blocks = torch.arange(-(-columns // SIGNS_PER_COUNTER), device=sample_ids.device, dtype=torch.int64)
    words = _words(seed, sample_ids, step, number, blocks)
    bits = (words[..., None] >> torch.arange(32, device=sample_ids.device)) & 1
    return bits.flatten(1)[:, :columns]


def rademacher(seed: int, sample_ids: Tensor, step: int, probe: int, like: Tensor, stream: int) -> Tensor:
    """Signs +-1 in the shape and dtype of `like` (B, *)."""
    bits = _bits(seed, sample_ids, step, stream + probe, like.shape[1:].numel())
    return (1 - 2 * bits).to(like.dtype).reshape(like.shape)


def hadamard_rows(seed: int, sample_ids: Tensor, step: int, probe: int, columns: int, stream: int) -> Tensor:
    """Each sample's row (B,) of Sylvester's matrix for a probe: a random permutation of 0 .. N - 1 at probe % N.

    A Feistel network over the m bits of an index, the lower half holding the odd one: its rounds in turn replace one
    half, the upper first, by its exclusive or with a random function of the other, which is word 0 of Philox's block
    (round << 24 | the other half). Luby and Rackoff, "How to construct pseudorandom permutations" (1988).

    Each row is uniform. A pair of rows is, too, but for a chi-squared divergence of 1e-6 at most: eight rounds would
    leave 2e-2 at m = 3, since two indices of which one half is equal keep their distance in every other round.
    """
    order = hadamard_order(columns)
    low_bits = (order + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (order - low_bits)) - 1
    number = stream + HADAMARD_ROWS + (probe >> order)
    index = torch.full_like(sample_ids, probe & ((1 << order) - 1), dtype=torch.int64)
    low, high = index & low_mask, index >> low_bits
    for turn in range(feistel_rounds(order)):
        other = low if turn % 2 == 0 else high
        word = _words(seed, sample_ids, step, number, (turn << 24 | other)[:, None])[:, 0, 0]
        if turn % 2 == 0:
            high = high ^ (word & high_mask)
        else:
            low = low ^ (word & low_mask)
    return high << low_bits | low


def _parity(words: Tensor) -> Tensor:
    for shift in (32, 16, 8, 4, 2, 1):
        words = words ^ (words >> shift)
    return words & 1


def _hadamard(seed: int, sample_ids: Tensor, step: int, probe: int, columns: int, stream: int) -> Tensor:
    rows = hadamard_rows(seed, sample_ids, step, probe, columns, stream)
    number = stream + HADAMARD_SIGNS - (probe >> hadamard_order(columns))
    elements = torch.arange(columns, device=sample_ids.device, dtype=torch.int64)
    return 1 - 2 * (_bits(seed, sample_ids, step, number, columns) ^ _parity(rows[:, None] & elements))


def _probe(
    seed: int, sample_ids: Tensor, step: int, probe: int, columns: int, distribution: str, stream: int
) -> Tensor:
    """One probe of every sample (B, columns) in float64."""
    distribution = resolve(distribution, columns)
    if distribution == "rademacher":
        return (1 - 2 * _bits(seed, sample_ids, step, stream + probe, columns)).double()
    if distribution == "hadamard":
        return _hadamard(seed, sample_ids, step, probe, columns, stream).double()
    z = normals(seed, sample_ids, step, columns, stream + probe)
    return z if distribution == "normal" else z * (math.sqrt(columns) / torch.sqrt(row_dot(z, z)))[:, None]


def make_probes(
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """Probes first .. first + count - 1 of every sample, (count, B, columns), made in float64 and rounded once."""
    out = sample_ids.new_zeros((count, sample_ids.shape[0], columns), dtype=dtype)
    if out.numel() == 0:
        return out
    key = (columns, distribution, stream)
    return torch.stack([_probe(seed, sample_ids, step, first + k, *key).to(dtype) for k in range(count)])


def probe_forms(
    products: Tensor, seed: int, sample_ids: Tensor, step: int, first: int, distribution: str, stream: int
) -> Tensor:
    """z_k . products[k] in float64, (K, B), of products (K, B, columns) and probes first .. first + K - 1.

    Linear in the products, and differentiable. The probes are float64's here and the arithmetic's own in a kernel
    (float32, unless products are float64), never rounded to a 16-bit type.
    """
    if products.numel() == 0:
        return products.double().sum(-1)
    key = (products.shape[-1], distribution, stream)
    return torch.stack(
        [row_dot(_probe(seed, sample_ids, step, first + k, *key), product) for k, product in enumerate(products)]
    )


def make_probes_torch(
    seed: int,
    sample_ids: Tensor,
    step: int,
    first: int,
    count: int,
    columns: int,
    distribution: str,
    stream: int,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Write the probes into `out`."""
    out.copy_(make_probes(seed, sample_ids, step, first, count, columns, distribution, stream, dtype))


def probe_forms_torch(
    products: Tensor, seed: int, sample_ids: Tensor, step: int, first: int, distribution: str, stream: int, out: Tensor
) -> None:
    """Write the forms into `out`."""
    out.copy_(probe_forms(products, seed, sample_ids, step, first, distribution, stream))
