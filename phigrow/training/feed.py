"""The data of every step, from any source, fetched ahead of the step in a thread."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from phigrow.training.order import Indices, apportion, epoch_rows, mixed_rows, rank_rows, shares, step_rows

AHEAD = 2
"""Steps that are fetched ahead: one in hand, one being read."""

REPEATS = 4
"""Epochs up to which repeated text is worth about as much as new text (Muennighoff et al. 2023, arXiv:2305.16264)."""

Position = dict[str, Any]


class Feed(Protocol):
    """Source of the data of every step, a function of seed and step. Only a stream also needs its position."""

    sources: list[str]

    def rows(self, step: int) -> Indices:
        """The numbers of the blocks of the global batch of a step, int64 ``[batch]``."""
        ...

    def seek(self, step: int, position: Position | None) -> None:
        """Go to a step; ``position`` is what `read` gave with the step before, where there is one."""
        ...

    def read(self, step: int, rank: int, world: int) -> tuple[npt.NDArray[np.int64], Position | None]:
        """This rank's share of the global batch of a step, in order, and the position after it."""
        ...

    def blocks_read(self, step: int) -> list[int]:
        """Blocks that the first ``step`` steps read of each source."""
        ...

    def epochs(self, step: int) -> dict[str, float] | None:
        """Epochs of each source in the first ``step`` steps; None where its size is not known."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


class BlockFeed:
    """Steps from packed blocks on disk: one set, or a mixture by weight."""

    def __init__(self, blocks: Any, seed: int, batch: int) -> None:
        self.train, self.seed, self.batch = blocks.train, seed, batch
        self.mixture = blocks.mixture
        self.weights = shares([source.weight for source in self.mixture]) if self.mixture else ()
        self.sources: list[str] = [source.name for source in self.mixture] or list(self.train.sources)
        self._known = (0, np.zeros(len(self.sources), np.int64))

    def rows(self, step: int) -> Indices:
        """See `Feed`."""
        if self.mixture:
            return mixed_rows(self.seed, step, self.batch, self.weights, [source.train for source in self.mixture])
        return step_rows(self.seed, step, self.batch, len(self.train))

    def seek(self, step: int, position: Position | None) -> None:
        """See `Feed`; blocks on disk are read anywhere."""

    def read(self, step: int, rank: int, world: int) -> tuple[npt.NDArray[np.int64], None]:
        """See `Feed`."""
        (mine,) = rank_rows(self.rows(step), rank, world, self.batch // world)
        return self.train.batch(mine), None

    def blocks_read(self, step: int) -> list[int]:
        """See `Feed`. Asked step after step it counts on; asked once it counts from the start."""
        if self.mixture:
            return apportion(self.weights, step * self.batch)
        if len(self.sources) < 2:
            return [step * self.batch]
        end, blocks = step * self.batch, len(self.train)
        done, counts = self._known
        epoch = end // blocks
        if not epoch * blocks <= done <= end:  # whole epochs need no look at their order
            done, counts = epoch * blocks, epoch * self._count(np.arange(blocks)) if epoch else np.zeros_like(counts)
        for low in range(done, end, 2**20):
            counts = counts + self._count(epoch_rows((self.seed,), low, min(low + 2**20, end), blocks))
        self._known = (end, counts)
        return [int(count) for count in counts]

    def epochs(self, step: int) -> dict[str, float]:
        """See `Feed`."""
        if not self.mixture:
            return {"all": step * self.batch / len(self.train)}
        counts = self.blocks_read(step)
        return {source.name: n / len(source.train) for source, n in zip(self.mixture, counts, strict=True)}

    def close(self) -> None:
        """See `Feed`."""

    def _count(self, rows: Indices) -> Indices:
        return np.bincount(self.train.source_of(rows), minlength=len(self.sources)).astype(np.int64)


class StreamFeed:
    """Steps from streams: every rank reads all of them and keeps its share, so that any number of ranks reads the same.

    Which streams a step reads is `apportion`'s, as for blocks on disk.
    """

    def __init__(self, blocks: Any, seed: int, batch: int) -> None:
        from phigrow.corpus.streaming import ShuffledStream

        sources, size = blocks.settings.sources, blocks.settings.shuffle
        self.seed, self.batch = seed, batch
        self.weights = shares([source.weight for source in sources])
        self.sources = [source.name for source in sources]
        self.streams = [ShuffledStream(stream, size, (seed, key)) for key, stream in enumerate(blocks.streams)]
        self._step = 0

    def rows(self, step: int) -> Indices:
        """See `Feed`: a stream's blocks have no numbers but those of the rows of the run."""
        return np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64)

    def seek(self, step: int, position: Position | None) -> None:
        """See `Feed`. Without a position the steps before are read and dropped, which takes as long as it took."""
        self._step = 0
        if position is not None:
            for stream, place in zip(self.streams, position["streams"], strict=True):
                stream.seek(place)
            self._step = step
        while self._step < step:
            self.read(self._step, 0, 1)

    def read(self, step: int, rank: int, world: int) -> tuple[npt.NDArray[np.int64], Position]:
        """See `Feed`; steps are read in order."""
        assert step == self._step, f"step {step} asked of a stream at {self._step}"
        counts = np.diff(
            [apportion(self.weights, rows) for rows in (step * self.batch, (step + 1) * self.batch)], axis=0
        )
        taken = [stream.take(int(count)) for stream, count in zip(self.streams, counts[0], strict=True)]
        self._step += 1
        whole = np.concatenate(taken)[np.random.default_rng([self.seed, step, 2**32 - 1]).permutation(self.batch)]
        (mine,) = rank_rows(np.arange(self.batch), rank, world, self.batch // world)
        return whole[mine].astype(np.int64), {"streams": [stream.position() for stream in self.streams]}

    def blocks_read(self, step: int) -> list[int]:
        """See `Feed`."""
        return apportion(self.weights, step * self.batch)

    def epochs(self, step: int) -> None:
        """See `Feed`: how long a stream is, is not known."""
        return None

    def close(self) -> None:
        """See `Feed`."""
        for stream in self.streams:
            stream.stream.close()


class LaterFeed:
    """A feed whose step 0 is a later step of another: that of a run which goes on where another stood.

    What was read counts from there; epochs count from the beginning, because text that was read is read again.
    """

    def __init__(self, feed: Feed, first: int) -> None:
        self.feed, self.first, self.sources = feed, first, feed.sources

    def rows(self, step: int) -> Indices:
        """See `Feed`."""
        return self.feed.rows(self.first + step)

    def seek(self, step: int, position: Position | None) -> None:
        """See `Feed`."""
        self.feed.seek(self.first + step, position)

    def read(self, step: int, rank: int, world: int) -> tuple[npt.NDArray[np.int64], Position | None]:
        """See `Feed`."""
        return self.feed.read(self.first + step, rank, world)

    def blocks_read(self, step: int) -> list[int]:
        """See `Feed`."""
        before, after = (self.feed.blocks_read(place) for place in (self.first, self.first + step))
        return [end - start for start, end in zip(before, after, strict=True)]

    def epochs(self, step: int) -> dict[str, float] | None:
        """See `Feed`."""
        return self.feed.epochs(self.first + step)

    def close(self) -> None:
        """See `Feed`."""
        self.feed.close()


@dataclass(frozen=True)
class Fetched:
    """One rank's share of one step, the position after it, and the seconds that the step waited for it."""

    blocks: npt.NDArray[np.int64]
    position: Position | None
    waited: float


class Prefetcher:
    """Reads the steps of a feed ahead of their use, in a thread of this process.

    numpy, the Rust tokenizer and the files let go of the interpreter while they work, so a thread is enough, and
    unlike a process it needs no copy of the feed.
    """

    def __init__(
        self, feed: Feed, first: int, last: int, rank: int, world: int, position: Position | None = None
    ) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._feed = feed
        self._thread = threading.Thread(
            target=self._work, args=(feed, first, last, rank, world, position), name="phigrow-feed", daemon=True
        )
        self._thread.start()

    def take(self, step: int) -> Fetched:
        """Return the share of a step; steps are taken in order. What went wrong in the thread is raised here."""
        began = time.perf_counter()
        item = self._queue.get()
        waited = time.perf_counter() - began
        if isinstance(item, BaseException):
            raise item
        number, blocks, position = item
        assert number == step, f"step {step} asked, {number} fetched"
        return Fetched(blocks, position, waited)

    def close(self) -> None:
        """Stop reading; the thread ends."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._feed.close()

    def _work(self, feed: Feed, first: int, last: int, rank: int, world: int, position: Position | None) -> None:
        for step in range(first, last):
            if self._closed.is_set():
                return
            try:
                if step == first:
                    feed.seek(first, position)
                item: Any = (step, *feed.read(step, rank, world))
            except BaseException as error:  # raised again in the loop, which is where it can be reported
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return


def repeated(epochs: dict[str, float] | None) -> list[str]:
    """Sentences that warn of sources that a run repeats more often than helps."""
    return [
        f"warning: {'the text' if name == 'all' else name} is read {count:.1f} times; beyond {REPEATS} epochs repeated "
        "text is worth ever less (Muennighoff et al. 2023, arXiv:2305.16264)"
        for name, count in (epochs or {}).items()
        if count > REPEATS
    ]
