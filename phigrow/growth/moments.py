"""Growth of Adam's moments, as recipes that `phigrow.growth.lift` computes.

An axis carries an activation with its write leg E and is read with R. A gradient runs the other way: the gradient
of a weight ``W' = E_out W R_in`` is ``G' = R_out^T G E_in^T``, and Adam's moments are averages of it and of its square.
They grow like weights whose legs have changed places, with gains to the first and to the second power. Moments of new
values start at zero, because their gradients are unknown.

The rule holds for copies. The gradient of any other value is zero if its output is not read or its input is not
written; otherwise it is unknown until the first steps. There are two exceptions, for which the rule is an estimate;
docs/stages.md has its measured error for every method and family. Noise that copies cancel moves gradient between them,
and only their sum obeys the rule. If new coordinates of the stream (or of a head with a LayerNorm) hold its mean,
LayerNorm gives them gradients of their own, which are subtracted from those of the old rows:
``G' = R_out^T (G - M^T G'_mean) E_in^T``, with M the rows of E that are means. G'_mean depends on the mean of the
stream's gradient, which LayerNorm has removed from G. `tests/growth/test_moments.py` checks these formulas to 1e-10.

An isometry Q that rotates the stream rotates gradients too. A reader with a fused normalisation,
``W' = W diag(g) Q^T``, gets ``G' = (G - s b^T) diag(1/g) Q^T``, with s the gradient of its bias: `moment_source` undoes
the fusion. Second moments grow by the squares of Q's entries, as if gradients of different coordinates, and those of
the bias, were independent. The normalisation keeps one gain for all coordinates; it is new, and its moments start at
zero. If readers have no bias (GPT-NeoX's head), b lies along a direction u: their G' gets ``s u^T`` besides, with s
computed from G (`_missing_bias`), and the normalisation's bias ``Q diag(g) G_b + u b^T G_b``. The gradient of the
stream's writers along u is in no moment of the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from phigrow.checkpoints.bits import Bits, widen
from phigrow.checkpoints.universal import ADAM_STATES
from phigrow.growth.axes import Bools, Floats
from phigrow.growth.lift import SourceTensor
from phigrow.growth.origins import Kind, anatomy
from phigrow.growth.plan import Plan
from phigrow.growth.recipe import Leg, TensorRecipe, Term

POWER = ADAM_STATES
"""Adam's moments, and the power of gains that they carry."""

STATES = {
    "scale": "copies take the gains of their gradients, squared for second moments; new values start at zero",
    "copy": "every copy takes its source's moments as they are",
    "asymmetric": "the first copy of each value keeps its moments as they are, further copies start at zero",
    "reset": "all moments start at zero, and Adam counts its steps from zero",
}
"""Ways to grow the moments; the first is the default.

- ``scale``: the rule above. Staged Training (2203.06211) has it for doubling, m/2 and v/4.
- ``copy``: moments are treated like weights without gains. Wrong by the gains; the same as ``scale`` for gains of 1.
- ``asymmetric``: SPARKLING (2602.02472) keeps the state of old values and resets that of new ones. There new values are
  copies too, and their states make them differ. Here a repeated layer counts as new.
- ``reset``: HyperCloning, bert2BERT and every tool that writes weights alone.
"""


LEAST_WEIGHT = 0.01
"""Moments are divided by the weights of a fused normalisation, but by no less than this part of their root mean square:
they are averages over steps at which these weights were not quite the same."""

MOST_AMPLIFIED = 100.0
"""The gradient of a missing bias is a quotient. It is left at zero where the divisor is so small that it would amplify
rounding, and changes of the weights between steps, by more than this factor."""

_VALUES_AT_ONCE = 1 << 22


