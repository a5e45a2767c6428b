"""What a comparison holds: estimates in a unit and an accounting, arms over their seeds, the comparison itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from phigrow.measure.records import Run

Unit = Literal["tokens", "flops", "seconds"]
Accounting = Literal["sunk", "charged"]
UNITS: tuple[Unit, ...] = ("tokens", "flops", "seconds")
ACCOUNTINGS: tuple[Accounting, ...] = ("sunk", "charged")

STEPS = (0, 1, 10, 100)
"""Numbers of updates after which the held-out loss is reported where it was recorded."""

CONFIDENCE = 0.95
FEWEST_SEEDS = 3
"""Below this many seeds there is no interval: resampling one or two values only repeats them."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """What an arm spent to reach the target, against what the baseline spent, in one unit and one accounting.

    ``cost`` and ``baseline_cost`` are means over the paired seeds, in tokens, FLOPs or seconds; nan where the cost of
    the source was not recorded. Where ``censored``, ``cost`` is a lower bound and ``speedup`` and ``saving`` are
    upper bounds.
    """

    unit: Unit
    accounting: Accounting
    cost: float
    baseline_cost: float
    censored: bool
    speedup_interval: Interval | None = None

    @property
    def speedup(self) -> float:
        """``baseline_cost / cost``; infinite for an arm that is at the target before it spends anything.

        >>> round(Estimate("tokens", "sunk", 194e9, 300e9, False).speedup, 2)
        1.55
        """
        return math.inf if self.cost == 0 else self.baseline_cost / self.cost

    @property
    def saving(self) -> float:
        """``1 - cost / baseline_cost``, a fraction; negative for an arm that needs more.

        >>> round(Estimate("tokens", "sunk", 194e9, 300e9, False).saving, 2)
        0.35
        """
        return 1.0 - self.cost / self.baseline_cost

    @property
    def saving_interval(self) -> Interval | None:
        """The interval of the saving: the same resamples, since ``saving = 1 - 1 / speedup`` for every one."""
        if self.speedup_interval is None:
            return None
        low, high = self.speedup_interval
        return 1.0 - 1.0 / low, 1.0 - 1.0 / high


@dataclass(frozen=True)
class Arm:
    """One arm over its seeds. Losses are nats a token on held-out text, means over the seeds.

    ``loss_at`` has the steps of ``STEPS`` that every seed recorded. ``estimates`` is empty for the baseline.
    ``notes`` are sentences a reader must see: censored, diverged or unfinished runs, missing source costs.
    """

    name: str
    runs: tuple[Run, ...]
    final_loss: float
    loss_at: dict[int, float]
    estimates: tuple[Estimate, ...] = ()
    censored_seeds: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return tuple(run.seed for run in self.runs)

    @property
    def initial_loss(self) -> float | None:
        """The held-out loss before the first update; None where it was not recorded."""
        return self.loss_at.get(0)

    def estimate(self, unit: Unit, accounting: Accounting) -> Estimate:
        """The estimate in one unit and accounting; KeyError for the baseline, which has none."""
        for estimate in self.estimates:
            if (estimate.unit, estimate.accounting) == (unit, accounting):
                return estimate
        raise KeyError((unit, accounting))

    @property
    def interval_note(self) -> str:
        """In words, what the intervals rest on: ``1 seed: no interval``."""
        count = len(self.runs)
        if count < FEWEST_SEEDS:
            return f"{count} seed{'s' if count > 1 else ''}: no interval"
        if self.censored_seeds:
            return f"{count} seeds, {len(self.censored_seeds)} censored: no interval"
        return f"{count} seeds: {CONFIDENCE:.0%} bootstrap interval over paired seeds"


@dataclass(frozen=True)
class Comparison:
    """A baseline and the arms compared with it. ``targets`` is the baseline's final held-out loss, seed by seed."""

    baseline: Arm
    arms: tuple[Arm, ...]
    targets: dict[int, float]

    def __getitem__(self, name: str) -> Arm:
        for arm in (self.baseline, *self.arms):
            if arm.name == name:
                return arm
        raise KeyError(name)

    def target(self, arm: Arm | None = None) -> float:
        """The mean target over the seeds of ``arm`` (of the baseline by default), nats a token."""
        return float(np.mean([self.targets[seed] for seed in (arm or self.baseline).seeds]))
