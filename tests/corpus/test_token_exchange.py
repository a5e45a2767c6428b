"""Ranks of one host that tokenise a stream for each other: the same batches, and no rank waits for one that is gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from phigrow.corpus import exchange as module
from phigrow.corpus import open_stream, stream_settings, train_tokenizer
from phigrow.corpus.exchange import TokenExchange, exchange_folder
from phigrow.corpus.feed import Feed
from phigrow.corpus.streaming import StreamBlocks
from phigrow.errors import GrowthError
from phigrow.training.data import token_exchange
from phigrow.training.process import World

RANKS, STEPS, BATCH = 3, 12, 6


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], StreamBlocks]:
    root = tmp_path_factory.mktemp("streamed")
    train_tokenizer(["text"], 257).save_pretrained(root / "bytes")
    rng = np.random.default_rng(0)
    for name, letters in (("a", "abc"), ("b", "xyz")):
        rows = [{"text": "".join(rng.choice(list(letters), rng.integers(0, 40)))} for _ in range(32)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {name: {"ref": str(root / f"{name}.jsonl"), "weight": weight} for name, weight in (("a/1", 3), ("b", 1))}
    for name, source in zip("ab", sources.values(), strict=True):
        source["ref"] = str(root / f"{name}.jsonl")
    values = {"tokenizer": str(root / "bytes"), "heldout": 5, "shuffle": 8, "sources": sources}
    return lambda: open_stream(stream_settings(values), 16)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phigrow.corpus.streaming.DOCUMENTS", 8)


def feeds(opened: Callable[[], StreamBlocks], folder: Path, wait: float = 20.0) -> list[Feed]:
    """One feed for each rank, as their processes would have them."""
    out = []
    for rank in range(RANKS):
        blocks = opened()
        blocks.share_work(TokenExchange(folder, rank, RANKS, wait=wait))
        out.append(blocks.make_feed(3, BATCH))
    return out


def read_together(made: list[Feed], first: int = 0, last: int = STEPS, position: Any = None) -> list[list[Any]]:
    """Read the steps of all feeds at the same time, and close each feed when it is done."""
    found: list[list[Any]] = [[] for _ in made]
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            made[rank].seek(first, position)
            for step in range(first, last):
                found[rank].append(made[rank].read(step, rank, RANKS))
        except BaseException as error:
            errors.append(error)
        finally:
            made[rank].close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return found


def alone(opened: Callable[[], StreamBlocks], rank: int, position: Any = None, first: int = 0) -> list[Any]:
    feed = opened().make_feed(3, BATCH)
    feed.seek(first, position)
    out = [feed.read(step, rank, RANKS) for step in range(first, STEPS)]
    feed.close()
    return out


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for (batch, position), (wanted, place) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(batch, wanted)
        assert position == place


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """Count the documents that each rank tokenises: the streams of a rank share one tokenizer."""
    counts: dict[Any, int] = {}

    class Counted:
        """A tokenizer that counts, and is the tokenizer otherwise."""

        def __init__(self, tokenizer: Tokenizer) -> None:
            vars(self)["tokenizer"] = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.tokenizer, name, value)

        @staticmethod
        def from_str(text: str) -> Counted:
            return Counted(Tokenizer.from_str(text))

        def encode_batch_fast(self, texts: list[str], **how: Any) -> Any:
            counts[self] = counts.get(self, 0) + len(texts)
            return self.tokenizer.encode_batch_fast(texts, **how)

    monkeypatch.setattr("tokenizers.Tokenizer", Counted)
    return counts


def test_ranks_read_the_same_batches_and_each_tokenises_its_share(opened, tmp_path, encoded):
    expected = [alone(opened, rank) for rank in range(RANKS)]
    by_one = max(encoded.values())
    encoded.clear()
    made = feeds(opened, tmp_path / "x")
    encoded.clear()  # held-out documents
    found = read_together(made)
    for rank in range(RANKS):
        assert_same(found[rank], expected[rank])
    assert not (tmp_path / "x").exists()
    most = max(encoded.values())
    assert most < 0.5 * by_one  # a third, and a round that is read ahead
    # From a position in the middle, as a run that resumes.
    later = read_together(feeds(opened, tmp_path / "y"), 7, STEPS, json.loads(json.dumps(found[0][6][1])))
    for rank in range(RANKS):
        assert_same(later[rank], expected[rank][7:])
    assert not np.array_equal(expected[0][0][0], expected[1][0][0])  # negative control
    assert max(place["start"]["epoch"] for place in expected[0][-1][1]["streams"]) == 1  # the text has started over


def test_a_rank_that_is_gone_or_late_stops_no_other(opened, tmp_path, encoded):
    expected = [alone(opened, rank) for rank in range(RANKS)]
    gone = feeds(opened, tmp_path / "gone")
    gone.pop().close()
    for rank, found in enumerate(read_together(gone)):
        assert_same(found, expected[rank])
    late = feeds(opened, tmp_path / "late", wait=0.001)
    found = read_together(late[:1])[0]  # the others never read
    assert_same(found, expected[0])


def test_an_exchange_without_space_is_none(opened, tmp_path, monkeypatch):
    made = feeds(opened, tmp_path / "x")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "hardlink_to", full)
    began = time.monotonic()
    for rank, found in enumerate(read_together(made)):
        assert_same(found, alone(opened, rank))
    assert time.monotonic() - began < 15  # nobody waits for tokens that do not come


def test_a_rank_with_an_error_ends_alone(opened, tmp_path, monkeypatch):
    made = feeds(opened, tmp_path / "x")
    real = made[1].read

    def broken(step: int, *more: int) -> Any:
        if step == 2:
            raise GrowthError("the text cannot be read", where="here")
        return real(step, *more)

    monkeypatch.setattr(made[1], "read", broken)
    with pytest.raises(GrowthError, match="the text cannot be read"):
        read_together(made)
    assert not (tmp_path / "x").exists()


def test_hosts_with_unequal_numbers_of_ranks_take_part_in_the_same_collectives(tmp_path, monkeypatch):
    sizes = [1, 2, 2]  # the first host has one rank
    barrier, told = threading.Barrier(3), {}
    calls: dict[int, list[str]] = {rank: [] for rank in range(3)}

    def gather(world: World, mine: Any) -> list[Any]:
        calls[world.rank].append("gather")
        told[world.rank] = mine
        barrier.wait(10)
        out = [told[rank] for rank in range(3)]
        barrier.wait(10)
        return out

    def agreed(world: World, work: Any) -> str:
        calls[world.rank].append("broadcast")
        return str(gather(world, "token")[0])

    monkeypatch.setattr("phigrow.training.data.exchange_folder", lambda token: tmp_path / token)
    monkeypatch.setattr("phigrow.training.data.on_rank_zero", agreed)
    monkeypatch.setattr("phigrow.training.data.gather_objects", gather)
    made: dict[int, Any] = {}

    def work(rank: int) -> None:
        device: Any = None
        made[rank] = token_exchange(World(rank, 3, max(0, rank - 1), sizes[rank], device))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert calls[0] == calls[1] == calls[2] == ["gather", "broadcast", "gather", "gather", "gather"]
    assert made[0] is None
    assert [(made[rank].rank, made[rank].size) for rank in (1, 2)] == [(0, 2), (1, 2)]
    for rank in (1, 2):
        made[rank].close()


def test_ranks_agree_on_a_folder_or_on_none(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "exchange_folder", lambda token: tmp_path / token)
    monkeypatch.setattr("phigrow.training.data.exchange_folder", lambda token: tmp_path / token)
    monkeypatch.setattr("phigrow.training.data.on_rank_zero", lambda world, work: "agreed")
    device: Any = None
    assert token_exchange(World(0, 1, 0, 1, device)) is None

    def gather(world: World, mine: Any) -> list[Any]:
        if mine is None:
            TokenExchange(tmp_path / "agreed", 1, 2)
            return [None, None]
        return [mine, True]

    monkeypatch.setattr("phigrow.training.data.gather_objects", gather)
    made = token_exchange(World(0, 2, 0, 2, device))
    assert made is not None
    assert (made.folder, made.is_mine(4), made.is_mine(5)) == (tmp_path / "agreed", True, False)
    made.close()
    monkeypatch.setattr("phigrow.training.data.gather_objects", lambda world, mine: [mine, mine])
    monkeypatch.setattr("phigrow.training.data.on_rank_zero", lambda world, work: "elsewhere")
    assert token_exchange(World(0, 2, 0, 2, device)) is None  # the folder of the other rank is not there


def test_folders_that_were_left_behind_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Path", lambda name: tmp_path)
    left = TokenExchange(exchange_folder("old"), 0, 2)
    assert exchange_folder("new") == tmp_path / "phigrow-tokens-new"
    assert left.folder.is_dir()
    monkeypatch.setattr(module, "STALE_SECONDS", -1.0)
    exchange_folder("new")
    assert not left.folder.exists()
