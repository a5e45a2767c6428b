"""Anomalies in the steps of a run: losses that jump, values that are not finite, and a rank that is slow."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    from phigrow.training.step import Reading

SPIKE_WINDOW, SPIKE_FEWEST = 100, 20
SPIKE_SIGMAS = 6.0
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


class Spikes:
    """Detector of losses that lie 6 standard deviations above the median of the last 100 (at least 20).

    The deviation is 1.4826 times the median absolute deviation. So neither a spike nor the steep beginning of a curve
    hides the next spike. If the loss stays high, its new level becomes the median after 50 steps, and the flags end.

    >>> spikes = Spikes(2.0 + 0.01 * (i % 7) for i in range(100))
    >>> [spikes.is_spike(loss) for loss in (2.05, 2.5, 2.04)]
    [False, True, False]
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._last = deque((loss for loss in losses if math.isfinite(loss)), maxlen=SPIKE_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Return true if this loss is a spike. Every finite loss joins the window."""
        if not math.isfinite(loss):
            return False
        is_spike = False
        if len(self._last) >= SPIKE_FEWEST:
            middle = statistics.median(self._last)
            spread = _MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in self._last)
            is_spike = loss > middle + SPIKE_SIGMAS * spread
        self._last.append(loss)
        return is_spike


SLOW_WINDOW, SLOW_FACTOR, SLOW_SHARE, SLOW_LOSS = 100, 1.2, 0.8, 0.02


class SlowRanks:
    """Detector of a rank that is the slowest in 80 % of the last 100 steps, and 20 % slower than the median in the sum.

    All ranks wait for the slowest one at every step. A rank that is slow once, for example because the system was busy,
    does not count. Nor does one that costs less than 2 % of the steps' seconds, as a wait of a millisecond for data.
    A slow rank is reported once, and again after another one was.

    >>> slow = SlowRanks()
    >>> [slow.find((1.0, 1.0, 1.3), 2.5) for _ in range(100)][-2:]
    [None, (2, 1.3)]
    """

    def __init__(self) -> None:
        self._last: deque[tuple[int, float, float, float]] = deque(maxlen=SLOW_WINDOW)
        self._reported: int | None = None

    def find(self, seconds: Sequence[float], step_seconds: float) -> tuple[int, float] | None:
        """Return a rank that is slow and was not reported, with the ratio of its time to the median; else None.

        Args:
            seconds: own time of each rank in a step, see `phigrow.training.step.OwnTime`.
            step_seconds: of the whole step.
        """
        self._last.append((*slowest(seconds), step_seconds))
        if len(self._last) < SLOW_WINDOW:
            return None
        rank, times = Counter(rank for rank, *_ in self._last).most_common(1)[0]
        slow = sum(own for each, own, *_ in self._last if each == rank)
        middle = sum(median for each, _, median, _ in self._last if each == rank)
        whole = sum(step for *_, step in self._last)
        if rank == self._reported or times < SLOW_SHARE * SLOW_WINDOW or not slow > SLOW_FACTOR * middle > 0:
            return None
        if slow - middle < SLOW_LOSS * whole:
            return None
        self._reported = rank
        return rank, slow / middle


def slowest(seconds: Sequence[float]) -> tuple[int, float, float]:
    """Return the slowest rank, its seconds, and the median of all ranks.

    >>> slowest((1.0, 1.5, 1.1))
    (1, 1.5, 1.1)
    """
    rank = max(range(len(seconds)), key=lambda each: seconds[each])
    return rank, seconds[rank], statistics.median(seconds)


class NonFinite:
    """Counter of steps that were skipped because a loss or a gradient was not finite; equal on every rank."""

    def __init__(self, limit: int, dtype: str) -> None:
        self.limit, self.dtype, self.count = limit, dtype, 0

    def is_overflow(self, reading: Reading) -> bool:
        """Return true if fp16's loss scaler skipped the step. It searches its scale by overflows, so this is normal."""
        return self.dtype == "fp16" and reading.skipped and not reading.broken

    def check(self, reading: Reading, rows: Iterable[int]) -> None:
        """Count a skipped step, and end the run at the limit.

        Args:
            reading: measurements of the step.
            rows: the blocks of its global batch.

        Raises:
            GrowthError: the number of skipped steps of this launch has reached the limit. Every rank raises it.
        """
        if not reading.skipped or self.is_overflow(reading):
            return
        self.count += 1
        if not self.limit or self.count < self.limit:
            return
        reason = f"the loss is not finite in blocks {_listed(reading.broken)}"
        if not reading.broken:
            reason = f"the loss is {reading.loss:.4g} and a gradient is not finite, over blocks {_listed(rows)}"
        raise GrowthError(
            f"{self.count} steps of this launch were skipped, the last one at step {reading.step}",
            where="nonfinite_limit",
            why=reason,
            fix="look at these blocks and at the records before them; lower lr or grad_clip, train in bf16 or fp32"
            " instead of fp16, or raise nonfinite_limit. The same command resumes from the last checkpoint",
        )


def _listed(rows: Iterable[int], most: int = 32) -> str:
    words = [str(row) for row in rows]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
