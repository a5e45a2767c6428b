"""Cost of reaching a loss, read off the curve of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from phigrow.measure.crossing import Crossing, Descent
from phigrow.measure.estimates import Basis
from phigrow.records.run import Run
from phigrow.records.schema import Unit


@dataclass(frozen=True)
class CostToTarget:
    """Cost of reaching a loss for one run.

    Attributes:
        run: the run.
        at_end: the run is the baseline's decayed end in a study of several budgets, and the target is the fitted loss
            at its budget. The cost is then the run's whole cost.
    """

    run: Run
    at_end: bool = False

    @property
    def basis(self) -> Basis:
        """Source of the costs: a constant-rate curve, or a curve in mid-schedule."""
        return "constant" if self.run.schedule == "constant" else "curve"

    @cached_property
    def curve(self) -> Descent:
        """The monotone fit of the run's own evaluations."""
        return Descent.of(self.run.evals["tokens"], self.run.evals["loss"])

    def end_loss(self) -> float:
        """Return the last evaluation, or the level of the fit there if that is higher.

        The level lies above a point that the fit pooled with worse ones. The fit never reaches a loss below its level.
        """
        return max(float(self.run.evals["loss"][-1]), float(self.curve.levels[-1]))

    def cost(self, unit: Unit, target: float) -> Crossing:
        """Return the cost of reaching ``target``, the expansion included.

        The cost is nan if the run did not record the unit.
        """
        more = self.run.expand_cost(unit) if self.run.has_unit(unit) else math.nan
        end = float(self.run.evals[unit][-1])
        if self.at_end:
            return Crossing(end + more, False, end + more, target, (end + more, end + more))
        crossing = self.curve.crossing(self.run.evals[unit], target)
        return replace(
            crossing,
            cost=None if crossing.cost is None else crossing.cost + more,
            end_cost=crossing.end_cost + more,
            span=None if crossing.span is None else (crossing.span[0] + more, crossing.span[1] + more),
        )
