"""Staged Training's width operator: two copies of the model side by side, block-diagonal, averaged by the head.

S. Shen et al., Staged Training for Transformer Language Models (2203.06211): embeddings [E, E], every matrix
[[W, 0], [0, W]], biases and normalisations twice, and the head [W, W] / 2 (the authors, whose head is the embedding,
halve the last normalisation instead, as here where embeddings are tied). Heads double, whole.

Exact at twice the size, other factors are refused; heads or mlp may stay, and are then shared by the two halves. The
halves get equal gradients for ever, and so do the new blocks: Adam's moments there are those of the old ones, halved
(the authors' code starts them at zero).
"""

from __future__ import annotations

from dataclasses import replace

from phigrow.growth.axes import AxisMap, DiagonalBlocks, wrap
from phigrow.growth.copy_maps import average_maps, copy_reasons
from phigrow.growth.method import GrowthTask, Method, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    family = task.family
    stream = (family.residual, family.normed, family.final)
    doubling = (*stream, family.heads[0], family.mlp)
    for axis in task.grown_axes:
        src, dst = task.sizes(axis)
        if axis not in doubling:
            raise task.refuse(
                f"staged cannot grow {axis}, {src} -> {dst}",
                axis,
                "it puts two copies of the model side by side, heads and tokens as they are",
                f"keep {axis} at {src}, or use --method lossless",
            )
        if dst != 2 * src:
            raise task.refuse(
                f"staged cannot grow {axis} {src} -> {dst}, which is not twice as much",
                axis,
                "it puts two copies of the model side by side",
                f"choose {2 * src}, or use --method lossless or tile",
            )
    maps = average_maps(task, lambda name, src, dst: wrap(src, dst))
    return {
        axis: replace(made, structure=DiagonalBlocks(2)) if task.grows(axis) else made for axis, made in maps.items()
    }


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    return copy_reasons(task, even=True)


METHOD = Method(
    name="staged",
    summary="two copies of the source side by side, for exactly twice the width (Staged Training)",
    depth="identity",
    axis_maps=_axis_maps,
    approximations=_approximations,
    always_exact=True,
)
