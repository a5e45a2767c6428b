"""Which blocks a step reads, whoever reads them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from phigrow.corpus import order
from phigrow.corpus.order import (
    apportion,
    heldout_rows,
    micro_batch_rows,
    mixed_rows,
    permuted,
    rank_rows,
    shares,
    step_rows,
)


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


WEIGHTS = [[0.8, 0.2], [0.4, 0.2, 0.4], [1.0, 1.0, 3.0, 0.3, 7.0], [0.98, 0.01, 0.01]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_after_any_number_of_rows_each_source_has_its_weight_to_within_a_block(weights):
    exact = shares(weights)
    # Of up to three sources less than one block; of more, a large one can be ahead by a little more.
    most = [1 if len(weights) <= 3 else 0.5 + weight * len(weights) / 2 for weight in exact]
    former = [0] * len(weights)
    for rows in range(1, 500):
        counts = apportion(exact, rows)
        assert sum(counts) == rows
        assert all(now >= before for now, before in zip(counts, former, strict=True))
        away = [abs(count - weight * rows) for count, weight in zip(counts, exact, strict=True)]
        assert all(distance < bound for distance, bound in zip(away, most, strict=True))
        former = counts
    # Ten billion rows on, as exactly, and from no history.
    counts = apportion(exact, 10**10 + 7)
    away = [abs(count - weight * (10**10 + 7)) for count, weight in zip(counts, exact, strict=True)]
    assert all(distance < bound for distance, bound in zip(away, most, strict=True))


def test_rounding_each_source_by_itself_would_not_do():
    # Negative control: parts that are rounded alone do not add up.
    exact = shares(WEIGHTS[1])
    assert any(sum(round(weight * rows) for weight in exact) != rows for rows in range(100))


def test_weights_are_the_decimals_that_were_written():
    assert shares([0.8, 0.2]) == (Fraction(4, 5), Fraction(1, 5))
    assert shares([40, 20, 40]) == shares([0.4, 0.2, 0.4]) == (Fraction(2, 5), Fraction(1, 5), Fraction(2, 5))


SOURCES = [range(0, 30), np.array([30, 33, 36, 39, 42]), range(50, 61)]


def mixed(steps: int, batch: int, seed: int = 0) -> list[np.ndarray]:
    return [mixed_rows(seed, step, batch, shares([0.5, 0.1, 0.4]), SOURCES) for step in range(steps)]


def test_every_source_of_a_mixture_has_epochs_of_its_own():
    stream = np.concatenate(mixed(60, 10))
    for source, share in zip(SOURCES, (0.5, 0.1, 0.4), strict=True):
        taken = stream[np.isin(stream, source)]
        assert len(taken) == share * 600
        # Steps are shuffled inside, so an epoch's border may lie in a step: count instead of cutting.
        counts = np.bincount(taken, minlength=61)[np.asarray(source)]
        assert counts.max() - counts.min() <= 1
        assert counts.min() >= 10
    assert set(stream) == {number for source in SOURCES for number in source}


def test_a_step_of_a_mixture_is_shuffled_and_depends_on_seed_and_step_alone():
    steps = mixed(40, 20)
    np.testing.assert_array_equal(mixed_rows(0, 17, 20, shares([0.5, 0.1, 0.4]), SOURCES), steps[17])
    labels = np.array([[int(row >= 50) for row in step] for step in steps])
    assert 0.2 < labels[:, :5].mean() < 0.6  # the third source, last in the list, is not last in the step
    assert not np.array_equal(steps[17], mixed(18, 20, seed=1)[17])
    cut = np.concatenate(mixed(80, 10))  # batches of another size read the same text in the end
    np.testing.assert_array_equal(np.sort(cut), np.sort(np.concatenate(steps)))


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4097])
def test_permutations_without_a_table_are_permutations(size):
    places = np.arange(size)
    first, second = permuted((0, 1), places, size), permuted((0, 2), places, size)
    assert sorted(first) == sorted(second) == list(range(size))
    if size > 100:
        assert not np.array_equal(first, second)
        assert abs(np.corrcoef(first, places)[0, 1]) < 0.15
        assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.15
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    np.testing.assert_array_equal(permuted((0, 1), places[::-1][: size // 2 + 1], size), first[::-1][: size // 2 + 1])


def test_large_sets_are_permuted_without_a_table(monkeypatch):
    monkeypatch.setattr(order, "TABLE", 10)
    stream = np.concatenate([step_rows(3, step, 4, 30) for step in range(45)]).reshape(6, 30)
    assert all(sorted(epoch) == list(range(30)) for epoch in stream)
    assert len({tuple(epoch) for epoch in stream}) == 6


def test_the_order_of_one_set_is_numpys_permutation():
    # Curves that were recorded stay repeatable.
    np.testing.assert_array_equal(step_rows(3, 0, 30, 30), np.random.default_rng([3, 0]).permutation(30))
