"""Origins of every value of a grown checkpoint, from its recipes alone: no weights, no torch.

Every coordinate of a stored axis has a `Kind`, and the kind of a value follows from the kinds of its row and its
column by the rules of `phigrow.growth.lift`: a zero leg wins over a random one, a random one over a mixture, a mixture
over a mean, a mean over a copy; a value is scaled where a gain of either is not 1. So a tensor is described by its
axes, and counted exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from functools import cached_property, reduce
from typing import Any, NamedTuple

import numpy as np

from phigrow.errors import GrowthError
from phigrow.growth.axes import Bools, Floats, Ints
from phigrow.growth.axis_groups import stored_label
from phigrow.growth.plan import Plan
from phigrow.growth.recipe import Leg, TensorRecipe
from phigrow.models.family import spelled


class Kind(IntEnum):
    """Kind of a value. Copies have two bits, further copy and scaled, so that they combine by `or`."""

    COPIED = 0
    TILED = 1
    SCALED = 2
    TILED_SCALED = 3
    MEAN = 4
    MIXED = 5
    FRESH = 6
    ZERO = 7
    CONSTANT = 8

    @property
    def is_copy(self) -> bool:
        return self <= Kind.TILED_SCALED

    @property
    def is_old(self) -> bool:  # made of the source's values alone
        return self.is_copy or self == Kind.MIXED


WORDS = {
    Kind.COPIED: "copied",
    Kind.TILED: "tiled",
    Kind.SCALED: "scaled",
    Kind.TILED_SCALED: "tiled and scaled",
    Kind.MEAN: "mean",
    Kind.MIXED: "mixed",
    Kind.FRESH: "fresh",
    Kind.ZERO: "zero",
    Kind.CONSTANT: "constant",
}
"""copied: the first copy, unchanged; tiled: a further copy; scaled: with a gain other than 1; mixed: a sum over many
values of the source, by dense legs or a fused normalisation; fresh: new random values; constant: the value of a new
bias or normalisation."""

SIDES = {1: ("values",), 2: ("rows", "columns")}
"""Names of the stored axes of a vector and of a matrix."""


class Span(NamedTuple):
    """Consecutive coordinates ``start .. stop`` of one kind and gain; ``source`` is None where they copy nothing.

    ``gain`` of a constant is its value, of a mixture 1.
    """

    start: int
    stop: int
    source: int | None
    kind: Kind
    gain: float

    def __str__(self) -> str:
        here, gain = _between(self.start, self.stop), f" x{self.gain:.4g}" if self.gain != 1 else ""
        if self.kind in (Kind.MEAN, Kind.MIXED):
            return f"{here} <- {'mean' if self.kind == Kind.MEAN else 'mixture of all'}{gain}"
        if self.source is not None:
            return f"{here} <- {_between(self.source, self.source + self.stop - self.start)}{gain}"
        return f"{here} {WORDS[self.kind]}" + (f" {self.gain:g}" if self.kind == Kind.CONSTANT else "")


def _between(start: int, stop: int) -> str:
    return f"{start}..{stop - 1}" if stop - start > 1 else str(start)


@dataclass(frozen=True, eq=False)
class Part:
    """One named axis as a tensor uses it.

    Attributes:
        name: of the axis.
        src_size: source coordinates.
        source: int64 [size]; the source coordinate, negative where there is none.
        kinds: int64 [size] of `Kind`.
        gains: float64 [size]; the gain of copies and means, the value of constants, 1 elsewhere.
    """

    name: str
    src_size: int
    source: Ints
    kinds: Ints
    gains: Floats

    @property
    def size(self) -> int:
        return len(self.kinds)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The coordinates as the fewest spans."""
        step = np.where(self.source[:-1] >= 0, 1, 0)
        same = self.source[1:] == self.source[:-1] + step
        same &= (self.kinds[1:] == self.kinds[:-1]) & (self.gains[1:] == self.gains[:-1])
        edges = [0, *(np.flatnonzero(~same) + 1).tolist(), self.size]
        return tuple(
            Span(a, b, int(self.source[a]) if self.source[a] >= 0 else None, Kind(self.kinds[a]), float(self.gains[a]))
            for a, b in itertools.pairwise(edges)
            if b > a
        )


