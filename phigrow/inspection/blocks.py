"""A grown tensor as rectangles of one kind and gain: what a picture draws."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from phigrow.growth.origins import Anatomy, Kind, Part, combine

Limits = Sequence[tuple[int, int]]


class Block(NamedTuple):
    """A rectangle of one kind and gain: rows and columns ``start .. stop``."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    kind: Kind
    gain: float

    @property
    def area(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


def blocks(found: Anatomy) -> list[Block]:
    """The tensor as rectangles of one kind and gain that cover it once; a vector is one column wide."""
    parts = found.growth.parts
    rows, columns = (_split(pieces(side.whole), side.whole.size // parts) for side in (found.sides[0], found.sides[-1]))
    if len(found.sides) == 1:
        columns = [(0, 1, Kind.COPIED, 1.0)]
    drawn = []
    for (top, bottom, one, row_gain), (left, right, other, column_gain) in itertools.product(rows, columns):
        off = parts > 1 and top // (found.growth.shape[0] // parts) != left // (found.growth.shape[1] // parts)
        kind = Kind.ZERO if off else combine(one, other)
        has_gain = kind.is_copy or kind in (Kind.MEAN, Kind.CONSTANT)
        drawn.append(Block((top, bottom), (left, right), kind, row_gain * column_gain if has_gain else 1.0))
    return drawn


def _split(whole: list[tuple[int, int, Kind, float]], size: int) -> list[tuple[int, int, Kind, float]]:
    """The pieces cut at every multiple of a size."""
    found = []
    for start, stop, kind, gain in whole:
        edges = [start, *range((start // size + 1) * size, stop, size), stop]
        found += [(low, high, kind, gain) for low, high in itertools.pairwise(edges)]
    return found


def pieces(part: Part) -> list[tuple[int, int, Kind, float]]:
    """(start, stop, kind, gain) of a stored axis: its spans, joined where only the source jumps."""
    found: list[tuple[int, int, Kind, float]] = []
    for span in part.spans:
        if found and found[-1][2:] == (span.kind, span.gain):
            found[-1] = (found[-1][0], span.stop, span.kind, span.gain)
        else:
            found.append((span.start, span.stop, span.kind, span.gain))
    return found


def cut(block: Block, limits: Limits) -> Block | None:
    """The part of a block inside (rows, columns), or None."""
    (top, bottom), (left, right) = (
        (max(span[0], limit[0]), min(span[1], limit[1]))
        for span, limit in zip((block.rows, block.columns), limits, strict=True)
    )
    return Block((top, bottom), (left, right), block.kind, block.gain) if top < bottom and left < right else None
