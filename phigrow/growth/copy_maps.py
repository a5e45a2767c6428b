"""Helpers for methods that grow an axis by copying coordinates (tile, fpi, net2net)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from phigrow.growth.axes import FRESH, AxisMap, Floats, Ints, axis_map, concatenate, copies_of_each
from phigrow.growth.method import GrowthTask

Sources = Callable[[str, int, int], Ints]
"""(name, source size, destination size) -> source of every coordinate; equal names draw equal sources."""


def copy_maps(
    task: GrowthTask, sources: Sources, read_gain: Callable[[Floats], Floats], *, averages: bool
) -> dict[str, AxisMap]:
    """Return a map of copies for every axis.

    Axes that must agree (hidden, normed and final; queries, keys and both halves of their rotary part) have the same
    sources, because ``sources`` is called for them with one name. A query carries the read gain of its key.

    Args:
        task: the sizes.
        sources: gives the sources of one part of an axis.
        read_gain: number of copies c of each coordinate's source -> read gain of the coordinate.
        averages: True if that gain is 1/c. A query is then multiplied by sqrt(h'/h), because attention divides by the
            root of the head dimension.
    """
    family, maps = task.family, {}
    for axis in family.axis_names:
        source = concatenate([(src, sources(name, src, dst)) for name, src, dst in _parts(task, axis)])
        counts = copies_of_each(task.src[axis], source)
        read = np.ones_like(counts) if axis == family.vocab else read_gain(counts)
        write: float | Floats = 1.0
        if axis == family.query:
            write = read * (np.sqrt(task.dst[axis] / task.src[axis]) if averages else 1.0)
            read = 1 / (write * counts)
        elif axis == family.final and task.tied:
            # The head is the embedding, which has gain 1, so the gain goes to the stream that the head reads.
            write, read = read, np.ones_like(counts)
        maps[axis] = axis_map(task.src[axis], source, write=write, read=read)
    return maps


def _parts(task: GrowthTask, axis: str) -> list[tuple[str, int, int]]:
    family = task.family
    if axis in (family.query, family.key):
        named = zip(("turning", "turning", "still"), task.parts(axis), strict=True)
        return [(name, src, dst) for name, (src, dst) in named]
    stream = (family.residual, family.normed, family.final)
    return [("stream" if axis in stream else axis, *task.sizes(axis))]


def copy_reasons(task: GrowthTask, *, even: bool) -> list[str]:
    """Return the reasons for which averaged copies do not preserve the function; empty if they preserve it.

    Args:
        task: the sizes.
        even: True if all coordinates of hidden have the same number of copies.
    """
    family, reasons = task.family, []
    if task.grows(family.residual) and not even:
        src, dst = task.sizes(family.residual)
        seen = "LayerNorm sees another mean and variance" if family.centred else "RMSNorm sees another mean square"
        why = "is no whole factor" if dst % src else "is copied unevenly"
        reasons.append(f"hidden {src} -> {dst} {why}: {seen}")
    if task.grows("rotary"):
        reasons.append("the rotary part of heads grows: its coordinates turn at other frequencies")
    if task.grows(family.vocab):
        reasons.append("copies of tokens share their probability")
    if task.grows(family.query) and task.dst_config.get("qk_layernorm"):
        reasons.append("LayerNorm inside heads sees another mean and variance")
    return reasons


def average_maps(task: GrowthTask, sources: Sources) -> dict[str, AxisMap]:
    """Return `copy_maps` with read gain 1/c."""
    return copy_maps(task, sources, lambda counts: 1 / counts, averages=True)


def generator(seed: int, name: str) -> np.random.Generator:
    """Return a generator whose numbers depend on a seed and a name alone."""
    digest = hashlib.sha256(f"{seed}:map:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(digest[:16], "big")))


def drawn_evenly(seed: int, name: str, src: int, dst: int) -> Ints:
    """Return the old coordinates, then rounds of them in random order; counts differ by one at most."""
    if src == 0:
        return np.full(dst, FRESH, dtype=np.int64)
    random = generator(seed, name)
    rounds = [np.arange(src), *(random.permutation(src) for _ in range(-(-dst // src) - 1))]
    return np.concatenate(rounds)[:dst]
