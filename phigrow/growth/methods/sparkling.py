"""SPARKLING's initial weights: wrapped copies, with read gains that keep the root mean square of activations.

Q. Yu et al., SPARKLING: Balancing Signal Preservation and Symmetry Breaking for Width-Progressive Learning
(2602.02472).
c copies of a coordinate are read with 1/sqrt(c): sums of as many independent terms keep their root mean square, and so
do rows of the weights. The other half of the method is not in the weights: the optimizer's state is kept for copied
values and reset for new ones, and their learning rate warms up again.

Not function-preserving: copies are not independent at the start.
"""

from __future__ import annotations

import numpy as np

from phigrow.growth.axes import AxisMap, wrap
from phigrow.growth.copy_maps import copy_maps
from phigrow.growth.method import GrowthTask, Method, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    return copy_maps(task, lambda name, src, dst: wrap(src, dst), lambda counts: 1 / np.sqrt(counts), averages=False)


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    grown = task.grown_axes
    return [f"sparkling keeps root mean squares, not sums, over {', '.join(grown)}"] if grown else []


METHOD = Method(
    name="sparkling",
    summary="copies of the source that keep the size of activations (SPARKLING)",
    depth="interpose",
    axis_maps=_axis_maps,
    approximations=_approximations,
)
