"""Confidence intervals of a ratio of costs over few paired seeds, from a bootstrap's error and Student's t."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

CONFIDENCE = 0.95
FEWEST_SEEDS = 3
"""Fewest seeds with an interval: resamples of one or two values only repeat them."""

RESAMPLES = 4999


def speedup_intervals(
    costs: Floats, against: Floats, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> list[Interval | None]:
    """Return an interval of ``mean(against) / mean(costs)`` for every row, over paired seeds.

    The seeds are resampled in pairs (``scipy.stats.bootstrap``), all rows alike. With 3 to 10 seeds, percentiles of the
    resamples are too narrow: means of three values lie between the smallest and the largest, and this range contains
    the mean of a symmetric distribution 3 times in 4. Only the standard error s of log(speedup) is therefore taken
    from the bootstrap. The interval is

        log(speedup) +- t(n - 1) * sqrt(n / (n - 1)) * s

    with Student's t for n - 1 degrees of freedom. The root corrects the bootstrap's division by n (T. Hesterberg, What
    teachers should know about the bootstrap, 2015). ``benchmarks/coverage.py`` measures the coverage. If a seed's cost
    is 0, the logarithm has no value. The ratio of costs is then resampled, and its interval ends at 0.

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
