"""Choose learning rates by successive halving over runs of full length, on a grid that widens at its edges.

Every arm tries the same grid. At each length but the last, the better half of the rates goes on. Where the best rate is
the smallest or largest that was tried, one more rate beyond it is trained to the end, until the best lies inside.
(K. Jamieson and A. Talwalkar, Non-stochastic best arm identification, 2016.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from phigrow.study.settings import Sweep

Edge = Literal["low", "high"]


@dataclass
class Rates:
    """State of one arm's choice.

    Attributes:
        tried: for each rate, the number of the sweep's lengths to which it is trained, running ones included.
        losses: for each rate, its held-out losses at the finished lengths; infinite if it diverged.
        undecided: for each length, the number of runs whose rates are not known yet.
        best: the chosen rate; None while runs are missing, or if all rates diverged.
        edge: "low" or "high" if the best rate is the smallest or the largest that was tried.
    """

    tried: dict[float, int] = field(default_factory=dict)
    losses: dict[float, list[float]] = field(default_factory=dict)
    undecided: tuple[int, ...] = ()
    best: float | None = None
    edge: Edge | None = None

    def record(self, sweep: Sweep) -> dict[str, Any]:
        """Return the entry for the records of runs that train at the chosen rate."""
        if not sweep.halves:
            return sweep.record()
        losses = {f"{rate:g}": [_finite(loss) for loss in self.losses[rate]] for rate in sorted(self.losses)}
        return sweep.record() | {"lr": sorted(self.tried), "edge": self.edge, "losses": losses}


def choose(sweep: Sweep, loss_of: Callable[[float, int], float | None]) -> Rates:
    """Return the best rate, or the rates that must still be trained to choose it.

    Args:
        sweep: the grid and the lengths.
        loss_of: returns the held-out loss of a rate at the length with this index; None while it is missing.

    >>> sweep = Sweep(lr=(1e-3, 2e-3, 4e-3), steps=(10, 40), seeds=(0,))
    >>> choose(sweep, lambda rate, length: abs(rate - 2e-3)).best
    0.002
    """
    rates = Rates()
    alive = sorted(sweep.lr)
    for length in range(len(sweep.steps)):
        missing = [rate for rate in alive if _read(rates, loss_of, rate, length) is None]
        if missing:
            left, undecided = len(alive), []
            for _ in sweep.steps[length + 1 :]:
                left = _half(left)
                undecided.append(left)
            rates.undecided = (*[0] * (length + 1), *undecided)
            return rates
        if length < len(sweep.steps) - 1:
            alive = sorted(alive, key=lambda rate: rates.losses[rate][-1])[: _half(len(alive))]
    finals = {rate: rates.losses[rate][-1] for rate in alive}
    rates.undecided = (0,) * len(sweep.steps)
    for _ in range(sweep.widen):
        edge = _edge(finals, rates)
        if edge is None:
            break
        rate = _beyond(sorted(rates.tried), edge)
        for length in range(len(sweep.steps)):
            if (loss := _read(rates, loss_of, rate, length)) is None:
                rates.tried[rate] = len(sweep.steps)  # it is trained at all lengths, which share a trunk
                return rates
        finals[rate] = loss  # type: ignore[assignment]
    best = min(finals, key=lambda rate: finals[rate])
    rates.best, rates.edge = best if math.isfinite(finals[best]) else None, _edge(finals, rates)
    return rates


def _read(rates: Rates, loss_of: Callable[[float, int], float | None], rate: float, length: int) -> float | None:
    rates.tried[rate] = max(rates.tried.get(rate, 0), length + 1)
    loss = loss_of(rate, length)
    if loss is not None:
        loss = math.inf if math.isnan(loss) else loss
        rates.losses.setdefault(rate, []).append(loss)
    return loss


def _edge(finals: dict[float, float], rates: Rates) -> Edge | None:
    """Return the edge at which the best rate lies, None if it lies between two rates that were tried."""
    best, tried = min(finals, key=lambda rate: finals[rate]), sorted(rates.tried)
    if len(tried) < 2:
        return None
    if math.isinf(finals[best]):  # all rates diverged; smaller ones may not
        return "low"
    return "low" if best == tried[0] else "high" if best == tried[-1] else None


def _beyond(tried: list[float], edge: Edge) -> float:
    """Return the next rate beyond the end of a grid, at the same ratio as the last two rates."""
    rate = tried[0] ** 2 / tried[1] if edge == "low" else tried[-1] ** 2 / tried[-2]
    return float(f"{rate:.3g}")


def _half(count: int) -> int:
    return (count + 1) // 2


def _finite(loss: float) -> float | None:
    return round(loss, 6) if math.isfinite(loss) else None
