"""What one run, or one arm and seed trained to several budgets, spent until it got to a loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from phigrow.measure.crossing import Crossing, Descent
from phigrow.measure.estimates import Basis, Unit
from phigrow.records.reader import Run


@dataclass(frozen=True)
class Reached(Crossing):
    """A crossing; where ``early``, ``cost`` is an upper bound: the smallest decayed end is already below the target."""

    early: bool = False


@dataclass(frozen=True)
class Reach:
    """One arm and seed: the run at the budget that is compared, and every finished end of a decayed schedule.

    With two ends or more the cost of a loss is interpolated between them, on a monotone fit of the final losses over
    log cost, so that only decayed models are compared with decayed models. With one it is read off the run's own curve.
    """

    run: Run
    ends: tuple[Run, ...]

    @property
    def basis(self) -> Basis:
        """What costs are read off."""
        if len(self.ends) > 1:
            return "ends"
        return "constant" if self.run.schedule == "constant" else "curve"

    @cached_property
    def curve(self) -> Descent:
        """The monotone fit of the run's own evaluations."""
        return Descent.of(self.run.evals["tokens"], self.run.evals["loss"])

    @cached_property
    def _between(self) -> Descent:
        return Descent.of([_end(run, "tokens") for run in self.ends], [run.evals["loss"][-1] for run in self.ends])

    def end_loss(self, run: Run) -> float:
        """The loss that ends at a run's budget: its last evaluation, or the fit's level where that is higher.

        A fit's level lies above a point that it pooled with worse ones at larger budgets; what lies below the level
        the fit never reaches.
        """
        final = float(run.evals["loss"][-1])
        if len(self.ends) > 1:
            # The budget's own level: the last one that starts at or before it.
            place = next((i for i, end in enumerate(self.ends) if end is run), len(self.ends) - 1)
            return max(final, float(self._between.levels[np.searchsorted(self._between.starts, place, "right") - 1]))
        return max(final, float(self.curve.levels[-1]))

    def cost(self, unit: Unit, target: float, *, on_curve: bool = False) -> Reached:
        """What was spent until ``target``, the expansion included, where there was one; in the unit's own measure."""
        more = self.run.expand_cost(unit)
        if len(self.ends) > 1 and not on_curve:
            found = self._between_ends(unit, target)
        else:
            crossing = self.curve.crossing(self.run.evals[unit], target)
            found = Reached(crossing.cost, crossing.censored, crossing.end_cost, crossing.fit_end)
        cost = None if found.cost is None else found.cost + more
        return Reached(cost, found.censored, found.end_cost + more, found.fit_end, found.early)

    def _between_ends(self, unit: Unit, target: float) -> Reached:
        start = self.run.held_out(0)
        if start is not None and start <= target:
            return Reached(0.0, False, _end(self.ends[-1], unit), float(self._between.levels[-1]))
        logs = np.log([_end(run, unit) for run in self.ends])
        found = self._between.crossing(logs, target)
        # Equal to rounding: the target was this very end.
        early = not found.censored and self._between.levels[0] < target - 1e-12 * abs(target)
        cost = None if found.cost is None else float(np.exp(found.cost))
        return Reached(cost, found.censored, float(np.exp(found.end_cost)), found.fit_end, early)


def reach(by_budget: dict[int | None, Run], run: Run) -> Reach:
    """The runs of one arm and seed as a `Reach`; unfinished runs and those that diverged are no ends."""
    ends = [
        end
        for end in by_budget.values()
        if end.budget is not None
        and end.finished
        and np.isfinite(end.evals["loss"][-1])
        and end.evals["tokens"][-1] > 0
    ]
    return Reach(run, tuple(sorted(ends, key=lambda end: float(end.evals["tokens"][-1]))))


def _end(run: Run, unit: str) -> float:
    return max(float(run.evals[unit][-1]), 1e-12)
