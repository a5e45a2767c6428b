"""The blocks of each optimizer step, a function of seed and step that does not depend on ranks or micro-batches."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from phigrow.corpus.splits import Numbers

Indices = npt.NDArray[np.int64]
HALF = Fraction(1, 2)

TABLE = 2**22
"""Most blocks of an epoch whose permutation is held as a table (16 MiB): 8.6 billion tokens in blocks of 2,048."""


@dataclass(frozen=True)
class Part:
    """The blocks with a number whose remainder modulo ``of`` is ``first`` to ``last - 1``.

    ``str(part)`` is ``first,last,of``.

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
        """Return the number of blocks of the part, of ``blocks`` blocks in all."""
        rounds, rest = divmod(blocks, self.of)
        width = self.last - self.first
        return rounds * width + min(max(rest - self.first, 0), width)

    def numbers(self, places: Indices) -> Indices:
        """Return the numbers of the blocks at these places of the part. Places count from 0."""
        rounds, rest = np.divmod(places, self.last - self.first)
        numbers: Indices = rounds * self.of + self.first + rest
        return numbers


WHOLE = Part()
"""All blocks."""


def step_rows(seed: int, step: int, batch: int, blocks: int, part: Part = WHOLE) -> Indices:
    """Return the block of each row of the global batch of one step, int64 ``[batch]``.

    Every epoch is a permutation of the part, seeded by (seed, epoch). A batch may have blocks of two epochs. ``step``
    counts from 0.

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
    """Return the held-out blocks of an evaluation, spread evenly; all of them if ``wanted`` is 0.

    They depend only on the two numbers, so all arms and seeds are evaluated on the same text.
    """
    count = blocks if wanted == 0 else min(wanted, blocks)
    return np.arange(count, dtype=np.int64) * blocks // max(count, 1)


def micro_batch_rows(share: int, seq_len: int, tokens: int = 16384) -> int:
    """Return the largest divisor of a rank's share of the batch that holds at most ``tokens`` tokens (at least 1)."""
    return max(d for d in range(1, share + 1) if share % d == 0 and (d == 1 or d * seq_len <= tokens))


Shares = tuple[Fraction, ...]


def shares(weights: Sequence[float]) -> Shares:
    """Return weights as exact fractions of 1, from their shortest decimals (0.8 and 0.2 are 4/5 and 1/5)."""
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def apportion(weights: Shares, rows: int) -> list[int]:
    """Return the number of rows of each source among the first ``rows`` rows, by Webster's method (Sainte-Laguë, 1910).

    The m-th row of a source is due at ``(m - 1/2) / weight``, and rows are taken in this order. Counts therefore never
    fall as ``rows`` grows, and need no history. A count differs from ``weight * rows`` by at most
    ``1/2 + weight * sources / 2``, and by less than 1 with up to three sources (Balinski and Young, "Fair
    Representation", 1982).

    >>> [apportion(shares([0.8, 0.2]), rows) for rows in (1, 5, 10)]
    [[1, 0], [4, 1], [8, 2]]
    """
    counts = [math.floor(weight * rows + HALF) for weight in weights]  # all rows that are due by then
    each = range(len(weights))
    while (rest := rows - sum(counts)) > 0:
        counts[min(each, key=lambda k: ((counts[k] + HALF) / weights[k], k))] += 1
    for _ in range(-rest):
        counts[max(each, key=lambda k: ((counts[k] - HALF) / weights[k], k))] -= 1
    return counts


def mixed_rows(
    seed: int, step: int, batch: int, weights: Shares, sources: Sequence[range | Numbers], part: Part = WHOLE
) -> Indices:
    """Return the block of each row of the global batch of one step, int64 ``[batch]``, from several sources by weight.

    `apportion` distributes the rows over the sources. Every epoch of a source is a permutation of its own. The rows of
    a step are then shuffled, so that every rank and micro-batch reads the mixture.

    Args:
        seed, step, batch: as in `step_rows`.
        weights: see `shares`.
        sources: the numbers of the blocks of each source.
        part: blocks of each source that are read, numbered within their source.
    """
    before, after = (apportion(weights, rows) for rows in (step * batch, (step + 1) * batch))
    taken = [
        picked(blocks, part.numbers(epoch_rows((seed, key), start, end, part.size(len(blocks)))))
        for key, (start, end, blocks) in enumerate(zip(before, after, sources, strict=True))
    ]
    rows = np.concatenate(taken)
    return rows[np.random.default_rng([seed, step, 2**32 - 1]).permutation(len(rows))]


def picked(blocks: range | Numbers, places: Indices) -> Indices:
    """Return the numbers at these places of ``blocks``."""
    return np.asarray(blocks.start + places if isinstance(blocks, range) else blocks[places], np.int64)


def epoch_rows(seed: tuple[int, ...], start: int, end: int, blocks: int) -> Indices:
    """Return rows ``start`` to ``end`` of an endless sequence of epochs, each a permutation of all blocks.

    Up to `TABLE` blocks, the permutations are numpy's. Above, they are computed place by place, in constant memory.
    """
    epochs, places = np.divmod(np.arange(start, end, dtype=np.int64), blocks)
    out = np.empty(end - start, np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        key = (seed[0], epoch, *seed[1:])
        out[here] = _permutation(key, blocks)[places[here]] if blocks <= TABLE else permuted(key, places[here], blocks)
    return out


class _Tables:
    """Permutations as tables: the last two epochs of each source, because a batch may have blocks of both.

    Args:
        sources: number of sources whose tables are kept.
    """

    def __init__(self, sources: int) -> None:
        self._sources, self._lock = sources, threading.Lock()
        self._kept: OrderedDict[tuple[int, ...], OrderedDict[int, npt.NDArray[np.uint32]]] = OrderedDict()

    def __call__(self, key: tuple[int, ...], blocks: int) -> npt.NDArray[np.uint32]:
        """Return the permutation of an epoch; ``key`` is (seed, epoch, source)."""
        with self._lock:  # the loop and the thread that reads ahead ask for the same tables
            seed, epoch, *source = key
            tables = self._kept.setdefault((blocks, seed, *source), OrderedDict())
            self._kept.move_to_end((blocks, seed, *source))
            if epoch not in tables:
                tables[epoch] = np.random.default_rng(key).permutation(blocks).astype(np.uint32)
            tables.move_to_end(epoch)
            while len(tables) > 2:
                tables.popitem(last=False)
            while len(self._kept) > self._sources:
                self._kept.popitem(last=False)
            return tables[epoch]


_permutation = _Tables(32)


def permuted(key: tuple[int, ...], places: Indices, size: int) -> Indices:
    """Return the image of each place under a pseudorandom permutation of ``range(size)``, in constant memory.

    A Feistel network of six rounds permutes the next even power of two. It is applied again to images outside the range
    until all are inside ("cycle walking", Black and Rogaway 2002).

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
