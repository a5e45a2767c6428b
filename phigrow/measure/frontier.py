"""The flat frontier: the fewest FLOPs at which a model of any size, trained from scratch, reaches a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from phigrow.measure.cost_of_ends import source_cost
from phigrow.measure.ends import Effects, Ends
from phigrow.measure.errors_of_means import interval_of, over_runs, over_text
from phigrow.measure.estimates import ACCOUNTINGS, Accounting, Arm, Comparison, FrontierSaving
from phigrow.measure.loss_fit import REACH, Reading
from phigrow.records.run import Key, Run

Floats = NDArray[np.float64]

POINTS = 60
"""Costs at which the curve of each size is read to compute the lower envelope."""


@dataclass(frozen=True)
class EnvelopePoint:
    """The point at which the envelope has a given loss.

    Attributes:
        log_flops, slope: of the envelope at this point.
        where: ``inside``, ``before`` or ``after`` the envelope.
        readings: of the sizes on both sides: name, reading, and weight in the interpolation.
    """

    log_flops: float
    slope: float
    where: str
    readings: tuple[tuple[str, Reading, float], ...] = ()


@dataclass(frozen=True)
class FlatFrontier:
    """Curves of loss over FLOPs of flat models of several sizes, and their lower envelope.

    The envelope is the lower convex hull of the sizes' fitted curves over log FLOPs. Between two sizes it is the
    straight line that touches both curves. Models of sizes in between would lie on this line or below it.

    Attributes:
        sizes: decayed ends of each size, over FLOPs, by the name of its arm.
    """

    sizes: dict[str, Ends]

    @cached_property
    def hull(self) -> list[tuple[float, float, str]]:
        """Points (log FLOPs, loss, size) of the lower convex hull, by rising FLOPs and falling loss."""
        points: list[tuple[float, float, str]] = []
        for name, ends in self.sizes.items():
            logs = ends.fit.logs
            for at in np.linspace(logs[0], logs[-1], POINTS if len(logs) > 1 else 1):
                points.append((float(at), ends.fit.read(float(at)).loss, name))
        points.sort()
        hull: list[tuple[float, float, str]] = []
        for point in points:
            while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        lowest = min(range(len(hull)), key=lambda place: hull[place][1])
        return hull[: lowest + 1]

    def at_loss(self, loss: float) -> EnvelopePoint:
        """Return the point at which the envelope comes down to a loss. Its end is extended by ``REACH`` at most."""
        hull = self.hull
        if loss > hull[0][1]:
            return EnvelopePoint(hull[0][0], -1.0, "before")
        if loss < hull[-1][1]:
            name = hull[-1][2]
            reading, where = self.sizes[name].fit.crossing(loss, hull[-1][0])
            if where == "inside" and reading.slope < 0 and reading.at <= hull[-1][0] + REACH:
                return EnvelopePoint(reading.at, reading.slope, "inside", ((name, reading, 1.0),))
            border = hull[-1][0] + REACH
            # Where the curve is still above the loss at the border, the frontier needs more than that.
            above = self.sizes[name].fit.read(border).loss > loss
            return EnvelopePoint(border if above else hull[-1][0], -1.0, "after")
        place = next((i for i in range(1, len(hull)) if hull[i][1] <= loss), 0)
        (x0, y0, left), (x1, y1, right) = hull[max(place - 1, 0)], hull[place]
        if place == 0 or y0 == y1:
            return EnvelopePoint(x1, -1.0, "inside", ((right, self.sizes[right].fit.read(x1), 1.0),))
        share = (y0 - loss) / (y0 - y1)
        at = x0 + share * (x1 - x0)
        slope = (y1 - y0) / (x1 - x0)
        if left == right:
            return EnvelopePoint(at, slope, "inside", ((left, self.sizes[left].fit.read(at), 1.0),))
        readings = ((left, self.sizes[left].fit.read(x0), 1 - share), (right, self.sizes[right].fit.read(x1), share))
        return EnvelopePoint(at, slope, "inside", readings)


def _turns_up(one: tuple[float, float, str], two: tuple[float, float, str], three: tuple[float, float, str]) -> bool:
    """Return True if the middle point lies on or above the line from the first to the third."""
    return (two[1] - one[1]) * (three[0] - one[0]) >= (three[1] - one[1]) * (two[0] - one[0])


def flat_frontier(flat: Mapping[str, Sequence[Run]]) -> FlatFrontier | None:
    """Return the frontier of flat arms and the baseline; None if a size lacks FLOPs or decayed ends."""
    sizes = {}
    for name, runs in sorted(flat.items(), key=lambda item: _parameters(item[1])):
        by_key: dict[Key, dict[int | None, Run]] = {}
        for run in sorted(runs, key=lambda run: run.budget or 0):
            by_key.setdefault(run.key, {})[run.budget] = run
        ends = Ends.of(by_key, "flops")
        if not ends.keys or not np.isfinite(ends.tokens).all():
            return None
        sizes[name] = ends
    return FlatFrontier(sizes)


def _parameters(runs: Sequence[Run]) -> int:
    return max((int(run.meta.get("parameters") or 0) for run in runs), default=0)


def frontier_of(comparison: Comparison) -> FlatFrontier | None:
    """Return the flat frontier of a comparison, the baseline included; None without flat arms."""
    if not comparison.flat:
        return None
    base = comparison.baseline
    return flat_frontier({base.name: comparison.ends.get(base.name, base.runs), **comparison.flat})


def frontier_savings(frontier: FlatFrontier, arm: Arm, ends: Ends) -> tuple[FrontierSaving, ...]:
    """Return the savings of an arm against the best flat model of any size, sunk and charged.

    saving = 1 - (FLOPs of the arm) / (FLOPs of the frontier at the arm's loss), at the end of the arm's budget.

    Args:
        frontier: of the flat models.
        arm: with its runs at the budget.
        ends: decayed ends of the arm, over FLOPs.
    """
    if not ends.keys or not np.isfinite(ends.tokens).all():
        return ()
    spent = {run.key: float(run.evals["flops"][-1]) for run in arm.runs if run.key in ends.keys}
    if not spent:
        return ()
    reading = ends.fit.read(float(np.mean(np.log(list(spent.values())))))
    there = frontier.at_loss(reading.loss)
    effects = _effects(frontier, there, ends, reading)
    savings = []
    for accounting in ACCOUNTINGS:
        costs = {
            run.key: spent[run.key]
            + run.expand_cost("flops")
            + (source_cost(run, "flops", grown=bool(run.meta.get("growth"))) if accounting == "charged" else 0.0)
            for run in arm.runs
            if run.key in spent
        }
        cost = float(np.mean(list(costs.values())))
        savings.append(_saving(accounting, cost, reading.loss, there, effects, ends))
    return tuple(savings)


def _effects(frontier: FlatFrontier, there: EnvelopePoint, ends: Ends, reading: Reading) -> Effects | None:
    """Return the effect of each run on the log ratio of FLOPs; None if a flat size lacks a seed of the arm."""
    effects = ends.effects(reading).times(1 / there.slope)
    seeds = {seed for _, seed in ends.keys}
    for name, at, share in there.readings:
        size = frontier.sizes[name]
        if not seeds <= {seed for _, seed in size.keys}:
            return None
        mine = size.effects(at)
        chosen = {key: value for key, value in mine.runs.items() if key[1] in seeds}
        effects = effects.plus(Effects(chosen, mine.text).times(-share / there.slope))
    return effects


def _saving(
    accounting: Accounting, cost: float, loss: float, there: EnvelopePoint, effects: Effects | None, ends: Ends
) -> FrontierSaving:
    flat = math.exp(there.log_flops)
    bound = {"before": "at most", "after": "at least"}.get(there.where, "")
    interval = None
    if not bound and effects is not None and math.isfinite(cost):
        error = over_runs(effects.runs)
        if error is not None:
            errors = [error]
            if effects.text is not None and ends.blocks is not None and len(effects.text) > 1:
                errors.append(over_text(effects.text, ends.blocks))
            low, high = interval_of(there.log_flops - math.log(cost), errors)
            interval = (1 - 1 / low, 1 - 1 / high)
    return FrontierSaving(accounting, loss, cost, flat, bound, interval)
