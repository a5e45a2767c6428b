"""Axis maps: how one named axis of a model becomes a larger one, stored sparsely, one entry a coordinate.

A map has two legs. The write leg ``E`` (destination x source) says how an activation carried by the axis is spread
over the larger one, the read leg ``R`` (source x destination) how a consumer undoes it. Every destination coordinate is

- a copy of a source coordinate, with a write gain and a read gain,
- ``MEAN``: written as the mean over the source coordinates,
- ``FRESH``: not written from the source at all, or
- ``DENSE``: written and read as a mixture of all source coordinates; then the whole axis is, by dense legs.

Where a leg does not come from the source it is either zero or *random*: filled with new values by the lift.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from einops import rearrange

from phigrow.errors import GrowthError
from phigrow.growth.dense_map import DenseMap, Floats, dense_map_from_json

MEAN = -1
FRESH = -2
DENSE = -3

Anchor = Literal["edge", "center"]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


class Run(NamedTuple):
    """Consecutive destination coordinates ``start .. stop`` that copy consecutive source coordinates, or none.

    ``source`` is the first source coordinate, or ``MEAN``, ``FRESH`` or ``DENSE``.
    """

    start: int
    stop: int
    source: int


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis, from ``src_size`` to ``dst_size`` coordinates.

    Attributes:
        src_size: source coordinates.
        source: int64 [dst_size]; the source coordinate copied, or ``MEAN``, ``FRESH`` or ``DENSE``.
        write: float64 [dst_size]; gain on the write leg (0 where FRESH).
        read: float64 [dst_size]; gain on the read leg (0 where neither a copy nor DENSE).
        write_random: bool [dst_size]; the write leg is filled with new random values.
        read_random: bool [dst_size]; the read leg is filled with new random values.
        fresh_bias: the value of a bias at FRESH coordinates.
        legs: of an axis that is all DENSE, its legs before these gains; None of any other.
        parts: the axis is so many equal parts in a row. A matrix between two axes of as many parts is block-diagonal:
            zero where the parts of row and column differ, and the others count ``parts`` times, so the sum is R E.
        ahead: bool [dst_size] or None; coordinates that copy what the *next* source layer writes, where there is one.
    """

    src_size: int
    source: Ints
    write: Floats
    read: Floats
    write_random: Bools
    read_random: Bools
    fresh_bias: float = 0.0
    legs: DenseMap | None = None
    parts: int = 1
    ahead: Bools | None = None

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
        """The axis does not change at all: same size, same order, gains 1."""
        same = self.dst_size == self.src_size and np.array_equal(self.source, np.arange(self.src_size))
        return bool(same and (self.write == 1).all() and (self.read == 1).all())

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The source pattern as the fewest runs, gains left aside: what can be moved in one slice."""
        return tuple(_runs(self.source))

    def left_inverse_error(self) -> float:
        """max |R E - I|; 0 for an axis that a consumer reads exactly as it did before growth.

        FRESH coordinates add nothing as long as one of their legs is zero; two random legs give ``inf``.
        """
        if (self.write_random & self.read_random).any():
            return float("inf")
        if self.legs is not None:
            return self.legs.left_inverse_error(self.write * self.read)
        product = np.zeros(self.src_size)
        copies = self.is_copy
        np.add.at(product, self.source[copies], self.write[copies] * self.read[copies])
        return float(np.abs(product - 1).max(initial=0.0))

    def dense_legs(self) -> tuple[Floats, Floats]:
        """The legs as matrices ``E`` [dst, src] and ``R`` [src, dst], random entries as 0 (for tests and pictures)."""
        if self.legs is not None:
            return self.legs.write(np.float64) * self.write[:, None], self.legs.read(np.float64) * self.read
        write, read = np.zeros((self.dst_size, self.src_size)), np.zeros((self.src_size, self.dst_size))
        copies = np.flatnonzero(self.is_copy)
        write[copies, self.source[copies]] = self.write[copies]
        read[self.source[copies], copies] = self.read[copies]
        means = np.flatnonzero(self.source == MEAN)
        write[means] = self.write[means, None] / self.src_size
        return write, read

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal map; coordinates are run-length coded."""
        kinds = {MEAN: "mean", FRESH: "fresh", DENSE: "dense"}
        gains = np.stack([self.write, self.read, self.write_random, self.read_random])
        runs: list[list[Any]] = []
        for start, stop, source in _runs(self.source, gains):
            legs = ["random" if flag[start] else float(gain[start]) for gain, flag in self._legs()]
            runs.append([stop - start, kinds.get(source, source), *legs])
        said = {"src_size": self.src_size, "dst_size": self.dst_size, "fresh_bias": self.fresh_bias, "runs": runs}
        return said | self.apart()

    def apart(self) -> dict[str, Any]:
        """What a map has besides coordinates and gains, as in its JSON; nothing in most."""
        said: dict[str, Any] = {} if self.legs is None else {"legs": self.legs.to_json()}
        if self.parts != 1:
            said["parts"] = self.parts
        if self.ahead is not None:
            said["ahead"] = [
                [run.start, run.stop] for run in _runs(-1 - self.ahead.astype(np.int64)) if run.source == -2
            ]
        return said

    def _legs(self) -> tuple[tuple[Floats, Bools], tuple[Floats, Bools]]:
        return (self.write, self.write_random), (self.read, self.read_random)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AxisMap:
        """Read what `to_json` wrote.

        Raises:
            GrowthError: a malformed map (sizes that do not add up, a source out of range, an unknown word).
        """
        try:
            sources: list[Ints] = []
            legs: tuple[list[Any], list[Any]] = ([], [])
            for length, source, *gains in data["runs"]:
                code = {"mean": MEAN, "fresh": FRESH, "dense": DENSE}.get(source, source)
                sources.append(np.full(length, code) if code < 0 else np.arange(code, code + length))
                for leg, gain in zip(legs, gains, strict=True):
                    leg += [gain] * length
            source, src_size = np.concatenate(sources).astype(np.int64), int(data["src_size"])
            if len(source) != data["dst_size"] or source.max() >= src_size or source.min() < DENSE:
                raise ValueError(f"runs of {len(source)} coordinates up to source {source.max()}")
            dense = dense_map_from_json(data["legs"], src_size, len(source)) if "legs" in data else None
            if (source == DENSE).any() if dense is None else (source != DENSE).any():
                raise ValueError("dense coordinates without legs, or legs of coordinates that are not dense")
            random = [np.array([gain == "random" for gain in leg]) for leg in legs]
            write, read = (np.array([0.0 if gain == "random" else float(gain) for gain in leg]) for leg in legs)
            parts = data.get("parts", 1)
            if type(parts) is not int or parts < 1 or len(source) % parts:
                raise ValueError(f"{len(source)} coordinates in {parts!r} parts")
            ahead = None if "ahead" not in data else np.zeros(len(source), dtype=np.bool_)
            for start, stop in data.get("ahead", []):
                if ahead is not None and 0 <= start < stop <= len(source):
                    ahead[start:stop] = True
            bias = float(data["fresh_bias"])
            return cls(src_size, source, write, read, random[0], random[1], bias, dense, parts, ahead)
        except (KeyError, TypeError, ValueError) as error:
            raise GrowthError(
                "a malformed axis map in a plan",
                why=f"{type(error).__name__}: {error}",
                fix="make the plan again with phigrow plan --json",
            ) from error


