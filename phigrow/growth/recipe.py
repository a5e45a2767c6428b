"""Recipes: the computation of each destination tensor from source tensors, resolved from a plan.

A `TensorRecipe` is the only description of a tensor's arithmetic. The lift computes it, learned growth computes it in
torch, `phigrow.growth.origins` reads off where every value came from, and `phigrow.growth.moments` turns it around for
Adam's moments. None of them looks at the family table again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from phigrow.growth.axes import AxisMap, Bools, Floats, Ints, PartMeans, part_map
from phigrow.growth.dense_map import DenseMap
from phigrow.growth.learned import Learned
from phigrow.growth.norm_fusion import NormFusion, norm_fusions
from phigrow.models.config import Config
from phigrow.models.family import Axis, Family, Parameter, Sizes

NoiseOn = Literal["copies", "pairs", "all"]


@dataclass(frozen=True, eq=False)
class Leg:
    """One stored axis of a tensor: where each destination coordinate comes from, and its gain.

    Attributes:
        axis: names of the axis in the family table; several for a composite axis.
        written: the tensor writes the axis; otherwise it reads it.
        src_size: source coordinates.
        source: int64 [dst_size]; the source coordinate copied, -1 where there is none.
        is_mean: bool [dst_size]; the coordinate is a mean over source coordinates: all, or those of ``part_means``.
        gain: float64 [dst_size]; factor of weights, 0 where nothing comes from the source.
        gradient_gain: float64 [dst_size]; factor of gradients, which run the other way.
        random: bool [dst_size]; the coordinate is filled with new random values.
        dense: the matrix of an axis whose coordinates mix all source coordinates; None of any other.
        parts: of a composite axis, the legs of its parts, slowest first.
        part_means: the source coordinates that means are taken over; None where they are taken over all.
    """

    axis: Axis
    written: bool
    src_size: int
    source: Ints
    is_mean: Bools
    gain: Floats
    gradient_gain: Floats
    random: Bools
    dense: DenseMap | None = None
    parts: tuple[Leg, ...] = ()
    part_means: PartMeans | None = None

    @property
    def dst_size(self) -> int:
        return len(self.source)

    @cached_property
    def is_copy(self) -> Bools:
        """bool [dst_size]: the coordinates that copy a source coordinate."""
        return self.source >= 0

    @cached_property
    def counts(self) -> Ints:
        """int64 [src_size]: how many destination coordinates copy each source coordinate."""
        return np.bincount(self.source[self.is_copy], minlength=self.src_size)

    @cached_property
    def is_identity(self) -> bool:
        """The tensor has its source's coordinates, in their order and with gain 1."""
        same = self.dst_size == self.src_size and np.array_equal(self.source, np.arange(self.src_size))
        return bool(same and (self.gain == 1).all())

    def matrix(self, compute: npt.DTypeLike) -> npt.NDArray[Any]:
        """[dst, src]: the matrix of a dense axis, without gains."""
        assert self.dense is not None, "the axis is dense"
        return self.dense.write(compute) if self.written else self.dense.read(compute).T

    def only(self, chosen: Bools) -> Leg:
        """The leg of the chosen coordinates; the others take nothing."""
        return replace(
            self,
            source=np.where(chosen, self.source, -1),
            is_mean=self.is_mean & chosen,
            gain=np.where(chosen, self.gain, 0.0),
            gradient_gain=np.where(chosen, self.gradient_gain, 0.0),
            random=self.random & chosen,
        )

    def without_source(self, random: bool) -> Leg:
        """The leg of a new layer: no coordinate takes anything, and all are drawn where ``random`` is set."""
        nothing = np.zeros(self.dst_size)
        return replace(
            self,
            source=np.full(self.dst_size, -1),
            is_mean=np.zeros(self.dst_size, dtype=np.bool_),
            gain=nothing,
            gradient_gain=nothing,
            random=np.full(self.dst_size, random),
            dense=None,
            parts=tuple(part.without_source(random) for part in self.parts),
        )


@dataclass(frozen=True, eq=False)
class Term:
    """One source tensor's share of a destination tensor: ``coefficient`` times its values, grown by two legs.

    Attributes:
        source: the source tensor.
        legs: how its stored axes grow: its row leg, and of a matrix its column leg.
        coefficient: factor of all its values.
        column_scale: source vector that multiplies the columns before they grow (a fused normalisation's weight).
    """

    source: str
    legs: tuple[Leg, ...]
    coefficient: float = 1.0
    column_scale: str | None = None


