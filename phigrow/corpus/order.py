"""Which blocks each optimizer step reads: a function of seed and step, whatever the ranks and micro-batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
HALF = Fraction(1, 2)

TABLE = 2**22
"""Blocks up to which an epoch's permutation is held as a table (32 MiB); of 2,048 tokens these are 8.6 billion."""


@dataclass(frozen=True)
class Part:
    """The blocks whose number, divided by ``of``, leaves ``first`` to ``last - 1`` as the remainder.

    ``str`` of a part is ``first,last,of``.

    >>> part = Part(2, 4, 5)
    >>> part.size(13), part.numbers(np.arange(part.size(13))).tolist()
    (5, [2, 3, 7, 8, 12])
    """

    first: int = 0
    last: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.first},{self.last},{self.of}"

    def size(self, blocks: int) -> int:
        """Return how many of ``blocks`` blocks belong to the part."""
        rounds, rest = divmod(blocks, self.of)
        width = self.last - self.first
        return rounds * width + min(max(rest - self.first, 0), width)

    def numbers(self, places: Indices) -> Indices:
        """Return the numbers of the blocks that stand at these places of the part, which counts from 0."""
        rounds, rest = np.divmod(places, self.last - self.first)
        numbers: Indices = rounds * self.of + self.first + rest
        return numbers


WHOLE = Part()
"""All blocks."""


def step_rows(seed: int, step: int, batch: int, blocks: int, part: Part = WHOLE) -> Indices:
    """Return the block of each row of the global batch of one step, int64 ``[batch]``.

    Every epoch is a permutation of the part, seeded by (seed, epoch); a batch may straddle two. ``step`` counts from 0.

    >>> step_rows(0, 0, 4, 4).tolist() == sorted(step_rows(0, 0, 4, 4).tolist())
    False
    >>> sorted(step_rows(0, 0, 4, 4).tolist())
    [0, 1, 2, 3]
    """
    return part.numbers(epoch_rows((seed,), step * batch, (step + 1) * batch, part.size(blocks)))


def rank_rows(rows: Indices, rank: int, world: int, micro: int) -> list[Indices]:
    """Return one rank's micro-batches of a global batch: its contiguous share, cut into pieces of ``micro`` rows."""
    share = len(rows) // world
    mine = rows[rank * share : (rank + 1) * share]
    return [mine[start : start + micro] for start in range(0, share, micro)]


def heldout_rows(wanted: int, blocks: int) -> Indices:
    """Return the held-out blocks that an evaluation reads, spread evenly; all of them where ``wanted`` is 0.

    They depend on nothing but the two numbers, so every arm and every seed is evaluated on the same text.
    """
    count = blocks if wanted == 0 else min(wanted, blocks)
    return np.arange(count, dtype=np.int64) * blocks // max(count, 1)


def micro_batch_rows(share: int, seq_len: int, tokens: int = 16384) -> int:
    """Return the largest divisor of a rank's share of the batch that holds at most ``tokens`` tokens (at least 1)."""
    return max(d for d in range(1, share + 1) if share % d == 0 and (d == 1 or d * seq_len <= tokens))


Shares = tuple[Fraction, ...]


def shares(weights: Sequence[float]) -> Shares:
    """Return weights as exact fractions of 1, each as its shortest decimal says it (0.8 and 0.2 are 4/5 and 1/5)."""
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def apportion(weights: Shares, rows: int) -> list[int]:
    """Return how many of the first ``rows`` rows each source has given: Webster's method (Sainte-Laguë, 1910).

    The m-th row of a source is due at ``(m - 1/2) / weight``; the first ``rows`` in that order are given. So counts
    never fall as ``rows`` grows, need no history, and are exact in the long run: a count is at most
    ``1/2 + weight * sources / 2`` away from ``weight * rows``; of one to three sources, less than 1 (Balinski and
    Young, "Fair Representation", 1982).

    >>> [apportion(shares([0.8, 0.2]), rows) for rows in (1, 5, 10)]
    [[1, 0], [4, 1], [8, 2]]
    """
    counts = [math.floor(weight * rows + HALF) for weight in weights]  # all that is due by the time `rows`
    each = range(len(weights))
    while (rest := rows - sum(counts)) > 0:
        counts[min(each, key=lambda k: ((counts[k] + HALF) / weights[k], k))] += 1
    for _ in range(-rest):
        counts[max(each, key=lambda k: ((counts[k] - HALF) / weights[k], k))] -= 1
    return counts


def mixed_rows(
    seed: int, step: int, batch: int, weights: Shares, sources: Sequence[range | Indices], part: Part = WHOLE
) -> Indices:
    """Return the block of each row of the global batch of one step, int64 ``[batch]``, from several sources by weight.

    Which sources a step reads is `apportion`'s; of each source every epoch is a permutation of its own; the rows of a
    step are then shuffled, so that every rank and micro-batch sees the mixture.

    Args:
        seed, step, batch: as in `step_rows`.
        weights: see `shares`.
        sources: the numbers of the blocks of each source.
        part: which blocks of each source are read; they are numbered within their source.
    """
    before, after = (apportion(weights, rows) for rows in (step * batch, (step + 1) * batch))
    taken = [
        picked(blocks, part.numbers(epoch_rows((seed, key), start, end, part.size(len(blocks)))))
        for key, (start, end, blocks) in enumerate(zip(before, after, sources, strict=True))
    ]
    rows = np.concatenate(taken)
    return rows[np.random.default_rng([seed, step, 2**32 - 1]).permutation(len(rows))]


def picked(blocks: range | Indices, places: Indices) -> Indices:
    """Return the numbers that stand at these places of ``blocks``."""
    return blocks.start + places if isinstance(blocks, range) else blocks[places]


def epoch_rows(seed: tuple[int, ...], start: int, end: int, blocks: int) -> Indices:
    """Return rows ``start`` to ``end`` of an endless sequence of epochs, each a permutation of all blocks.

    The permutations are numpy's up to `TABLE` blocks. Above, they are computed place by place, and cost no memory.
    """
    epochs, places = np.divmod(np.arange(start, end, dtype=np.int64), blocks)
    out = np.empty(end - start, np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        key = (seed[0], epoch, *seed[1:])
        out[here] = _permutation(key, blocks)[places[here]] if blocks <= TABLE else permuted(key, places[here], blocks)
    return out


@functools.lru_cache(maxsize=64)  # of at most 32 MiB: two epochs of every source of a mixture anyone is likely to write
def _permutation(key: tuple[int, ...], blocks: int) -> Indices:
    return np.random.default_rng(key).permutation(blocks).astype(np.int64)


def permuted(key: tuple[int, ...], places: Indices, size: int) -> Indices:
    """Return where a pseudorandom permutation of ``range(size)`` sends each place, one by one, in constant memory.

    A Feistel network of six rounds permutes the next even power of two; what falls outside is sent on until it is
    inside ("cycle walking", Black and Rogaway 2002).

    >>> sorted(permuted((0, 0), np.arange(6), 6).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    low = np.uint64((1 << half) - 1)
    bits = np.uint64(half)
    rounds = np.random.default_rng(key).integers(0, 2**64, 6, dtype=np.uint64)
    out = places.astype(np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        left, right = out[outside] >> bits, out[outside] & low
        for number in rounds:
            left, right = right, left ^ (_mixed(right + number) & low)
        out[outside] = (left << bits) | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
