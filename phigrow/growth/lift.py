"""`lift`: the only function that computes grown values.

A destination tensor is lifted in blocks of rows, so that no tensor has to fit in memory. Where source and destination
have one dtype, values move as stored bits and only what has a gain is computed: exact, and at the speed of memory. New
values come from `phigrow.growth.draws`. None of this depends on the size of blocks or shards, on threads, or on which
tensors are grown together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np

from phigrow.checkpoints.bits import STORED, Bits, Values, bits_of, narrow, scaled, tensor_of, widen
from phigrow.growth.axes import MEAN, AxisMap, Bools, Floats, Ints
from phigrow.growth.draws import Stream
from phigrow.growth.layer_sum import Blend
from phigrow.growth.matmul import aligned, mixed_columns, mixed_rows
from phigrow.growth.pieces import Piece, assign, clip, pieces_of
from phigrow.growth.plan import Plan, TensorGrowth

if TYPE_CHECKING:
    import torch

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
    """A source tensor that is simply there."""

    tensor: torch.Tensor

    @property
    def dtype_name(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    def bits(self, start: int, stop: int) -> Bits:
        return bits_of(self.tensor[start:stop])


class Lift:
    """The lift of one destination tensor.

    Args:
        growth: where it comes from.
        source: the source tensor's values.
        plan: gives seed, noise and the standard deviation of new values.
        dtype: of the result, as torch names it.
        others: name -> source tensor, of those that ``growth.others`` names.

    Arithmetic is float64 where source or result is, else float32; one rounding at the end. Mixtures
    (`phigrow.growth.dense_map`) are added up in float64 except for 16-bit results.
    """

    def __init__(
        self,
        growth: TensorGrowth,
        source: SourceTensor,
        plan: Plan,
        dtype: str,
        others: Mapping[str, SourceTensor] | None = None,
    ) -> None:
        self.growth, self.dtype = growth, dtype
        self.others = {name: (others or {})[name] for name in growth.others}
        self.seed, self.noise, self.std = plan.seed, plan.noise, plan.initializer_range
        self.stream = plan.axes[plan.table.residual].src_size
        self.noise_on = plan.noise_on
        mixed_axes = any(each.legs is not None for each in growth.maps)
        self.mixes = mixed_axes or growth.fold is not None or bool(growth.blend)
        wide = "float64" in (source.dtype_name, dtype) or (self.mixes and dtype == "float32")
        self.compute = np.float64 if wide else np.float32
        blended = [(coefficient, self.others[name]) for name, coefficient in growth.blend]
        self.source: SourceTensor = Blend(blended, growth.source_shape[0], self.compute) if blended else source
        self._column_mean: Values | None = None
        self._rms: float | None = None
        self._preparing = Lock()

    def rows(self, start: int, stop: int) -> Bits:
        """Rows ``start .. stop`` of the destination tensor, [stop - start, ...], as stored bits of the result's dtype.

        Thread-safe: blocks of one tensor may be lifted at the same time.
        """
        shape = (stop - start, *self.growth.shape[1:])
        if self.growth.zero:
            return np.zeros(shape, dtype=STORED[self.dtype])
        if len(shape) == 1:
            return narrow(self._vector(start, stop), self.dtype)
        return self._matrix(start, stop)

    # Vectors: biases, and scales and shifts of normalisations.

    def _vector(self, start: int, stop: int) -> Values:
        if self.mixes:
            return self._mixed_vector()[start:stop]
        return self._spread(self._rows_of(self.source, 0, self.growth.maps[0].src_size))[start:stop]

    def _spread(self, values: Values) -> Values:
        growth, axis = self.growth, self.growth.maps[0]
        is_scale = growth.parameter.kind == "scale"
        gain = axis.write
        if is_scale and growth.norm_read is not None:
            # A normalisation passes on the gains of the stream it reads: its scale takes them off again.
            read_gain = growth.norm_read.write
            gain = np.divide(axis.write, read_gain, out=np.ones_like(axis.write), where=axis.is_copy)
        if growth.norm_read is axis:
            gain = np.ones_like(gain)
        out: Values = np.full(axis.dst_size, 1.0 if is_scale else axis.fresh_bias, dtype=self.compute)
        gain, means = gain.astype(self.compute), axis.source == MEAN
        out[axis.is_copy] = values[axis.source[axis.is_copy]] * gain[axis.is_copy]
        if growth.above is not None and axis.ahead is not None:
            ahead = axis.ahead & axis.is_copy
            out[ahead] = self._rows_of(self.others[growth.above], 0, axis.src_size)[axis.source[ahead]] * gain[ahead]
        out[means] = self.compute(values.mean(dtype=np.float64)) * gain[means]
        return out

    def _mixed_vector(self) -> Values:
        """A vector of a mixed axis, or one that takes in a normalisation or is a part of it."""
        growth, axis = self.growth, self.growth.maps[0]
        fold, kind = growth.fold, growth.parameter.kind
        gains: Values = axis.write.astype(self.compute)
        if fold is None and kind == "scale" and growth.norm_read is not None:
            gains = (axis.write / growth.norm_read.write).astype(self.compute)
        if fold is not None and kind == "scale":
            assert growth.norm_read is not None, "a normalisation reads the stream"
            return (axis.write / growth.norm_read.write).astype(self.compute)
        if fold is not None and kind == "shift":
            assert axis.legs is not None, "what is folded is mixed"
            return axis.legs.aside(self.compute) * gains if fold.aside else np.zeros_like(gains)
        values = self._rows_of(self.source, 0, axis.src_size)
        if fold is not None and fold.shift is not None and fold.reader is not None:
            reader, shift = self.others[fold.reader], self._whole(fold.shift)
            spans = self._spans((axis.src_size, len(shift)))
            values = values + np.concatenate([self._rows_of(reader, *span) @ shift for span in spans])
        if axis.legs is None:
            return self._spread(values)
        written: Values = axis.legs.write(self.compute) @ values
        return written * gains

    # Matrices: out[i, j] = write-leg entry of i times read-leg entry of j, whichever axis is stored first.

    def _matrix(self, start: int, stop: int) -> Bits:
        column_map = self.growth.maps[1]
        stored = self.source.dtype_name
        if self.mixes:
            mixed = self._mixed(start, stop)
            self._fill_random(mixed, start, stop)
            return narrow(mixed, self.dtype)
        moved = stored == self.dtype and not self._noise_applies
        make = np.empty if self._filled else np.zeros
        out = make((stop - start, column_map.dst_size), dtype=STORED[self.dtype] if moved else self.compute)
        for piece in clip(self._pieces[0], start, stop):
            target = out[piece.start - start : piece.stop - start]
            if piece.source == MEAN:
                row = np.zeros((1, column_map.dst_size), dtype=self.compute)
                self._gather(self._mean_of_rows()[None, :], piece.gain, row)
                target[:] = narrow(row, self.dtype) if moved else row
            else:
                rows = self._source_of(piece).bits(piece.source, piece.source + piece.stop - piece.start)
                self._gather(rows if moved else widen(rows, stored, self.compute), piece.gain, target)
        self._fill_random(out, start, stop)
        if self.growth.parts > 1:
            self._part(out, start, stop)
        if self._noise_applies:
            (self._perturb if self.noise_on == "all" else self._add_noise)(out, start, stop)
        bits: Bits = out if moved else narrow(out, self.dtype)
        return bits

    def _source_of(self, piece: Piece) -> SourceTensor:
        ahead = self.growth.maps[0].ahead
        above = self.growth.above if ahead is not None and ahead[piece.start] else None
        return self.source if above is None else self.others[above]

    def _part(self, out: np.ndarray, start: int, stop: int) -> None:
        """Leave the blocks on the diagonal."""
        height, width = (size // self.growth.parts for size in self.growth.shape)
        for part in range(self.growth.parts):
            low, high = max(start, part * height), min(stop, (part + 1) * height)
            if low < high:
                out[low - start : high - start, : part * width] = 0
                out[low - start : high - start, (part + 1) * width :] = 0

    def _gather(self, rows: np.ndarray, row_gain: float, out: np.ndarray) -> None:
        """Fill the columns of ``out`` from ``rows``; both are stored bits, or both are values."""
        pieces = self._pieces[1]
        if len(pieces) > _MOST_PIECES:
            column_map = self.growth.maps[1]
            copies = np.flatnonzero(column_map.is_copy)
            gains = self._leg(1)[0][copies] * row_gain
            out[:, copies] = self._times(rows[:, column_map.source[copies]], 1.0 if (gains == 1).all() else gains)
            pieces = [piece for piece in pieces if piece.source == MEAN]
        for piece in pieces:
            if piece.source == MEAN:
                values = rows if rows.dtype.kind == "f" else widen(rows, self.dtype, self.compute)
                mean = values.mean(axis=1, keepdims=True, dtype=np.float64) * (piece.gain * row_gain)
                mean = mean.astype(self.compute)
                out[:, piece.start : piece.stop] = mean if rows.dtype.kind == "f" else narrow(mean, self.dtype)
            else:
                part = rows[:, piece.source : piece.source + piece.stop - piece.start]
                out[:, piece.start : piece.stop] = self._times(part, piece.gain * row_gain)

    def _mixed(self, start: int, stop: int) -> Values:
        """Rows of a matrix of which an axis mixes: one leg after the other, without new values."""
        growth, (row_map, column_map) = self.growth, self.growth.maps
        first, last = aligned(start, stop, row_map.dst_size)
        width = column_map.src_size
        if row_map.legs is not None:
            legs, gains = self._dense(0), self._leg(0)[0][first:last, None]
            parts = ((low, self._rows_of(self.source, low, high)) for low, high in self._spans(growth.source_shape))
            rows = mixed_rows(legs[first:last], parts, width) * gains.astype(self.compute)
        else:
            rows = np.zeros((last - first, width), dtype=self.compute)
            for piece in clip(self._pieces[0], first, last):
                mean = piece.source == MEAN
                size = piece.stop - piece.start
                part = self._mean_of_rows() if mean else self._rows_of(self.source, piece.source, piece.source + size)
                rows[piece.start - first : piece.stop - first] = part * self.compute(piece.gain)
        if column_map.legs is None:
            out = np.zeros((last - first, column_map.dst_size), dtype=self.compute)
            self._gather(rows, 1.0, out)
            return out[start - first : stop - first]
        fold, gains = growth.fold, self._leg(1)[0].astype(self.compute)
        if fold is None:
            return (mixed_columns(rows, self._dense(1).T) * gains)[start - first : stop - first]
        out = mixed_columns(rows * self._whole(fold.scale), self._dense(1).T) * gains
        if fold.aside and fold.shift is not None:
            shifted = mixed_columns(rows, self._whole(fold.shift)[:, None])
            out += shifted * (column_map.legs.aside(self.compute) * gains)
        return out[start - first : stop - first]

    def _dense(self, stored: int) -> Values:
        """[dst, src]: the leg that a mixed axis uses in this tensor, without its gains."""
        legs = self.growth.maps[stored].legs
        assert legs is not None, "a mixed axis"
        return legs.write(self.compute) if stored == self.growth.written else legs.read(self.compute).T

    def _rows_of(self, source: SourceTensor, start: int, stop: int) -> Values:
        return widen(source.bits(start, stop), source.dtype_name, self.compute)

    def _whole(self, name: str) -> Values:
        """A vector of the normalisation that is folded."""
        return self._rows_of(self.others[name], 0, self.stream)

    def _times(self, values: np.ndarray, gain: float | Floats) -> np.ndarray:
        if isinstance(gain, float) and gain == 1:
            return values
        if values.dtype.kind == "f":
            product: np.ndarray = values * np.asarray(gain, dtype=self.compute)
            return product
        return scaled(values, self.dtype, gain)

    @cached_property
    def _pieces(self) -> tuple[list[Piece], list[Piece]]:
        return pieces_of(self.growth.maps[0], self._leg(0)[0]), pieces_of(self.growth.maps[1], self._leg(1)[0])

    @cached_property
    def _filled(self) -> bool:
        """Whether every value comes from the source or is drawn, so that none is left at zero."""
        return all(bool((random | (gain != 0)).all()) for gain, random in (self._leg(0), self._leg(1)))

    def _leg(self, stored: int) -> tuple[Floats, Bools]:
        """Gain and random flag of the leg that the stored axis uses in this tensor."""
        axis = self.growth.maps[stored]
        written = stored == self.growth.written
        return (axis.write, axis.write_random) if written else (axis.read * self.growth.parts, axis.read_random)

    # Statistics of the whole source tensor, which its blocks share: computed once, by whichever thread is first.

    def _spans(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        rows, columns = shape
        step = max(1, _STATISTICS_VALUES // columns)
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _mean_of_rows(self) -> Values:
        """[columns]: the mean over all source rows, accumulated in float64."""
        with self._preparing:
            if self._column_mean is None:
                total = np.zeros(self.growth.source_shape[1])
                for start, stop in self._spans(self.growth.source_shape):
                    part = widen(self.source.bits(start, stop), self.source.dtype_name, self.compute)
                    # Sums of 16 in the arithmetic's own dtype: as exact as its result, and five times as fast.
                    even = len(part) - len(part) % 16
                    total += part[:even].reshape(16, -1, part.shape[1]).sum(axis=0).sum(axis=0, dtype=np.float64)
                    total += part[even:].sum(axis=0, dtype=np.float64)
                self._column_mean = (total / self.growth.source_shape[0]).astype(self.compute)
            return self._column_mean

    def _root_mean_square(self) -> float:
        with self._preparing:
            if self._rms is None:
                total = 0.0
                for start, stop in self._spans(self.growth.source_shape):
                    part = widen(self.source.bits(start, stop), self.source.dtype_name, np.float64)
                    total += float(np.square(part).sum())
                rows, columns = self.growth.source_shape
                self._rms = (total / (rows * columns)) ** 0.5
            return self._rms

    # New values.

    def _fill_random(self, out: np.ndarray, start: int, stop: int) -> None:
        (row_gain, row_random), (column_gain, column_random) = self._leg(0), self._leg(1)
        if not (row_random[start:stop].any() or column_random.any()):
            return
        # A zero leg wins over a random one: new heads must not be read whatever their rows hold.
        row_open, column_open = row_random | (row_gain != 0), column_random | (column_gain != 0)
        for purpose, rows, columns in (
            ("new rows", row_random, column_open),
            ("new columns", ~row_random & row_open, column_random),
        ):
            chosen, places = np.flatnonzero(rows[start:stop]), np.flatnonzero(columns)
            if not len(chosen) or not len(places):
                continue
            stream = Stream(self.seed, purpose, self.growth.name, len(places))
            first = int(np.count_nonzero(rows[:start]))
            if out.dtype.kind == "f":
                assign(out, chosen, places, stream.values(first, len(chosen)) * self.std)
            else:
                assign(out, chosen, places, stream.bits(first, len(chosen), self.std, self.dtype))

    @cached_property
    def _noise_applies(self) -> bool:
        return self.noise != 0 and self.growth.carries_noise(self.noise_on)

    def _add_noise(self, out: Values, start: int, stop: int) -> None:
        """Add noise to the columns that read copies, so that copies add up to what they did."""
        row_map, read = self.growth.maps
        copies = np.flatnonzero(read.is_copy)
        size = self.noise * self._root_mean_square() * read.read[copies]
        noise = (self._paired if self.noise_on == "pairs" else self._shared)(start, stop, read, copies, size)
        written = row_map.is_copy | (row_map.source == MEAN)
        noise[~written[start:stop]] = 0
        out[:, copies] += noise.astype(out.dtype)

    def _shared(self, start: int, stop: int, read: AxisMap, copies: Ints, size: Floats) -> Floats:
        """N (I - E R), R the leg that averages copies: each has its own, and what does not cancel is taken off."""
        source, write = read.source[copies], read.write[copies]
        back = 1.0 / (write * read.counts[source])
        noise = Stream(self.seed, "noise", self.growth.name, len(copies)).values(start, stop - start) * size
        weighted = (noise * write)[:, np.argsort(source, kind="stable")]
        first_copies = np.concatenate([[0], np.cumsum(read.counts[read.counts > 0])[:-1]])
        summed = np.zeros((stop - start, read.src_size))
        summed[:, read.counts > 0] = np.add.reduceat(weighted, first_copies, axis=1)
        shared: Floats = noise - summed[:, source] * back
        return shared

    def _paired(self, start: int, stop: int, read: AxisMap, copies: Ints, size: Floats) -> Floats:
        """+N and -N on the first and second, third and fourth copy of a coordinate; none on one that is left over."""
        order = np.argsort(read.source[copies], kind="stable")
        counts = read.counts[read.counts > 0]
        nth = np.arange(len(copies)) - np.repeat(np.cumsum(counts) - counts, counts)
        even = np.flatnonzero((nth % 2 == 0) & (nth + 1 < np.repeat(counts, counts)))
        one, other = order[even], order[even + 1]
        noise, write = np.zeros((stop - start, len(copies))), read.write[copies]
        noise[:, one] = Stream(self.seed, "noise", self.growth.name, len(one)).values(start, stop - start) * size[one]
        noise[:, other] = -noise[:, one] * (write[one] / write[other])
        return noise

    def _perturb(self, out: Values, start: int, stop: int) -> None:
        """Add values of an initialisation to what came from the source; what is new is drawn already."""
        (row_gain, _), (column_gain, _) = self._leg(0), self._leg(1)
        rows, columns = np.flatnonzero(row_gain[start:stop]), np.flatnonzero(column_gain)
        if not len(rows) or not len(columns):
            return
        drawn = Stream(self.seed, "perturbation", self.growth.name, len(columns)).values(start, stop - start)
        out[rows[:, None], columns] += (drawn[rows] * (self.noise * self.std)).astype(out.dtype)


def lift(
    growth: TensorGrowth,
    source: SourceTensor,
    plan: Plan,
    dtype: torch.dtype,
    others: Mapping[str, SourceTensor] | None = None,
) -> torch.Tensor:
    """Compute one grown tensor, whole, from its source tensor, and from others where its growth folds them in."""
    name = str(dtype).removeprefix("torch.")
    return tensor_of(Lift(growth, source, plan, name, others).rows(0, growth.shape[0]), name)
