"""The cost at which a noisy loss curve reaches a target, read off a monotone fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phigrow.errors import GrowthError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Crossing:
    """Crossing of a target by a curve.

    ``cost`` is None if the curve never reached it (``censored``); ``end_cost`` is then a lower bound.
    ``fit_end`` is the last value of the monotone fit, in the unit of the losses. ``span`` is the range of costs in
    which the crossing may lie, because nothing was evaluated between the two evaluations around it; None if the curve
    never reached the target. ``at_start`` is true if the first evaluation is at or below the target.
    """

    cost: float | None
    censored: bool
    end_cost: float
    fit_end: float
    span: tuple[float, float] | None = None
    at_start: bool = False


def monotone(costs: ArrayLike, losses: ArrayLike) -> Floats:
    """Fit the non-increasing curve nearest to the losses in least squares (isotonic regression).

    Points that break the order are pooled into their mean. A loss that is not finite counts as infinite, so everything
    before it is pooled with it: the fit is infinite up to the last such point, and starts anew behind it. A run that
    ends in nan therefore reaches no target. One that recovers counts from its recovery on.

    Args:
        costs: non-decreasing, any unit.
        losses: one for each cost.

    Returns:
        The fitted losses, shape as ``losses``.

    Raises:
        GrowthError: no points, lengths that differ, or costs that are not finite or decrease.

    >>> monotone([0, 1, 2, 3], [4.0, 3.0, 3.5, 2.0]).tolist()
    [4.0, 3.25, 3.25, 2.0]
    """
    from scipy.optimize import isotonic_regression

    at, values = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if at.ndim != 1 or at.shape != values.shape or not at.size:
        raise GrowthError(
            f"costs of shape {at.shape} and losses of shape {values.shape} form no curve",
            why="a curve has one loss for each cost",
            fix="give two lists of the same length, with at least one point",
        )
    if not np.isfinite(at).all() or (np.diff(at) < 0).any():
        raise GrowthError(
            "the costs decrease or are not finite",
            why="costs are cumulative",
            fix="give costs that are finite and do not decrease",
        )
    broken = np.flatnonzero(~np.isfinite(values))
    start = int(broken[-1]) + 1 if broken.size else 0
    fit = np.full(values.shape, np.inf)
    if start < values.size:
        fit[start:] = isotonic_regression(values[start:], increasing=False).x
    return fit


@dataclass(frozen=True)
class Descent:
    """The monotone fit of one loss curve, as levels of falling loss. One fit serves many targets and units.

    ``levels`` falls strictly. ``starts`` has the index of the first point of each level, and ``size`` is the number of
    points.
    """

    levels: Floats
    starts: NDArray[np.int64]
    size: int

    @classmethod
    def of(cls, costs: ArrayLike, losses: ArrayLike) -> Descent:
        """Fit losses in the order of their costs; raises as ``monotone``."""
        fit = monotone(costs, losses)
        starts = np.concatenate(([0], np.flatnonzero(fit[1:] != fit[:-1]) + 1))
        return cls(fit[starts], starts, len(fit))

    def crossing(self, costs: ArrayLike, target: float) -> Crossing:
        """Return the crossing of ``target``, see ``cost_to_loss``; ``costs`` may be in any unit.

        Raises:
            GrowthError: a target that is not finite.
        """
        if not np.isfinite(target):
            raise GrowthError(
                f"the target loss is {target}",
                why="only a finite loss can be reached",
                fix="give a finite loss in nats per token",
            )
        at = np.asarray(costs, dtype=np.float64)
        end_cost, fit_end = float(at[-1]), float(self.levels[-1])
        if fit_end > target:
            return Crossing(None, True, end_cost, fit_end)
        if self.levels[0] <= target:
            return Crossing(float(at[0]), False, end_cost, fit_end, (0.0, float(at[0])), at_start=True)
        centres = np.add.reduceat(at, self.starts) / np.diff([*self.starts, self.size])
        below = int(np.argmax(self.levels <= target))
        high, low = self.levels[below - 1], self.levels[below]
        # A level at infinity cannot be interpolated: the cost is then that of the first finite level.
        share = (high - target) / (high - low) if np.isfinite(high) else 1.0
        cost = float(centres[below - 1] + share * (centres[below] - centres[below - 1]))
        gap = float(at[self.starts[below]] - at[self.starts[below] - 1])
        # A curve that falls strictly has the loss of an evaluation at no other cost.
        span = (cost, cost) if low == target else (cost - share * gap, cost + (1 - share) * gap)
        return Crossing(cost, False, end_cost, fit_end, span)

    def loss_at(self, costs: ArrayLike, cost: float) -> float:
        """Return the loss of the fit at ``cost``, interpolated between the centres of its levels."""
        at = np.asarray(costs, dtype=np.float64)
        centres = np.add.reduceat(at, self.starts) / np.diff([*self.starts, self.size])
        return float(np.interp(cost, centres, self.levels))


def cost_to_loss(costs: ArrayLike, losses: ArrayLike, target: float) -> Crossing:
    """Return the cost at which the monotone fit of a curve comes down to ``target``.

    Cost is interpolated linearly against loss between neighbouring levels of the fit. Pooled points are one level at
    their mean cost. The edges of a level would make the result depend on the noise.

    - Noise: an evaluation that is low by chance is pooled with those after it, and does not count.
    - Target not reached: ``censored``, and ``cost`` is None.
    - Divergence (nan, inf, or a loss that rises and stays up): pooled as in ``monotone``, so an earlier crossing does
      not count.
    - First level at or below the target: the first recorded cost, 0 for a run that was evaluated before its first
      update.

    Raises:
        GrowthError: as ``monotone``, and a target that is not finite.

    >>> cost_to_loss([0, 100, 200], [5.0, 4.0, 3.0], target=3.5).cost
    150.0
    """
    return Descent.of(costs, losses).crossing(costs, target)
