"""Cost of reaching a loss, for one run or for one arm and seed trained to several budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from phigrow.measure.crossing import Crossing, Descent
from phigrow.measure.estimates import Basis
from phigrow.records.run import Run
from phigrow.records.schema import Unit


@dataclass(frozen=True)
class TargetCrossing(Crossing):
    """A crossing of the target loss.

    ``upper_bound``: the smallest decayed end is already below the target, so ``cost`` is an upper bound.
    """

    upper_bound: bool = False


@dataclass(frozen=True)
class CostToTarget:
    """Cost of reaching a loss, for one arm and seed.

    With two decayed ends or more, costs are interpolated between them, on a monotone fit of the final losses over log
    cost. Only decayed models are then compared with decayed models. With one end, costs are read off the run's curve.

    Attributes:
        run: the run at the budget that is compared.
        ends: every finished run whose schedule has decayed, by rising tokens.
    """

    run: Run
    ends: tuple[Run, ...]

    @classmethod
    def of(cls, by_budget: dict[int | None, Run], run: Run) -> CostToTarget:
        """Collect the ends of one arm and seed; unfinished and diverged runs are left out."""
        ends = [
            end
            for end in by_budget.values()
            if end.budget is not None
            and end.finished
            and np.isfinite(end.evals["loss"][-1])
            and end.evals["tokens"][-1] > 0
        ]
        return cls(run, tuple(sorted(ends, key=lambda end: float(end.evals["tokens"][-1]))))

    @property
    def basis(self) -> Basis:
        """Source of the costs: decayed ends, a constant-rate curve, or a curve in mid-schedule."""
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
        """Return the loss at the end of a run's budget: its last evaluation, or the level of the fit if that is higher.

        The level lies above a point that the fit pooled with worse ones. The fit never reaches a loss below its level.
        """
        final = float(run.evals["loss"][-1])
        if len(self.ends) > 1:
            # The budget's own level: the last one that starts at or before it.
            place = next((i for i, end in enumerate(self.ends) if end is run), len(self.ends) - 1)
            return max(final, float(self._between.levels[np.searchsorted(self._between.starts, place, "right") - 1]))
        return max(final, float(self.curve.levels[-1]))

    def cost(self, unit: Unit, target: float, *, on_curve: bool = False) -> TargetCrossing:
        """Return the cost of reaching ``target``, the expansion included.

        The cost is nan if a run did not record the unit.
        """
        more = self.run.expand_cost(unit)
        if not all(run.has_unit(unit) for run in (self.run, *self.ends)):
            more = math.nan
        if len(self.ends) > 1 and not on_curve:
            crossed = self._between_ends(unit, target)
        else:
            crossing = self.curve.crossing(self.run.evals[unit], target)
            crossed = TargetCrossing(crossing.cost, crossing.censored, crossing.end_cost, crossing.fit_end)
        cost = None if crossed.cost is None else crossed.cost + more
        return TargetCrossing(cost, crossed.censored, crossed.end_cost + more, crossed.fit_end, crossed.upper_bound)

    def _between_ends(self, unit: Unit, target: float) -> TargetCrossing:
        start = self.run.held_out(0)
        if start is not None and start <= target:
            return TargetCrossing(0.0, False, _end(self.ends[-1], unit), float(self._between.levels[-1]))
        logs = np.log([_end(run, unit) for run in self.ends])
        crossed = self._between.crossing(logs, target)
        # Equal to rounding: the target was this very end.
        upper_bound = not crossed.censored and self._between.levels[0] < target - 1e-12 * abs(target)
        cost = None if crossed.cost is None else float(np.exp(crossed.cost))
        return TargetCrossing(cost, crossed.censored, float(np.exp(crossed.end_cost)), crossed.fit_end, upper_bound)


def _end(run: Run, unit: str) -> float:
    return max(float(run.evals[unit][-1]), 1e-12)
