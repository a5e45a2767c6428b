"""A smooth falling curve through the losses of decayed ends, fitted near the cost at which it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BANDWIDTH = 2.5
"""Distance in log cost (a factor of 12) at which an end has no weight.

With a larger distance, curves of other shapes fit badly. With a smaller one, the fit follows the noise of single ends.
"""

REACH = math.log(1.5)
"""Distance in log cost to which a curve is read beyond its first and its last end."""

SHAPES = np.linspace(-2.0, 2.0, 41)
"""Powers of the cost that are tried first: -0.3 is a scaling law, 0 a straight line in log cost, 1 one in cost."""

CLOSE = 1e-12
"""Relative accuracy of a crossing, in log cost or in loss."""


@dataclass(frozen=True)
class Reading:
    """The fitted curve at one log cost.

    Attributes:
        at: the log cost.
        loss, slope: of the curve, the slope in log cost.
        influence: derivative of ``loss`` with respect to the mean loss of each end.
        fitted: the curve at each end.
    """

    at: float
    loss: float
    slope: float
    influence: Floats
    fitted: Floats


@dataclass(frozen=True)
class LossFit:
    """Mean losses at rising log costs, and the curve through them.

    Near a log cost c the curve is

        loss(x) = a + b (exp(k (x - c)) - 1) / k,  b <= 0

    in x = log cost, fitted by least squares with Cleveland's tricube weights around c. The power k is free between -2
    and 2. The curve is E + A cost^k: a scaling law for k < 0, and nearly a straight line in cost for a grown arm with
    a head start. It never rises. Two ends are joined by a straight line in log cost (k = 0).

    Attributes:
        logs: log cost of every end, rising.
        losses: mean loss of every end.
        counts: number of runs in each mean.
    """

    logs: Floats
    losses: Floats
    counts: Floats

    def read(self, at: float) -> Reading:
        """Return the curve at a log cost, from the fit around it."""
        x, y = self.logs - at, self.losses
        if len(x) == 1:
            return Reading(at, float(y[0]), 0.0, np.ones(1), y.copy())
        weights = self.counts * _tricube(np.abs(x))
        power = self._power(x, weights) if len(x) > 2 else 0.0
        basis = _power_of(x, np.array([power]))[0]
        loss, slope = _line(basis, y, weights)
        columns = [np.ones_like(x)]
        if slope < 0:
            columns.append(basis)
            if len(x) > 2 and abs(power) < SHAPES[-1]:
                columns.append(slope * _derivative(x, power))
        jacobian = np.stack(columns, axis=1)
        root = np.sqrt(weights)
        influence = np.linalg.pinv(jacobian * root[:, None], rcond=1e-10)[0] * root
        return Reading(at, loss, slope, influence, loss + slope * basis)

    def beyond(self, at: float) -> str:
        """Return the distance of a log cost from the nearest end in words; empty if it lies between the ends."""
        if at > self.logs[-1] + 1e-9:
            return f"{100 * math.expm1(at - self.logs[-1]):.0f} % beyond its last end"
        return f"{-100 * math.expm1(at - self.logs[0]):.0f} % before its first end" if at < self.logs[0] - 1e-9 else ""

    def crossing(self, target: float, start: float, longest: float = -math.inf) -> tuple[Reading, str]:
        """Return the curve at the cost at which it comes down to ``target``, and the place of this cost.

        The place is ``inside``, or ``before`` or ``after`` if the cost lies more than ``REACH`` outside the ends. The
        curve is then read at that border.

        Args:
            target: a loss.
            start: the log cost to try first. It is the result if the curve has the target loss there.
            longest: log cost of the longest training, if its end was left out.
        """
        first, last = self.logs[0] - REACH, max(longest, float(self.logs[-1])) + REACH
        at = float(np.clip(start, first, last))
        for _ in range(40):
            here = self.read(at)
            if abs(here.loss - target) <= CLOSE * abs(target):
                return here, "inside"
            step = self._step(here, target)
            to = float(np.clip(at + step, first, last))
            if abs(to - at) <= CLOSE:
                break
            at = to
        low, high = self.read(first), self.read(last)
        if low.loss < target:
            return low, "before"
        if high.loss > target:
            return high, "after"
        from scipy.optimize import brentq

        return self.read(float(brentq(lambda c: self.read(c).loss - target, first, last, xtol=1e-12))), "inside"

    def _step(self, here: Reading, target: float) -> float:
        """Return the distance in log cost to the target on the tangent of the curve."""
        if here.slope >= 0:
            return math.inf if here.loss > target else -math.inf
        return float(np.clip((target - here.loss) / here.slope, -1.0, 1.0))

    def _power(self, x: Floats, weights: Floats) -> float:
        """Return the power whose curve is nearest to the ends."""
        sums = _residual(x, self.losses, weights, SHAPES)
        best = int(np.argmin(sums))
        power, least = float(SHAPES[best]), float(sums[best])
        total, y = float(weights.sum()), self.losses
        for _ in range(30):  # Gauss-Newton steps, with offset and slope projected out
            basis = _power_of(x, np.array([power]))[0]
            loss, slope = _line(basis, y, weights)
            change = slope * _derivative(x, power)
            centred = basis - (weights @ basis) / total
            heavy = weights * centred
            change -= (weights @ change) / total + centred * ((heavy @ change) / (heavy @ centred))
            size = float((weights * change) @ change)
            if size <= 1e-30:
                break
            step = float((weights * change) @ (y - loss - slope * basis)) / size
            to = min(max(power + step, SHAPES[0]), SHAPES[-1])
            now = float(_residual(x, y, weights, np.array([to]))[0])
            if not now <= least or abs(to - power) <= 1e-12:
                break
            power, least = to, now
        return power


def _tricube(distances: Floats) -> Floats:
    """Return weights that fall to almost 0 at the bandwidth. It is wide enough for at least three ends."""
    third = float(np.sort(distances)[min(2, len(distances) - 1)])
    return np.asarray(np.maximum(1 - np.minimum(distances / max(BANDWIDTH, 1.25 * third), 1.0) ** 3, 0.0) ** 3 + 1e-6)


def _power_of(x: Floats, powers: Floats) -> Floats:
    """Return (exp(k x) - 1) / k, and x for k = 0, shape (powers, ends)."""
    k = np.where(np.abs(powers) < 1e-9, 1.0, powers)[:, None]
    return np.where(np.abs(powers)[:, None] < 1e-9, x, np.expm1(k * x) / k)


def _derivative(x: Floats, power: float) -> Floats:
    """Return the derivative of ``_power_of`` with respect to the power."""
    if abs(power) < 1e-4:
        return np.asarray(x**2 / 2 + power * x**3 / 3)
    return np.asarray((x * np.exp(power * x) - np.expm1(power * x) / power) / power)


def _line(basis: Floats, losses: Floats, weights: Floats) -> tuple[float, float]:
    """Return offset and slope of the weighted least-squares line. The slope is at most 0."""
    total = weights.sum()
    middle, mean = (weights @ basis) / total, (weights @ losses) / total
    centred = basis - middle
    slope = min(float((weights * centred) @ (losses - mean) / ((weights * centred) @ centred)), 0.0)
    return float(mean - slope * middle), slope


def _residual(x: Floats, losses: Floats, weights: Floats, powers: Floats) -> Floats:
    """Return the weighted sum of squared residuals for every power."""
    basis = _power_of(x, powers)
    total = weights.sum()
    centred = basis - (basis @ weights)[:, None] / total
    rest = losses - (weights @ losses) / total
    slope = np.minimum((centred * weights) @ rest / ((centred * weights) * centred).sum(1), 0.0)
    return np.asarray((weights * (rest - slope[:, None] * centred) ** 2).sum(1))
