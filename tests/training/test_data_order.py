"""Which blocks a step reads, whoever reads them."""

from __future__ import annotations

import numpy as np
import pytest

from phigrow.training.order import heldout_rows, micro_batch_rows, rank_rows, step_rows


def test_every_epoch_reads_every_block_once_in_an_order_of_its_own():
    blocks, batch = 30, 4
    stream = np.concatenate([step_rows(3, step, batch, blocks) for step in range(45)])
    epochs = stream.reshape(6, blocks)
    for epoch in epochs:
        assert sorted(epoch) == list(range(blocks))
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_order_depends_on_the_seed_and_on_nothing_asked_before():
    first = step_rows(0, 17, 8, 100)
    for step in (3, 90, 17):
        step_rows(0, step, 8, 100)
    np.testing.assert_array_equal(step_rows(0, 17, 8, 100), first)
    assert not np.array_equal(step_rows(1, 17, 8, 100), first)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_and_micro_batches_share_the_same_global_batch(world, micro):
    rows = step_rows(0, 5, 12, 50)
    parts = [rank_rows(rows, rank, world, micro) for rank in range(world)]
    assert all(len(part) == micro for mine in parts for part in mine)
    np.testing.assert_array_equal(np.concatenate([p for mine in parts for p in mine]), rows)


def test_a_batch_larger_than_the_data_repeats_it():
    assert sorted(step_rows(0, 0, 9, 3)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_held_out_rows_are_spread_and_never_more_than_there_are():
    np.testing.assert_array_equal(heldout_rows(4, 100), [0, 25, 50, 75])
    np.testing.assert_array_equal(heldout_rows(0, 5), range(5))
    np.testing.assert_array_equal(heldout_rows(9, 5), range(5))
    assert len(heldout_rows(4, 0)) == 0


@pytest.mark.parametrize(("share", "seq_len", "rows"), [(16, 256, 16), (512, 2048, 8), (7, 2048, 7), (13, 4096, 1)])
def test_micro_batches_fit_the_budget(share, seq_len, rows):
    assert micro_batch_rows(share, seq_len) == rows
