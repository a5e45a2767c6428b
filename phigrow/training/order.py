"""Which blocks each optimizer step reads: a function of seed and step, whatever the ranks and micro-batches."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, blocks: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(blocks).astype(np.int64)


def step_rows(seed: int, step: int, batch: int, blocks: int) -> Indices:
    """Return the block of each row of the global batch of one step, int64 ``[batch]``.

    Every epoch is a permutation seeded by (seed, epoch); a batch may straddle two. ``step`` counts from 0.

    >>> step_rows(0, 0, 4, 4).tolist() == sorted(step_rows(0, 0, 4, 4).tolist())
    False
    >>> sorted(step_rows(0, 0, 4, 4).tolist())
    [0, 1, 2, 3]
    """
    position = np.arange(step * batch, (step + 1) * batch)
    epochs, places = np.divmod(position, blocks)
    return np.array(
        [_permutation(seed, int(e), blocks)[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64
    )


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
