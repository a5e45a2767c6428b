"""Net2Net: every new unit copies an old one drawn at random, and readers share the weight of a unit among its copies.

T. Chen, I. Goodfellow, J. Shlens, Net2Net: Accelerating Learning via Knowledge Transfer (1511.05641). With g(j) = j for
j <= n and uniform among the old units beyond, W'[i, j] = W[g(i), g(j)] / |{k: g(k) = g(j)}|. Heads are units too, and
so are coordinates of a head (rotary ones in their pairs).

Exact where hidden does not grow. The stream is copied unevenly, and LayerNorm and RMSNorm then see other statistics:
the paper's networks had none.
"""

from __future__ import annotations

import numpy as np

from phigrow.growth.axes import FRESH, AxisMap, Ints
from phigrow.growth.copy_maps import average_maps, copy_reasons, generator
from phigrow.growth.method import GrowthTask, Method, Options


def _drawn(seed: int, name: str, src: int, dst: int) -> Ints:
    if src == 0:
        return np.full(dst, FRESH, dtype=np.int64)
    return np.concatenate([np.arange(src), generator(seed, name).integers(src, size=dst - src)])


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    return average_maps(task, lambda name, src, dst: _drawn(task.seed, name, src, dst))


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    drawn = _drawn(task.seed, "stream", *task.sizes(task.family.residual))
    return copy_reasons(task, even=len(set(np.bincount(drawn).tolist())) == 1)


METHOD = Method(
    name="net2net",
    summary="random copies of units, their weights shared among the copies (Net2Net)",
    depth="identity",
    axis_maps=_axis_maps,
    approximations=_approximations,
)
