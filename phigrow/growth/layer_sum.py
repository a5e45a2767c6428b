"""A sum over tensors of several layers, read like a stored one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, Protocol

import numpy as np

from phigrow.checkpoints.bits import STORED, Bits, Values, widen


class Rows(Protocol):
    """A tensor of which rows are read on demand."""

    @property
    def dtype_name(self) -> str: ...

    def bits(self, start: int, stop: int) -> Bits: ...


class Blend:
    """A source tensor that is a sum over others, added up once and held while it is in use.

    The four that were used last are held, in the dtype of the arithmetic.

    Args:
        parts: (coefficient, tensor), all of one shape.
        rows: of each.
        compute: float32 or float64.
    """

    def __init__(self, parts: Sequence[tuple[float, Rows]], rows: int, compute: type[np.floating[Any]]) -> None:
        self.parts, self.rows, self.compute = parts, rows, compute
        self.lock = Lock()

    @property
    def dtype_name(self) -> str:
        return np.dtype(self.compute).name

    def bits(self, start: int, stop: int) -> Bits:
        """Rows ``start .. stop``, as bits of the arithmetic's dtype."""
        with self.lock:
            whole = _summed(self)
        view: Bits = whole[start:stop].view(STORED[self.dtype_name])
        return view


@lru_cache(maxsize=4)
def _summed(blend: Blend) -> Values:
    total: Any = None
    for coefficient, part in blend.parts:
        values = widen(part.bits(0, blend.rows), part.dtype_name, blend.compute)
        total = values * blend.compute(coefficient) + (0 if total is None else total)
    out: Values = total
    return out
