"""Blocks of each source of a split: found in pieces, as a list of all labels gives them, in little memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from phigrow.corpus import source_rows
from phigrow.corpus.source_rows import ScatteredRows, rows_by_source


class Labelled:
    """A split without text; labels are computed, so that they take no memory."""

    def __init__(self, blocks: int, count: int, label: Any) -> None:
        self.blocks, self.label = blocks, label
        self.sources = [f"source {number}" for number in range(count)]

    def __len__(self) -> int:
        return self.blocks

    def labels(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.label(np.arange(start, stop)), np.int64)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few blocks, so that small splits have many."""
    monkeypatch.setattr(source_rows, "PIECE", 8)
    monkeypatch.setattr(source_rows, "READ", 32)


def test_rows_of_every_source_are_those_of_all_labels(small_pieces):
    rng = np.random.default_rng(0)
    for size in (1, 7, 8, 31, 32, 33, 100, 257):
        of_all = rng.choice([0, 0, 0, 2, 3], size)
        split = Labelled(size, 5, lambda rows, of_all=of_all: of_all[rows])
        for source, rows in enumerate(rows_by_source(split)):
            expected = np.flatnonzero(of_all == source)
            assert len(rows) == len(expected)
            if isinstance(rows, range):
                assert list(rows) == expected.tolist()
            else:
                places = rng.integers(0, len(rows), 50)
                assert rows[places].tolist() == expected[places].tolist()
                assert np.concatenate(list(rows.pieces())).tolist() == expected.tolist()


def test_consecutive_rows_are_a_range(small_pieces):
    split = Labelled(100, 3, lambda rows: (rows >= 40) * 2)
    assert rows_by_source(split) == [range(40), range(0), range(40, 100)]
    scattered = rows_by_source(Labelled(100, 3, lambda rows: (rows >= 40) * 2 - 2 * (rows == 99)))
    assert [type(rows) for rows in scattered] == [ScatteredRows, range, range]


def test_many_blocks_take_little_memory():
    """8 million blocks of two sources in turns; a list of them takes 64 MB."""
    split = Labelled(2**23, 2, lambda rows: rows % 2)
    tracemalloc.start()
    try:
        rows = ScatteredRows(split, 1)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    places = np.array([0, 5, 4_194_303])
    assert rows[places].tolist() == [1, 11, 8_388_607]
    assert kept < 2**20
    assert peak < 2**26
