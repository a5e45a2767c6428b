"""`lift`: the only function that computes grown values.

A destination tensor is lifted in blocks of rows, so that no tensor has to fit in memory. New random values are drawn
per fixed span of rows from a generator seeded by (seed, tensor name, span): the result does not depend on the size of
blocks or shards, on threads, or on which tensors are grown together. Draws are float32 on the CPU.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np

from phigrow.axes import FRESH, MEAN, Run
from phigrow.plan import Plan, TensorGrowth

if TYPE_CHECKING:
    import torch

SPAN_VALUES = 1 << 20
"""Values drawn from one generator; part of what a seed means, so changing it changes every wr expansion."""


class SourceTensor(Protocol):
    """A source tensor of which rows are read on demand."""

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start .. stop`` of the stored tensor, [stop - start, ...]."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A source tensor that is simply there."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor[start:stop]


def span_rows(shape: tuple[int, ...]) -> int:
    """Rows that share one random generator: the best multiple for the blocks in which a tensor is lifted."""
    columns = shape[1] if len(shape) == 2 else 1
    return max(1, SPAN_VALUES // columns)


class Lift:
    """The lift of one destination tensor.

    Args:
        growth: where it comes from.
        source: the source tensor's values.
        plan: gives seed, noise and the standard deviation of new values.
        dtype: of the result.

    Arithmetic is float64 where source or result is, else float32; one cast at the end.
    """

    def __init__(self, growth: TensorGrowth, source: SourceTensor, plan: Plan, dtype: torch.dtype) -> None:
        import torch

        self.growth, self.source, self.dtype = growth, source, dtype
        self.seed, self.noise, self.std = plan.seed, plan.noise, plan.initializer_range
        self.compute = torch.float64 if torch.float64 in (source.dtype, dtype) else torch.float32
        self._column_mean: torch.Tensor | None = None
        self._rms: float | None = None
        self._preparing = Lock()

    def all(self) -> torch.Tensor:
        """The whole tensor."""
        return self.rows(0, self.growth.shape[0])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start .. stop`` of the destination tensor, [stop - start, ...] in the result's dtype."""
        import torch

        shape = (stop - start, *self.growth.shape[1:])
        if self.growth.zero:
            return torch.zeros(shape, dtype=self.dtype)
        if len(shape) == 1:
            return self._vector(start, stop).to(self.dtype)
        return self._matrix(start, stop)

    def prepare(self) -> None:
        """Compute the statistics of the whole source tensor that its blocks share (once, whichever thread is first)."""
        if self.growth.zero or len(self.growth.shape) == 1:
            return
        with self._preparing:
            if (self.growth.maps[0].source == MEAN).any():
                self._mean_of_rows()
            if self._noise_applies():
                self._root_mean_square()

    # Vectors: biases, and scales and shifts of normalisations.

    def _vector(self, start: int, stop: int) -> torch.Tensor:
        import torch

        growth, axis = self.growth, self.growth.maps[0]
        values = self.source.rows(0, axis.src_size).to(self.compute)
        is_scale = growth.parameter.kind == "scale"
        gain = axis.write
        if is_scale and growth.norm_read is not None:
            # A normalisation passes on the gains of the stream it reads: its scale takes them off again.
            read_gain = growth.norm_read.write
            gain = np.divide(axis.write, read_gain, out=np.ones_like(axis.write), where=axis.is_copy)
        if growth.norm_read is axis:
            gain = np.ones_like(gain)
        fresh_value = 1.0 if is_scale else axis.fresh_bias
        out = torch.full((axis.dst_size,), fresh_value, dtype=self.compute)
        copies, means = torch.from_numpy(axis.is_copy), torch.from_numpy(axis.source == MEAN)
        gains = torch.from_numpy(np.ascontiguousarray(gain)).to(self.compute)
        out[copies] = values[torch.from_numpy(axis.source[axis.is_copy])] * gains[copies]
        out[means] = values.mean(dtype=torch.float64).to(self.compute) * gains[means]
        return out[start:stop]

    # Matrices: out[i, j] = write-leg entry of i times read-leg entry of j, whichever axis is stored first.

    def _matrix(self, start: int, stop: int) -> torch.Tensor:
        import torch

        row_map, column_map = self.growth.maps
        row_gain, column_gain = self._gain(0)[start:stop], self._gain(1)
        has_mean = (column_map.source == MEAN).any() or (row_map.source[start:stop] == MEAN).any()
        plain = not (has_mean or self._noise_applies() or (row_gain != 1).any() or (column_gain != 1).any())
        # Where nothing is computed, values move as they are stored: exact, and at the speed of memory.
        work = self.source.dtype if plain and self.source.dtype == self.dtype else self.compute
        out = torch.zeros((stop - start, column_map.dst_size), dtype=work)
        for run in _clip(row_map.runs, start, stop):
            if run.source == FRESH:
                continue
            target = out[run.start - start : run.stop - start]
            if run.source == MEAN:
                self._gather_columns(self._mean_of_rows()[None, :], target)
            else:
                rows = self.source.rows(run.source, run.source + run.stop - run.start)
                self._gather_columns(rows.to(work) if work != rows.dtype else rows, target)
        if not plain:
            if not (column_gain == 1).all():
                out *= torch.from_numpy(column_gain).to(work)
            if not (row_gain == 1).all():
                out *= torch.from_numpy(row_gain).to(work)[:, None]
        self._fill_random(out, start, stop)
        if self._noise_applies():
            self._add_noise(out, start, stop)
        return out.to(self.dtype)

    def _leg(self, stored: int) -> tuple[np.ndarray, np.ndarray]:
        """Gain and random flag of the leg that the stored axis uses in this tensor."""
        axis = self.growth.maps[stored]
        written = stored == self.growth.written
        return (axis.write, axis.write_random) if written else (axis.read, axis.read_random)

    def _gain(self, stored: int) -> np.ndarray:
        """float64 [size]: the gains, with 1 at FRESH coordinates, whose values are not scaled but zero or drawn."""
        return np.where(self.growth.maps[stored].source == FRESH, 1.0, self._leg(stored)[0])

    def _gather_columns(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        import torch

        column_map = self.growth.maps[1]
        for run in column_map.runs:
            if run.source == MEAN:
                mean = rows.sum(dim=1, keepdim=True, dtype=torch.float64) / rows.shape[1]
                out[:, run.start : run.stop] = mean.to(out.dtype)
            elif run.source >= 0:
                out[:, run.start : run.stop] = rows[:, run.source : run.source + run.stop - run.start]

    def _mean_of_rows(self) -> torch.Tensor:
        """[columns]: the mean over all source rows, accumulated in float64 over fixed spans."""
        import torch

        if self._column_mean is None:
            rows, columns = self.growth.source_shape
            total = torch.zeros(columns, dtype=torch.float64)
            step = span_rows(self.growth.source_shape)
            for start in range(0, rows, step):
                total += self.source.rows(start, min(start + step, rows)).sum(dim=0, dtype=torch.float64)
            self._column_mean = (total / rows).to(self.compute)
        return self._column_mean

    def _root_mean_square(self) -> float:
        import torch

        if self._rms is None:
            rows, columns = self.growth.source_shape
            total, step = 0.0, span_rows(self.growth.source_shape)
            for start in range(0, rows, step):
                part = self.source.rows(start, min(start + step, rows)).to(torch.float64)
                total += float(part.square().sum())
            self._rms = (total / (rows * columns)) ** 0.5
        return self._rms

    # New values.

    def _generator(self, purpose: str, span: int) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self.seed}:{purpose}:{self.growth.name}:{span}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(span, first row, last row) of every random span that the rows touch, whole."""
        size, total = span_rows(self.growth.shape), self.growth.shape[0]
        return [(k, k * size, min((k + 1) * size, total)) for k in range(start // size, (stop - 1) // size + 1)]

    def _fill_random(self, out: torch.Tensor, start: int, stop: int) -> None:
        import torch

        (row_gain, row_random), (column_gain, column_random) = self._leg(0), self._leg(1)
        # A zero leg wins over a random one: new heads must not be read whatever their rows hold.
        row_open, column_open = row_random | (row_gain != 0), column_random | (column_gain != 0)
        if not (row_random[start:stop].any() or column_random.any()):
            return
        all_columns = torch.from_numpy(np.flatnonzero(column_open))
        new_columns = torch.from_numpy(np.flatnonzero(column_random))
        for span, first, last in self._spans(start, stop):
            generator = self._generator("fresh", span)
            for selected, columns in (
                (row_random[first:last], all_columns),
                (~row_random[first:last] & row_open[first:last], new_columns),
            ):
                rows = np.flatnonzero(selected) + first
                if not len(rows) or not len(columns):
                    continue
                values = torch.empty(len(rows), len(columns)).normal_(0.0, self.std, generator=generator)
                inside = (rows >= start) & (rows < stop)
                _assign(out, torch.from_numpy(rows[inside] - start), columns, values[torch.from_numpy(inside)])

    def _noise_applies(self) -> bool:
        growth = self.growth
        if self.noise == 0 or len(growth.maps) != 2:
            return False
        read = growth.maps[1 - growth.written]
        # Tokens are looked up, not summed over: there is nothing for noise on the vocabulary axis to cancel in.
        return growth.written == 0 and int(read.counts.max()) > 1

    def _add_noise(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Add N (I - E R) on the read axis, R the leg that averages copies: copies still add up to what they did."""
        import torch

        row_map, read = self.growth.maps
        scale = self.noise * self._root_mean_square()
        copies = np.flatnonzero(read.is_copy)
        source = torch.from_numpy(read.source[copies])
        write = torch.from_numpy(read.write[copies]).to(self.compute)
        back = torch.from_numpy(1.0 / (read.write * np.maximum(read.counts[np.maximum(read.source, 0)], 1))[copies])
        columns = torch.from_numpy(copies)
        read_gain = torch.from_numpy(np.where(read.is_copy, read.read, 0.0)[copies]).to(self.compute)
        written = row_map.is_copy | (row_map.source == MEAN)
        for span, first, last in self._spans(start, stop):
            noise = torch.empty(last - first, len(copies)).normal_(0.0, scale, generator=self._generator("noise", span))
            low, high = max(first, start), min(last, stop)
            noise = noise[low - first : high - first].to(self.compute) * read_gain
            summed = torch.zeros(high - low, read.src_size, dtype=self.compute).index_add_(1, source, noise * write)
            noise -= summed[:, source] * back.to(self.compute)
            keep = torch.from_numpy(written[low:high])
            out[low - start : high - start].index_add_(1, columns, noise * keep[:, None])


def lift(growth: TensorGrowth, source: SourceTensor, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """Compute one grown tensor, whole, from its source tensor."""
    return Lift(growth, source, plan, dtype).all()


def _clip(runs: tuple[Run, ...], start: int, stop: int) -> list[Run]:
    """The runs inside ``start .. stop``, cut to it."""
    clipped = []
    for run in runs:
        low, high = max(run.start, start), min(run.stop, stop)
        if low < high:
            clipped.append(Run(low, high, run.source + low - run.start if run.source >= 0 else run.source))
    return clipped


def _assign(out: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
    """``out[rows][:, columns] = values``, by slices where they are consecutive (much faster than by index)."""
    if len(rows) and int(rows[-1]) - int(rows[0]) + 1 == len(rows):
        out = out[int(rows[0]) : int(rows[-1]) + 1]
        if len(columns) and int(columns[-1]) - int(columns[0]) + 1 == len(columns):
            out[:, int(columns[0]) : int(columns[-1]) + 1] = values.to(out.dtype)
        else:
            out[:, columns] = values.to(out.dtype)
    else:
        out[rows[:, None], columns[None, :]] = values.to(out.dtype)
