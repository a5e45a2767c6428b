"""Where every value of a grown checkpoint came from, read off its plan: no weights, no torch.

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
from phigrow.growth.axes import DENSE, MEAN, AxisMap, Bools, Floats, Ints, part_map
from phigrow.growth.plan import NoiseOn, Plan, TensorGrowth
from phigrow.models.family import spelled


class Kind(IntEnum):
    """What a value is. The copies are two bits, further copy and scaled, so that they combine by `or`."""

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
"""copied: the first copy, as it was; tiled: a further copy; scaled: with a gain that is not 1; mixed: a sum over many
values of the source, by dense legs or with what a folded normalisation adds; fresh: new random values; constant: the
value of a new bias or normalisation."""

SIDES = {1: ("values",), 2: ("rows", "columns")}
"""What the stored axes of a vector and of a matrix are called."""


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
    """Where the values of one tensor came from.

    Attributes:
        growth: the tensor.
        sides: one a stored axis, rows first.
        noise: symmetry-breaking noise on what copies are read with, as a fraction of the root mean square; or 0.
    """

    growth: TensorGrowth
    sides: tuple[Side, ...]
    noise: float

    def kinds(self) -> Ints:
        """int64 of the tensor's shape: the `Kind` of every value."""
        return np.where(self._diagonal, reduce(_outer, [side.whole.kinds for side in self.sides]), int(Kind.ZERO))

    def gains(self) -> Floats:
        """float64 of the tensor's shape: the gain of copies and means, the value of constants."""
        return np.where(self._diagonal, reduce(np.multiply.outer, [side.whole.gains for side in self.sides]), 1.0)

    @property
    def _diagonal(self) -> Bools:
        """bool, of the tensor's shape or of none: outside of it a matrix of several parts is zero."""
        parts = self.growth.parts
        places = [np.arange(side.whole.size) * parts // side.whole.size for side in self.sides]
        return np.equal.outer(*places) if parts > 1 else np.array(True)

    @cached_property
    def counts(self) -> dict[Kind, int]:
        """How many values are of each kind; they add up to the size of the tensor."""
        counts, parts = dict.fromkeys(Kind, 0), self.growth.parts
        for part in range(parts):
            kinds = [np.array_split(side.whole.kinds, parts)[part] for side in self.sides]
            held = [np.bincount(each, minlength=len(Kind)).tolist() for each in kinds]
            for choice in itertools.product(Kind, repeat=len(held)):
                many = [held[k][kind] for k, kind in enumerate(choice)]
                counts[reduce(combine, choice)] += int(np.prod(many, dtype=object))
        counts[Kind.ZERO] += int(np.prod(self.growth.shape, dtype=object)) - sum(counts.values())
        return counts

    def to_json(self) -> dict[str, Any]:
        """A JSON object: shapes, source, the spans of every axis, and how many values are of each kind."""
        growth = self.growth
        return {
            "name": growth.name,
            "shape": list(growth.shape),
            "source": growth.source,
            "source_shape": list(growth.source_shape),
            "kind": growth.parameter.kind,
            "identity_layer": growth.zero,
            "noise": self.noise,
            "parts": growth.parts,
            "above": growth.above,
            **({"blend": [list(part) for part in growth.blend]} if growth.blend else {}),
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


def anatomy(
    growth: TensorGrowth, axes: Mapping[str, AxisMap], noise: float = 0.0, noise_on: NoiseOn = "copies"
) -> Anatomy:
    """Where every value of a tensor comes from.

    Args:
        growth: of `Plan.tensors`.
        axes: the plan's maps, by which the copies of a composite axis are told from further copies.
        noise, noise_on: the plan's.

    >>> plan = phigrow.plan("phi-1_5", "phi2.json", "wr")  # doctest: +SKIP
    >>> anatomy(next(plan.tensors()), plan.axes).counts[Kind.COPIED]  # doctest: +SKIP
    104857600
    """
    sides = tuple(_side(growth, stored, axes) for stored in range(len(growth.maps)))
    return Anatomy(growth, sides, noise if growth.carries_noise(noise_on) else 0.0)


def _side(growth: TensorGrowth, stored: int, axes: Mapping[str, AxisMap]) -> Side:
    names = growth.parameter.axes[stored]
    maps = [part_map(axes, name) for name in names]
    firsts = [first_copies(each) for each in maps]
    first = reduce(np.logical_and.outer, firsts).reshape(-1)
    whole = _part(growth, stored, spelled(names), growth.maps[stored], first)
    if len(names) == 1 or growth.maps[stored].legs is not None:
        parts: tuple[Part, ...] = (whole,)
    else:
        parts = tuple(_part(growth, stored, name, each, f) for name, each, f in zip(names, maps, firsts, strict=True))
    return Side(whole, parts, stored == growth.written)


def _part(growth: TensorGrowth, stored: int, name: str, axis: AxisMap, first: Bools) -> Part:
    size = axis.dst_size
    if growth.zero:
        nothing = np.full(size, -1)
        return Part(name, axis.src_size, nothing, np.full(size, int(Kind.ZERO)), np.ones(size))
    fresh_value = 0.0
    if len(growth.maps) == 2:
        written = stored == growth.written
        read = axis.read * (growth.parts if axis.parts == growth.parts else 1)
        gains, random = (axis.write, axis.write_random) if written else (read, axis.read_random)
    else:
        # Vectors are never drawn: where nothing is copied they hold one value.
        gains, random = _vector_gains(growth, axis), np.zeros(size, dtype=bool)
        fresh_value = 1.0 if growth.parameter.kind == "scale" else axis.fresh_bias
    if growth.fold is not None and growth.parameter.kind in ("scale", "shift"):
        return _folded_norm(growth, name, axis)
    present = (axis.source >= MEAN) & ~random & (gains != 0)
    copies = present & axis.is_copy
    kinds = np.where(axis.source == DENSE, int(Kind.MIXED), int(Kind.ZERO))
    if fresh_value != 0:
        kinds[axis.source < MEAN] = Kind.CONSTANT
    kinds[random] = Kind.FRESH
    kinds[present & (axis.source == MEAN)] = Kind.MEAN
    kinds[copies] = (~first * Kind.TILED + (gains != 1) * Kind.SCALED)[copies]
    if growth.blend or (growth.fold is not None and growth.parameter.kind == "bias"):
        kinds[copies], copies = int(Kind.MIXED), np.zeros(size, dtype=bool)
    held = np.where(present, gains, np.where(kinds == Kind.CONSTANT, fresh_value, 1.0))
    return Part(name, axis.src_size, np.where(copies, axis.source, -1), kinds, held)


def _folded_norm(growth: TensorGrowth, name: str, axis: AxisMap) -> Part:
    """One gain for all coordinates; no bias, or a drawn direction."""
    kind, gain = Kind.FRESH if growth.fold and growth.fold.aside else Kind.ZERO, np.ones_like(axis.write)
    if growth.parameter.kind == "scale" and growth.norm_read is not None:
        kind, gain = Kind.CONSTANT, axis.write / growth.norm_read.write
    return Part(name, axis.src_size, np.full(axis.dst_size, -1), np.full(axis.dst_size, int(kind)), gain)


def _vector_gains(growth: TensorGrowth, axis: AxisMap) -> Floats:
    """What `lift` multiplies a bias or a normalisation by."""
    if growth.norm_read is axis:
        return np.ones_like(axis.write)
    if growth.parameter.kind == "scale" and growth.norm_read is not None:
        return np.divide(axis.write, growth.norm_read.write, out=np.ones_like(axis.write), where=axis.is_copy)
    return axis.write


def first_copies(axis: AxisMap) -> Bools:
    """bool [dst_size]: one copy of every source coordinate that has any, the one in the longest unbroken run.

    With ``anchor center`` that is the block in the middle, not what wraps around before it.

    >>> first_copies(axis_map(3, wrap(3, 5, "center"))).tolist()  # doctest: +SKIP
    [False, True, True, True, False]
    """
    lengths = np.zeros(axis.dst_size, dtype=np.int64)
    for run in axis.runs:
        lengths[run.start : run.stop] = run.stop - run.start
    copies = np.flatnonzero(axis.is_copy)
    best = copies[np.lexsort((copies, -lengths[copies], axis.source[copies]))]
    _, places = np.unique(axis.source[best], return_index=True)
    first = np.zeros(axis.dst_size, dtype=bool)
    first[best[places]] = True
    return first


def matching(plan: Plan, pattern: str) -> list[Anatomy]:
    """The tensors whose name matches a pattern such as ``model.layers.0.*``.

    Raises:
        GrowthError: none does.
    """
    found = [anatomy(g, plan.axes, plan.noise, plan.noise_on) for g in plan.tensors() if fnmatchcase(g.name, pattern)]
    if not found:
        names = [g.name for g in plan.tensors()]
        raise GrowthError(
            f"no tensor matches {pattern!r}",
            why=f"the grown model has {len(names)} tensors, from {names[0]} to {names[-1]}",
            fix="give a whole name or a pattern with *, such as '*.layers.0.*' or '*q_proj*'",
        )
    return found


def named(counts: Mapping[Kind, int]) -> dict[str, int]:
    """Counts with words for keys, as in JSON."""
    return {WORDS[kind]: counts[kind] for kind in Kind}


def span_lines(found: Anatomy, most: int = 16) -> list[str]:
    """The axes of a tensor in words, one line a span: ``rows q 64..79 <- 32..47 x0.559``.

    Spans of a composite axis are those of its parts, of which the axis is the product. At most ``most`` a part.
    """
    growth, lines = found.growth, []
    if growth.parts > 1:
        lines.append(f"zero but for {growth.parts} blocks on the diagonal")
    if growth.blend:
        lines.append("a sum: " + " + ".join(f"{coefficient:.3g} {name}" for name, coefficient in growth.blend))
    if growth.above is not None:
        lines.append(f"new coordinates of {spelled(growth.parameter.written)} <- {growth.above}")
    for word, side in zip(SIDES[len(found.sides)], found.sides, strict=True):
        for part in side.parts:
            label = f"{word} {part.name}"
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
