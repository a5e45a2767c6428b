"""Feeds: the data of every step, a function of seed and step, from packed blocks or from streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from phigrow.corpus.order import (
    WHOLE,
    Indices,
    Part,
    Shares,
    apportion,
    epoch_rows,
    mixed_rows,
    rank_rows,
    shares,
    step_rows,
)
from phigrow.corpus.splits import MixedSource, Split

Position = dict[str, Any]

REPEATS = 4
"""Epochs up to which repeated text is worth about as much as new text (Muennighoff et al. 2023, arXiv:2305.16264)."""


class Feed(Protocol):
    """Data of every step, as a function of seed and step. Only a stream also needs its position."""

    sources: list[str]

    def rows(self, step: int) -> Indices:
        """Return the numbers of the blocks in the global batch of a step, int64 ``[batch]``."""
        ...

    def seek(self, step: int, position: Position | None) -> None:
        """Go to a step, with the position that `read` returned for the step before, if it returned one."""
        ...

    def read(self, step: int, rank: int, world: int) -> tuple[npt.NDArray[np.int64], Position | None]:
        """Return this rank's share of the global batch of a step, in order, and the position after it."""
        ...

    def blocks_read(self, step: int, first: int = 0) -> list[int]:
        """Return the number of blocks of each source that the steps from ``first`` to ``step - 1`` read."""
        ...

    def resume_count(self, step: int, blocks: list[int], first: int = 0) -> None:
        """Take over what `blocks_read` returned in an earlier launch, so that these steps are not counted again."""
        ...

    def epochs(self, step: int) -> dict[str, float] | None:
        """Return the epochs of each source in the first ``step`` steps; None if its size is not known."""
        ...

    def notices(self, steps: int, *, ended: bool = False) -> list[str]:
        """Return lines for the user on what was met in the text since the last call.

        Args:
            steps: of the whole run.
            ended: the run reads no more.
        """
        ...

    def close(self) -> None:
        """Close the files that are open."""
        ...


