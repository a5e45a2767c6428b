"""What the steps of a run read, and reading ahead of them."""

from __future__ import annotations

import json
import runpy
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import MIXTURE, FakeBlocks, FakeSplit

from phigrow.corpus import open_stream, stream_settings, train_tokenizer
from phigrow.corpus.feed import BlockFeed, Feed, LaterFeed
from phigrow.errors import GrowthError
from phigrow.training.device_copy import to_device
from phigrow.training.evaluation import held_out
from phigrow.training.prefetch import AHEAD, Prefetcher, repeated
from phigrow.training.process import World

CPU = torch.device("cpu")


class TwoSources(FakeSplit):
    """Blocks of which every third is of another source."""

    def __init__(self, blocks: int, seed: int) -> None:
        super().__init__(blocks, seed)
        self.sources = ["a", "b"]

    def source_of(self, indices: Any) -> np.ndarray:
        return (np.asarray(indices) % 3 == 0).astype(np.int64)


def feeds() -> dict[str, Feed]:
    return {
        "one": FakeBlocks().make_feed(3, 12),
        "labelled": FakeBlocks(train=TwoSources(64, 1)).make_feed(3, 12),
        "mixed": FakeBlocks(mixture=MIXTURE).make_feed(3, 12),
    }


@pytest.mark.parametrize("kind", ["one", "labelled", "mixed"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_batch_that_one_rank_reads(kind, world):
    feed = feeds()[kind]
    for step in (0, 5, 70):
        whole, _ = feed.read(step, 0, 1)
        parts = [feed.read(step, rank, world)[0] for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        np.testing.assert_array_equal(whole, FakeBlocks().train.batch(feed.rows(step)))
        assert not np.array_equal(whole, feed.read(step + 1, 0, 1)[0])


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 40])
@pytest.mark.parametrize("kind", ["labelled", "mixed"])
def test_blocks_are_counted_by_source_from_the_start_or_step_by_step(kind, steps):
    feed = feeds()[kind]
    rows = np.concatenate([np.empty(0, np.int64), *(feed.rows(step) for step in range(steps))])
    second = rows % 3 == 0 if kind == "labelled" else rows >= 40
    expected = [int((~second).sum()), int(second.sum())]
    assert feed.blocks_read(steps) == expected
    again = feeds()[kind]
    assert [again.blocks_read(step) for step in range(steps + 1)][-1] == expected


class ManyBlocks(TwoSources):
    """Blocks of two sources without any text."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.sources = blocks, ["a", "b"]

    def __len__(self) -> int:
        return self.blocks


def peak_bytes(work: Callable[[], Any]) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_order_of_1_4_trillion_tokens_takes_no_memory_of_their_number():
    """phi-2's tokens in blocks of 2,048, at 80 % of its steps, as each of 96 ranks computes them."""
    blocks, batch, step = 683_593_750, 2016, 271_000
    feed = BlockFeed(ManyBlocks(blocks), (), 0, batch)
    rows, peak = peak_bytes(lambda: feed.rows(step))
    assert peak < 2**20
    assert len(set(rows.tolist())) == batch
    assert 0 <= rows.min() < rows.max() < blocks
    assert abs(rows.mean() / blocks - 0.5) < 0.05


def test_the_tables_of_former_epochs_are_given_back():
    blocks = 2**20  # a table takes 4 MiB
    feed = BlockFeed(ManyBlocks(blocks), (), 5, 64)
    orders = []

    def read() -> None:
        for epoch in range(6):
            step = (epoch + 1) * blocks // 64
            orders.append((feed.rows(step - 1), feed.rows(step)))

    _, peak = peak_bytes(read)
    assert peak < 26 * 2**20  # two tables, and 12 MiB while the next one is made; all of them take 24 more
    assert len({rows.tobytes() for pair in orders for rows in pair}) == 12
    for number, (last, first) in enumerate(orders[:2]):
        np.testing.assert_array_equal(last, np.random.default_rng((5, number)).permutation(blocks)[-64:])
        np.testing.assert_array_equal(first, np.random.default_rng((5, number + 1)).permutation(blocks)[:64])


def test_blocks_of_whole_epochs_are_counted_in_pieces():
    blocks = 9_000_000  # all places at once would be 72 MB
    feed = BlockFeed(ManyBlocks(blocks), (), 0, 1000)
    found, peak = peak_bytes(lambda: feed.blocks_read(27_000))
    assert found == [18_000_000, 9_000_000]
    assert peak < 60 * 2**20
    again, peak = peak_bytes(lambda: feed.blocks_read(36_000))
    assert again == [24_000_000, 12_000_000]
    assert peak < 2**20  # an epoch is counted once


@pytest.mark.parametrize("first", [0, 3, 5, 6, 11])
@pytest.mark.parametrize("kind", ["one", "labelled", "mixed"])
def test_blocks_of_a_part_of_the_steps_are_counted(kind, first):
    feed, again = feeds()[kind], feeds()[kind]
    for step in (first, first + 1, first + 7, first + 40, first + 12):  # an epoch of 64 blocks is 5.3 steps
        rows = np.concatenate([np.empty(0, np.int64), *(feed.rows(each) for each in range(first, step))])
        second = {"one": rows < 0, "labelled": rows % 3 == 0, "mixed": rows >= 40}[kind]
        expected = [int((~second).sum()), int(second.sum())][: len(feed.sources)]
        assert feed.blocks_read(step, first) == expected
        assert LaterFeed(again, first).blocks_read(step - first) == expected


def test_a_run_that_resumes_counts_on_from_the_records():
    feed, resumed = feeds()["labelled"], feeds()["labelled"]
    resumed.resume_count(20, feed.blocks_read(20))
    counted: list[int] = []
    real = TwoSources.source_of
    resumed.train.source_of = lambda rows: (counted.append(len(rows)), real(resumed.train, rows))[1]  # type: ignore[attr-defined]
    assert resumed.blocks_read(22) == feed.blocks_read(22)
    assert sum(counted) == 2 * 12
    wrong = feeds()["labelled"]  # negative control: the counts are taken over
    wrong.resume_count(20, [0, 0])
    assert sum(wrong.blocks_read(22)) == 24


def test_resuming_at_80_percent_of_1_4_trillion_tokens_counts_nothing_again():
    blocks, batch, step = 683_593_750, 2016, 271_000
    feed = BlockFeed(ManyBlocks(blocks), (), 0, batch)
    feed.resume_count(step, [364_224_000, 182_112_000])
    began = time.perf_counter()
    counts, peak = peak_bytes(lambda: feed.blocks_read(step + 10))
    assert sum(counts) == (step + 10) * batch
    assert counts[1] == pytest.approx(182_112_000 + 10 * batch / 3, abs=400)
    assert peak < 2**22
    assert time.perf_counter() - began < 5  # of 546 million blocks it would take minutes


def test_the_simulation_of_a_large_run_runs_at_toy_size(capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "feed.py"
    shown = runpy.run_path(str(path))["run"](3e6, 16, 96, 96, 0.8, recount=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == shown
    assert shown[0] == {"tokens": 3_000_000, "blocks": 187_500, "steps": 1953, "batch": 96, "blocks_a_rank": 1}
    assert [line["data"] for line in shown[1:]] == [
        "sources in order", "mixture of ranges", "mixture of mingled sources",
    ]  # fmt: skip
    for line in shown[1:]:
        assert line["step_MiB"] < 1
        assert line["resume_seconds"] < 1
    assert "recount_seconds" in shown[1]


def test_a_mixture_says_its_epochs_and_warns_above_four():
    epochs = feeds()["mixed"].epochs(40)
    assert epochs == {"most": 0.75 * 480 / 40, "rest": 0.25 * 480 / 24}
    assert len(repeated(epochs)) == 2
    assert repeated({"most": 4.0, "rest": 4.01}) == [
        "warning: rest is read 4.0 times; beyond 4 epochs repeated text is worth ever less (Muennighoff et al. 2023, "
        "arXiv:2305.16264)"
    ]
    assert repeated({"all": 9.0})[0].startswith("warning: the text is read 9.0 times")
    assert repeated(None) == []


def test_held_out_blocks_of_a_mixture_follow_its_weights():
    held = held_out(FakeBlocks(mixture=MIXTURE), 4)
    assert held.rows.tolist() == [0, 1, 3, 5]  # three of the first five, one of the other eight
    assert (held.names, held.weights) == (["most", "rest"], (0.75, 0.25))
    assert held.loss([3.0, 5.0], [3.0, 1.0]) == 0.75 * 1 + 0.25 * 5
    assert len(held_out(FakeBlocks(mixture=MIXTURE), 0).rows) == 13
    tiny = held_out(FakeBlocks(mixture=MIXTURE), 1)
    assert tiny.labels.tolist() == [0, 1]  # every source has one at least
    plain = held_out(FakeBlocks(heldout=TwoSources(13, 2)), 0)
    assert plain.loss([3.0, 5.0], [3.0, 1.0]) == 2.0
    assert plain.labels.tolist() == [1, 0, 0] * 4 + [1]


def test_blocks_describe_themselves_for_the_run_record():
    counts = {"tokens_seen": 100, "dropped_tokens": 4, "documents": 7, "documents_cut": 2}
    sources = {"a": {"tokens": 60}, "b": {"tokens": 40}}
    assert FakeBlocks(info={"train": counts | {"sources": sources}}).describe() == {
        "data_fingerprint": "fake",
        "train_blocks": 64,
        "heldout_blocks": 13,
        "packing": {"efficiency": 0.96, "dropped_tokens": 4, "documents": 7, "documents_cut": 2},
        "sources": sources,
    }
    assert FakeBlocks(mixture=MIXTURE).describe()["sources"] == {
        "most": {"weight": 0.75, "tokens": 640},
        "rest": {"weight": 0.25, "tokens": 384},
    }
    with pytest.raises(GrowthError, match="the data has no blocks to train on"):
        FakeBlocks(train=FakeSplit(0, 1)).make_feed(0, 8)


def test_a_prefetcher_reads_ahead_in_order_and_no_further():
    feed = feeds()["mixed"]
    reads: list[int] = []
    real = feed.read
    feed.read = lambda step, rank, world: (reads.append(step), real(step, rank, world))[1]  # type: ignore[assignment]
    ahead = Prefetcher(feed, 3, 100, World(0, 2, 0, 2, CPU))
    for step in range(3, 8):
        np.testing.assert_array_equal(ahead.take(step).blocks, real(step, 0, 2)[0])
    time.sleep(0.1)
    assert reads == list(range(3, reads[-1] + 1))
    assert reads[-1] <= 7 + AHEAD + 1
    ahead.close()
    assert "phigrow-feed" not in [thread.name for thread in threading.enumerate()]


def test_a_fast_feed_is_not_waited_for_and_a_slow_one_is():
    def waited(seconds: float) -> float:
        feed = feeds()["one"]
        real = feed.read

        def slow(step: int, rank: int, world: int) -> Any:
            time.sleep(seconds)
            return real(step, rank, world)

        feed.read = slow  # type: ignore[method-assign]
        ahead = Prefetcher(feed, 0, 8, World(0, 1, 0, 1, CPU))
        total = 0.0
        for step in range(8):
            total += ahead.take(step).waited if step else 0 * ahead.take(step).waited
            time.sleep(0.03)  # the step
        ahead.close()
        return total

    assert waited(0.0) < 0.05 < 0.3 < waited(0.1)


def test_what_goes_wrong_in_the_thread_is_raised_in_the_loop():
    feed = feeds()["one"]

    def broken(step: int, rank: int, world: int) -> Any:
        raise OSError("the disk is gone")

    feed.read = broken  # type: ignore[method-assign]
    ahead = Prefetcher(feed, 0, 8, World(0, 1, 0, 1, CPU))
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(0)
    ahead.close()


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_batches_for_a_gpu_are_pinned_in_the_thread_and_copied_without_waiting(kind, monkeypatch):
    calls: list[tuple[Any, ...]] = []

    def pin(batch: torch.Tensor) -> torch.Tensor:
        calls.append(("pin", threading.current_thread().name))
        return batch

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("use", device)))
    monkeypatch.setattr(torch.Tensor, "to", lambda batch, device, **how: calls.append(("copy", device, how)))
    device, feed = torch.device(kind, 3 if kind == "cuda" else None), feeds()["one"]
    ahead = Prefetcher(feed, 0, 1, World(1, 2, 1, 2, device))
    batch = ahead.take(0).blocks
    ahead.close()
    np.testing.assert_array_equal(batch, feed.read(0, 1, 2)[0])
    to_device(batch, device)
    if kind == "cuda":  # a new thread uses GPU 0, and pinning there would take memory of rank 0's GPU
        assert calls == [("use", device), ("pin", "phigrow-feed"), ("copy", device, {"non_blocking": True})]
    else:
        assert calls == [("copy", device, {"non_blocking": False})]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Feed]:
    root = tmp_path_factory.mktemp("streamed")
    train_tokenizer(["text"], 257).save_pretrained(root / "bytes")
    rng = np.random.default_rng(0)
    for name, letters in (("a", "abc"), ("b", "xyz")):
        rows = [{"text": "".join(rng.choice(list(letters), 50))} for _ in range(60)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {name: {"ref": str(root / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 3), ("b", 1))}
    values = {"tokenizer": str(root / "bytes"), "heldout": 5, "shuffle": 8, "sources": sources}
    return lambda: open_stream(stream_settings(values), 16).make_feed(3, 12)


def test_ranks_share_the_batch_of_a_stream_and_continue_it_exactly(streamed):
    whole, shares_of = streamed(), [streamed() for _ in range(3)]
    batches, positions = [], []
    for step in range(9):
        batch, position = whole.read(step, 0, 1)
        parts = [feed.read(step, rank, 3) for rank, feed in enumerate(shares_of)]
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), batch)
        assert all(found == position for _, found in parts)
        batches.append(batch)
        positions.append(json.loads(json.dumps(position)))
    assert whole.blocks_read(9) == [81, 27]
    for start, position in ((4, positions[3]), (4, None), (9, positions[8])):
        resumed = streamed()
        resumed.seek(start, position)
        for step in range(start, 9):
            np.testing.assert_array_equal(resumed.read(step, 0, 1)[0], batches[step])
        resumed.close()
    wrong = streamed()  # negative control: the position matters
    wrong.seek(4, positions[2])
    assert not np.array_equal(wrong.read(4, 0, 1)[0], batches[4])
    for feed in (whole, wrong, *shares_of):
        feed.close()
