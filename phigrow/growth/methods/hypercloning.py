"""HyperCloning: every axis is repeated n times and its readers divided by n, with noise that copies cancel.

M. Samragh et al., Scaling Smart: Accelerating Large Language Model Pre-training with Small Model Initialization
(2409.12903). W' = [[W, W], [W, W]] / 2 at a factor of 2, biases, normalisations and embeddings repeated, more heads
rather than larger ones; then, in every matrix of every layer, the columns that read the first and second copy of a
coordinate get +N and -N, those of the third and fourth the next; of an odd number of copies the last has none.
``snr`` is the ratio in decibels of the power of the repeated matrix to that of N: 10 did best in the paper.

Exact; whole factors only, others are refused.
"""

from __future__ import annotations

from phigrow.growth.axes import AxisMap, wrap
from phigrow.growth.copy_maps import average_maps, copy_reasons
from phigrow.growth.method import GrowthTask, Method, Option, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    family = task.family
    for axis in task.grown_axes:
        src, dst = task.sizes(axis)
        if axis in (family.query, family.key, family.value):
            raise task.refuse(
                f"hypercloning cannot grow heads, {src} -> {dst} coordinates",
                axis,
                "it repeats whole heads",
                f"keep heads of {src} coordinates and choose a multiple of them, or use --method lossless",
            )
        if dst % src:
            raise task.refuse(
                f"hypercloning cannot grow {axis} {src} -> {dst}, which is no whole factor",
                axis,
                "it repeats whole axes",
                f"choose a multiple of {src}, or use --method lossless or fpi",
            )
    return average_maps(task, lambda name, src, dst: wrap(src, dst))


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    return copy_reasons(task, even=True)


def _noise(options: Options) -> float:
    return 0.0 if options["snr"] == "none" else float(10.0 ** (-options["snr"] / 20))


METHOD = Method(
    name="hypercloning",
    summary="whole repeats of the source side by side (HyperCloning)",
    depth="identity",
    axis_maps=_axis_maps,
    approximations=_approximations,
    options={
        "snr": Option(
            float,
            10,
            "signal-to-noise ratio in decibels",
            choices=("none",),
            range=(0, 100),
        )
    },
    own_noise=_noise,
    noise_on="pairs",
)