class BlockFeed:
    """Steps from packed blocks on disk: one set, or a mixture by weight. Of each source, only ``part`` is read."""

    def __init__(self, train: Split, mixture: Sequence[MixedSource], seed: int, batch: int, part: Part = WHOLE) -> None:
        self.train, self.mixture, self.seed, self.batch, self.part = train, mixture, seed, batch, part
        self.weights = shares([source.weight for source in self.mixture]) if self.mixture else ()
        self.sources: list[str] = [source.name for source in self.mixture] or list(self.train.sources)
        self._known: dict[int, tuple[int, Indices]] = {}  # first step -> rows counted, and blocks of each source
        self._epoch: Indices | None = None

    def rows(self, step: int) -> Indices:
        """See `Feed`."""
        if self.mixture:
            sources = [source.train for source in self.mixture]
            return mixed_rows(self.seed, step, self.batch, self.weights, sources, self.part)
        return step_rows(self.seed, step, self.batch, len(self.train), self.part)

    def seek(self, step: int, position: Position | None) -> None:
        """See `Feed`. Blocks on disk need no seek."""

    def read(self, step: int, rank: int, world: int) -> tuple[npt.NDArray[np.int64], None]:
        """See `Feed`."""
        (mine,) = rank_rows(self.rows(step), rank, world, self.batch // world)
        return self.train.batch(mine), None

    def blocks_read(self, step: int, first: int = 0) -> list[int]:
        """See `Feed`. A call with a later step continues the count of the call before."""
        if self.mixture:
            return _apportioned(self.weights, first * self.batch, step * self.batch)
        if len(self.sources) < 2:
            return [(step - first) * self.batch]
        end = step * self.batch
        done, counts = self._known.get(first, (first * self.batch, np.zeros(len(self.sources), np.int64)))
        if done > end:
            done, counts = first * self.batch, np.zeros(len(self.sources), np.int64)
        counts = counts + self._count_rows(done, end)
        self._known[first] = (end, counts)
        return [int(count) for count in counts]

    def resume_count(self, step: int, blocks: list[int], first: int = 0) -> None:
        """See `Feed`. At 80 % of 1.4T tokens in several sources a new count would take minutes."""
        self._known[first] = (step * self.batch, np.array(blocks, np.int64))

    def epochs(self, step: int) -> dict[str, float]:
        """See `Feed`."""
        if not self.mixture:
            return {"all": step * self.batch / self.part.size(len(self.train))}
        counts = self.blocks_read(step)
        sizes = [self.part.size(len(source.train)) for source in self.mixture]
        return {name: n / size for name, n, size in zip(self.sources, counts, sizes, strict=True)}

    def notices(self, steps: int, *, ended: bool = False) -> list[str]:
        """See `Feed`. The number of epochs is known before the run starts."""
        return []

    def close(self) -> None:
        """See `Feed`."""

    def _count_rows(self, start: int, end: int) -> Indices:
        """Count the blocks of each source in rows ``start`` to ``end - 1``; those of whole epochs need no order."""
        blocks, counts = self.part.size(len(self.train)), np.zeros(len(self.sources), np.int64)
        while start < end:
            rounds = 0 if start % blocks else (end - start) // blocks
            if rounds:
                counts, start = counts + rounds * self._epoch_counts(), start + rounds * blocks
                continue
            stop = min(end, start - start % blocks + blocks, start + 2**20)
            counts, start = counts + self._count(epoch_rows((self.seed,), start, stop, blocks)), stop
        return counts

    def _epoch_counts(self) -> Indices:
        """Count the blocks of each source in one epoch, once, in pieces: a run may have hundreds of millions."""
        if self._epoch is None:
            blocks = self.part.size(len(self.train))
            pieces = (np.arange(low, min(low + 2**20, blocks)) for low in range(0, blocks, 2**20))
            self._epoch = np.sum([self._count(places) for places in pieces], axis=0)
        return self._epoch

    def _count(self, places: Indices) -> Indices:
        rows = self.part.numbers(places)
        return np.bincount(self.train.source_of(rows), minlength=len(self.sources)).astype(np.int64)


def _apportioned(weights: Shares, start: int, end: int) -> list[int]:
    """Return the number of rows of each source among the rows ``start`` to ``end - 1`` of a mixture."""
    return [after - before for before, after in zip(apportion(weights, start), apportion(weights, end), strict=True)]


class BlockStream(Protocol):
    """Blocks of one source in order, from a position that can be saved."""

    @property
    def epoch_blocks(self) -> float | None:
        """Number of blocks of an epoch, once the text has started over and it is known."""

    @property
    def left_out(self) -> str:
        """One line on documents without text that were read; empty if there are none."""

    def seek(self, position: Position) -> None:
        """Go to a position."""

    def position(self) -> Position:
        """Return the position of the next block."""

    def take(self, blocks: int) -> npt.NDArray[np.uint32]:
        """Return the next blocks, uint32 ``[blocks, seq_len + 1]``."""

    def close(self) -> None:
        """Close the files."""


class StreamFeed:
    """Steps from streams: one stream for each name in ``weights``.

    Every rank reads all streams and keeps its share, so the text does not depend on the number of ranks. The ranks of a
    host can tokenise for each other, see `phigrow.corpus.exchange`. As with blocks on disk, `apportion` distributes the
    rows of a step over the streams.
    """

    def __init__(self, weights: Mapping[str, float], streams: Sequence[BlockStream], seed: int, batch: int) -> None:
        self.streams, self.seed, self.batch = streams, seed, batch
        self.weights = shares(list(weights.values()))
        self.sources = list(weights)
        self._step = 0
        self._repeated: set[str] = set()

    def rows(self, step: int) -> Indices:
        """See `Feed`. Blocks of a stream have the numbers of their rows in the run."""
        return np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64)

    def seek(self, step: int, position: Position | None) -> None:
        """See `Feed`. Without a position, the steps before it are read again and dropped."""
        self._step = 0
        if position is not None:
            for stream, start in zip(self.streams, position["streams"], strict=True):
                stream.seek(start)
            self._step = step
        while self._step < step:
            self.read(self._step, 0, 1)

    def read(self, step: int, rank: int, world: int) -> tuple[npt.NDArray[np.int64], Position]:
        """See `Feed`. Steps must be read in order."""
        assert step == self._step, f"step {step} asked of a stream at {self._step}"
        counts = np.diff(
            [apportion(self.weights, rows) for rows in (step * self.batch, (step + 1) * self.batch)], axis=0
        )
        taken = [stream.take(int(count)) for stream, count in zip(self.streams, counts[0], strict=True)]
        self._step += 1
        whole = np.concatenate(taken)[np.random.default_rng([self.seed, step, 2**32 - 1]).permutation(self.batch)]
        (mine,) = rank_rows(np.arange(self.batch), rank, world, self.batch // world)
        return whole[mine].astype(np.int64), {"streams": [stream.position() for stream in self.streams]}

    def blocks_read(self, step: int, first: int = 0) -> list[int]:
        """See `Feed`."""
        return _apportioned(self.weights, first * self.batch, step * self.batch)

    def resume_count(self, step: int, blocks: list[int], first: int = 0) -> None:
        """See `Feed`. Weights alone give the counts."""

    def epochs(self, step: int) -> None:
        """See `Feed`. The length of a stream is not known."""
        return None

    def notices(self, steps: int, *, ended: bool = False) -> list[str]:
        """See `Feed`. A source is named once, when its text has started over; documents without text at the end."""
        lines = []
        for name, stream, blocks in zip(self.sources, self.streams, self.blocks_read(steps), strict=True):
            length = stream.epoch_blocks
            if length is not None and blocks > length and name not in self._repeated:
                self._repeated.add(name)
                lines.append(
                    f"warning: the stream {name} starts over after {length:,.0f} blocks, so this run reads it "
                    f"{blocks / length:.1f} times"
                )
                if blocks > REPEATS * length:
                    lines[-1] += (
                        f"; beyond {REPEATS} epochs repeated text is worth ever less (Muennighoff et al. 2023, "
                        "arXiv:2305.16264)"
                    )
            if ended and stream.left_out:
                lines.append(f"stream {name}: {stream.left_out}")
        return lines

    def close(self) -> None:
        """See `Feed`."""
        for stream in self.streams:
            stream.close()


class LaterFeed:
    """A feed that begins at a later step of another feed, for a run that continues another run's data.

    Blocks read are counted from that step. Epochs are counted from the beginning of the other feed, because they count
    the repetitions of the text.
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

    def blocks_read(self, step: int, first: int = 0) -> list[int]:
        """See `Feed`."""
        return self.feed.blocks_read(self.first + step, self.first + first)

    def resume_count(self, step: int, blocks: list[int], first: int = 0) -> None:
        """See `Feed`."""
        self.feed.resume_count(self.first + step, blocks, self.first + first)

    def epochs(self, step: int) -> dict[str, float] | None:
        """See `Feed`."""
        return self.feed.epochs(self.first + step)

    def notices(self, steps: int, *, ended: bool = False) -> list[str]:
        """See `Feed`."""
        return self.feed.notices(self.first + steps, ended=ended)

    def close(self) -> None:
        """See `Feed`."""
        self.feed.close()
