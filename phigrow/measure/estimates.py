"""Results of a comparison: estimates in a unit and an accounting, arms over their seeds, the comparison itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from phigrow.measure.intervals import CONFIDENCE, FEWEST_SEEDS, Interval
from phigrow.records.run import Run
from phigrow.records.schema import Unit

Accounting = Literal["sunk", "charged"]
ACCOUNTINGS: tuple[Accounting, ...] = ("sunk", "charged")

STEPS = (0, 1, 10, 100)
"""Numbers of updates after which the held-out loss is reported where it was recorded."""

EDGE_MARK = "†"
"""Mark of an arm whose best learning rate lies at the edge of those that were tried."""

SHARED_MARK = "‡"
"""Mark of seconds that were measured while other runs shared the machine."""

INTERVAL = f"{100 * CONFIDENCE:.0f} % interval"

Basis = Literal["curve", "constant", "ends"]
"""Source of a cost: a curve in the middle of its schedule, a curve without decay, or fully decayed ends."""


@dataclass(frozen=True)
class Covered:
    """Sources of error in an interval: the numbers of sources and of seeds, and True if held-out text was resampled."""

    sources: int
    seeds: int
    text: bool


@dataclass(frozen=True)
class Estimate:
    """Costs of an arm and of the baseline at the target, in one unit and one accounting.

    Attributes:
        cost, baseline_cost: means over the paired seeds, in tokens, FLOPs or seconds; nan if the unit, or the cost of
            the source, was not recorded.
        censored: the target was not reached; ``cost`` is a lower bound, ``speedup`` and ``saving`` are upper bounds.
        upper_bound: the arm's smallest decayed end is already below the target; ``cost`` is an upper bound,
            ``speedup`` and ``saving`` are lower bounds.
        speedup_interval: 95 % interval, if there is one.
        shared_machine: the seconds were measured while other runs shared the machine. There is then no interval.
        between_evaluations: range of the speedup that the spacing of evaluations leaves open, because a cost lies
            between two evaluations; None for bounds and for costs that are read from decayed ends. An interval holds
            at least this range.
        unknown: the reason why ``cost`` is nan, if it is not that something was not recorded.
    """

    unit: Unit
    accounting: Accounting
    cost: float
    baseline_cost: float
    censored: bool
    speedup_interval: Interval | None = None
    upper_bound: bool = False
    shared_machine: bool = False
    between_evaluations: Interval | None = None
    unknown: str = ""

    @property
    def speedup(self) -> float:
        """``baseline_cost / cost``; infinite for an arm that is at the target before it spends anything.

        >>> round(Estimate("tokens", "sunk", 194e9, 300e9, False).speedup, 2)
        1.55
        """
        return math.inf if self.cost == 0 else self.baseline_cost / self.cost

    @property
    def saving(self) -> float:
        """``1 - cost / baseline_cost``, a fraction; negative for an arm that costs more than the baseline.

        >>> round(Estimate("tokens", "sunk", 194e9, 300e9, False).saving, 2)
        0.35
        """
        return 1.0 - self.cost / self.baseline_cost

    @property
    def saving_interval(self) -> Interval | None:
        """The interval of the saving, ``1 - 1 / speedup`` at both ends of the speedup's interval."""
        if self.speedup_interval is None:
            return None
        low, high = self.speedup_interval
        return 1.0 - 1.0 / low, 1.0 - 1.0 / high


@dataclass(frozen=True)
class FrontierSaving:
    """An arm against the best flat model of any size, in FLOPs, at the arm's own loss.

    Attributes:
        accounting: of the arm's cost.
        loss: held-out loss of the arm at the end of its budget.
        cost: FLOPs that the arm spent.
        flat_cost: FLOPs of the flat frontier at this loss.
        bound: ``at least`` or ``at most`` if the loss lies outside the frontier. ``flat_cost`` is then the nearest end
            of the frontier, and the saving is a bound.
        interval: 95 % interval of the saving, if there is one.
    """

    accounting: Accounting
    loss: float
    cost: float
    flat_cost: float
    bound: str = ""
    interval: Interval | None = None

    @property
    def saving(self) -> float:
        """``1 - cost / flat_cost``, a fraction; negative for an arm that needs more than a flat model."""
        return 1.0 - self.cost / self.flat_cost


@dataclass(frozen=True)
class BudgetPoint:
    """An arm against the baseline at one budget of the baseline.

    Attributes:
        budget: tokens of the baseline.
        target: mean loss of the baseline there.
        basis: source of the costs; under ``curve`` both arms are in the middle of their schedule.
        seeds: the paired seeds.
        estimates: costs in every unit and accounting.
        covered: sources of error in the intervals; None where paired seeds were resampled.
    """

    budget: float
    target: float
    basis: Basis
    seeds: tuple[int, ...]
    estimates: tuple[Estimate, ...]
    covered: Covered | None = None

    def estimate(self, unit: Unit, accounting: Accounting) -> Estimate:
        """The estimate in one unit and accounting."""
        return _estimate(self.estimates, unit, accounting)