def _runs(source: Ints, *also_constant: np.ndarray) -> list[Run]:
    """Split coordinates where the source jumps or where one of the given arrays [k, n] changes."""
    copies = source[:-1] >= 0
    joined = np.where(copies, source[1:] == source[:-1] + 1, source[1:] == source[:-1])
    for array in also_constant:
        joined &= (array[:, 1:] == array[:, :-1]).all(axis=0)
    edges = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(source)]
    return [Run(start, stop, int(source[start])) for start, stop in itertools.pairwise(edges) if stop > start]


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

    ``fresh_write`` and ``fresh_read`` say how legs that do not come from the source are filled (a MEAN coordinate
    has only such a read leg).

    >>> axis_map(2, [0, 1, FRESH], fresh_read="zero").runs
    (Run(start=0, stop=2, source=0), Run(start=2, stop=3, source=-2))
    """
    source = np.asarray(source, dtype=np.int64)
    copies, fresh = source >= 0, source == FRESH
    return AxisMap(
        src_size=src_size,
        source=source,
        write=np.where(fresh, 0.0, np.broadcast_to(write, source.shape)).astype(np.float64),
        read=np.where(copies, np.broadcast_to(read, source.shape), 0.0).astype(np.float64),
        write_random=fresh & (fresh_write == "random"),
        read_random=~copies & (fresh_read == "random"),
        fresh_bias=fresh_bias,
    )


def dense_map(src_size: int, dst_size: int, legs: DenseMap, *, write: float = 1.0, read: float = 1.0) -> AxisMap:
    """The map of an axis that mixes by dense legs, each with one gain."""
    no = np.zeros(dst_size, dtype=np.bool_)
    source = np.full(dst_size, DENSE, dtype=np.int64)
    return AxisMap(src_size, source, np.full(dst_size, write), np.full(dst_size, read), no, no, legs=legs)


def identity(size: int) -> AxisMap:
    """The map of an axis that does not grow."""
    return axis_map(size, np.arange(size))


def block(src_size: int, dst_size: int, anchor: Anchor = "edge") -> Ints:
    """Sources of an axis whose old coordinates stay in one block, at the start or in the middle; the rest FRESH.

    >>> block(2, 5, "center").tolist()
    [-2, 0, 1, -2, -2]
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
    assert all(each.fresh_bias == 0 and not each.apart() for each in maps), "stacked axes are of plain copies"
    return AxisMap(
        src_size=sum(each.src_size for each in maps),
        source=concatenate([(each.src_size, each.source) for each in maps]),
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

    A composite coordinate is FRESH where one of its parts is; its legs are then zero where a FRESH part's leg is
    zero, and random otherwise.

    Raises:
        AssertionError: a part with MEAN or DENSE coordinates; only whole axes are written as means or mixed.
    """
    if len(maps) == 1:
        return maps[0]
    assert not any(np.isin(part.source, (MEAN, DENSE)).any() for part in maps), "a composite axis is of plain copies"
    assert all(part.fresh_bias == 0 for part in maps), "a composite axis has plain biases"
    assert all(part.parts == 1 for part in maps[1:]), "only what is slowest lies in parts"
    ahead = [np.zeros(part.dst_size, dtype=np.bool_) if part.ahead is None else part.ahead for part in maps]
    places = " ".join(f"p{k}" for k in range(len(names)))
    flatten = f"{places} -> ({places})"

    def grid(arrays: list[np.ndarray], combine: np.ufunc) -> np.ndarray:
        return rearrange(reduce(combine.outer, arrays), flatten)

    fresh = grid([part.source == FRESH for part in maps], np.logical_or)
    strides = np.cumprod([1, *(part.src_size for part in maps[:0:-1])])[::-1]
    position = grid([np.maximum(part.source, 0) * stride for part, stride in zip(maps, strides, strict=True)], np.add)
    zero_write = grid([(part.source == FRESH) & ~part.write_random for part in maps], np.logical_or)
    zero_read = grid([(part.source == FRESH) & ~part.read_random for part in maps], np.logical_or)
    return AxisMap(
        src_size=int(np.prod([part.src_size for part in maps])),
        source=np.where(fresh, FRESH, position),
        write=np.where(fresh, 0.0, grid([part.write for part in maps], np.multiply)),
        read=np.where(fresh, 0.0, grid([part.read for part in maps], np.multiply)),
        write_random=fresh & ~zero_write,
        read_random=fresh & ~zero_read,
        parts=maps[0].parts,
        ahead=grid(ahead, np.logical_or) if any(part.ahead is not None for part in maps) else None,
    )
