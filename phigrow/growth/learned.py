"""Learned growth: matrices that replace an operator's copies, axis by axis and layer by layer.

A learned plan starts from an operator of copies, whose gains it keeps: E = diag(write) B and R = B^T diag(read). Every
stream has one matrix B, so that its writers and readers agree. At the start B selects: B[i, source(i)] is 1, and E and
R are the operator's own. Composite axes are made of these matrices: ``(kv group v)``, which the output of attention
reads, of B of ``(kv v)``; ``(kv q|k|v)`` of three, which do not mix.

Depth: a destination layer is a sum over source layers, with coefficients of its own for every line of the family table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from phigrow.errors import GrowthError
from phigrow.growth.axes import AxisMap, Ints, kronecker, part_map
from phigrow.growth.dense_map import Floats
from phigrow.growth.matrices import Maps
from phigrow.models.config import Config
from phigrow.models.family import Axis, Family, stacked_names

STREAM = "stream"


class Place(NamedTuple):
    """The place of a matrix B in the matrix of a composite axis: at [i, j] it is B[rows[i], columns[j]] where
    ``row_tags[i] == column_tags[j]``, and nothing elsewhere."""

    name: str
    rows: Ints
    columns: Ints
    row_tags: Ints
    column_tags: Ints

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """bool [dst, src]: where it lies."""
        return np.equal.outer(self.row_tags, self.column_tags)


@dataclass(frozen=True, eq=False)
class LearnedMap:
    """Both legs of an axis from one matrix [dst, src]."""

    learned: Learned
    axis: Axis
    fuses_norms: bool = False

    @cached_property
    def _matrix(self) -> Floats:
        places = self.learned.places(self.axis)
        return sum(
            (np.where(at.mask, self.learned.matrix(at.name)[np.ix_(at.rows, at.columns)], 0.0) for at in places),
            start=np.zeros(()),
        )

    @cached_property
    def _narrow(self) -> npt.NDArray[Any]:
        return self._matrix.astype(np.float32)

    def write(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        return self._matrix if np.dtype(compute) == np.float64 else self._narrow

    def read(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        return self.write(compute).T

    def bias_direction(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        raise AssertionError("no normalisation is fused into learned legs")

    def left_inverse_error(self, gains: Floats) -> float:
        product = (self._matrix.T * gains) @ self._matrix
        return float(np.abs(product - np.eye(len(product))).max())

    def dual(self, power: int, *, with_bias: bool = False) -> None:
        """Return None: learned legs have no inverse, so there is no rule for gradients."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "learned" if self.learned.maps.sha256 else "learned, at its start"}