@dataclass(frozen=True)
class Vanishing:
    """The budget above which the interval of a saving no longer lies above zero.

    Attributes:
        state: ``met`` if the interval comes down to zero between two budgets; ``never`` if it lies above zero at the
            largest budget; ``always`` if it lies above zero at no budget; ``unknown`` without intervals.
        budget: tokens, interpolated in their logarithm; None unless ``met``.
        above_from: with ``never``, the smallest budget from which on every interval lies above zero; None if all do.
    """

    state: Literal["met", "never", "always", "unknown"]
    budget: float | None = None
    above_from: float | None = None


@dataclass(frozen=True)
class Arm:
    """One arm over its seeds. Losses are nats per token on held-out text, means over the seeds.

    Attributes:
        name: of the arm.
        runs: one for each source seed and seed, at the compared budget.
        final_loss: at the end of the runs.
        loss_at: after the steps of ``STEPS`` that every seed recorded.
        estimates: costs in every unit and accounting; empty for the baseline.
        censored_seeds: seeds that did not reach the target.
        notes: sentences about censored, diverged or unfinished runs, and about missing costs.
        basis: source of the costs of ``estimates``.
        budgets: estimates at every budget of the baseline.
        settings: settings in which its training differs from the baseline's, with both values.
        surroundings: differences of machine, versions and evaluations from the baseline's, with both values.
        target: loss at which its costs were read; None where each seed has a target of its own.
        covered: sources of error in its intervals; None where paired seeds were resampled.
        frontier: its saving against the flat frontier, sunk and charged; empty without flat arms.
    """

    name: str
    runs: tuple[Run, ...]
    final_loss: float
    loss_at: dict[int, float]
    estimates: tuple[Estimate, ...] = ()
    censored_seeds: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    basis: Basis = "curve"
    budgets: tuple[BudgetPoint, ...] = ()
    settings: tuple[str, ...] = ()
    surroundings: tuple[str, ...] = ()
    target: float | None = None
    covered: Covered | None = None
    frontier: tuple[FrontierSaving, ...] = ()

    @property
    def lr_edge(self) -> str | None:
        """``low`` or ``high`` if the best learning rate is the smallest or the largest that was tried."""
        for run in self.runs:
            config = run.meta.get("config")
            sweep = config.get("lr_chosen_by") if isinstance(config, dict) else None
            if isinstance(sweep, dict) and sweep.get("edge") in ("low", "high"):
                return str(sweep["edge"])
        return None

    @property
    def label(self) -> str:
        """The name, marked if the best learning rate lies at the edge of those that were tried."""
        return f"{self.name} {EDGE_MARK}" if self.lr_edge else self.name

    @property
    def source_loss(self) -> float | None:
        """The held-out loss of the source at the moment of growth, mean over the runs; None if it was not recorded."""
        losses = [run.study.get("source_loss") for run in self.runs]
        known = [float(loss) for loss in losses if loss is not None]
        return float(np.mean(known)) if known and len(known) == len(losses) else None

    def source_meets(self, target: float) -> bool:
        """True if the source itself was at or below a target, so that a speedup says nothing about growth."""
        return self.source_loss is not None and self.source_loss <= target

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs, in order; a seed with several sources is there once."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    @property
    def source_seeds(self) -> tuple[int, ...]:
        """The recorded seeds of the sources, in order."""
        return tuple(dict.fromkeys(run.source_seed for run in self.runs if run.source_seed is not None))

    @property
    def initial_loss(self) -> float | None:
        """The held-out loss before the first update; None where it was not recorded."""
        return self.loss_at.get(0)

    def estimate(self, unit: Unit, accounting: Accounting) -> Estimate:
        """The estimate in one unit and accounting; KeyError for the baseline, which has none."""
        return _estimate(self.estimates, unit, accounting)

    def vanishing(self, unit: Unit, accounting: Accounting) -> Vanishing:
        """The budget above which the interval of the saving no longer lies above zero.

        A censored arm counts as not above zero. Budgets at which the source itself meets the target are left out.
        """
        points = [
            (point.budget, point.estimate(unit, accounting))
            for point in self.budgets
            if not self.source_meets(point.target)
        ]
        if all(estimate.speedup_interval is None for _, estimate in points):
            return Vanishing("unknown")
        known = [
            (budget, interval[0] if interval else min(1.0, estimate.speedup))
            for budget, estimate in points
            if (interval := estimate.speedup_interval) is not None or estimate.censored
        ]
        above = [low > 1 for _, low in known]
        if above[-1]:
            below = [place for place, good in enumerate(above) if not good]
            return Vanishing("never", above_from=known[below[-1] + 1][0] if below else None)
        last = max((place for place, good in enumerate(above) if good), default=None)
        if last is None:
            return Vanishing("always")
        (lower, high), (upper, low) = known[last], known[last + 1]
        # Interpolated in the cost ratio 1 / speedup, which stays finite where a speedup does not.
        share = (1 - 1 / high) / (1 / low - 1 / high) if low else 0.0
        return Vanishing("met", float(lower * (upper / lower) ** share))

    @property
    def interval_note(self) -> str:
        """The seeds and the interval in words, such as ``1 seed: no interval``."""
        count = len(self.seeds)
        if count < FEWEST_SEEDS:
            return f"{count} seed{'s' if count > 1 else ''}: no interval"
        if self.censored_seeds:
            return f"{count} seeds, {len(self.censored_seeds)} censored: no interval"
        if self.estimates and self.estimates[0].upper_bound:
            return f"{count} seeds, below the target at the smallest budget: no interval"
        if not self.has_intervals:
            if any(run.has_unknown_text for run in self.runs):
                return f"{count} seeds, not known to be paired: no interval"
            if self.estimates and self.estimates[0].cost == 0:
                return f"{count} seeds, at the target before training: no interval"
            return f"{count} seeds, fewer than {FEWEST_SEEDS} with every source: no interval"
        if self.covered is not None:
            sources, count = self.covered.sources, self.covered.seeds
            head = f"{sources} sources and {count} seeds" if sources > 1 else f"{count} seeds"
        else:
            head = f"{count} seeds"
        return f"{head}: {INTERVAL} over {covers_in_words(self.covered)}{self._widened}"

    @property
    def _widened(self) -> str:
        """Words that an interval ends where the spacing of evaluations puts it."""
        for estimate in self.estimates:
            if estimate.speedup_interval and estimate.between_evaluations:
                ends = zip(estimate.speedup_interval, estimate.between_evaluations, strict=True)
                if any(one == other for one, other in ends) and len(set(estimate.between_evaluations)) > 1:
                    return ", widened to the spacing of evaluations"
        return ""

    @property
    def unfinished(self) -> tuple[Run, ...]:
        """Runs that were last evaluated before the end of their schedule."""
        return tuple(run for run in self.runs if not run.finished)

    @property
    def has_intervals(self) -> bool:
        """True if a speedup of the arm has an interval, in any unit."""
        return any(estimate.speedup_interval is not None for estimate in self.estimates)


