"""`lift`: the only function that computes grown values.

It reads a `phigrow.growth.recipe.TensorRecipe` and source tensors, and nothing else. A destination tensor is lifted in
blocks of rows, so that no tensor has to fit in memory. Where source and destination have one dtype, values are copied
as stored bits and only values with a gain are computed: exact, and at the speed of memory. New values come from
`phigrow.growth.draws`. The result does not depend on the size of blocks or shards, on threads, or on which tensors are
grown together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from phigrow.checkpoints.bits import STORED, Bits, Values, bits_of, narrow, scaled, tensor_of, widen
from phigrow.growth.axes import Floats, Ints
from phigrow.growth.draws import NormalStream
from phigrow.growth.recipe import Leg, Noise, TensorRecipe

if TYPE_CHECKING:
    import torch

TILE = 32
"""Rows of a matrix product; from 16 to 128 equally fast."""
_STATISTICS_VALUES = 1 << 20
"""Values summed at a time for means; fixed, because the order of a sum shows in its last bits."""
_MOST_PIECES = 256
"""Above so many pieces a block, columns are gathered by index rather than slice by slice."""


class SourceTensor(Protocol):
    """A source tensor of which rows are read on demand."""

    @property
    def dtype_name(self) -> str: ...

    def bits(self, start: int, stop: int) -> Bits:
        """Rows ``start .. stop`` as stored, [stop - start, ...], unsigned integers of the dtype's width."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A source tensor that is held in memory."""

    tensor: torch.Tensor

    @property
    def dtype_name(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    def bits(self, start: int, stop: int) -> Bits:
        return bits_of(self.tensor[start:stop])


def lift(recipe: TensorRecipe, tensors: Mapping[str, SourceTensor], dtype: torch.dtype) -> torch.Tensor:
    """Compute one grown tensor, whole.

    Args:
        recipe: how it is computed.
        tensors: name -> source tensor, of at least those in ``recipe.sources``.
        dtype: of the result.
    """
    name = str(dtype).removeprefix("torch.")
    return tensor_of(Lift(recipe, tensors, name).rows(0, recipe.shape[0]), name)


class Lift:
    """The lift of one destination tensor.

    Args:
        recipe: how it is computed.
        tensors: name -> source tensor, of at least those in ``recipe.sources``.
        dtype: of the result, as torch names it.

    Arithmetic is float64 where source or result is, else float32; one rounding at the end. Mixtures (dense axes and
    sums over layers) are added up in float64 except for 16-bit results.
    """

    def __init__(self, recipe: TensorRecipe, tensors: Mapping[str, SourceTensor], dtype: str) -> None:
        self.recipe, self.dtype = recipe, dtype
        self._tensors = {name: tensors[name] for name in recipe.sources}
        self.source: SourceTensor = self._tensors[recipe.source]
        self._mixes = recipe.is_dense or recipe.offset is not None or bool(recipe.layer_sum)
        wide = "float64" in (self.source.dtype_name, dtype) or (self._mixes and dtype == "float32")
        self.compute: type[np.floating[Any]] = np.float64 if wide else np.float32
        if recipe.layer_sum:
            summed = [(coefficient, self._tensors[name]) for name, coefficient in recipe.layer_sum]
            self.source = LayerSum(summed, recipe.source_shape[0], self.compute)
            self._terms = [_GrownTerm(self.source, recipe.legs, recipe.source_shape, self.compute)]
        else:
            self._terms = [
                _GrownTerm(self._tensors[term.source], term.legs, recipe.source_shape, self.compute)
                for term in recipe.terms
            ]

    def rows(self, start: int, stop: int) -> Bits:
        """Rows ``start .. stop`` of the destination tensor, [stop - start, ...], as stored bits of the result's dtype.

        Thread-safe: blocks of one tensor may be lifted at the same time.
        """
        if self.recipe.is_zero:
            return np.zeros((stop - start, *self.recipe.shape[1:]), dtype=STORED[self.dtype])
        if len(self.recipe.shape) == 1:
            return narrow(self._vector()[start:stop], self.dtype)
        return self._dense_rows(start, stop) if self._mixes else self._copied_rows(start, stop)

    def _vector(self) -> Values:
        recipe, leg, offset = self.recipe, self.recipe.legs[0], self.recipe.offset
        out: Values = np.full(leg.dst_size, recipe.fill, dtype=self.compute)
        if offset is not None and offset.direction is not None:
            out += _along(offset.direction, self.compute)
        for term in self._terms:
            (leg,) = term.legs
            values, gain = term.values(0, leg.src_size), leg.gain.astype(self.compute)
            if offset is not None and offset.matrix is not None:
                values = values + self._product(offset.matrix, str(offset.vector), leg.src_size, offset.size)
            if leg.dense is not None:
                out = (leg.matrix(self.compute) @ values) * gain
            else:
                out[leg.is_copy] = values[leg.source[leg.is_copy]] * gain[leg.is_copy]
                out[leg.is_mean] = _means(values, leg).astype(self.compute) * gain[leg.is_mean]
            if leg.random.any():
                drawn = NormalStream(recipe.seed, "new values", recipe.name, int(leg.random.sum())).values(0, 1)[0]
                out[leg.random] = drawn * recipe.std
        return out

    def _copied_rows(self, start: int, stop: int) -> Bits:
        """Rows of a matrix of copies and means: by slices, as stored bits where dtypes agree."""
        recipe, noise = self.recipe, self.recipe.noise
        copy_bits = noise is None and all(term.source.dtype_name == self.dtype for term in self._terms)
        make = np.empty if self._is_filled else np.zeros
        out = make((stop - start, recipe.shape[1]), dtype=STORED[self.dtype] if copy_bits else self.compute)
        for term in self._terms:
            for piece in clip(term.pieces[0], start, stop):
                target = out[piece.start - start : piece.stop - start]
                if piece.is_mean:
                    row = np.zeros((1, recipe.shape[1]), dtype=self.compute)
                    self._gather(term, term.mean_of(piece)[None, :], piece.gain, row)
                    target[:] = narrow(row, self.dtype) if copy_bits else row
                else:
                    read = term.source.bits if copy_bits else term.values
                    rows = read(piece.source, piece.source + piece.stop - piece.start)
                    self._gather(term, rows, piece.gain, target)
        self._fill_random(out, start, stop)
        if recipe.diagonal_blocks > 1:
            _clear_beside_blocks(out, recipe, start, stop)
        if noise is not None:
            add_noise(recipe, noise, self._terms[0].root_mean_square, out, start)
        bits: Bits = out if copy_bits else narrow(out, self.dtype)
        return bits

    def _dense_rows(self, start: int, stop: int) -> Bits:
        """Rows of a matrix that mixes: one leg after the other, in tiles that do not depend on the block."""
        (term,), column_leg = self._terms, self.recipe.legs[1]
        first, last = aligned(start, stop, self.recipe.shape[0])
        rows = self._grown_rows(term, first, last)
        if column_leg.dense is None:
            out: Values = np.zeros((last - first, column_leg.dst_size), dtype=self.compute)
            self._gather(term, rows, 1.0, out)
        else:
            out = self._mixed_columns(rows, column_leg)
        out = out[start - first : stop - first]
        self._fill_random(out, start, stop)
        return narrow(out, self.dtype)

    def _grown_rows(self, term: _GrownTerm, first: int, last: int) -> Values:
        """[last - first, source columns]: rows after the row leg."""
        leg = term.legs[0]
        if leg.dense is not None:
            gain = leg.gain[first:last, None].astype(self.compute)
            blocks = ((low, term.values(low, high)) for low, high in _spans(term.shape))
            return mixed_rows(leg.matrix(self.compute)[first:last], blocks, term.shape[1]) * gain
        rows: Values = np.zeros((last - first, term.shape[1]), dtype=self.compute)
        for piece in clip(term.pieces[0], first, last):
            size = piece.stop - piece.start
            block = term.mean_of(piece) if piece.is_mean else term.values(piece.source, piece.source + size)
            rows[piece.start - first : piece.stop - first] = block * self.compute(piece.gain)
        return rows

    def _mixed_columns(self, rows: Values, leg: Leg) -> Values:
        """Rows after a dense column leg, with the normalisation that is fused into them."""
        scale, offset = self.recipe.terms[0].column_scale, self.recipe.offset
        gain = leg.gain.astype(self.compute)
        scaled_rows = rows if scale is None else rows * self._whole(scale, leg.src_size)
        out = mixed_columns(scaled_rows, leg.matrix(self.compute).T) * gain
        if offset is not None and offset.direction is not None:
            shifted = mixed_columns(rows, self._whole(str(offset.vector), leg.src_size)[:, None])
            out += shifted * _along(offset.direction, self.compute)
        return out

    def _gather(self, term: _GrownTerm, rows: np.ndarray, row_gain: float, out: np.ndarray) -> None:
        """Fill the columns of ``out`` from ``rows``; both are stored bits, or both are values."""
        pieces, leg = term.pieces[1], term.legs[1]
        if len(pieces) > _MOST_PIECES:
            copies = np.flatnonzero(leg.is_copy)
            gains = leg.gain[copies] * row_gain
            out[:, copies] = self._times(rows[:, leg.source[copies]], 1.0 if (gains == 1).all() else gains)
            pieces = [piece for piece in pieces if piece.is_mean]
        for piece in pieces:
            if piece.is_mean:
                values = rows if rows.dtype.kind == "f" else widen(rows, self.dtype, self.compute)
                mean = values.mean(axis=1, keepdims=True, dtype=np.float64) * (piece.gain * row_gain)
                mean = mean.astype(self.compute)
                out[:, piece.start : piece.stop] = mean if rows.dtype.kind == "f" else narrow(mean, self.dtype)
            else:
                block = rows[:, piece.source : piece.source + piece.stop - piece.start]
                out[:, piece.start : piece.stop] = self._times(block, piece.gain * row_gain)

    def _times(self, values: np.ndarray, gain: float | Floats) -> np.ndarray:
        if isinstance(gain, float) and gain == 1:
            return values
        if values.dtype.kind == "f":
            product: np.ndarray = values * np.asarray(gain, dtype=self.compute)
            return product
        return scaled(values, self.dtype, gain)

    @cached_property
    def _is_filled(self) -> bool:
        """Every value of a matrix comes from the source or is drawn, so none is left at zero."""
        return all(bool((leg.random | (leg.gain != 0)).all()) for leg in self.recipe.legs)

    def _whole(self, name: str, size: int) -> Values:
        """A source vector."""
        tensor = self._tensors[name]
        return widen(tensor.bits(0, size), tensor.dtype_name, self.compute)

    def _product(self, matrix: str, vector: str, rows: int, columns: int) -> Values:
        """[rows]: a source matrix times a source vector."""
        tensor, values = self._tensors[matrix], self._whole(vector, columns)
        blocks = (widen(tensor.bits(*span), tensor.dtype_name, self.compute) for span in _spans((rows, columns)))
        return np.concatenate([block @ values for block in blocks])

    def _fill_random(self, out: np.ndarray, start: int, stop: int) -> None:
        """Draw the new values of a matrix."""
        recipe, (row_leg, column_leg) = self.recipe, self.recipe.legs
        if not (row_leg.random[start:stop].any() or column_leg.random.any()):
            return
        # A zero leg wins over a random one: new heads must not be read whatever their rows hold.
        row_open, column_open = (leg.random | (leg.gain != 0) for leg in (row_leg, column_leg))
        for purpose, rows, columns in (
            ("new rows", row_leg.random, column_open),
            ("new columns", ~row_leg.random & row_open, column_leg.random),
        ):
            chosen, places = np.flatnonzero(rows[start:stop]), np.flatnonzero(columns)
            if not len(chosen) or not len(places):
                continue
            stream = NormalStream(recipe.seed, purpose, recipe.name, len(places))
            first = int(np.count_nonzero(rows[:start]))
            if out.dtype.kind == "f":
                assign(out, chosen, places, stream.values(first, len(chosen)) * recipe.std)
            else:
                assign(out, chosen, places, stream.bits(first, len(chosen), recipe.std, self.dtype))


class _GrownTerm:
    """A source tensor with the legs by which it grows, and statistics of the whole tensor that its blocks share."""

    def __init__(
        self,
        source: SourceTensor,
        legs: tuple[Leg, ...],
        shape: tuple[int, ...],
        compute: type[np.floating[Any]],
    ) -> None:
        self.source, self.legs, self.shape, self.compute = source, legs, shape, compute
        self._column_mean: Values | None = None
        self._root_mean_square: float | None = None
        self._lock = Lock()

    @cached_property
    def pieces(self) -> tuple[list[Piece], ...]:
        return tuple(pieces_of(leg) for leg in self.legs)

    def values(self, start: int, stop: int) -> Values:
        """Source rows ``start .. stop`` in the dtype of the arithmetic."""
        return widen(self.source.bits(start, stop), self.source.dtype_name, self.compute)

    def mean_of(self, piece: Piece) -> Values:
        """[columns]: the mean over the source rows of a piece of means, accumulated in float64."""
        means = self.legs[0].part_means
        if means is None:
            return self.mean_of_rows()
        rows = self.values(piece.source, piece.source + means.size)
        mean: Values = rows.mean(axis=0, dtype=np.float64).astype(self.compute)
        return mean

    def mean_of_rows(self) -> Values:
        """[columns]: the mean over all source rows, accumulated in float64."""
        with self._lock:
            if self._column_mean is None:
                total = np.zeros(self.shape[1])
                for span in _spans(self.shape):
                    block = self.values(*span)
                    # Sums of 16 in the arithmetic's own dtype: as exact as its result, and five times as fast.
                    even = len(block) - len(block) % 16
                    total += block[:even].reshape(16, -1, block.shape[1]).sum(axis=0).sum(axis=0, dtype=np.float64)
                    total += block[even:].sum(axis=0, dtype=np.float64)
                self._column_mean = (total / self.shape[0]).astype(self.compute)
            return self._column_mean

    def root_mean_square(self) -> float:
        """Root mean square of all source values, accumulated in float64."""
        with self._lock:
            if self._root_mean_square is None:
                total = 0.0
                for span in _spans(self.shape):
                    block = widen(self.source.bits(*span), self.source.dtype_name, np.float64)
                    total += float(np.square(block).sum())
                self._root_mean_square = (total / (self.shape[0] * self.shape[1])) ** 0.5
            return self._root_mean_square


def _spans(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    rows, columns = shape
    step = max(1, _STATISTICS_VALUES // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _along(leg: Leg, compute: type[np.floating[Any]]) -> Values:
    """[dst]: the bias direction of a dense axis, with its gains."""
    assert leg.dense is not None, "the axis is dense"
    direction: Values = leg.dense.bias_direction(compute) * leg.gain.astype(compute)
    return direction


def _clear_beside_blocks(out: np.ndarray, recipe: TensorRecipe, start: int, stop: int) -> None:
    """Leave the blocks on the diagonal."""
    height, width = (size // recipe.diagonal_blocks for size in recipe.shape)
    for block in range(recipe.diagonal_blocks):
        low, high = max(start, block * height), min(stop, (block + 1) * height)
        if low < high:
            out[low - start : high - start, : block * width] = 0
            out[low - start : high - start, (block + 1) * width :] = 0


# Copying, in slices.


class Piece(NamedTuple):
    """Consecutive destination coordinates of one gain that copy consecutive source coordinates, or are their mean.

    ``source`` is the first source coordinate. Of means over the whole axis it is -1.
    """

    start: int
    stop: int
    source: int
    gain: float
    is_mean: bool = False


def pieces_of(leg: Leg) -> list[Piece]:
    """The coordinates that take something from the source, in the fewest pieces."""
    source, gain = leg.source, leg.gain
    if leg.part_means is not None:
        source = np.where(leg.is_mean, leg.part_means.start, source)
    same = np.where(leg.is_copy[:-1], source[1:] == source[:-1] + 1, source[1:] == source[:-1])
    same &= (gain[1:] == gain[:-1]) & (leg.is_mean[1:] == leg.is_mean[:-1])
    edges = [0, *(np.flatnonzero(~same) + 1).tolist(), leg.dst_size]
    used = (leg.is_copy | leg.is_mean) & (gain != 0)
    return [
        Piece(start, stop, int(source[start]), float(gain[start]), bool(leg.is_mean[start]))
        for start, stop in itertools.pairwise(edges)
        if stop > start and used[start]
    ]


def _means(values: Values, leg: Leg) -> Floats:
    """float64, one for each mean of a leg: the means of a source vector."""
    means = leg.part_means
    if means is None:
        return np.full(int(leg.is_mean.sum()), values.mean(dtype=np.float64))
    by_part: Floats = values.reshape(-1, means.size).mean(axis=1, dtype=np.float64)
    return by_part[means.start[leg.is_mean] // means.size]


def clip(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """The pieces inside ``start .. stop``, cut to it."""
    clipped = []
    for piece in pieces:
        low, high = max(piece.start, start), min(piece.stop, stop)
        if low < high:
            source = piece.source if piece.is_mean else piece.source + low - piece.start
            clipped.append(piece._replace(start=low, stop=high, source=source))
    return clipped


def assign(out: np.ndarray, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
    """``out[rows][:, columns] = values``, by slices where they are consecutive (much faster than by index)."""
    row_slice, column_slice = _as_slice(rows), _as_slice(columns)
    if row_slice is not None and column_slice is not None:
        out[row_slice, column_slice] = values
    elif row_slice is not None:
        out[row_slice, columns] = values
    elif column_slice is not None:
        out[rows, column_slice] = values
    else:
        out[rows[:, None], columns[None, :]] = values


def _as_slice(places: np.ndarray) -> slice | None:
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else None


# Matrix products: the same bits for a row whatever block it is computed in. A BLAS may add up in another order where a
# matrix has another height, so products are taken in tiles of rows that lie at multiples of `TILE` of the whole tensor.


def aligned(start: int, stop: int, rows: int) -> tuple[int, int]:
    """The rows, of ``rows`` in all, that whole tiles around ``start .. stop`` hold.

    >>> aligned(40, 70, 80), aligned(40, 70, 200)
    ((32, 80), (32, 96))
    """
    return start - start % TILE, min(-(-stop // TILE) * TILE, rows)


def mixed_rows(matrix: Values, blocks: Iterable[tuple[int, Values]], width: int) -> Values:
    """``matrix @ source``, [rows, width], with the source given in blocks (first row, rows), each read once.

    Args:
        matrix: [rows, all source rows]; its first row lies at a multiple of `TILE` of the whole tensor.
    """
    out: Values = np.zeros((len(matrix), width), dtype=matrix.dtype)
    for first, block in blocks:
        for start, stop in _tiles(len(matrix)):
            out[start:stop] += matrix[start:stop, first : first + len(block)] @ block
    return out


def mixed_columns(rows: Values, matrix: Values) -> Values:
    """``rows @ matrix``; the first row lies at a multiple of `TILE` of the whole tensor."""
    out: Values = np.empty((len(rows), matrix.shape[1]), dtype=rows.dtype)
    for start, stop in _tiles(len(rows)):
        np.matmul(rows[start:stop], matrix, out=out[start:stop])
    return out


def _tiles(rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + TILE, rows)) for start in range(0, rows, TILE))


class LayerSum:
    """A source tensor that is a sum over tensors of several layers, added up once and held while it is in use.

    The four that were used last are held, in the dtype of the arithmetic.

    Args:
        summed: (coefficient, tensor), all of one shape.
        rows: of each.
        compute: float32 or float64.
    """

    def __init__(
        self, summed: Sequence[tuple[float, SourceTensor]], rows: int, compute: type[np.floating[Any]]
    ) -> None:
        self.summed, self.rows, self.compute = summed, rows, compute
        self.lock = Lock()

    @property
    def dtype_name(self) -> str:
        return np.dtype(self.compute).name

    def bits(self, start: int, stop: int) -> Bits:
        """Rows ``start .. stop``, as bits of the arithmetic's dtype."""
        with self.lock:
            whole = _summed(self)
        view: Bits = whole[start:stop].view(STORED[self.dtype_name])
        return view


@lru_cache(maxsize=4)
def _summed(layers: LayerSum) -> Values:
    total: Any = None
    for coefficient, tensor in layers.summed:
        values = widen(tensor.bits(0, layers.rows), tensor.dtype_name, layers.compute)
        total = values * layers.compute(coefficient) + (0 if total is None else total)
    out: Values = total
    return out


# Noise.


def add_noise(
    recipe: TensorRecipe, noise: Noise, root_mean_square: Callable[[], float], out: Values, start: int
) -> None:
    """Add a recipe's noise to rows ``start ..`` of a matrix, in place."""
    if noise.on == "all":
        _add_everywhere(recipe, noise, out, start)
        return
    row_leg, column_leg = recipe.legs
    copies = np.flatnonzero(column_leg.is_copy)
    size = noise.size * root_mean_square() * column_leg.gain[copies]
    draw = _cancelling_pairs if noise.on == "pairs" else _cancelling_together
    drawn = draw(recipe, column_leg, copies, size, start, len(out))
    written = row_leg.is_copy | row_leg.is_mean
    drawn[~written[start : start + len(out)]] = 0
    out[:, copies] += drawn.astype(out.dtype)


def _cancelling_together(recipe: TensorRecipe, leg: Leg, copies: Ints, size: Floats, start: int, count: int) -> Floats:
    """N (I - E R), with R the leg that averages copies: the noise of each copy, minus the part that does not cancel."""
    source, write = leg.source[copies], leg.gradient_gain[copies]
    back = 1.0 / (write * leg.counts[source])
    noise = NormalStream(recipe.seed, "noise", recipe.name, len(copies)).values(start, count) * size
    weighted = (noise * write)[:, np.argsort(source, kind="stable")]
    first_copies = np.concatenate([[0], np.cumsum(leg.counts[leg.counts > 0])[:-1]])
    summed = np.zeros((count, leg.src_size))
    summed[:, leg.counts > 0] = np.add.reduceat(weighted, first_copies, axis=1)
    shared: Floats = noise - summed[:, source] * back
    return shared


def _cancelling_pairs(recipe: TensorRecipe, leg: Leg, copies: Ints, size: Floats, start: int, count: int) -> Floats:
    """+N and -N on the first and second, third and fourth copy of a coordinate; none on one that is left over."""
    order = np.argsort(leg.source[copies], kind="stable")
    counts = leg.counts[leg.counts > 0]
    nth = np.arange(len(copies)) - np.repeat(np.cumsum(counts) - counts, counts)
    even = np.flatnonzero((nth % 2 == 0) & (nth + 1 < np.repeat(counts, counts)))
    one, other = order[even], order[even + 1]
    noise, write = np.zeros((count, len(copies))), leg.gradient_gain[copies]
    drawn = NormalStream(recipe.seed, "noise", recipe.name, len(one)).values(start, count)
    noise[:, one] = drawn * size[one]
    noise[:, other] = -noise[:, one] * (write[one] / write[other])
    return noise


def _add_everywhere(recipe: TensorRecipe, noise: Noise, out: Values, start: int) -> None:
    """Add the values of an initialisation to those from the source; new values are drawn already."""
    row_leg, column_leg = recipe.legs
    rows, columns = np.flatnonzero(row_leg.gain[start : start + len(out)]), np.flatnonzero(column_leg.gain)
    if not len(rows) or not len(columns):
        return
    perturbation = NormalStream(recipe.seed, "perturbation", recipe.name, len(columns)).values(start, len(out))
    out[rows[:, None], columns] += (perturbation[rows] * (noise.size * recipe.std)).astype(out.dtype)