@dataclass(frozen=True, eq=False)
class Offset:
    """A product that is added to a tensor: ``matrix @ vector``, or 1 without them, along a direction.

    Attributes:
        matrix, vector: source tensors. Their product has a source coordinate for every row of the tensor, and grows by
            the row leg.
        direction: the dense axis whose `DenseMap.bias_direction` it lies along, times the leg's gains; None for a bias,
            which has no second axis.
        size: length of the vector.
    """

    matrix: str | None = None
    vector: str | None = None
    direction: Leg | None = None
    size: int = 0


@dataclass(frozen=True)
class Noise:
    """Symmetry-breaking noise: its size and where it goes; see `phigrow.growth.plan.Plan`."""

    size: float
    on: NoiseOn


@dataclass(frozen=True, eq=False)
class TensorRecipe:
    """The computation of one destination tensor.

    The tensor is the sum of its terms, plus its offset. Coordinates that no term writes hold ``fill``, or new random
    values if the legs are random. Terms either share their legs, and are added up, or have legs for different rows.

    Attributes:
        name: destination tensor.
        source: the source tensor that takes its place in the smaller model.
        line: its line in the family table.
        kind: ``matrix``, ``bias``, ``scale`` or ``shift``, for reports; no arithmetic depends on it.
        layer: its destination layer; None outside of layers.
        legs: how each stored axis grows, in storage order.
        terms: shares of source tensors; none if every value is constant.
        fill: value of coordinates that no term writes; one number, or one value a coordinate of a vector.
        offset: a product that is added to the terms; None for none.
        diagonal_blocks: blocks on the diagonal of a matrix that is zero elsewhere; 1 for any other tensor.
        noise: noise on its values; None for none.
        norm_fusion: the normalisation that is fused into it, or of which it is a part; None if none is fused.
        is_new: it lies in a layer of new values, so nothing comes from the source.
        seed: of random values.
        std: standard deviation of random values.
    """

    name: str
    source: str
    line: str
    kind: str
    layer: int | None
    legs: tuple[Leg, ...]
    terms: tuple[Term, ...]
    fill: float | Floats = 0.0
    offset: Offset | None = None
    diagonal_blocks: int = 1
    noise: Noise | None = None
    norm_fusion: NormFusion | None = None
    is_new: bool = False
    seed: int = 0
    std: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(leg.dst_size for leg in self.legs)

    @property
    def source_shape(self) -> tuple[int, ...]:
        return tuple(leg.src_size for leg in self.legs)

    @property
    def written(self) -> Leg:
        """The leg of the axis that it writes."""
        return next(leg for leg in self.legs if leg.written)

    @property
    def is_zero(self) -> bool:
        """Every value is 0: it writes the residual stream in an identity layer."""
        return not self.terms and self.norm_fusion is None and not self.is_new

    @property
    def is_dense(self) -> bool:
        """An axis mixes all of its source coordinates."""
        return any(leg.dense is not None for leg in self.legs)

    @cached_property
    def layer_sum(self) -> tuple[tuple[str, float], ...]:
        """(source tensor, coefficient) of all layers that it is a sum of; empty where it comes from one as it is."""
        alike = all(term.legs == self.legs for term in self.terms)
        if not alike or (len(self.terms) < 2 and all(term.coefficient == 1 for term in self.terms)):
            return ()
        return tuple((term.source, term.coefficient) for term in self.terms)

    @property
    def next_layer_source(self) -> str | None:
        """The same tensor of the next source layer, where new coordinates come from there."""
        others = [term.source for term in self.terms if term.source != self.source]
        return others[0] if others and not self.layer_sum else None

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source tensor that its values are computed from."""
        names = [self.source]
        for term in self.terms:
            names += [term.source, *([term.column_scale] if term.column_scale else [])]
        if self.offset is not None:
            names += [name for name in (self.offset.matrix, self.offset.vector) if name is not None]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, eq=False)
class Resolver:
    """Resolves the tensors of a plan; legs are shared between layers.

    Attributes:
        family: the family table.
        src_config, dst_config: configurations of source and destination.
        axes: axis name -> map.
        composites: axis of a parameter -> map, composite axes among them.
        layers: source layer of each destination layer, -1 where it holds new values.
        identity_layers: destination layers that write nothing.
        learned: the learned matrices, of a plan of a learned method.
        seed, std: of random values.
        noise: of matrices that carry it; None for none.
    """

    family: Family
    src_config: Config
    dst_config: Config
    axes: Mapping[str, AxisMap]
    composites: Mapping[Axis, AxisMap]
    layers: tuple[int, ...]
    identity_layers: frozenset[int]
    learned: Learned | None
    seed: int
    std: float
    noise: Noise | None

    @cached_property
    def _src_sizes(self) -> Sizes:
        return self.family.sizes_of(self.src_config)

    @cached_property
    def _fusions(self) -> dict[str, NormFusion]:
        maps = self.composites.items()
        fused = {axis for axis, made in maps if made.dense is not None and made.dense.fuses_norms}
        return norm_fusions(self.family, self.src_config, fused)

    @cached_property
    def _legs(self) -> dict[str, tuple[Leg, ...]]:
        return {}

    @cached_property
    def _split_legs(self) -> dict[str, tuple[tuple[Leg, ...], tuple[Leg, ...]]]:
        return {}

    def recipes(self) -> Iterator[TensorRecipe]:
        """Every destination tensor, in the order of the family table."""
        layered = [p for p in self.family.parameters if p.in_layer and p.present(self.dst_config)]
        for parameter in self.family.parameters:
            if not parameter.present(self.dst_config):
                continue
            if not parameter.in_layer:
                yield self.recipe(parameter, None)
            elif parameter is layered[0]:
                for layer in range(len(self.layers)):
                    for p in layered:
                        yield self.recipe(p, layer)

    def recipe(self, parameter: Parameter, layer: int | None) -> TensorRecipe:
        """The recipe of one line of the family table, in one destination layer."""
        if layer is not None and self.layers[layer] < 0:
            return self._new_recipe(parameter, layer)
        legs = self.legs(parameter)
        source_layer, summed = self._layers(parameter, layer)
        source = parameter.name.format(layer=source_layer)
        is_norm = parameter.kind in ("scale", "shift")
        fusion = self._fusions.get(parameter.name) if summed else None
        fusion = fusion.at(source_layer) if fusion else None
        fill: float | Floats = 0.0
        if parameter.kind == "scale":
            fill = 1.0
        elif parameter.kind in ("bias", "shift"):
            fill = self.composites[parameter.written].fresh_bias
        terms = [Term(parameter.name.format(layer=k), legs, coefficient) for k, coefficient in summed]
        offset = None
        if not terms:
            fill = 0.0
        elif fusion is not None:
            stream = self._src_sizes[self.family.residual]
            terms, fill, offset = _fused(parameter, terms, legs, fusion, fill, stream)
        elif not is_norm and source_layer is not None:
            terms = self._from_next_layer(parameter, source_layer, terms)
        return TensorRecipe(
            name=parameter.name.format(layer=layer),
            source=source,
            line=parameter.name,
            kind=parameter.kind,
            layer=layer,
            legs=legs,
            terms=tuple(terms),
            fill=fill,
            offset=offset,
            diagonal_blocks=self._blocks(parameter),
            noise=self._noise(legs, layer) if terms else None,
            norm_fusion=fusion,
            seed=self.seed,
            std=self.std,
        )

    def _new_recipe(self, parameter: Parameter, layer: int) -> TensorRecipe:
        """The recipe of a tensor in a layer of new values: a matrix is drawn, a vector is as at initialisation."""
        return TensorRecipe(
            name=parameter.name.format(layer=layer),
            source=parameter.name.format(layer=max(self.layers[:layer], default=0)),
            line=parameter.name,
            kind=parameter.kind,
            layer=layer,
            legs=tuple(leg.without_source(random=len(parameter.axes) == 2) for leg in self.legs(parameter)),
            terms=(),
            fill=1.0 if parameter.kind == "scale" else 0.0,
            is_new=True,
            seed=self.seed,
            std=self.std,
        )

    def legs(self, parameter: Parameter) -> tuple[Leg, ...]:
        """The legs of a line of the family table, in storage order."""
        if parameter.name not in self._legs:
            self._legs[parameter.name] = tuple(self._leg(parameter, axis) for axis in parameter.axes)
        return self._legs[parameter.name]

    def _leg(self, parameter: Parameter, axis: Axis) -> Leg:
        blocks = self._blocks(parameter)
        written = axis == parameter.written
        whole = self._one_leg(parameter, axis, written, self.composites[axis], blocks)
        if len(axis) == 1 or whole.dense is not None:
            return whole
        # Blocks lie along the slowest part of a composite axis, which therefore carries their gain.
        maps = [(name, part_map(self.axes, name)) for name in axis]
        parts = [
            self._one_leg(parameter, (name,), written, part, blocks if part.diagonal_blocks == blocks else 1)
            for name, part in maps
        ]
        return replace(whole, parts=tuple(parts))

    def _one_leg(self, parameter: Parameter, names: Axis, written: bool, made: AxisMap, blocks: int) -> Leg:
        write, read = made.write, made.read
        if parameter.kind in ("scale", "shift"):
            write, read = self._norm_gains(parameter, made)
        # Vectors are never drawn: where nothing is copied they hold one value. The exception is the bias of a
        # normalisation inside heads, which alone makes new coordinates of a head differ.
        is_drawn = len(parameter.axes) == 2
        if made.head_norm is not None and parameter.kind in ("scale", "shift"):
            made, is_drawn = made.behind_norm(), parameter.kind == "shift"
        random = made.write_random if written else made.read_random
        return Leg(
            axis=names,
            written=written,
            src_size=made.src_size,
            source=made.source,
            is_mean=made.is_mean,
            gain=write if written else read * blocks,
            gradient_gain=read if written else write,
            random=random if is_drawn else np.zeros_like(random),
            dense=made.dense,
            part_means=made.part_means,
        )

    def _norm_gains(self, parameter: Parameter, made: AxisMap) -> tuple[Floats, Floats]:
        """Gains of a normalisation's weight or bias, and of its gradient.

        A normalisation of the stream passes on the stream's gains, so its weight divides by them. A normalisation that
        writes the axis that it reads (of a head) takes all gains off.
        """
        own = parameter.read == parameter.written
        if made.head_norm is not None:
            behind = made.behind_norm()
            if parameter.kind == "shift":
                return behind.write, behind.read
            return np.where(behind.is_copy, behind.write / made.write, 1.0), behind.read * made.write
        if parameter.kind == "shift" or parameter.read is None:
            return (np.ones_like(made.write) if own else made.write), made.read
        stream = self.composites[parameter.read].write
        if own:
            return np.ones_like(made.write), made.read * stream
        from_source = made.is_copy | (made.dense is not None)
        gain = np.divide(made.write, stream, out=np.ones_like(made.write), where=from_source)
        return gain, made.read * stream

    def _blocks(self, parameter: Parameter) -> int:
        counts = [self.composites[axis].diagonal_blocks for axis in parameter.axes]
        return counts[0] if len(counts) == 2 and counts[0] == counts[1] else 1

    def _layers(self, parameter: Parameter, layer: int | None) -> tuple[int | None, list[tuple[int | None, float]]]:
        """The source layer of a tensor, and the layers that it is a sum of with their coefficients."""
        if layer is None:
            return None, [(None, 1.0)]
        source_layer = self.layers[layer]
        if self.learned is None:
            is_zero = layer in self.identity_layers and parameter.written == (self.family.residual,)
            return source_layer, [] if is_zero else [(source_layer, 1.0)]
        coefficients = self.learned.depth(parameter.name)[layer]
        used = [int(k) for k in np.flatnonzero(coefficients)]
        if len(used) == 1 and coefficients[used[0]] == 1:
            source_layer = used[0]
        return source_layer, [(k, float(coefficients[k])) for k in used]

    def _from_next_layer(self, parameter: Parameter, source_layer: int, terms: list[Term]) -> list[Term]:
        """The terms, with new written coordinates from the next source layer, if there is one."""
        made = self.composites[parameter.written]
        next_layer = source_layer + 1
        if made.from_next_layer is None or next_layer >= self._src_sizes["layer"]:
            return terms
        if parameter.name not in self._split_legs:
            chosen = made.from_next_layer & made.is_copy
            sides = [
                tuple(leg.only(side) if leg.written else leg for leg in self.legs(parameter))
                for side in (~chosen, chosen)
            ]
            self._split_legs[parameter.name] = sides[0], sides[1]
        own, following = self._split_legs[parameter.name]
        name = parameter.name.format(layer=next_layer)
        return [Term(terms[0].source, own), Term(name, following)]

    def _noise(self, legs: tuple[Leg, ...], layer: int | None) -> Noise | None:
        """The noise of a matrix; its copies cancel it, so it goes where copies are summed over."""
        if len(legs) != 2 or self.noise is None:
            return None
        # Tokens are looked up, not summed over: there is nothing for noise on the vocabulary axis to cancel in.
        cancels = legs[0].written and int(legs[1].counts.max(initial=0)) > 1
        applies = self.noise.on == "all" or (cancels and (self.noise.on == "copies" or layer is not None))
        return self.noise if applies else None


def _fused(
    parameter: Parameter,
    terms: list[Term],
    legs: tuple[Leg, ...],
    fusion: NormFusion,
    fill: float | Floats,
    stream: int,
) -> tuple[list[Term], float | Floats, Offset | None]:
    """Terms, fill and offset of a tensor with a fused normalisation of ``stream`` values, or of a part of one."""
    if parameter.kind == "scale":  # one gain for all coordinates is left
        return [], legs[0].gain, None
    if parameter.kind == "shift":
        return [], 0.0, Offset(direction=legs[0]) if fusion.bias_direction else None
    if parameter.kind == "bias":
        return terms, fill, Offset(fusion.reader, fusion.shift, size=stream)
    source = terms[0].source
    offset = Offset(source, fusion.shift, legs[1], stream) if fusion.bias_direction else None
    return [replace(terms[0], column_scale=fusion.scale)], fill, offset
