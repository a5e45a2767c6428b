"""LEMON: a mean-filled stream, and copies of heads and mlp units whose readers are split unevenly.

Y. Wang et al., LEMON: Lossless Model Expansion (2310.07999). New coordinates of the stream hold its mean (nothing under
RMSNorm); new heads and units copy old ones in turn, and the columns that read c copies are W b_1 .. W b_c with random
b_k that add up to 1, so that no two copies get the same gradient. LEMON corrects the variance of the longer stream in
LayerNorm, weight and epsilon; here the stream is written with sqrt(D'/D) instead, and epsilon stays.

Exact at any ratio of hidden, heads and mlp. Larger heads are refused: the paper has no rule for them.
"""

from __future__ import annotations

import numpy as np

from phigrow.growth.axes import AxisMap, Floats, Ints, axis_map, copies_of_each, wrap
from phigrow.growth.copy_maps import generator
from phigrow.growth.exact_maps import kept_stream, refuse_inexact, statistics_kept, unread
from phigrow.growth.method import GrowthTask, Method, Options


def _split(seed: int, axis: str, source: Ints, counts: Floats) -> Floats:
    """Shares of the copies of a coordinate: 1/c times 0.5 to 1.5, made to add up to 1."""
    shares = np.where(counts > 1, generator(seed, axis).uniform(0.5, 1.5, len(source)), 1.0)
    shared: Floats = shares / np.bincount(source, weights=shares)[source]
    return shared


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    refuse_inexact(task, "lemon")
    family = task.family
    if task.grows(family.query):
        src, dst = task.sizes(family.query)
        raise task.refuse(
            f"lemon cannot grow heads, {src} -> {dst} coordinates",
            family.query,
            "it copies whole heads",
            f"keep heads of {src} coordinates, or use --method lossless",
        )
    maps = {**unread(task), **kept_stream(task, statistics_kept(task))}
    for axis in (*family.heads, family.mlp):
        source = wrap(*task.sizes(axis))
        counts = copies_of_each(task.src[axis], source)
        maps[axis] = axis_map(task.src[axis], source, read=_split(task.seed, axis, source, counts))
    return maps


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    return []


METHOD = Method(
    name="lemon",
    summary="the source's function, with copies read in uneven shares (LEMON)",
    depth="identity",
    axis_maps=_axis_maps,
    approximations=_approximations,
    always_exact=True,
)
