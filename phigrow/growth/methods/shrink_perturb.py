"""Shrink and perturb: the source in one block, shrunk, and noise of an initialisation everywhere.

N. Mallik et al., Warmstarting for Scaling Language Models (2411.07340), after J. Ash and R. Adams (1910.08475):
W' = lambda pad(W) + N, with lambda 0.4 where the paper did best and N the initialisation of the larger model, whose
standard deviation is the destination's ``initializer_range`` (the paper scales it by muP). The weights of
normalisations are not shrunk.

Not function-preserving.
"""

from __future__ import annotations

from phigrow.growth.axes import AxisMap, axis_map, block, concatenate
from phigrow.growth.method import GrowthTask, Method, Option, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    family, maps = task.family, {}
    for axis in family.axis_names:
        parts = task.parts(axis)
        source = concatenate([(src, block(src, dst)) for src, dst in parts])
        # Once for every tensor: each has one written axis, of which the heads are only a part.
        gain = 1.0 if axis in family.heads else options["shrink"]
        maps[axis] = axis_map(task.src[axis], source, write=gain)
    return maps


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    return [f"shrink_perturb shrinks the source by {options['shrink']} and adds noise"]


METHOD = Method(
    name="shrink_perturb",
    summary="the source's weights scaled down, plus new random weights",
    depth="interpose",
    axis_maps=_axis_maps,
    approximations=_approximations,
    options={"shrink": Option(float, 0.4, "factor on the source's weights", range=(0.01, 1))},
    own_noise=lambda options: 1.0,
    noise_on="all",
)
