"""`lift`: the only function that computes grown values.

A destination tensor is lifted in blocks of rows, so that no tensor has to fit in memory. Where source and destination
have one dtype, values move as stored bits and only what has a gain is computed: exact, and at the speed of memory. New
values come from `phigrow.draws`; none of this depends on the size of blocks or shards, on threads, or on which tensors
are grown together.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from phigrow.axes import FRESH, MEAN, AxisMap, Bools, Floats
from phigrow.bits import STORED, Bits, Values, bits_of, narrow, scaled, tensor_of, widen
from phigrow.draws import Stream
from phigrow.plan import Plan, TensorGrowth

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


class _Piece(NamedTuple):
    """Consecutive destination coordinates that come from consecutive source ones (or from their mean), at one gain."""

    start: int
    stop: int
    source: int
    gain: float


class Lift:
    """The lift of one destination tensor.

    Args:
        growth: where it comes from.
        source: the source tensor's values.
        plan: gives seed, noise and the standard deviation of new values.
        dtype: of the result, as torch names it.

    Arithmetic is float64 where source or result is, else float32; one rounding at the end.
    """

    def __init__(self, growth: TensorGrowth, source: SourceTensor, plan: Plan, dtype: str) -> None:
        self.growth, self.source, self.dtype = growth, source, dtype
        self.seed, self.noise, self.std = plan.seed, plan.noise, plan.initializer_range
        self.noise_everywhere = plan.noise_on == "all"
        self.compute = np.float64 if "float64" in (source.dtype_name, dtype) else np.float32
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
        growth, axis = self.growth, self.growth.maps[0]
        values = widen(self.source.bits(0, axis.src_size), self.source.dtype_name, self.compute)
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
        out[means] = self.compute(values.mean(dtype=np.float64)) * gain[means]
        return out[start:stop]

    # Matrices: out[i, j] = write-leg entry of i times read-leg entry of j, whichever axis is stored first.

    def _matrix(self, start: int, stop: int) -> Bits:
        column_map = self.growth.maps[1]
        stored = self.source.dtype_name
        moved = stored == self.dtype and not self._noise_applies
        make = np.empty if self._filled else np.zeros
        out = make((stop - start, column_map.dst_size), dtype=STORED[self.dtype] if moved else self.compute)
        for piece in _clip(self._pieces[0], start, stop):
            target = out[piece.start - start : piece.stop - start]
            if piece.source == MEAN:
                row = np.zeros((1, column_map.dst_size), dtype=self.compute)
                self._gather(self._mean_of_rows()[None, :], piece.gain, row)
                target[:] = narrow(row, self.dtype) if moved else row
            else:
                rows = self.source.bits(piece.source, piece.source + piece.stop - piece.start)
                self._gather(rows if moved else widen(rows, stored, self.compute), piece.gain, target)
        self._fill_random(out, start, stop)
        if self._noise_applies:
            (self._perturb if self.noise_everywhere else self._add_noise)(out, start, stop)
        bits: Bits = out if moved else narrow(out, self.dtype)
        return bits

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

    def _times(self, values: np.ndarray, gain: float | Floats) -> np.ndarray:
        if isinstance(gain, float) and gain == 1:
            return values
        if values.dtype.kind == "f":
            product: np.ndarray = values * np.asarray(gain, dtype=self.compute)
            return product
        return scaled(values, self.dtype, gain)

    @cached_property
    def _pieces(self) -> tuple[list[_Piece], list[_Piece]]:
        return _pieces_of(self.growth.maps[0], self._leg(0)[0]), _pieces_of(self.growth.maps[1], self._leg(1)[0])

    @cached_property
    def _filled(self) -> bool:
        """Whether every value comes from the source or is drawn, so that none is left at zero."""
        return all(bool((random | (gain != 0)).all()) for gain, random in (self._leg(0), self._leg(1)))

    def _leg(self, stored: int) -> tuple[Floats, Bools]:
        """Gain and random flag of the leg that the stored axis uses in this tensor."""
        axis = self.growth.maps[stored]
        written = stored == self.growth.written
        return (axis.write, axis.write_random) if written else (axis.read, axis.read_random)

    # Statistics of the whole source tensor, which its blocks share: computed once, by whichever thread is first.

    def _spans(self) -> list[tuple[int, int]]:
        rows, columns = self.growth.source_shape
        step = max(1, _STATISTICS_VALUES // columns)
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _mean_of_rows(self) -> Values:
        """[columns]: the mean over all source rows, accumulated in float64."""
        with self._preparing:
            if self._column_mean is None:
                total = np.zeros(self.growth.source_shape[1])
                for start, stop in self._spans():
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
                for start, stop in self._spans():
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
                _assign(out, chosen, places, stream.values(first, len(chosen)) * self.std)
            else:
                _assign(out, chosen, places, stream.bits(first, len(chosen), self.std, self.dtype))

    @cached_property
    def _noise_applies(self) -> bool:
        growth = self.growth
        if self.noise == 0 or len(growth.maps) != 2:
            return False
        if self.noise_everywhere:
            return True
        read = growth.maps[1 - growth.written]
        # Tokens are looked up, not summed over: there is nothing for noise on the vocabulary axis to cancel in.
        return growth.written == 0 and int(read.counts.max()) > 1

    def _add_noise(self, out: Values, start: int, stop: int) -> None:
        """Add N (I - E R) on the read axis, R the leg that averages copies: copies still add up to what they did."""
        row_map, read = self.growth.maps
        copies = np.flatnonzero(read.is_copy)
        source, write = read.source[copies], read.write[copies]
        back = 1.0 / (write * read.counts[source])
        drawn = Stream(self.seed, "noise", self.growth.name, len(copies)).values(start, stop - start)
        noise = drawn * (self.noise * self._root_mean_square()) * read.read[copies]
        weighted = (noise * write)[:, np.argsort(source, kind="stable")]
        first_copies = np.concatenate([[0], np.cumsum(read.counts[read.counts > 0])[:-1]])
        summed = np.zeros((stop - start, read.src_size))
        summed[:, read.counts > 0] = np.add.reduceat(weighted, first_copies, axis=1)
        noise -= summed[:, source] * back
        written = row_map.is_copy | (row_map.source == MEAN)
        noise[~written[start:stop]] = 0
        out[:, copies] += noise.astype(out.dtype)

    def _perturb(self, out: Values, start: int, stop: int) -> None:
        """Add values of an initialisation to what came from the source; what is new is drawn already."""
        (row_gain, _), (column_gain, _) = self._leg(0), self._leg(1)
        rows, columns = np.flatnonzero(row_gain[start:stop]), np.flatnonzero(column_gain)
        if not len(rows) or not len(columns):
            return
        drawn = Stream(self.seed, "perturbation", self.growth.name, len(columns)).values(start, stop - start)
        out[rows[:, None], columns] += (drawn[rows] * (self.noise * self.std)).astype(out.dtype)


def lift(growth: TensorGrowth, source: SourceTensor, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """Compute one grown tensor, whole, from its source tensor."""
    name = str(dtype).removeprefix("torch.")
    return tensor_of(Lift(growth, source, plan, name).rows(0, growth.shape[0]), name)


def _pieces_of(axis: AxisMap, gains: Floats) -> list[_Piece]:
    """What a leg takes from the source, in the fewest pieces; coordinates that take nothing are left out."""
    pieces = []
    for run in axis.runs:
        edges = [run.start, *(run.start + 1 + np.flatnonzero(np.diff(gains[run.start : run.stop]))).tolist(), run.stop]
        for start, stop in itertools.pairwise(edges):
            source = run.source + start - run.start if run.source >= 0 else run.source
            if source != FRESH and gains[start] != 0:
                pieces.append(_Piece(start, stop, source, float(gains[start])))
    return pieces


def _clip(pieces: list[_Piece], start: int, stop: int) -> list[_Piece]:
    """The pieces inside ``start .. stop``, cut to it."""
    clipped = []
    for piece in pieces:
        low, high = max(piece.start, start), min(piece.stop, stop)
        if low < high:
            source = piece.source + low - piece.start if piece.source >= 0 else piece.source
            clipped.append(_Piece(low, high, source, piece.gain))
    return clipped


def _assign(out: np.ndarray, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
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