@dataclass(frozen=True, eq=False)
class Side:
    """One stored axis of a tensor: as it is stored, and part by part where it is composite, such as (kv group q)."""

    whole: Part
    parts: tuple[Part, ...]
    written: bool


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Origins of the values of one tensor.

    Attributes:
        recipe: how the tensor is computed.
        sides: one a stored axis, rows first.
    """

    recipe: TensorRecipe
    sides: tuple[Side, ...]

    @property
    def noise(self) -> float:
        """Size of the noise on its values; 0 for none."""
        return self.recipe.noise.size if self.recipe.noise else 0.0

    def kinds(self) -> Ints:
        """int64 of the tensor's shape: the `Kind` of every value."""
        return np.where(self._diagonal, reduce(_outer, [side.whole.kinds for side in self.sides]), int(Kind.ZERO))

    def gains(self) -> Floats:
        """float64 of the tensor's shape: the gain of copies and means, the value of constants."""
        return np.where(self._diagonal, reduce(np.multiply.outer, [side.whole.gains for side in self.sides]), 1.0)

    @property
    def _diagonal(self) -> Bools:
        """bool, of the tensor's shape or of none: a matrix of diagonal blocks is zero where it is False."""
        count = self.recipe.diagonal_blocks
        places = [np.arange(side.whole.size) * count // side.whole.size for side in self.sides]
        return np.equal.outer(*places) if count > 1 else np.array(True)

    @cached_property
    def counts(self) -> dict[Kind, int]:
        """Number of values of each kind; they add up to the size of the tensor."""
        counts, blocks = dict.fromkeys(Kind, 0), self.recipe.diagonal_blocks
        for block in range(blocks):
            kinds = [np.array_split(side.whole.kinds, blocks)[block] for side in self.sides]
            held = [np.bincount(each, minlength=len(Kind)).tolist() for each in kinds]
            for choice in itertools.product(Kind, repeat=len(held)):
                many = [held[k][kind] for k, kind in enumerate(choice)]
                counts[reduce(combine, choice)] += int(np.prod(many, dtype=object))
        counts[Kind.ZERO] += int(np.prod(self.recipe.shape, dtype=object)) - sum(counts.values())
        return counts

    def to_json(self) -> dict[str, Any]:
        """A JSON object: shapes, source, the spans of every axis, and how many values are of each kind."""
        recipe = self.recipe
        return {
            "name": recipe.name,
            "shape": list(recipe.shape),
            "source": recipe.source,
            "source_shape": list(recipe.source_shape),
            "kind": recipe.kind,
            "identity_layer": recipe.is_zero,
            "noise": self.noise,
            "parts": recipe.diagonal_blocks,
            "above": recipe.next_layer_source,
            **({"blend": [list(term) for term in recipe.layer_sum]} if recipe.layer_sum else {}),
            "axes": [
                {
                    "axis": side.whole.name,
                    "leg": "write" if side.written else "read",
                    "parts": [
                        {"axis": part.name, "spans": [_span_json(span) for span in part.spans]} for part in side.parts
                    ],
                }
                for side in self.sides
            ],
            "values": named(self.counts),
        }


def combine(one: Kind, other: Kind) -> Kind:
    """The kind of a value from those of its row and its column.

    >>> combine(Kind.TILED, Kind.SCALED).name, combine(Kind.FRESH, Kind.ZERO).name
    ('TILED_SCALED', 'ZERO')
    """
    highest = max(one, other)
    return Kind(one | other) if highest.is_copy else highest


def _outer(one: Ints, other: Ints) -> Ints:
    highest = np.maximum.outer(one, other)
    return np.where(highest <= Kind.TILED_SCALED, np.bitwise_or.outer(one, other), highest)


def anatomy(recipe: TensorRecipe) -> Anatomy:
    """Read the origins of a tensor's values off its recipe.

    >>> plan = phigrow.plan("phi-1_5", "phi2.json", "wr")  # doctest: +SKIP
    >>> anatomy(next(plan.recipes())).counts[Kind.COPIED]  # doctest: +SKIP
    104857600
    """
    return Anatomy(recipe, tuple(_side(recipe, leg) for leg in recipe.legs))


def _side(recipe: TensorRecipe, leg: Leg) -> Side:
    # A composite coordinate is a first copy where all of its parts are.
    firsts = [first_copies(part.source) for part in leg.parts or (leg,)]
    first = reduce(np.logical_and.outer, firsts).reshape(-1)
    whole = _part(recipe, leg, first)
    parts = tuple(_part(recipe, part, f) for part, f in zip(leg.parts, firsts, strict=False))
    return Side(whole, parts or (whole,), leg.written)


def _part(recipe: TensorRecipe, leg: Leg, first: Bools) -> Part:
    """Kinds and gains of one axis, or of a part of a composite one, as the lift computes them."""
    name, size = spelled(leg.axis), leg.dst_size
    if not recipe.terms and not (recipe.is_new and leg.random.any()):
        return _constant(recipe, name, leg.src_size, size)
    no_source = ~(leg.is_copy | leg.is_mean)
    present = ~no_source & ~leg.random & (leg.gain != 0)
    copies = present & leg.is_copy
    kinds = np.full(size, int(Kind.ZERO if leg.dense is None else Kind.MIXED))
    if recipe.fill != 0 and leg.dense is None:
        kinds[no_source] = Kind.CONSTANT
    kinds[leg.random] = Kind.FRESH
    kinds[present & leg.is_mean] = Kind.MEAN
    kinds[copies] = (~first * Kind.TILED + (leg.gain != 1) * Kind.SCALED)[copies]
    if recipe.layer_sum or (recipe.offset is not None and len(recipe.shape) == 1):
        kinds[copies], copies = int(Kind.MIXED), np.zeros(size, dtype=bool)
    gains = np.where(present, leg.gain, np.where(kinds == Kind.CONSTANT, recipe.fill, 1.0))
    return Part(name, leg.src_size, np.where(copies, leg.source, -1), kinds, gains)


def _constant(recipe: TensorRecipe, name: str, src_size: int, size: int) -> Part:
    """A part of a tensor without terms: zero, one constant for every coordinate, or the bias direction."""
    kind = Kind.ZERO if recipe.offset is None else Kind.FRESH
    gains = np.broadcast_to(np.asarray(recipe.fill, dtype=np.float64), size)
    if gains.any():
        return Part(name, src_size, np.full(size, -1), np.full(size, int(Kind.CONSTANT)), gains)
    return Part(name, src_size, np.full(size, -1), np.full(size, int(kind)), np.ones(size))


def first_copies(source: Ints) -> Bools:
    """One copy of every source coordinate that has any, the one in the longest unbroken run.

    With ``anchor center`` that is the block in the middle, not the copies that wrap around before it.

    Args:
        source: int64 [dst_size]; the source coordinate of every coordinate, negative where there is none.

    Returns:
        bool [dst_size].

    >>> first_copies(wrap(3, 5, "center")).tolist()  # doctest: +SKIP
    [False, True, True, True, False]
    """
    ends = (source[:-1] < 0) | (source[1:] != source[:-1] + 1)
    edges = [0, *(np.flatnonzero(ends) + 1).tolist(), len(source)]
    lengths = np.repeat(np.diff(edges), np.diff(edges))
    copies = np.flatnonzero(source >= 0)
    best = copies[np.lexsort((copies, -lengths[copies], source[copies]))]
    _, places = np.unique(source[best], return_index=True)
    first = np.zeros(len(source), dtype=bool)
    first[best[places]] = True
    return first


def matching(plan: Plan, pattern: str) -> list[Anatomy]:
    """The tensors whose name matches a pattern such as ``model.layers.0.*``.

    Raises:
        GrowthError: none does.
    """
    matches = [anatomy(recipe) for recipe in plan.recipes() if fnmatchcase(recipe.name, pattern)]
    if not matches:
        names = [recipe.name for recipe in plan.recipes()]
        raise GrowthError(
            f"no tensor matches {pattern!r}",
            where="the names of the grown model's tensors",
            why=f"the grown model has {len(names)} tensors, from {names[0]} to {names[-1]}",
            fix="give a whole name or a pattern with *, such as '*.layers.0.*' or '*q_proj*'",
        )
    return matches


def named(counts: Mapping[Kind, int]) -> dict[str, int]:
    """Counts with words for keys, as in JSON."""
    return {WORDS[kind]: counts[kind] for kind in Kind}


def span_lines(anatomy: Anatomy, most: int = 16) -> list[str]:
    """The axes of a tensor in words, one line a span: ``rows head: q 64..79 <- 32..47 x0.559``.

    Spans of a composite axis are those of its parts, of which the axis is the product. At most ``most`` a part.
    """
    recipe, lines = anatomy.recipe, []
    if recipe.diagonal_blocks > 1:
        lines.append(f"zero but for {recipe.diagonal_blocks} blocks on the diagonal")
    if recipe.layer_sum:
        lines.append("a sum: " + " + ".join(f"{coefficient:.3g} {name}" for name, coefficient in recipe.layer_sum))
    if recipe.next_layer_source is not None:
        lines.append(f"new coordinates of {stored_label(spelled(recipe.written.axis))} <- {recipe.next_layer_source}")
    for word, side in zip(SIDES[len(anatomy.sides)], anatomy.sides, strict=True):
        for part in side.parts:
            label = f"{word} {stored_label(part.name)}"
            lines += [f"{label} {span}" for span in part.spans[:most]]
            if len(part.spans) > most:
                lines.append(f"{label} and {len(part.spans) - most} more spans (all of them with --json)")
    return lines


def _span_json(span: Span) -> dict[str, Any]:
    return {
        "start": span.start,
        "stop": span.stop,
        "source": span.source,
        "kind": WORDS[span.kind],
        "gain": span.gain,
    }
