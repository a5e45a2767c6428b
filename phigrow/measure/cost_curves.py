"""Curves of cost against loss, as the costs of a comparison were read, so that every drawn cost lies on its curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phigrow.measure.cost_to_target import CostToTarget
from phigrow.measure.estimates import Arm, Comparison
from phigrow.records.run import Run
from phigrow.records.schema import Unit

POINTS = 48
"""Losses at which a curve is read."""


def readers(comparison: Comparison, arm: Arm) -> list[CostToTarget]:
    """Return the costs of an arm for every seed, read as `compare` read them."""
    ends: Sequence[Run] = comparison.ends.get(arm.name, ())
    return [
        CostToTarget.of({other.budget: other for other in ends if other.key == run.key} or {run.budget: run}, run)
        for run in arm.runs
    ]


def cost_curve(comparison: Comparison, arm: Arm, unit: Unit, highest: float) -> list[tuple[float, float]]:
    """Return (cost, loss) points, means over the seeds, from ``highest`` down to the lowest loss that all seeds reach.

    Seeds have targets of their own. A point is the mean cost at losses that are equally far from each seed's target.
    The cost at distance 0 is therefore the cost of the arm's estimate, sunk.
    Losses that a seed had before its first update are left out.
    """
    own = readers(comparison, arm)
    targets = [comparison.targets[run.seed] for run in arm.runs]
    middle = float(np.mean(targets))
    lowest = _lowest(own, targets)
    if not lowest < highest - middle:  # no seed, or one that diverged
        return []
    offsets = {*np.linspace(lowest, highest - middle, POINTS).tolist(), 0.0}
    points = []
    for offset in sorted(offsets, reverse=True):
        crossings = [each.cost(unit, target + offset) for each, target in zip(own, targets, strict=True)]
        costs = [each.cost for each in crossings if each.cost is not None and not each.upper_bound]
        started_below = any(cost <= each.run.expand_cost(unit) for cost, each in zip(costs, own, strict=False))
        if len(costs) == len(own) and np.isfinite(costs).all() and not started_below:
            points.append((float(np.mean(costs)), middle + offset))
    return points


def _lowest(own: Sequence[CostToTarget], targets: Sequence[float]) -> float:
    """The lowest offset from the targets at which every seed still has a cost."""
    return max(
        each.cost("tokens", target).fit_end - target if np.isfinite(target) else 0.0
        for each, target in zip(own, targets, strict=True)
    )
