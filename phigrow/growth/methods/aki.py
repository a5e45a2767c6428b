"""AKI, advanced knowledge initialisation (bert2BERT): FPI, but new neurons are taken from the layer above.

C. Chen et al., bert2BERT: Towards Reusable Pretrained Language Models (2110.07143), section 3.3. With W~ the matrix
whose fan-in is grown as in `fpi` (copied, over its count), columns being the fan-out:

    U_l[:, j] = W~_l[:, j] for j <= d,  W~_{l+1}[:, g(j)] for j > d

for all matrices of attention and mlp, with their biases; queries, keys and values by whole heads.

The paper leaves some choices open, which are made here. Normalisations, embeddings and the last layer, which has none
above it, grow as in `fpi`. Two things differ from the paper. One map g, drawn in even rounds as in `fpi`, serves all
layers; the paper draws one a layer. Layers are repeated in place (`interpose`); the paper stacks (``--depth stack``).

Not function-preserving: the paper gives that up so that copies differ. With a single layer it is `fpi`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from phigrow.growth.axes import AxisMap, FromNextLayer
from phigrow.growth.copy_maps import average_maps, copy_reasons, drawn_evenly
from phigrow.growth.method import GrowthTask, Method, Options


def _from_next_layer(task: GrowthTask) -> list[str]:
    """The axes whose new neurons come from above."""
    family = task.family
    return [axis for axis in (family.residual, *family.heads, family.mlp) if task.grows(axis)]


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    maps = average_maps(task, lambda name, src, dst: drawn_evenly(task.seed, name, src, dst))
    for axis in _from_next_layer(task):
        src, dst = task.sizes(axis)
        maps[axis] = replace(maps[axis], structure=FromNextLayer(np.arange(dst) >= src))
    return maps


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    src, dst = task.sizes(task.family.residual)
    reasons = copy_reasons(task, even=dst % src == 0)
    if task.src["layer"] > 1 and (axes := _from_next_layer(task)):
        reasons.append(f"aki takes new coordinates of {', '.join(axes)} from the layer above")
    return reasons


METHOD = Method(
    name="aki",
    summary="copies of neurons; new ones come from the next layer (bert2BERT's AKI)",
    depth="interpose",
    axis_maps=_axis_maps,
    approximations=_approximations,
)
