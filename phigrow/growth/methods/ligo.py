"""LiGO: the source's weights mapped linearly into the larger model by matrices that a short training run learns.

P. Wang et al., Learning to Grow Pretrained Models for Efficient Transformer Training (2303.00980):

    W'_l = sum over k of w[l, k] B W_k A^T

Width: one B for the residual stream (the paper's B_emb), which the embedding, every normalisation and every writer of
the stream carry and every reader takes as A; B of queries, keys, values and mlp, the output of attention reading with
that of values and the last matrix of the mlp with that of the mlp. Depth: w [L', L], of every kind of parameter its
own, weights and biases apart. About 100 steps of the language-model loss learn B and w, with the source frozen
(`phigrow learn-growth`); the large model is then made once, by the lift of every plan (`phigrow.growth.learned`).

Learning starts from a known operator, and equals it there: depth from ``stack``, width from ``fpi`` (c copies are read
with 1/c) or ``tile`` (read in full, so that A = B as in the paper). Gains of the start stay: A = diag(read) B.

Two things differ from the authors' code (github.com/VITA-Group/LiGO, ``ligo.py``). There each destination layer has its
own B of queries, keys, values and mlp; here all layers share them. There the first rows of B stay the identity; here
they are learned too. Rotary coordinates, which the paper's models lack, mix like others. The vocabulary, groups of
heads that share a key and normalisations inside heads (``qk_layernorm``) grow as in the start.

Not function-preserving once learned. Costs matrix products, and memory for B: of the mlp 8192 -> 10240, 0.7 GB.
"""

from __future__ import annotations

from phigrow.growth.axes import AxisMap, wrap
from phigrow.growth.copy_maps import average_maps, copy_maps, copy_reasons, drawn_evenly
from phigrow.growth.method import GrowthTask, Method, Option, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    if options["start"] == "tile":
        return copy_maps(task, lambda name, src, dst: wrap(src, dst), lambda counts: counts**0.0, averages=False)
    return average_maps(task, lambda name, src, dst: drawn_evenly(task.seed, name, src, dst))


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    if options["start"] == "tile":
        return [f"ligo from tile adds up copies of {axis}" for axis in task.grown_axes[:1]]
    src, dst = task.sizes(task.family.residual)
    return copy_reasons(task, even=dst % src == 0)


METHOD = Method(
    name="ligo",
    summary="linear maps of the source's weights, learned before growing (LiGO)",
    depth="stack",
    axis_maps=_axis_maps,
    approximations=_approximations,
    options={"start": Option(str, "fpi", "method that learning starts from", choices=("fpi", "tile"))},
    learns=True,
)
