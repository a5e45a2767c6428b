"""FPI, function-preserving initialisation (bert2BERT): copies drawn evenly at random, fan-in divided by their count.

C. Chen et al., bert2BERT: Towards Reusable Pretrained Language Models (2110.07143). Output neurons are copied by a
map g, input neurons by a map f whose weights are divided by the number of copies; whole heads are copied. The paper
draws g uniformly; here every round of new coordinates is a random permutation of the old ones, so that at whole ratios
all have the same count, without which normalisations see another mean and variance.

Exact where hidden grows by a whole factor, at any ratio of heads and mlp.
"""

from __future__ import annotations

from phigrow.growth.axes import AxisMap
from phigrow.growth.copy_maps import average_maps, copy_reasons, drawn_evenly
from phigrow.growth.method import GrowthTask, Method, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    return average_maps(task, lambda name, src, dst: drawn_evenly(task.seed, name, src, dst))


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    src, dst = task.sizes(task.family.residual)
    return copy_reasons(task, even=dst % src == 0)


METHOD = Method(
    name="fpi",
    summary="random copies of neurons, each read with a share of the weight (bert2BERT's FPI)",
    depth="interpose",
    axis_maps=_axis_maps,
    approximations=_approximations,
)
