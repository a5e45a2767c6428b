"""Parts of the data: which blocks a run reads and is evaluated on, and the losses of groups of held-out blocks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import assert_continued, losses, records
from scenarios import MIXTURE, SEQ_LEN, FakeBlocks, FakeSplit

from phigrow.corpus.order import WHOLE, Part, mixed_rows, shares, step_rows
from phigrow.errors import GrowthError
from phigrow.measure.pairing import check_pair
from phigrow.records import load_run
from phigrow.training import RunConfig
from phigrow.training.data import make_feed, restricted
from phigrow.training.evaluation import GROUPS, HeldOut, held_out

SOURCES = [range(0, 30), np.array([30, 33, 36, 39, 42]), range(50, 61)]
PARTS = [Part(0, 1, 2), Part(1, 2, 2), Part(2, 4, 5), Part(0, 3, 3), Part(6, 7, 7)]


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """List a run on parts of a mixture, on one and on two ranks, one of which is stopped; and one on parts of a set."""
    parts = {"zero": 1, "mixed": True, "data_part": [1, 3, 3], "eval_part": [0, 1, 2], "study": {"source_seed": 3}}
    if ranks == 1:
        plain = {"out": "plain", "zero": 0, "data_part": [0, 1, 2], "eval_part": [1, 2, 2]}
        return [{"out": "one", **parts}, plain, {**plain, "out": "other", "data_part": [1, 2, 2]}]
    parts |= {"save_every": 2, "export": "export"}
    cut = {"out": "cut", **parts}
    return [{"out": "two", **parts}, {**cut, "stop_at": 4, "log_every": 1}, cut]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("blocks", [1, 6, 7, 30, 61])
def test_a_part_has_the_blocks_with_its_remainders(part, blocks):
    expected = [number for number in range(blocks) if part.first <= number % part.of < part.last]
    assert part.size(blocks) == len(expected)
    assert part.numbers(np.arange(len(expected))).tolist() == expected


def test_parts_that_share_no_remainder_share_no_block_and_together_are_everything():
    parts = [Part(0, 2, 5), Part(2, 3, 5), Part(3, 5, 5)]
    numbers = np.concatenate([part.numbers(np.arange(part.size(31))) for part in parts])
    assert sorted(numbers) == list(range(31))


def test_without_a_part_the_order_is_that_of_recorded_runs():
    # Frozen before there were parts.
    assert step_rows(3, 2, 8, 64).tolist() == [41, 50, 11, 47, 39, 23, 38, 59]
    assert step_rows(3, 7, 12, 30).tolist() == [8, 19, 14, 11, 15, 21, 8, 19, 20, 28, 29, 26]
    found = mixed_rows(3, 5, 12, shares([0.5, 0.1, 0.4]), SOURCES).tolist()
    assert found == [50, 10, 59, 54, 14, 23, 30, 11, 57, 13, 52, 2]


@pytest.mark.parametrize("part", PARTS[:4])
def test_every_epoch_of_a_part_is_a_permutation_of_its_blocks(part):
    size = part.size(64)
    steps = range(-(-3 * size // 8))
    rows = np.concatenate([step_rows(3, step, 8, 64, part) for step in steps])[: 3 * size]
    expected = part.numbers(np.arange(size)).tolist()
    assert [sorted(epoch) for epoch in rows.reshape(3, size).tolist()] == [expected] * 3
    assert len({tuple(epoch) for epoch in rows.reshape(3, size).tolist()}) == 3


def test_a_part_of_a_mixture_is_of_the_blocks_of_each_source():
    part, weights = Part(1, 3, 4), shares([0.5, 0.1, 0.4])
    rows = np.concatenate([mixed_rows(3, step, 12, weights, SOURCES, part) for step in range(40)])
    expected = [number for source in SOURCES for place, number in enumerate(source) if place % 4 in (1, 2)]
    assert sorted(set(rows.tolist())) == expected
    assert np.isin(rows, SOURCES[1]).sum() == 48  # the weights of sources stay


@pytest.mark.parametrize("mixture", [(), MIXTURE])
def test_epochs_and_records_count_the_blocks_of_the_part(mixture):
    blocks = FakeBlocks(mixture=mixture)
    config = RunConfig(data_part=[0, 1, 4], eval_part=[0, 1, 3], seed=3, batch=12)
    blocks = restricted(config, blocks)
    feed = make_feed(config, blocks)
    info = blocks.describe()
    if mixture:
        assert feed.epochs(10) == {"most": 0.75 * 120 / 10, "rest": 0.25 * 120 / 6}
        assert info["sources"]["rest"]["tokens"] == 6 * SEQ_LEN
        assert (info["train_blocks"], info["heldout_blocks"]) == (16, 2 + 3)
    else:
        assert feed.epochs(10) == {"all": 120 / 16}
        assert (info["train_blocks"], info["heldout_blocks"]) == (16, 5)
    read = {int(row) for step in range(10) for row in feed.rows(step)}
    assert len(read) == 16


def test_sources_are_counted_in_a_part():
    class TwoSources(FakeSplit):
        def source_of(self, indices: Any) -> np.ndarray:
            return (np.asarray(indices) % 3 == 0).astype(np.int64)

    train = TwoSources(64, 1)
    train.sources = ["a", "b"]
    feed = FakeBlocks(train=train, train_part=Part(0, 1, 2)).make_feed(3, 12)
    for step in (1, 2, 3, 40):
        rows = np.concatenate([feed.rows(number) for number in range(step)])
        assert feed.blocks_read(step) == [int((rows % 3 != 0).sum()), int((rows % 3 == 0).sum())]


def test_held_out_blocks_come_from_the_part_alone():
    assert held_out(FakeBlocks(heldout_part=Part(1, 2, 3)), 0).rows.tolist() == [1, 4, 7, 10]
    assert held_out(FakeBlocks(heldout_part=Part(1, 2, 3)), 2).rows.tolist() == [1, 7]
    mixed = held_out(FakeBlocks(mixture=MIXTURE, heldout_part=Part(1, 2, 2)), 0)
    assert mixed.rows.tolist() == [1, 3, 6, 8, 10, 12]
    assert mixed.labels.tolist() == [0, 0, 1, 1, 1, 1]


def test_groups_are_contiguous_and_of_equal_size():
    held = HeldOut(np.arange(250), np.zeros(250, np.int64), ["all"], None)
    group, sizes = held.groups()
    assert len(sizes) == GROUPS
    assert (np.diff(group) >= 0).all()
    assert set(sizes.tolist()) == {2, 3}
    assert held_out(FakeBlocks(), 0).groups()[1].tolist() == [1] * 13


@pytest.mark.parametrize("counts", [(4, 9), (300, 1), (130, 70)])
def test_groups_of_a_mixture_have_its_loss_as_their_mean(counts):
    labels = np.repeat([0, 1], counts)
    held = HeldOut(np.arange(len(labels)), labels, ["most", "rest"], (0.75, 0.25))
    losses = np.random.default_rng(0).normal(3, 1, len(labels))
    group, sizes = held.groups()
    assert sizes.min() >= 1
    means = np.bincount(group, losses * held.block_weights()) / sizes
    sums = [float(losses[labels == source].sum()) for source in (0, 1)]
    assert np.average(means, weights=sizes) == pytest.approx(held.loss(sums, counts), rel=1e-12)
    # Negative control: a plain mean of the blocks is another number.
    assert abs(losses.mean() - held.loss(sums, counts)) > 1e-3


@pytest.mark.parametrize("part", [[0, 1], [1, 1, 2], [0, 3, 2], [2, 1, 3], [0, 0, 0]])
@pytest.mark.parametrize("name", ["data_part", "eval_part"])
def test_a_part_that_is_none_is_refused(name, part):
    with pytest.raises(GrowthError, match=rf"(?s){name} is .*first < last <= of"):
        RunConfig(**{name: part})


def test_a_part_without_blocks_is_refused():
    with pytest.raises(GrowthError, match=r"the part 69,70,70 of the train blocks is empty for the data"):
        FakeBlocks(train_part=Part(69, 70, 70)).make_feed(0, 8)
    with pytest.raises(GrowthError, match=r"the part 30,31,31 of the train blocks is empty for rest"):
        FakeBlocks(mixture=MIXTURE, train_part=Part(30, 31, 31)).make_feed(0, 8)
    with pytest.raises(GrowthError, match=r"The part 19,20,20 of the 13 held-out blocks is empty"):
        restricted(RunConfig(eval_part=[19, 20, 20]), FakeBlocks())
    with pytest.raises(GrowthError, match="blocks of a stream have no numbers"):
        RunConfig(data_part=[0, 1, 2], stream={"ref": "x"})


def test_a_part_that_is_everything_changes_nothing():
    whole, part = FakeBlocks().make_feed(3, 12), FakeBlocks(train_part=Part(0, 4, 4)).make_feed(3, 12)
    for step in range(12):
        np.testing.assert_array_equal(whole.rows(step), part.rows(step))
    assert Part(0, 1, 1) == WHOLE


def test_a_run_on_parts_is_the_same_on_any_number_of_ranks_and_continues_exactly(launches):
    folder = launches(__name__)
    for kind in ("step", "eval"):
        np.testing.assert_allclose(losses(folder / "two", kind), losses(folder / "one", kind), rtol=2e-6)
    assert_continued(folder / "cut", folder / "two")
    first, *_, last = records(folder / "two", "eval")
    assert "group_losses" not in first
    assert last["group_losses"] == records(folder / "cut", "eval")[-1]["group_losses"]
    assert records(folder / "one", "eval")[-1]["group_losses"] == pytest.approx(last["group_losses"], abs=2e-5)
    assert (len(last["group_blocks"]), sum(last["group_blocks"])) == (4, 3 + 4)
    assert np.average(last["group_losses"], weights=last["group_blocks"]) == pytest.approx(last["loss"], abs=1e-6)
    (meta,) = records(folder / "two", "run")
    assert meta["study"] == {"source_seed": 3}
    assert meta["config"]["data_part"] == [1, 3, 3]


def test_the_meter_tells_held_out_parts_apart_and_not_those_of_the_train_text(launches):
    folder = launches(__name__)
    (last,) = records(folder / "plain", "eval")[-1:]
    assert last["group_blocks"] == [1] * 6
    assert np.mean(last["group_losses"]) == pytest.approx(last["loss"], abs=1e-6)
    assert np.ptp(last["group_losses"]) > 1e-3
    plain, other = load_run(folder / "plain"), load_run(folder / "other")
    assert losses(folder / "plain") != losses(folder / "other")
    check_pair(dataclasses.replace(other, arm="grown"), plain, "scratch")
    changed = plain.meta["config"] | {"eval_part": [0, 1, 2]}
    with pytest.raises(GrowthError, match="eval_part"):
        check_pair(dataclasses.replace(other, meta=other.meta | {"config": changed}), plain, "scratch")
    prints = [run.meta["eval_fingerprint"] for run in (plain, other)]
    assert prints[0] == prints[1] != FakeBlocks(heldout_part=Part(0, 1, 2)).describe()["eval_fingerprint"]
    assert "eval_fingerprint" not in FakeBlocks().describe()
