"""Errors of a mean over sources, seeds and held-out text, and the intervals made from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phigrow.measure.intervals import CONFIDENCE, FEWEST_SEEDS, Interval
from phigrow.records.run import Key

Floats = NDArray[np.float64]


STRETCHES = 10
"""Parts of the held-out text that are resampled."""


@dataclass(frozen=True)
class MeanError:
    """Variance of a mean, its degrees of freedom, and the numbers of sources and seeds behind it."""

    variance: float
    df: float
    sources: int = 0
    seeds: int = 0


def over_runs(values: Mapping[Key, float]) -> MeanError | None:
    """Return the error of the mean of one value for each run, over seeds and, if there are several, over sources.

    With one source the variance is that of the seeds' values, divided by their number n, with n - 1 degrees of
    freedom. With A sources and S seeds, where every source has every seed, let M_a, M_s and M_e be the mean squares of
    sources, seeds and rest. The variance is

        (M_a + M_s - M_e / 4) / (A S)

    with Satterthwaite's degrees of freedom for M_a + M_s. M_e instead of M_e / 4 would be unbiased. With two sources
    and three seeds, its intervals are too narrow, and those without M_e are too wide (`benchmarks/coverage.py`).

    The table is the largest in which every source has every seed. Runs outside it count in the mean, but not in the
    error.

    Returns:
        The error; None with fewer than ``FEWEST_SEEDS`` seeds.
    """
    table = _full_table(values)
    if table is None:
        return None
    sources, seeds = table.shape
    if sources == 1:
        return MeanError(float(table[0].var(ddof=1)) / seeds, seeds - 1, 1, seeds)
    middle = table.mean()
    by_source, by_seed = table.mean(1) - middle, table.mean(0) - middle
    rest = table - middle - by_source[:, None] - by_seed
    of_sources = seeds * float((by_source**2).sum()) / (sources - 1)
    of_seeds = sources * float((by_seed**2).sum()) / (seeds - 1)
    of_rest = float((rest**2).sum()) / ((sources - 1) * (seeds - 1))
    both = of_sources + of_seeds
    if both == 0:
        return MeanError(0.0, seeds - 1, sources, seeds)
    df = both**2 / (of_sources**2 / (sources - 1) + of_seeds**2 / (seeds - 1))
    return MeanError(max(both - of_rest / 4, both / 2) / table.size, df, sources, seeds)


def _full_table(values: Mapping[Key, float]) -> Floats | None:
    """Return the largest table (sources, seeds) without a gap and with ``FEWEST_SEEDS`` seeds; None if none exists."""
    sources = list(dict.fromkeys(source for source, _ in values))
    best: Floats | None = None
    for count in range(len(sources), 0, -1):
        for chosen in itertools.combinations(sources, count):
            seeds = [s for s in dict.fromkeys(seed for _, seed in values) if all((a, s) in values for a in chosen)]
            if len(seeds) >= FEWEST_SEEDS and (best is None or count * len(seeds) > best.size):
                best = np.array([[values[a, s] for s in seeds] for a in chosen])
    return best


def over_text(effects: Floats, blocks: Floats) -> MeanError:
    """Return the error that comes from the choice of the held-out text.

    It is the variance under resampling of stretches of the text, to first order. A stretch is a tenth of the groups,
    next to each other. Single groups would give too small an error, because a document spans several of them.

    Args:
        effects: for each group, the result on its blocks alone minus the result on all blocks.
        blocks: number of blocks of each group.
    """
    shares = blocks / blocks.sum()
    stretches = np.array([part.sum() for part in np.array_split(shares * effects, min(STRETCHES, len(effects)))])
    count = len(stretches)
    return MeanError(float((stretches**2).sum()) * count / (count - 1), count - 1)


def interval_of(log_ratio: float, errors: Sequence[MeanError], confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of a ratio from independent errors of its logarithm, with Satterthwaite's t.

    >>> interval_of(0.0, [MeanError(0.0, 2)])
    (1.0, 1.0)
    """
    from scipy.special import stdtrit  # Student's t, without the seconds that scipy.stats takes to load

    variance = sum(error.variance for error in errors)
    if variance == 0:
        return math.exp(log_ratio), math.exp(log_ratio)
    df = variance**2 / sum(error.variance**2 / error.df for error in errors)
    wide = float(stdtrit(df, 0.5 + confidence / 2)) * math.sqrt(variance)
    return math.exp(log_ratio - wide), math.exp(log_ratio + wide)
