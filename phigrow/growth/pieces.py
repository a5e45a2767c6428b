"""What a leg takes from the source, in slices: the fewest pieces that can be moved at one gain."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from phigrow.growth.axes import FRESH, AxisMap, Floats


class Piece(NamedTuple):
    """Consecutive destination coordinates that come from consecutive source ones (or from their mean), at one gain,
    and all from the same layer."""

    start: int
    stop: int
    source: int
    gain: float


def pieces_of(axis: AxisMap, gains: Floats) -> list[Piece]:
    """What a leg takes from the source, in the fewest pieces; coordinates that take nothing are left out."""
    pieces = []
    for run in axis.runs:
        jumps = np.diff(gains[run.start : run.stop]) != 0
        if axis.ahead is not None:
            jumps |= np.diff(axis.ahead[run.start : run.stop])
        edges = [run.start, *(run.start + 1 + np.flatnonzero(jumps)).tolist(), run.stop]
        for start, stop in itertools.pairwise(edges):
            source = run.source + start - run.start if run.source >= 0 else run.source
            if source != FRESH and gains[start] != 0:
                pieces.append(Piece(start, stop, source, float(gains[start])))
    return pieces


def clip(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """The pieces inside ``start .. stop``, cut to it."""
    clipped = []
    for piece in pieces:
        low, high = max(piece.start, start), min(piece.stop, stop)
        if low < high:
            source = piece.source + low - piece.start if piece.source >= 0 else piece.source
            clipped.append(Piece(low, high, source, piece.gain))
    return clipped


def assign(out: np.ndarray, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
    """``out[rows][:, columns] = values``, by slices where they are consecutive (much faster than by index)."""
    row_slice, column_slice = _as_slice(rows), _as_slice(columns)
    if row_slice is not None and column_slice is not None:
        out[row_slice, column_slice] = values
    elif row_slice is not None:
        out[row_slice, columns] = values
    elif column_slice is not None:
        out[rows, column_slice] = values
    else:
        out[rows[:, None], columns[None, :]] = values


def _as_slice(places: np.ndarray) -> slice | None:
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else None