def moment_recipe(
    recipe: TensorRecipe, plan: Plan, moment: str, state: str = "scale", *, power: int | None = None
) -> TensorRecipe | None:
    """Return the recipe of a moment of one destination tensor; None if all of it is zero.

    Args:
        recipe: of `Plan.recipes`.
        plan: the plan.
        moment: ``exp_avg`` or ``exp_avg_sq``.
        state: one of `STATES`.
        power: of the gradient that the moment averages; by default that of Adam's moments.

    Returns:
        A recipe for `phigrow.growth.lift.Lift` without random values, means or noise. The moment of ``recipe.source``
        that it reads comes from `moment_source`.

    >>> plan = phigrow.plan("phi-1_5", "phi2.json", "lossless")  # doctest: +SKIP
    >>> moment_recipe(next(plan.recipes()), plan, "exp_avg").legs[1].gain[0]  # of hidden: 1 / c  # doctest: +SKIP
    0.8944271909999159
    """
    if state == "reset" or not _keeps(recipe, plan, state):
        return None
    power = POWER[moment] if power is None else power
    sides = anatomy(recipe).sides if state == "asymmetric" else None
    kept: list[Bools] = []
    for stored, leg in enumerate(recipe.legs):
        is_first = np.isin(sides[stored].whole.kinds, (Kind.COPIED, Kind.SCALED)) if sides else True
        kept.append(leg.is_copy & is_first)

    with_bias = recipe.norm_fusion is not None and recipe.norm_fusion.bias_direction

    def turned(legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
        return tuple(
            _gradient_leg(leg, chosen, power if state == "scale" else 0, with_bias)
            for leg, chosen in zip(legs, kept, strict=True)
        )

    former = recipe.terms or (Term(recipe.source, recipe.legs),)
    terms = [Term(term.source, turned(term.legs)) for term in former]
    return replace(
        recipe,
        legs=turned(recipe.legs),
        terms=tuple(term for term in terms if _takes_something(term)),
        fill=0.0,
        offset=None,
        diagonal_blocks=1,
        noise=None,
        norm_fusion=None,
    )


def _keeps(recipe: TensorRecipe, plan: Plan, state: str) -> bool:
    """Return True if some of a tensor's moments come from the source."""
    dense = [leg.dense for leg in recipe.legs if leg.dense is not None]
    if recipe.is_zero or recipe.is_new or recipe.layer_sum or any(each.dual(1) is None for each in dense):
        return False
    fusion = recipe.norm_fusion
    if (dense or fusion) and state != "scale":
        return False  # a mixture is no copy
    if fusion is not None and recipe.source == fusion.scale:
        return False
    if recipe.layer is None:
        return True
    if state == "scale":  # nothing reads an identity layer, so its gradients are zero
        return recipe.layer not in plan.identity_layers
    if state == "asymmetric":
        source_layer = plan.layers[recipe.layer]
        copies = [k for k, source in enumerate(plan.layers) if source == source_layer and k not in plan.identity_layers]
        return recipe.layer == copies[0]
    return True


def _gradient_leg(leg: Leg, kept: Bools, power: int, with_bias: bool) -> Leg:
    """The leg of gradients: gains of either side change places, to a power; nothing is drawn and nothing is a mean.

    With ``with_bias``, a dense leg has one more source coordinate, along the bias direction.
    """
    nothing = np.zeros(leg.dst_size, dtype=np.bool_)
    if leg.dense is not None:
        gain, gradient_gain = leg.gradient_gain**power, leg.gain**power
        dense = leg.dense.dual(power, with_bias=with_bias)
        size = leg.src_size + with_bias
        return replace(leg, src_size=size, gain=gain, gradient_gain=gradient_gain, dense=dense, random=nothing)
    kept = kept & leg.is_copy
    return replace(
        leg,
        source=np.where(kept, leg.source, -1),
        is_mean=nothing,
        gain=np.where(kept, leg.gradient_gain**power, 0.0),
        gradient_gain=np.where(kept, leg.gain**power, 0.0),
        random=nothing,
        parts=(),
    )


def _takes_something(term: Term) -> bool:
    return all(leg.dense is not None or bool(leg.is_copy.any()) for leg in term.legs)


def moment_source(
    recipe: TensorRecipe, moment: str, read: Callable[[str, str], SourceTensor], *, power: int | None = None
) -> SourceTensor:
    """Return the values from which a tensor's moment is lifted: the source's moment, with norm fusion undone.

    Args:
        recipe: of `Plan.recipes`.
        moment: ``exp_avg`` or ``exp_avg_sq``.
        read: (source tensor, ``fp32`` or a moment) -> its values.
        power: as in `moment_recipe`.
    """
    source, fusion = read(recipe.source, moment), recipe.norm_fusion
    # A bias gets the gradient of the tensor that it is added to.
    if fusion is None or (len(recipe.shape) == 1 and recipe.source != fusion.shift):
        return source

    def whole(name: str, kind: str, size: int) -> Floats:
        values = read(name, kind)
        return widen(values.bits(0, size), values.dtype_name, np.float64).astype(np.float64, copy=False)

    power = POWER[moment] if power is None else power
    rows, columns = (recipe.source_shape[0], recipe.source_shape[-1])
    weights = whole(fusion.scale, "fp32", columns) ** power
    if recipe.source == fusion.shift:  # the normalisation is n -> g n + b: gradients of its readers go through g
        if not fusion.bias_direction:
            return _Unfused(source, weights)
        gradient = whole(recipe.source, moment, columns)
        aside = whole(fusion.shift, "fp32", columns) ** power @ gradient
        return _Held(np.append(weights * gradient, aside))
    least = (LEAST_WEIGHT * np.sqrt(np.square(weights).mean())) if power == 1 else LEAST_WEIGHT**2 * weights.mean()
    divisor = np.copysign(np.maximum(np.abs(weights), least), weights)
    if fusion.shift is None:
        return _Unfused(source, 1 / divisor)
    shift = whole(fusion.shift, "fp32", columns) ** power
    if fusion.bias is not None:
        bias = whole(fusion.bias, moment, rows)
    else:
        bias = _missing_bias(source, rows, divisor, shift, power)
    return _Unfused(source, 1 / divisor, bias, shift, positive=power == 2, with_bias=fusion.bias_direction)


def _missing_bias(source: SourceTensor, rows: int, divisor: Floats, shift: Floats, power: int) -> Floats:
    """[rows]: the moment that the bias of a reader would have, if the reader had one.

    The reader's gradient is ``G = (N + s e^T) diag(g)``, with N the gradient behind the normalisation before weights,
    and e = b/g. Normalised values add up to 0 over the coordinates, and so do the rows of N: s is the sum of a row of
    ``G diag(1/g)`` over the sum of e. For second moments, gradients of different tokens count as independent. The mean
    square of normalised values is 1, so that of s is that of N, averaged over the coordinates.
    """
    ratio = shift / divisor
    total = float(ratio.sum())
    if power == 1 and abs(total) * MOST_AMPLIFIED <= np.sqrt(len(ratio) * np.square(ratio).sum()):
        return np.zeros(rows)
    weights = (1 / divisor) / (total if power == 1 else len(ratio) + total)
    step = max(1, _VALUES_AT_ONCE // len(ratio))
    blocks = (source.bits(start, min(start + step, rows)) for start in range(0, rows, step))
    return np.concatenate([widen(block, source.dtype_name, np.float64) @ weights for block in blocks])


@dataclass(frozen=True, eq=False)
class _Unfused:
    """``(M - down across^T) * gains``, float64, read like a stored tensor; at least zero where ``positive`` is set.

    With ``with_bias``, ``down`` is one more column.
    """

    source: SourceTensor
    gains: Floats
    down: Floats | None = None
    across: Floats | None = None
    positive: bool = False
    with_bias: bool = False

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
        values = values * gains
        if self.with_bias and self.down is not None:
            values = np.column_stack([values, self.down[start:stop]])
        return np.ascontiguousarray(values).view(np.uint64)


@dataclass(frozen=True, eq=False)
class _Held:
    """Values in memory, float64, read like a stored tensor."""

    values: Floats

    @property
    def dtype_name(self) -> str:
        return "float64"

    def bits(self, start: int, stop: int) -> Bits:
        return self.values[start:stop].view(np.uint64)