class Learned:
    """The matrices of a learned plan, in place of the copies that it starts from.

    Args:
        maps: the matrices; none at the start.
        family: the table.
        config: of the destination.
        axes: the start's maps.
        layers, identity_layers: the start's layer map.
        src_layers: layers of the source.
    """

    def __init__(
        self,
        maps: Maps,
        family: Family,
        config: Config,
        axes: Mapping[str, AxisMap],
        layers: tuple[int, ...],
        identity_layers: frozenset[int],
        src_layers: int,
    ) -> None:
        self.maps, self.family, self.config, self.axes = maps, family, config, axes
        self.layers, self.identity_layers, self.src_layers = layers, identity_layers, src_layers
        streams = (family.residual, family.normed, family.final)
        self._streams = {(name,): STREAM for name in streams}
        self._own: dict[str, Axis] = {STREAM: (family.residual,), family.mlp: (family.mlp,)}
        for p in family.parameters:
            if len(p.written) > 1:
                self._own |= {name: (*p.written[:-1], name) for name in stacked_names(p.written[-1])}

    @cached_property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Name -> (destination, source) size of every learned matrix; axes that keep their size have none."""
        maps = {name: self._start(name) for name in self._own}
        return {name: (m.dst_size, m.src_size) for name, m in maps.items() if m.dst_size != m.src_size}

    def lines(self) -> list[str]:
        """Lines of the family table that have coefficients: all in layers, where layers are added."""
        grows = len(self.layers) != self.src_layers
        return [p.name for p in self.family.parameters if grows and p.in_layer and p.present(self.config)]

    def matrix(self, name: str) -> Floats:
        """B [dst, src] of a name, learned or at the start."""
        start = self._start(name)
        learned = self.maps.matrix(f"width/{name}", self.widths[name]) if name in self.widths else None
        return selection(start) if learned is None else learned

    def depth(self, line: str) -> Floats:
        """[dst layers, src layers]: the coefficients of a line of the family table."""
        shape = (len(self.layers), self.src_layers)
        learned = self.maps.matrix(f"depth/{line}", shape) if line in self.lines() else None
        if learned is not None:
            return learned
        out = np.zeros(shape)
        out[np.arange(shape[0]), list(self.layers)] = 1.0
        written = next(p.written for p in self.family.parameters if p.name == line)
        if written == (self.family.residual,):
            out[sorted(self.identity_layers)] = 0.0
        return out

    def places(self, axis: Axis) -> list[Place]:
        """Places of matrices in the matrix of an axis; empty where the axis keeps the start's map."""
        if len(axis) == 1:
            name = self._streams.get(axis, axis[0] if axis[0] == self.family.mlp else None)
            sizes = self.widths.get(name or "")
            return [] if name is None or sizes is None else [_everywhere(name, *sizes)]
        names = stacked_names(axis[-1])
        return [self._place(axis, name) for name in names] if any(name in self.widths for name in names) else []

    def grown(self, axis: Axis, start: AxisMap) -> AxisMap:
        """The map of an axis, from the start's."""
        if not self.places(axis):
            return start
        nothing = np.full(start.dst_size, -1)
        return replace(start, source=nothing, is_mean=nothing >= 0, structure=LearnedMap(self, axis))

    def check(self, where: str | Path) -> None:
        """Compare the names and shapes of the matrices with the sizes of the plan.

        Raises:
            GrowthError: the matrices were learned for other sizes.
        """
        expected = {f"width/{name}" for name in self.widths} | {f"depth/{line}" for line in self.lines()}
        if other := sorted(expected ^ set(self.maps.tensors)):
            is_needed = other[0] in expected
            raise GrowthError(
                "the learned maps do not fit the plan",
                where=str(where),
                why=f"the plan needs {other[0]}, which the file lacks"
                if is_needed
                else f"the file has {other[0]}, which the plan does not use",
                fix="learn them again for this source and this destination",
            )
        for name in self.widths:
            self.matrix(name)
        for line in self.lines():
            self.depth(line)

    def _start(self, name: str) -> AxisMap:
        own = self._own[name]
        return kronecker(own, [part_map(self.axes, part) for part in own])

    def _place(self, axis: Axis, name: str) -> Place:
        own, extra = self._own[name], [part for part in axis[:-1] if part not in self._own[name]]
        (rows, row_tags), (columns, column_tags) = (
            self._side(axis, name, own, extra, destination) for destination in (True, False)
        )
        # Coordinates on one side alone never meet the other side.
        return Place(name, rows, columns, row_tags, np.where(column_tags < 0, -2, column_tags))

    def _side(self, axis: Axis, name: str, own: Axis, extra: list[str], destination: bool) -> tuple[Ints, Ints]:
        def size(part: str) -> int:
            made = part_map(self.axes, part)
            return made.dst_size if destination else made.src_size

        shape = [size(part) for part in axis]
        at = dict(zip(axis, np.unravel_index(np.arange(int(np.prod(shape))), shape), strict=True))
        names = stacked_names(axis[-1])
        offset = sum(size(each) for each in names[: names.index(name)])
        inside = at[axis[-1]] - offset
        member = (inside >= 0) & (inside < size(name))
        at[name] = np.where(member, inside, 0)
        index = np.ravel_multi_index([at[part] for part in own], [size(part) for part in own])
        tags = np.zeros(len(index), dtype=np.int64)
        for part in extra:
            source = self.axes[part].source[at[part]] if destination else at[part]
            member &= source >= 0
            tags = tags * self.axes[part].src_size + np.maximum(source, 0)
        return index.astype(np.int64), np.where(member, tags, -1)


def selection(axis: AxisMap) -> Floats:
    """[dst, src]: 1 where a coordinate copies a source coordinate."""
    out = np.zeros((axis.dst_size, axis.src_size))
    copies = np.flatnonzero(axis.is_copy)
    out[copies, axis.source[copies]] = 1.0
    return out


def _everywhere(name: str, dst: int, src: int) -> Place:
    rows, columns = np.arange(dst), np.arange(src)
    return Place(name, rows, columns, np.zeros_like(rows), np.zeros_like(columns))
