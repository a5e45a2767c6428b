"""Normal random values that depend on a seed, a name and their position alone.

Every row of a stream starts at its own position in a PCG64DXSM sequence, so any rows can be drawn without those before
them. The values do not depend on blocks, threads, shards or other draws. A value is one of 65,536 quantiles
of the normal distribution, each equally likely, scaled to a variance of exactly 1: fewer steps than float32 has, more
than bfloat16 has; the largest is 4.3 standard deviations. One value takes 16 random bits and one table lookup, several
times faster than computing it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from phigrow.checkpoints.bits import Bits, Values, looked_up, narrow

LEVELS = 1 << 16
_WORD = 4
"""Values in one 64-bit draw."""
_AT_ONCE = 1 << 16
"""Values looked up at a time: their indices stay in the cache."""


@lru_cache(maxsize=1)
def quantiles() -> Values:
    """float64 [65536]: the normal quantiles at the middles of equal shares, ascending, of variance 1."""
    inverse = NormalDist().inv_cdf
    half = np.array([inverse((k + 0.5) / LEVELS) for k in range(LEVELS // 2)])
    values = np.concatenate([half, -half[::-1]])
    scaled: Values = values / np.sqrt(np.mean(values**2))
    return scaled


@lru_cache(maxsize=32)
def _stored(std: float, dtype: str) -> Bits:
    return narrow(quantiles() * std, dtype)


class NormalStream:
    """A stream of normal values, [rows, width]. Any rows can be drawn.

    Args:
        seed, purpose, name: the key of the values; equal keys give equal values.
        width: values a row.
    """

    def __init__(self, seed: int, purpose: str, name: str, width: int) -> None:
        digest = hashlib.sha256(f"{seed}:{purpose}:{name}".encode()).digest()
        self._seed = int.from_bytes(digest[:16], "big")
        self.width = width

    def bits(self, first: int, count: int, std: float, dtype: str) -> Bits:
        """Rows ``first .. first + count`` with a standard deviation, as stored bits of a dtype."""
        return self._looked_up(_stored(std, dtype), first, count)

    def values(self, first: int, count: int) -> Values:
        """Rows ``first .. first + count``, float64, of standard deviation 1."""
        return self._looked_up(quantiles(), first, count)

    def _looked_up(self, table: np.ndarray, first: int, count: int) -> np.ndarray:
        words = -(-self.width // _WORD)
        source = np.random.PCG64DXSM(self._seed)
        source.advance(first * words)
        draw: Callable[..., np.ndarray] = np.random.Generator(source).integers
        out = np.empty((count, words * _WORD), dtype=table.dtype)
        step = max(1, _AT_ONCE // max(1, words * _WORD))
        for row in range(0, count, step):
            rows = min(step, count - row)
            # All 64 bits of a draw; unlike random_raw, other threads run meanwhile.
            raw = draw(0, 2**64 - 1, rows * words, dtype=np.uint64, endpoint=True)
            looked_up(table, raw.view(np.uint16).reshape(rows, -1), out[row : row + rows])
        return out[:, : self.width]
