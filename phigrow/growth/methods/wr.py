"""Weight reuse (wr): the source in one block of every axis, everything else new.

Phi (M. Javaheripi, NeurIPS 2023 LLM Efficiency Challenge): the small matrix is copied into the large one, the rest
stays at its initialisation. The slides leave the place of the block open; here it is top-left (``anchor edge``) or
centred, axis by axis: whole heads, and the rotary part of a head stays its rotary part. New weights are
N(0, initializer_range), new biases 0, new LayerNorm weights 1 and biases 0.

Not function-preserving: old readers also read the new coordinates of the stream.
"""

from __future__ import annotations

from phigrow.growth.axes import AxisMap, axis_map, block, concatenate
from phigrow.growth.method import GrowthTask, Method, Option, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    anchor, family = options["anchor"], task.family
    maps = {}
    for axis in family.axis_names:
        parts = task.parts(axis)
        source = concatenate([(src, block(src, dst, anchor)) for src, dst in parts])
        maps[axis] = axis_map(task.src[axis], source)
    return maps


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    grown = task.grown_axes
    return [f"wr reads new random coordinates of {', '.join(grown)}"] if grown else []


METHOD = Method(
    name="wr",
    summary="the source's weights in one block, new random weights around it (weight reuse)",
    depth="interpose",
    axis_maps=_axis_maps,
    approximations=_approximations,
    options={"anchor": Option(str, "edge", "place of the source on every axis", choices=("edge", "center"))},
)
