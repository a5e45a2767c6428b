"""Tiling (tile): every axis wraps around, ``src[i mod n]``.

Phi (M. Javaheripi, NeurIPS 2023 LLM Efficiency Challenge): the rest of the large matrix is filled with wrapped copies
of the small one. Whole heads are copied; inside a query or key head the rotary part wraps onto the rotary part.
``anchor center`` puts the source in the middle and wraps to both sides, which was best for ModernBERT (2412.13663).

``scale`` is the gain of a reader of c copies of a coordinate:

- ``none`` (as in the Phi talk): 1; sums grow c-fold. Not function-preserving.
- ``preserve``: read gain 1/c, and queries times sqrt(h'/h) for head dimension h -> h', because attention divides by
  its root. Function-preserving when hidden grows by a whole factor: only then does LayerNorm see the same statistics.
- ``rms``: read gain 1/sqrt(c), which keeps the root mean square of sums of independent copies.

Exact copies always get equal gradients. ``noise`` adds N (I - E R) to every matrix that reads copies. The copies cancel
this noise (as HyperCloning's pairs do, 2409.12903), so ``preserve`` stays exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from phigrow.growth.axes import AxisMap, Floats, wrap
from phigrow.growth.copy_maps import copy_maps, copy_reasons
from phigrow.growth.method import GrowthTask, Method, Option, Options

_GAINS: dict[str, Callable[[Floats], Floats]] = {
    "none": np.ones_like,
    "preserve": lambda counts: 1 / counts,
    "rms": lambda counts: 1 / np.sqrt(counts),
}


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    anchor, scale = options["anchor"], options["scale"]
    return copy_maps(task, lambda name, src, dst: wrap(src, dst, anchor), _GAINS[scale], averages=scale == "preserve")


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    grown = task.grown_axes
    if grown and options["scale"] != "preserve":
        return [f"tile with scale {options['scale']} lets sums over copies of {', '.join(grown)} grow"]
    src, dst = task.sizes(task.family.residual)
    return copy_reasons(task, even=dst % src == 0)


METHOD = Method(
    name="tile",
    summary="the source's weights repeated until every matrix is full (tiling)",
    depth="interpose",
    axis_maps=_axis_maps,
    approximations=_approximations,
    options={
        "anchor": Option(str, "edge", "place of the source on every axis", choices=("edge", "center")),
        "scale": Option(
            str, "none", "gain on reading c copies: none 1 (as Phi), preserve 1/c, rms 1/sqrt(c)", choices=tuple(_GAINS)
        ),
    },
    takes_noise=True,
)
