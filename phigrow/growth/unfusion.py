"""Moments of what took in a normalisation, as they would be had it not; see `phigrow.growth.moments`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phigrow.checkpoints.bits import Bits, widen
from phigrow.growth.axes import Floats
from phigrow.growth.layer_sum import Rows
from phigrow.growth.moments import POWER
from phigrow.growth.plan import TensorGrowth

LEAST_WEIGHT = 0.01
"""Moments are divided by the weights of a folded normalisation, but by no less than this part of their root mean
square: they are averages over steps at which these weights were not quite the same."""


def moment_source(growth: TensorGrowth, moment: str, read: Callable[[str, str], Rows]) -> Rows:
    """What a tensor's moment is lifted from: its source's, less the normalisation that its weights take in.

    Args:
        growth: of `Plan.tensors`.
        moment: ``exp_avg`` or ``exp_avg_sq``.
        read: (source tensor, ``fp32`` or a moment) -> its values.
    """
    source, fold = read(growth.source, moment), growth.fold
    if fold is None or growth.parameter.kind == "bias":  # a bias gets the gradient of what it is added to
        return source

    def whole(name: str, kind: str, size: int) -> Floats:
        values = read(name, kind)
        return widen(values.bits(0, size), values.dtype_name, np.float64).astype(np.float64, copy=False)

    power, (rows, columns) = POWER[moment], (growth.source_shape[0], growth.source_shape[-1])
    weights = whole(fold.scale, "fp32", columns) ** power
    if growth.parameter.kind == "shift":  # n -> g n + b: what readers pass back goes through g
        return _Unfolded(source, weights)
    least = (LEAST_WEIGHT * np.sqrt(np.square(weights).mean())) if power == 1 else LEAST_WEIGHT**2 * weights.mean()
    divisor = np.copysign(np.maximum(np.abs(weights), least), weights)
    if fold.shift is None or fold.bias is None:
        return _Unfolded(source, 1 / divisor)
    shift = whole(fold.shift, "fp32", columns) ** power
    return _Unfolded(source, 1 / divisor, whole(fold.bias, moment, rows), shift, positive=power == 2)


@dataclass(frozen=True, eq=False)
class _Unfolded:
    """``(M - down across^T) * gains``, float64, read like a stored tensor; not below zero where that is asked."""

    source: Rows
    gains: Floats
    down: Floats | None = None
    across: Floats | None = None
    positive: bool = False

    @property
    def dtype_name(self) -> str:
        return "float64"

    def bits(self, start: int, stop: int) -> Bits:
        values = widen(self.source.bits(start, stop), self.source.dtype_name, np.float64)
        if self.down is not None and self.across is not None:
            values = values - np.outer(self.down[start:stop], self.across)
        if self.positive:
            values = np.maximum(values, 0)
        gains = self.gains if values.ndim == 2 else self.gains[start:stop]
        return (values * gains).view(np.uint64)
