"""Blocks of each source of a split: found in pieces, as a list of all labels gives them, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from phigrow.corpus import build, load_blocks, mix_sources, prepare, source_rows, train_tokenizer
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


def test_packed_blocks_are_stored_in_few_pieces_and_mean_the_same_in_many(tmp_path, monkeypatch):
    train_tokenizer(["text"], 257).save_pretrained(tmp_path / "bytes")
    rng = np.random.default_rng(0)
    rows = [{"text": "".join(rng.choice(list("abc"), 200)), "source": "ab"[k % 2]} for k in range(120)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {}
    for name, size in (("few", build.BATCH_BYTES), ("many", 0)):
        monkeypatch.setattr(build, "BATCH_BYTES", size)
        given = {"seq_len": 8, "tokenizer": tmp_path / "bytes", "across_sources": True, "progress": False}
        prepare(tmp_path / "text.jsonl", tmp_path / name, **given)
        folders[name] = load_blocks(tmp_path / name)
    few, many = folders["few"], folders["many"]
    assert (len(few.train.parts), len(many.train.parts)) == (1, 3)
    assert few.fingerprint == many.fingerprint
    chosen = rng.integers(0, len(few.train), 300)
    np.testing.assert_array_equal(few.train.batch(chosen), many.train.batch(chosen))
    np.testing.assert_array_equal(few.train.source_of(chosen), many.train.source_of(chosen))
    np.testing.assert_array_equal(few.train.labels(990, 2010), many.train.labels(990, 2010))
    assert set(many.train.source_of(chosen).tolist()) == {0, 1}
    mixed = [mix_sources(blocks, {"a": 1, "b": 2}) for blocks in (few, many)]
    assert mixed[0].fingerprint == mixed[1].fingerprint
    assert [type(source.train) for source in mixed[1].mixture] == [ScatteredRows, ScatteredRows]
    np.testing.assert_array_equal(mixed[0].make_feed(0, 8).rows(3), mixed[1].make_feed(0, 8).rows(3))
    with pytest.raises(IndexError, match="block -1"):
        few.train.source_of([-1])
