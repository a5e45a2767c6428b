"""The blocks of each source of a packed split, in memory that does not grow with the number of blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from phigrow.corpus.splits import Rows

READ = 2**20
"""Number of labels that are read at once."""

PIECE = 1024
"""Number of blocks in a piece. `ScatteredRows` keeps one count for each."""

Labels = npt.NDArray[np.int64]


class LabelledBlocks(Protocol):
    """A split whose blocks have labels on disk."""

    sources: list[str]

    def __len__(self) -> int: ...

    def labels(self, start: int, stop: int) -> Labels:
        """Return the index into `sources` of each block from ``start`` to ``stop - 1``."""


class ScatteredRows:
    """Numbers of the blocks of one source, where blocks of other sources lie between them.

    Eight bytes are kept for every 1,024 blocks of the split; the labels of the rest are read where they are needed. A
    list of the numbers would take eight bytes for each block, on every rank.

    >>> class Six:
    ...     sources = ["a", "b"]
    ...     def __len__(self): return 6
    ...     def labels(self, start, stop): return np.array([0, 1, 1, 0, 1, 0])[start:stop]
    >>> rows = ScatteredRows(Six(), 1)
    >>> len(rows), rows[np.array([2, 0])].tolist()
    (3, [4, 1])
    """

    def __init__(self, split: LabelledBlocks, source: int) -> None:
        self.split, self.source = split, source
        counts = [np.add.reduceat(here, np.arange(0, len(here), PIECE)) for _, here in self._chosen()]
        self._before = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, places: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        piece = np.searchsorted(self._before, places, side="right") - 1
        out = np.empty(len(places), np.int64)
        order = np.argsort(piece, kind="stable")
        borders = np.flatnonzero(np.diff(piece[order], prepend=-1, append=-1))
        for first, last in itertools.pairwise(borders.tolist()):
            here = order[first:last]
            number = int(piece[here[0]])
            start = number * PIECE
            labels = self.split.labels(start, min(start + PIECE, len(self.split)))
            out[here] = start + np.flatnonzero(labels == self.source)[places[here] - self._before[number]]
        return out

    def pieces(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield all numbers in order, some at a time."""
        for start, here in self._chosen():
            yield start + np.flatnonzero(here)

    def _chosen(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield 1 for each block of the source and 0 for the others, with the number of the first of them."""
        for start in range(0, len(self.split), READ):
            labels = self.split.labels(start, min(start + READ, len(self.split)))
            yield start, (labels == self.source).astype(np.int64)


def rows_by_source(split: LabelledBlocks) -> list[Rows]:
    """Return the rows of every source; a range if they are consecutive."""
    count = len(split.sources)
    sizes, first, last = np.zeros(count, np.int64), np.full(count, len(split)), np.full(count, -1)
    for start in range(0, len(split), READ):
        labels = split.labels(start, min(start + READ, len(split)))
        for source in np.unique(labels).tolist():
            places = np.flatnonzero(labels == source)
            sizes[source] += len(places)
            first[source] = min(first[source], start + places[0])
            last[source] = start + places[-1]
    return [
        range(begin, begin + size) if size and end - begin + 1 == size else _scattered(split, source, size)
        for source, (size, begin, end) in enumerate(zip(sizes.tolist(), first.tolist(), last.tolist(), strict=True))
    ]


def _scattered(split: LabelledBlocks, source: int, size: int) -> Rows:
    return ScatteredRows(split, source) if size else range(0)
