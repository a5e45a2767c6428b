"""What becomes of Adam's moments when a model grows, as plans; `phigrow.growth.lift` computes the values.

An axis carries an activation with its write leg E and is read with R, so a gradient runs the other way: the gradient
of a weight ``W' = E_out W R_in`` is ``G' = R_out^T G E_in^T``, and Adam's moments are averages of it and of its square.
They grow like weights whose legs have changed places, with gains to the first and to the second power. What is new
starts at zero: nothing is known of it.

The law speaks of copies. Where a value is no copy, its gradient is zero if what it writes is not read or what it reads
is not written; else it is open, and the first steps find it. Two things are beyond it. Noise that copies cancel moves
gradient between them, and only their sum obeys. And where new coordinates of the stream hold its mean, LayerNorm passes
them gradients of their own, which the old rows pay for: ``G' = R_out^T (G - M^T G'_mean) E_in^T`` with M the rows of E
that are means. `tests/growth/test_moments.py` holds all of this to 1e-10.

Where a stream is turned by an isometry Q, gradients are turned with it, and readers that took in a normalisation,
``W' = W diag(g) Q^T``, get ``G' = (G - s b^T) diag(1/g) Q^T`` with s the gradient of their bias:
`phigrow.growth.unfusion` takes the normalisation out. Second moments grow by the squares of Q's entries, as if
gradients of different coordinates, and of the bias, were independent. What the normalisation itself has left, one gain
for all coordinates, is new and starts at zero; and where readers have no bias (GPT-NeoX's head), s is unknown, and they
start at zero too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from phigrow.growth.axes import FRESH, AxisMap, Bools, Floats
from phigrow.growth.origins import Kind, anatomy
from phigrow.growth.plan import Plan, TensorGrowth

POWER = {"exp_avg": 1, "exp_avg_sq": 2}
"""Adam's moments, and the power of gains that they carry."""

STATES = {
    "scale": "copies take the gains of their gradients, squared for second moments; new values start at zero",
    "copy": "every copy takes its source's moments as they are",
    "asymmetric": "the first copy of each value keeps its moments as they are, further copies start at zero",
    "reset": "all moments start at zero, and Adam counts its steps from zero",
}
"""What can be done with the moments, the first being the default.

- ``scale``: the rule above. Staged Training (2203.06211) has it for doubling, m/2 and v/4.
- ``copy``: what one does who takes moments for weights without gains. Off by the gains, and for gains of 1 the same.
- ``asymmetric``: SPARKLING (2602.02472) keeps the state of old values and resets that of new ones, which are copies
  there too, so that the two part. Here a repeated layer is new as well.
- ``reset``: HyperCloning, bert2BERT and every tool that writes weights alone.
"""


def moment_growth(growth: TensorGrowth, plan: Plan, moment: str, state: str = "scale") -> TensorGrowth | None:
    """How a moment of one destination tensor comes from that of its source tensor; None where all of it is zero.

    Args:
        growth: of `Plan.tensors`.
        plan: the plan.
        moment: ``exp_avg`` or ``exp_avg_sq``.
        state: one of `STATES`.

    Returns:
        A growth for `phigrow.growth.lift.Lift`, with neither random values nor means; its values come from
        `phigrow.growth.unfusion.moment_source`, and the plan's noise must be left out.

    >>> plan = phigrow.plan("phi-1_5", "phi2.json", "lossless")  # doctest: +SKIP
    >>> moment_growth(next(plan.tensors()), plan, "exp_avg").maps[1].write[0]  # of hidden: 1 / c  # doctest: +SKIP
    0.8944271909999159
    """
    if state == "reset" or not _keeps(growth, plan, state):
        return None
    power = POWER[moment]
    if state == "scale":
        maps = tuple(_swapped(growth, stored, power) for stored in range(len(growth.maps)))
    else:
        kept = _first if state == "asymmetric" else _copies
        maps = tuple(_as_they_are(axis, kept(growth, plan, stored)) for stored, axis in enumerate(growth.maps))
    # As a bias, because new values of a normalisation's moments are 0, not 1.
    kind: Literal["matrix", "bias"] = "matrix" if len(maps) == 2 else "bias"
    above = growth.above if any(axis.ahead is not None and axis.ahead.any() for axis in maps) else None
    parameter = replace(growth.parameter, kind=kind)
    return replace(growth, parameter=parameter, maps=maps, norm_read=None, fold=None, above=above)


def _keeps(growth: TensorGrowth, plan: Plan, state: str) -> bool:
    """Whether any of a tensor's moments come from the source."""
    legs = [axis.legs for axis in growth.maps if axis.legs is not None]
    if growth.zero or growth.blend or any(each.dual(1) is None for each in legs):
        return False
    if (legs or growth.fold) and state != "scale":
        return False  # a mixture is no copy
    if growth.fold is not None and (growth.fold.aside or growth.parameter.kind == "scale"):
        return False
    if growth.layer is None:
        return True
    if state == "scale":  # nothing reads an identity layer, so its gradients are zero
        return growth.layer not in plan.identity_layers
    if state == "asymmetric":
        layers = plan.layers
        kept = [
            k for k, source in enumerate(layers) if source == layers[growth.layer] and k not in plan.identity_layers
        ]
        return growth.layer == kept[0]
    return True


def _swapped(growth: TensorGrowth, stored: int, power: int) -> AxisMap:
    """The map of a stored axis with its legs in each other's place, and no values but copies."""
    axis = growth.maps[stored]
    write, read = axis.read, axis.write
    if axis.legs is not None:
        return replace(axis, write=write**power, read=read**power, legs=axis.legs.dual(power))
    if growth.parameter.kind == "scale":
        # d(scale) is the gradient of the output, times an input that carries the gain of the stream: for the norm of
        # a head, which reads what it writes, the gain of that is gone.
        stream = growth.norm_read
        write = axis.read * (axis.write if stream is None or stream is axis else stream.write)
    return _made(axis, axis.is_copy, write**power, read**power)


def _as_they_are(axis: AxisMap, kept: Bools) -> AxisMap:
    ones = np.ones(axis.dst_size)
    return _made(axis, kept, ones, ones)


def _copies(growth: TensorGrowth, plan: Plan, stored: int) -> Bools:
    return growth.maps[stored].is_copy


def _first(growth: TensorGrowth, plan: Plan, stored: int) -> Bools:
    kinds = anatomy(growth, plan.axes).sides[stored].whole.kinds
    return np.isin(kinds, (Kind.COPIED, Kind.SCALED))


def _made(axis: AxisMap, kept: Bools, write: Floats, read: Floats) -> AxisMap:
    nothing = np.zeros(axis.dst_size, dtype=bool)
    return AxisMap(
        src_size=axis.src_size,
        source=np.where(kept, axis.source, FRESH),
        write=np.where(kept, write, 0.0),
        read=np.where(kept, read, 0.0),
        write_random=nothing,
        read_random=nothing,
        ahead=None if axis.ahead is None else axis.ahead & kept,
    )
