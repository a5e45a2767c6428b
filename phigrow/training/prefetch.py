"""Fetch the data of the next steps in a thread, ahead of their use."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phigrow.corpus.feed import REPEATS, Feed, Position
from phigrow.training.device_copy import host_batch, use_device

if TYPE_CHECKING:
    from torch import Tensor

    from phigrow.training.process import World

AHEAD = 2
"""Number of steps that may wait in the queue."""


@dataclass(frozen=True)
class Fetched:
    """One rank's share of one step on the host, the position after it, and the seconds that the step waited for it."""

    blocks: Tensor
    position: Position | None
    waited: float


class Prefetcher:
    """Reader of the steps of a feed ahead of their use, in a thread of this process.

    numpy, the Rust tokenizer and file reads release Python's global lock, so a thread is enough. Unlike a process it
    needs no copy of the feed. For a GPU the thread also copies each batch into pinned memory.
    """

    def __init__(self, feed: Feed, first: int, last: int, world: World, position: Position | None = None) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._feed = feed
        self._thread = threading.Thread(
            target=self._work, args=(feed, first, last, world, position), name="phigrow-feed", daemon=True
        )
        self._thread.start()

    def take(self, step: int) -> Fetched:
        """Return this rank's share of a step; steps are taken in order. Errors of the thread are raised here."""
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

    def _work(self, feed: Feed, first: int, last: int, world: World, position: Position | None) -> None:
        for step in range(first, last):
            if self._closed.is_set():
                return
            try:
                if step == first:
                    use_device(world.device)
                    feed.seek(first, position)
                blocks, after = feed.read(step, world.rank, world.size)
                item: Any = (step, host_batch(blocks, world.device), after)
            except BaseException as error:  # `take` raises it again in the main thread
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
    """Return a warning for each source that a run repeats more than `REPEATS` times."""
    return [
        f"warning: {'the text' if name == 'all' else name} is read {count:.1f} times; beyond {REPEATS} epochs repeated "
        "text is worth ever less (Muennighoff et al. 2023, arXiv:2305.16264)"
        for name, count in (epochs or {}).items()
        if count > REPEATS
    ]