def covers_in_words(covered: Covered | None) -> str:
    """Name the sources of error in an interval, and those that are missing from it.

    >>> covers_in_words(Covered(1, 3, True))
    'paired seeds and held-out text, not over the source'
    """
    sources, text = (covered.sources > 1, covered.text) if covered else (False, False)
    over = [*(["sources"] if sources else []), "paired seeds", *(["held-out text"] if text else [])]
    without = [*([] if sources else ["the source"]), *([] if text else ["the held-out text"])]
    return listed(over) + (f", not over {' or '.join(without)}" if without else "")


def listed(words: Sequence[str]) -> str:
    """Return words joined by commas, the last by ``and``.

    >>> listed(["sources", "seeds", "text"])
    'sources, seeds and text'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _estimate(estimates: tuple[Estimate, ...], unit: Unit, accounting: Accounting) -> Estimate:
    for estimate in estimates:
        if (estimate.unit, estimate.accounting) == (unit, accounting):
            return estimate
    raise KeyError((unit, accounting))


@dataclass(frozen=True)
class Comparison:
    """A baseline and the arms compared with it.

    Attributes:
        baseline: the arm that sets the target.
        arms: the others.
        targets: the baseline's final held-out loss, by seed.
        ends: for each arm of a study of several budgets, the runs of all its budgets.
        notes: sentences about the comparison as a whole.
        flat: decayed ends of flat models of other sizes, by arm.
    """

    baseline: Arm
    arms: tuple[Arm, ...]
    targets: dict[int, float]
    ends: dict[str, tuple[Run, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    flat: dict[str, tuple[Run, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Arm:
        for arm in (self.baseline, *self.arms):
            if arm.name == name:
                return arm
        raise KeyError(name)

    def target(self, arm: Arm | None = None) -> float:
        """The mean target over the seeds of ``arm`` (of the baseline by default), nats per token."""
        if arm is not None and arm.target is not None:
            return arm.target
        return float(np.mean([self.targets[seed] for seed in (arm or self.baseline).seeds]))
