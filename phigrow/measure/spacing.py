"""The spacing of evaluations: a cost lies between two of them, and a speedup is no closer than they allow."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from phigrow.measure.estimates import Estimate
from phigrow.measure.intervals import Interval
from phigrow.measure.wording import times

COARSE = 0.05
"""Share of a speedup that evaluations may leave open before a note says so."""


def between_evaluations(costs: NDArray[np.float64], against: NDArray[np.float64]) -> Interval | None:
    """Return the range of the speedup if each cost may lie anywhere in its span; None if a span is unknown.

    Args:
        costs, against: smallest and largest cost of every seed, shape (seeds, 2), of the arm and of the baseline.
    """
    (least, most), (least_against, most_against) = costs.mean(axis=0), against.mean(axis=0)
    if not np.isfinite([least, most, least_against, most_against]).all():
        return None
    low = math.inf if most == 0 else least_against / most
    return float(low), float(math.inf if least <= 0 else most_against / least)


def widened(interval: Interval | None, between: Interval | None) -> Interval | None:
    """Return an interval that holds the range which the spacing of evaluations leaves open."""
    if interval is None or between is None:
        return interval
    return min(interval[0], between[0]), max(interval[1], between[1])


def coarse(name: str, estimate: Estimate) -> list[str]:
    """Note that the evaluations leave a wide range of speedups open."""
    if estimate.between_evaluations is None or not math.isfinite(estimate.speedup):
        return []
    low, high = estimate.between_evaluations
    if estimate.speedup <= low * (1 + COARSE) and high <= estimate.speedup * (1 + COARSE):
        return []
    return [
        f"{name}: its evaluations are far apart, so its speedup in {estimate.unit} may lie anywhere from {times(low)} "
        f"to {times(high)}; for a closer figure, set a smaller eval_every"
    ]
