"""Confidence intervals of a ratio of costs over few paired seeds: a bootstrap's error, with Student's t."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

CONFIDENCE = 0.95
FEWEST_SEEDS = 3
"""Below this many seeds there is no interval: resampling one or two values only repeats them."""

RESAMPLES = 4999


def speedup_intervals(
    costs: Floats, against: Floats, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> list[Interval | None]:
    """Return an interval of ``mean(against) / mean(costs)`` for every row, over seeds that are paired.

    The seeds are resampled in pairs (``scipy.stats.bootstrap``), all rows alike. With 3 to 10 seeds the percentiles of
    the resamples cover far less than they promise: three values cannot spread further than from the smallest to the
    largest, which holds the mean of a symmetric law 3 times in 4. Taken from the bootstrap is therefore its standard
    error s of log(speedup), and the interval is

        log(speedup) +- t(n - 1) * sqrt(n / (n - 1)) * s

    with Student's t for n - 1 degrees of freedom; the root undoes the bootstrap's dividing by n (T. Hesterberg, What
    teachers should know about the bootstrap, 2015). What this covers is measured by ``benchmarks/coverage.py``.
    Where a seed's cost is 0 the logarithm has no value: the ratio of costs itself is then resampled, and is 0 at least.

    Args:
        costs: of the arm, shape (rows, seeds), not negative.
        against: of the baseline, same shape, positive.

    Returns:
        (low, high) for each row; None with fewer than ``FEWEST_SEEDS`` seeds or where a cost is not finite.

    >>> speedup_intervals(np.array([[1.0, 1.0, 1.0]]), np.array([[2.0, 2.0, 2.0]]))
    [(2.0, 2.0)]
    """
    from scipy.stats import bootstrap, t

    costs, against = np.atleast_2d(costs), np.atleast_2d(against)
    count = costs.shape[1]
    known = np.isfinite(costs).all(axis=1) & np.isfinite(against).all(axis=1)
    if count < FEWEST_SEEDS or not known.any():
        return [None] * len(costs)
    spread = t.ppf(0.5 + confidence / 2, count - 1) * math.sqrt(count / (count - 1))
    intervals: list[Interval | None] = [None] * len(costs)
    zero = (costs == 0).any(axis=1)
    for rows, logarithm in ((known & ~zero, True), (known & zero, False)):
        (places,) = np.nonzero(rows)
        if not places.size:
            continue
        mine, theirs = costs[places], against[places]
        ratio = mine.mean(axis=1) / theirs.mean(axis=1)

        def statistic(one: Floats, other: Floats, axis: int = -1, logarithm: bool = logarithm) -> Floats:
            ratios = one.mean(axis) / other.mean(axis)
            return np.asarray(np.log(ratios) if logarithm else ratios)

        error = bootstrap(
            (mine, theirs), statistic, paired=True, vectorized=True, axis=-1, n_resamples=resamples,
            method="percentile", rng=np.random.default_rng(0),
        ).standard_error  # fmt: skip
        wide = spread * error
        low, high = (ratio / np.exp(wide), ratio * np.exp(wide)) if logarithm else (ratio - wide, ratio + wide)
        for place, least, most in zip(places, np.maximum(low, 0.0), high, strict=True):
            intervals[place] = tuple(math.inf if end == 0 else 1.0 / float(end) for end in (most, least))  # type: ignore[assignment]
    return intervals
