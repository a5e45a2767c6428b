"""Axis maps: the growth of one named axis of a model, stored sparsely, one entry a coordinate.

A map has two legs. The write leg ``E`` (destination x source) spreads an activation of the axis over the larger axis;
the read leg ``R`` (source x destination), by which a consumer reads it, undoes that. Every destination coordinate is

- a copy of a source coordinate, with a write gain and a read gain,
- a mean: written as the mean over the source coordinates,
- fresh: not written from the source at all, or
- dense: written and read as a mixture of all source coordinates. Then every coordinate of the axis is dense.

A leg that does not come from the source is either zero or *random*: the lift fills it with new values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from einops import rearrange

from phigrow.errors import GrowthError
from phigrow.growth.dense_map import DenseMap, dense_map_from_json
from phigrow.growth.dense_map import Floats as Floats

FRESH = -1
MEAN = -2
"""Spellings of the source of a coordinate that copies none, for `axis_map`."""

MOST_COORDINATES = 1 << 24
"""Largest axis of a plan that is read from a file: the largest vocabulary that phigrow accepts."""

Anchor = Literal["edge", "center"]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DiagonalBlocks:
    """An axis of equal diagonal blocks.

    If the row and the column axis of a matrix have the same number of blocks, values outside the blocks are zero and
    read gains are multiplied by the number, so that the sum over a row is that of R E.
    """

    count: int


@dataclass(frozen=True, eq=False)
class FromNextLayer:
    """An axis with coordinates that copy the next source layer; in the last layer they copy their own.

    Attributes:
        chosen: bool [dst_size]; these coordinates.
    """

    chosen: Bools


@dataclass(frozen=True)
class HeadNorm:
    """A normalisation inside heads, which writes the axis that it reads.

    The axis map holds the legs before the normalisation. Behind it, old coordinates have another gain, and new ones
    hold the normalisation's bias alone, because a mean normalises to zero.

    Attributes:
        write: gain of the old coordinates behind the normalisation.
        random: its bias at new coordinates is drawn; otherwise it is 0.
    """

    write: float
    random: bool


@dataclass(frozen=True, eq=False)
class PartMeans:
    """Means of a composite axis, each over one whole part, such as a head.

    Attributes:
        start: int64 [dst_size]; the first source coordinate of the part, -1 where there is no mean.
        size: source coordinates of the part.
    """

    start: Ints
    size: int


Structure: TypeAlias = "DenseMap | DiagonalBlocks | FromNextLayer | HeadNorm | PartMeans"


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis, from ``src_size`` to ``dst_size`` coordinates.

    Attributes:
        src_size: source coordinates.
        source: int64 [dst_size]; the source coordinate copied, -1 where there is none.
        is_mean: bool [dst_size]; the coordinate is written as the mean over the source coordinates.
        write: float64 [dst_size]; gain on the write leg (0 where fresh).
        read: float64 [dst_size]; gain on the read leg (0 where neither a copy nor dense).
        write_random: bool [dst_size]; the write leg is filled with new random values.
        read_random: bool [dst_size]; the read leg is filled with new random values.
        fresh_bias: the value of a bias at fresh coordinates.
        structure: a dense map (the legs before these gains), diagonal blocks, coordinates from the next layer, a
            normalisation inside heads, or means over parts; None for an axis of plain copies.
    """

    src_size: int
    source: Ints
    is_mean: Bools
    write: Floats
    read: Floats
    write_random: Bools
    read_random: Bools
    fresh_bias: float = 0.0
    structure: Structure | None = None

    @property
    def dst_size(self) -> int:
        return len(self.source)

    @property
    def dense(self) -> DenseMap | None:
        """The legs of an axis that mixes all source coordinates, before gains; None of any other."""
        if isinstance(self.structure, DiagonalBlocks | FromNextLayer | HeadNorm | PartMeans):
            return None
        return self.structure

    @property
    def diagonal_blocks(self) -> int:
        """Number of diagonal blocks; see `DiagonalBlocks`."""
        return self.structure.count if isinstance(self.structure, DiagonalBlocks) else 1

    @property
    def head_norm(self) -> HeadNorm | None:
        """The normalisation inside heads, where the axis grows through one."""
        return self.structure if isinstance(self.structure, HeadNorm) else None

    @property
    def part_means(self) -> PartMeans | None:
        """The parts that means are taken over; None where they are taken over the whole axis."""
        return self.structure if isinstance(self.structure, PartMeans) else None

    def behind_norm(self) -> AxisMap:
        """The map of the axis behind the normalisation inside heads."""
        norm = self.head_norm
        assert norm is not None, "the axis has a normalisation inside heads"
        return axis_map(
            self.src_size,
            np.where(self.is_copy, self.source, FRESH),
            write=norm.write,
            read=1 / norm.write,
            fresh_write="random" if norm.random else "zero",
            fresh_read="zero",
        )

    @property
    def from_next_layer(self) -> Bools | None:
        """bool [dst_size]: coordinates that copy the next source layer; None where the method has none."""
        return self.structure.chosen if isinstance(self.structure, FromNextLayer) else None

    @cached_property
    def is_copy(self) -> Bools:
        """bool [dst_size]: the coordinates that copy a source coordinate."""
        return self.source >= 0

    @cached_property
    def is_fresh(self) -> Bools:
        """bool [dst_size]: the coordinates that are not written from the source."""
        return ~(self.is_copy | self.is_mean) if self.dense is None else np.zeros_like(self.is_copy)

    @cached_property
    def counts(self) -> Ints:
        """int64 [src_size]: how many destination coordinates copy each source coordinate."""
        return np.bincount(self.source[self.is_copy], minlength=self.src_size)

    @cached_property
    def is_identity(self) -> bool:
        """True for an axis that does not change: same size, same order, gains 1."""
        same = self.dst_size == self.src_size and np.array_equal(self.source, np.arange(self.src_size))
        return bool(same and (self.write == 1).all() and (self.read == 1).all())

    def left_inverse_error(self) -> float:
        """max |R E - I|; 0 for an axis that a consumer reads exactly as it did before growth.

        Fresh coordinates add nothing as long as one of their legs is zero; two random legs give ``inf``.
        """
        if (self.write_random & self.read_random).any():
            return float("inf")
        if self.dense is not None:
            return self.dense.left_inverse_error(self.write * self.read)
        product = np.zeros(self.src_size)
        copies = self.is_copy
        np.add.at(product, self.source[copies], self.write[copies] * self.read[copies])
        return float(np.abs(product - 1).max(initial=0.0))

    def dense_legs(self) -> tuple[Floats, Floats]:
        """The legs as matrices ``E`` [dst, src] and ``R`` [src, dst], random entries as 0 (for tests and pictures)."""
        if self.dense is not None:
            return self.dense.write(np.float64) * self.write[:, None], self.dense.read(np.float64) * self.read
        write, read = np.zeros((self.dst_size, self.src_size)), np.zeros((self.src_size, self.dst_size))
        copies = np.flatnonzero(self.is_copy)
        write[copies, self.source[copies]] = self.write[copies]
        read[self.source[copies], copies] = self.read[copies]
        if self.part_means is None:
            write[self.is_mean] = self.write[self.is_mean, None] / self.src_size
        else:
            means = self.part_means
            inside = np.arange(self.src_size) // means.size == means.start[:, None] // means.size
            write += np.where(inside & self.is_mean[:, None], self.write[:, None] / means.size, 0.0)
        return write, read

    def words(self) -> list[int | str]:
        """The source of every coordinate as JSON spells it: a number, ``mean``, ``fresh`` or ``dense``."""
        none = "fresh" if self.dense is None else "dense"
        return [
            int(source) if source >= 0 else "mean" if mean else none
            for source, mean in zip(self.source, self.is_mean, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal map; coordinates are run-length coded."""
        words = self.words()
        columns = np.stack([self.is_mean, self.write, self.read, self.write_random, self.read_random])
        gains = ((self.write, self.write_random), (self.read, self.read_random))
        runs: list[list[Any]] = []
        for start, stop in _runs(self.source, columns):
            legs = ["random" if random[start] else float(gain[start]) for gain, random in gains]
            runs.append([stop - start, words[start], *legs])
        sizes = {"src_size": self.src_size, "dst_size": self.dst_size, "fresh_bias": self.fresh_bias}
        return {**sizes, "runs": runs, **self.structure_json()}

    def structure_json(self) -> dict[str, Any]:
        """The keys that JSON has for the structure; none for most axes."""
        if self.dense is not None:
            return {"legs": self.dense.to_json()}
        assert self.part_means is None, "a composite axis is made of the maps of a plan, and is not stored"
        if self.head_norm is not None:
            return {"norm": {"write": self.head_norm.write, "shift": "random" if self.head_norm.random else "zero"}}
        if self.from_next_layer is not None:
            chosen = self.from_next_layer.astype(np.int64)
            return {"ahead": [[start, stop] for start, stop in _runs(chosen - 2) if chosen[start]]}
        return {"parts": self.diagonal_blocks} if self.diagonal_blocks != 1 else {}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AxisMap:
        """Read a map from the JSON of `to_json`.

        Raises:
            GrowthError: a malformed map (sizes that do not add up, a source out of range, an unknown word).
        """
        try:
            src_size, dst_size = int(data["src_size"]), data["dst_size"]
            _check_lengths(data["runs"], dst_size)
            source, words, legs = _read_runs(data["runs"])
            if source.max() >= src_size:
                raise ValueError(f"source {source.max()} of {src_size} coordinates")
            structure = _structure_from_json(data, src_size, dst_size)
            is_dense = words == "dense"
            if not is_dense.all() if "legs" in data else is_dense.any():
                raise ValueError("dense coordinates without `legs`, or `legs` of coordinates that are not dense")
            random = [np.array([gain == "random" for gain in leg]) for leg in legs]
            write, read = (np.array([0.0 if gain == "random" else float(gain) for gain in leg]) for leg in legs)
            bias = float(data["fresh_bias"])
            return cls(src_size, source, words == "mean", write, read, random[0], random[1], bias, structure)
        except (KeyError, TypeError, ValueError) as error:
            raise GrowthError(
                "an axis map of the plan cannot be read",
                where=f"{data.get('src_size')} -> {data.get('dst_size')}" if isinstance(data, dict) else None,
                why=f"{type(error).__name__}: {error}",
                fix="make the plan again with phigrow plan --json",
            ) from error


def _check_lengths(runs: list[Any], dst_size: Any) -> None:
    """Check that runs add up to an axis, before memory is allocated for it: a stranger may have written them."""
    lengths = [run[0] for run in runs]
    if not all(type(length) is int and length > 0 for length in lengths) or sum(lengths) != dst_size:
        raise ValueError(f"the lengths of the runs do not add up to {dst_size} coordinates")
    if dst_size > MOST_COORDINATES:
        raise ValueError(f"{dst_size} coordinates, but phigrow accepts at most {MOST_COORDINATES}")


def _read_runs(runs: list[Any]) -> tuple[Ints, npt.NDArray[np.str_], tuple[list[Any], list[Any]]]:
    """Source of every coordinate, the word for it (``copy`` where it is a number), and both legs."""
    sources: list[Ints] = []
    words: list[str] = []
    legs: tuple[list[Any], list[Any]] = ([], [])
    for length, source, *gains in runs:
        is_word = source in ("mean", "fresh", "dense")
        if not is_word and (type(source) is not int or source < 0):
            raise ValueError(f"source {source!r}")
        sources.append(np.full(length, -1) if is_word else np.arange(source, source + length))
        words += [source if is_word else "copy"] * length
        for leg, gain in zip(legs, gains, strict=True):
            leg += [gain] * length
    return np.concatenate(sources).astype(np.int64), np.array(words), legs


def _structure_from_json(data: dict[str, Any], src_size: int, dst_size: int) -> Structure | None:
    keys = [key for key in ("legs", "parts", "ahead", "norm") if key in data]
    if len(keys) > 1:
        raise ValueError(f"both {keys[0]} and {keys[1]}")
    if "legs" in data:
        return dense_map_from_json(data["legs"], src_size, dst_size)
    if "norm" in data:
        gain, shift = float(data["norm"]["write"]), data["norm"]["shift"]
        if not (np.isfinite(gain) and gain > 0) or shift not in ("random", "zero"):
            raise ValueError(f"a normalisation inside heads with gain {gain} and bias {shift!r}")
        return HeadNorm(gain, shift == "random")
    if "parts" in data:
        count = data["parts"]
        if type(count) is not int or count < 1 or dst_size % count:
            raise ValueError(f"{dst_size} coordinates in {count!r} parts")
        return DiagonalBlocks(count)
    if "ahead" not in data:
        return None
    chosen = np.zeros(dst_size, dtype=np.bool_)
    for start, stop in data["ahead"]:
        if not 0 <= start < stop <= dst_size:
            raise ValueError(f"ahead {start} to {stop} of {dst_size} coordinates")
        chosen[start:stop] = True
    return FromNextLayer(chosen)


def _runs(source: Ints, constant: npt.NDArray[Any] | None = None) -> list[tuple[int, int]]:
    """Split coordinates at every jump of the source, and at every change of a row of ``constant`` [k, n]."""
    joined = np.where(source[:-1] >= 0, source[1:] == source[:-1] + 1, source[1:] == source[:-1])
    if constant is not None:
        joined &= (constant[:, 1:] == constant[:, :-1]).all(axis=0)
    edges = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(source)]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


def axis_map(
    src_size: int,
    source: Ints | Sequence[int],
    *,
    write: float | Floats = 1.0,
    read: float | Floats = 1.0,
    fresh_write: Literal["random", "zero"] = "random",
    fresh_read: Literal["random", "zero"] = "random",
    fresh_bias: float = 0.0,
) -> AxisMap:
    """Build a map from its sources; gains are scalars or one value a destination coordinate.

    Args:
        src_size: source coordinates.
        source: for every destination coordinate, the source coordinate that it copies, or ``MEAN`` or ``FRESH``.
        write, read: gains.
        fresh_write, fresh_read: content of legs that do not come from the source (of a mean, the read leg only).
        fresh_bias: the value of a bias at fresh coordinates.

    >>> axis_map(2, [0, 1, FRESH], fresh_read="zero").words()
    [0, 1, 'fresh']
    """
    source = np.asarray(source, dtype=np.int64)
    copies, fresh = source >= 0, source == FRESH
    return AxisMap(
        src_size=src_size,
        source=np.where(copies, source, -1),
        is_mean=source == MEAN,
        write=np.where(fresh, 0.0, np.broadcast_to(write, source.shape)).astype(np.float64),
        read=np.where(copies, np.broadcast_to(read, source.shape), 0.0).astype(np.float64),
        write_random=fresh & (fresh_write == "random"),
        read_random=~copies & (fresh_read == "random"),
        fresh_bias=fresh_bias,
    )


def dense_axis_map(src_size: int, dst_size: int, dense: DenseMap, *, write: float = 1.0, read: float = 1.0) -> AxisMap:
    """The map of an axis that mixes by a dense map, each leg with one gain."""
    no, gains = np.zeros(dst_size, dtype=np.bool_), (np.full(dst_size, write), np.full(dst_size, read))
    return AxisMap(src_size, np.full(dst_size, -1), no, *gains, no, no, structure=dense)


def identity(size: int) -> AxisMap:
    """The map of an axis that does not grow."""
    return axis_map(size, np.arange(size))


def block(src_size: int, dst_size: int, anchor: Anchor = "edge") -> Ints:
    """Sources of an axis whose old coordinates stay in one block, at the start or in the middle; the rest FRESH.

    >>> block(2, 5, "center").tolist()
    [-1, 0, 1, -1, -1]
    """
    source = np.full(dst_size, FRESH, dtype=np.int64)
    start = _offset(src_size, dst_size, anchor)
    source[start : start + src_size] = np.arange(src_size)
    return source


def wrap(src_size: int, dst_size: int, anchor: Anchor = "edge") -> Ints:
    """Sources of an axis filled with wrapped copies, ``src[i mod n]``; `center` wraps to both sides of the middle.

    >>> wrap(3, 5).tolist(), wrap(3, 5, "center").tolist()
    ([0, 1, 2, 0, 1], [2, 0, 1, 2, 0])
    """
    if src_size == 0:
        return np.full(dst_size, FRESH, dtype=np.int64)
    return (np.arange(dst_size) - _offset(src_size, dst_size, anchor)) % src_size


def _offset(src_size: int, dst_size: int, anchor: Anchor) -> int:
    return 0 if anchor == "edge" else (dst_size - src_size) // 2


def copies_of_each(src_size: int, source: Ints) -> Floats:
    """float64 [dst]: for each copy, how many copies its source coordinate has (1 where it is no copy)."""
    counts = np.bincount(source[source >= 0], minlength=max(src_size, 1))
    return np.where(source >= 0, counts[np.maximum(source, 0)], 1).astype(np.float64)


def concatenate(parts: Sequence[tuple[int, Ints]]) -> Ints:
    """Sources of an axis made of consecutive parts (source size, sources), each mapped onto its own part.

    >>> concatenate([(2, block(2, 2)), (1, wrap(1, 2))]).tolist()
    [0, 1, 2, 2]
    """
    joined, offset = [], 0
    for size, source in parts:
        joined.append(np.where(source >= 0, source + offset, source))
        offset += size
    return np.concatenate(joined)


def stacked(maps: Sequence[AxisMap]) -> AxisMap:
    """The map of axes that lie one after the other, such as ``q|k|v``; each grows in its own place."""
    if len(maps) == 1:
        return maps[0]
    assert all(each.fresh_bias == 0 and each.structure is None for each in maps), "stacked axes are of plain copies"
    return AxisMap(
        src_size=sum(each.src_size for each in maps),
        source=concatenate([(each.src_size, each.source) for each in maps]),
        is_mean=np.concatenate([each.is_mean for each in maps]),
        write=np.concatenate([each.write for each in maps]),
        read=np.concatenate([each.read for each in maps]),
        write_random=np.concatenate([each.write_random for each in maps]),
        read_random=np.concatenate([each.read_random for each in maps]),
    )


def part_map(axes: Mapping[str, AxisMap], part: str) -> AxisMap:
    """The map of one place of a composite axis: an axis, or several stacked ones (``q|k|v``)."""
    return stacked([axes[name] for name in part.split("|")])


def kronecker(names: Sequence[str], maps: Sequence[AxisMap]) -> AxisMap:
    """The map of a composite axis such as ``(kv group q)``, first name slowest: E and R are Kronecker products.

    A composite coordinate is fresh where one of its parts is. Its legs are then zero where a fresh part's leg is zero,
    and random otherwise.

    Raises:
        AssertionError: a part that is dense, or has means and is not the last; only whole axes are mixed.
    """
    if len(maps) == 1:
        return maps[0]
    assert not any(part.dense is not None for part in maps), "a composite axis is of plain copies"
    assert not any(part.is_mean.any() for part in maps[:-1]), "means are taken over the last part of a composite axis"
    assert all(part.fresh_bias == 0 for part in maps), "a composite axis has plain biases"
    assert all(part.diagonal_blocks == 1 for part in maps[1:]), "only the slowest part has diagonal blocks"
    places = " ".join(f"p{k}" for k in range(len(names)))
    flatten = f"{places} -> ({places})"

    def grid(arrays: list[np.ndarray], combine: np.ufunc) -> np.ndarray:
        return rearrange(reduce(combine.outer, arrays), flatten)

    structure: Structure | None = None
    if any(part.from_next_layer is not None for part in maps):
        assert maps[0].diagonal_blocks == 1, "diagonal blocks take nothing from the next layer"
        none = [np.zeros(part.dst_size, dtype=np.bool_) for part in maps]
        chosen = [
            no if part.from_next_layer is None else part.from_next_layer for part, no in zip(maps, none, strict=True)
        ]
        structure = FromNextLayer(grid(chosen, np.logical_or))
    elif maps[0].diagonal_blocks != 1:
        structure = DiagonalBlocks(maps[0].diagonal_blocks)
    fresh = grid([part.is_fresh for part in maps], np.logical_or)
    strides = np.cumprod([1, *(part.src_size for part in maps[:0:-1])])[::-1]
    position = grid([np.maximum(part.source, 0) * stride for part, stride in zip(maps, strides, strict=True)], np.add)
    means = ~fresh & np.broadcast_to(maps[-1].is_mean, (len(fresh) // maps[-1].dst_size, maps[-1].dst_size)).reshape(-1)
    if means.any():
        assert structure is None, "an axis of means has no other structure"
        structure = PartMeans(np.where(means, position, -1), maps[-1].src_size)
    zero_write = grid([part.is_fresh & ~part.write_random for part in maps], np.logical_or)
    # A mean is written, but what reads it is new.
    zero_read = grid([~part.is_copy & ~part.read_random for part in maps], np.logical_or)
    return AxisMap(
        src_size=int(np.prod([part.src_size for part in maps])),
        source=np.where(fresh | means, -1, position),
        is_mean=means,
        write=np.where(fresh, 0.0, grid([part.write for part in maps], np.multiply)),
        read=np.where(fresh, 0.0, grid([part.read for part in maps], np.multiply)),
        write_random=fresh & ~zero_write,
        read_random=(fresh | means) & ~zero_read,
        structure=structure,
    )
