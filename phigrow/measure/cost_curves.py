"""The curves from which costs were read, for figures: every drawn cost lies on its curve."""

from __future__ import annotations

import math

import numpy as np

from phigrow.measure.cost_to_target import CostToTarget
from phigrow.measure.ends import Ends
from phigrow.measure.estimates import Arm, Comparison
from phigrow.records.run import Budgets, Key
from phigrow.records.schema import Unit

POINTS = 48
"""Losses, or costs, at which a curve is read."""


def cost_curve(comparison: Comparison, arm: Arm, unit: Unit, highest: float) -> list[tuple[float, float]]:
    """Return (cost, loss) points, means over the runs, from ``highest`` down to the lowest loss that all runs reach.

    In a study of several budgets, the points lie on the curve through the decayed ends. Otherwise each run has its own
    target, and a point is the mean cost at one distance from these targets. At distance 0 it is the cost of the arm's
    sunk estimate. Losses that a run had before its first update are left out.
    """
    if arm.basis == "ends" or (arm is comparison.baseline and arm.name in comparison.ends):
        return _curve_of_ends(comparison, arm, unit, highest)
    own = [CostToTarget(run) for run in arm.runs]
    targets = [comparison.targets[run.seed] for run in arm.runs]
    middle = float(np.mean(targets))
    lowest = max(
        each.cost("tokens", target).fit_end - target if np.isfinite(target) else 0.0
        for each, target in zip(own, targets, strict=True)
    )
    if not lowest < highest - middle:  # no seed, or one that diverged
        return []
    offsets = {*np.linspace(lowest, highest - middle, POINTS).tolist(), 0.0}
    points = []
    for offset in sorted(offsets, reverse=True):
        crossings = [each.cost(unit, target + offset) for each, target in zip(own, targets, strict=True)]
        costs = [each.cost for each in crossings if each.cost is not None]
        started_below = any(cost <= each.run.expand_cost(unit) for cost, each in zip(costs, own, strict=False))
        if len(costs) == len(own) and np.isfinite(costs).all() and not started_below:
            points.append((float(np.mean(costs)), middle + offset))
    return points


def ends_of(comparison: Comparison, arm: Arm) -> Ends:
    """Return the decayed ends of the runs of an arm, as `compare` read them."""
    by_key: dict[Key, Budgets] = {run.key: {} for run in arm.runs}
    for run in comparison.ends.get(arm.name, arm.runs):
        if run.key in by_key:
            by_key[run.key][run.budget] = run
    return Ends.of(by_key)


def _curve_of_ends(comparison: Comparison, arm: Arm, unit: Unit, highest: float) -> list[tuple[float, float]]:
    ends = ends_of(comparison, arm)
    if ends.budgets < 2:
        return []
    logs = set(np.linspace(ends.fit.logs[0], ends.fit.logs[-1], POINTS).tolist())
    read: dict[float, float] = {}
    estimate = next((e for e in arm.estimates if (e.unit, e.accounting) == ("tokens", "sunk")), None)
    if estimate and arm.target is not None and not (estimate.censored or estimate.upper_bound or estimate.cost == 0):
        reading, _ = ends.fit.crossing(arm.target, math.log(estimate.baseline_cost), ends.longest)
        read[reading.at] = arm.target
    read |= {at: ends.fit.read(at).loss for at in logs}
    points = []
    for at, loss in sorted(read.items()):
        costs = [ends.unit_cost(run.key, unit, at) + run.expand_cost(unit) for run in arm.runs if run.key in ends.keys]
        if loss <= highest and np.isfinite(costs).all():
            points.append((float(np.mean(costs)), loss))
    return points
