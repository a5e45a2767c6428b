"""isometric: the residual stream is mapped into a larger one by a random isometry, so no two coordinates are alike.

With Q [D', D] a random isometry (Q^T Q = I) that takes the mean of the stream to the mean of the larger one, and
c = sqrt(D'/D):

1. Writers of the stream: c Q W. Mean and variance stay, so epsilon keeps its effect. The normalised stream n, before
   weights, becomes c Q n.
2. Normalisations: weight 1/c everywhere; weights g and biases b are fused into the readers.
3. Readers: W diag(g) Q^T, and W b is added to their bias. If a reader has no bias (GPT-NeoX's head), the bias of the
   normalisation is a unit vector u orthogonal to the columns of Q, and W b u^T is added to the readers.
4. All other axes as in `lossless`: new heads, head coordinates, mlp units, layers and tokens change nothing at first.

Function-preserving in evaluation mode, to rounding, at any sizes. Unlike the mean fill, every coordinate of the
new stream is in use from the start, each a different mixture of the old ones, and no reader starts with columns that
multiply zero. Not published elsewhere, to our knowledge.

Refused with tied embeddings: one matrix cannot both write the stream and carry the last weights. Costs matrix products,
and memory for Q (`phigrow.growth.dense_map.Isometry`).
"""

from __future__ import annotations

from phigrow.growth.axes import AxisMap, dense_axis_map
from phigrow.growth.dense_map import Isometry
from phigrow.growth.exact_maps import refuse_inexact, unread
from phigrow.growth.method import GrowthTask, Method, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    refuse_inexact(task, "isometric")
    family, maps = task.family, unread(task)
    src, dst = task.sizes(family.residual)
    if src == dst:
        return maps
    if task.tied:
        raise task.refuse(
            f"isometric cannot grow {family.residual} {src} -> {dst} where embeddings are tied",
            family.residual,
            "the head is the embedding, so it cannot take in the weights of the last normalisation",
            "use --method lossless, or a source with a head of its own",
        )
    gain, isometry = float((dst / src) ** 0.5), Isometry(src, dst, task.seed)
    maps[family.residual] = dense_axis_map(src, dst, isometry, write=gain, read=1 / gain)
    maps[family.normed] = maps[family.final] = dense_axis_map(src, dst, isometry)
    return maps


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    return []


METHOD = Method(
    name="isometric",
    summary="the source's function, with its residual stream mapped by a random isometry",
    depth="identity",
    axis_maps=_axis_maps,
    approximations=_approximations,
    always_exact=True,
)
