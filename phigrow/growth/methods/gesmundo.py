"""Composable function-preserving expansions: everything new is written at random and read with zeros, or never written.

A. Gesmundo, K. Maile, Composable Function-preserving Expansions for Transformer Architectures (2308.06103). New mlp
units and heads have zero columns where they are read; new key coordinates are zero and queries take sqrt(h'/h), as in
`lossless` (with LayerNorm inside heads and for rotary parts too, which the paper leaves open); new coordinates of the
stream are zero, and RMSNorm's weight takes sqrt(D/D') for the longer mean. Here the writers of the stream carry the
inverse of that last gain instead, so that epsilon keeps its effect.

Exact under RMSNorm, the scope of the paper. Under LayerNorm zeros shift the mean that is subtracted.
"""

from __future__ import annotations

from phigrow.growth.axes import FRESH, AxisMap
from phigrow.growth.exact_maps import kept_stream, refuse_inexact, unread
from phigrow.growth.method import GrowthTask, Method, Options


def _axis_maps(task: GrowthTask, options: Options) -> dict[str, AxisMap]:
    refuse_inexact(task, "gesmundo")
    return {**unread(task), **kept_stream(task, FRESH)}


def _approximations(task: GrowthTask, options: Options) -> list[str]:
    if task.family.centred and task.grows(task.family.residual):
        return ["zeros in the stream shift the mean that LayerNorm takes off"]
    return []


METHOD = Method(
    name="gesmundo",
    summary="the source, plus new units whose outputs have zero weight",
    depth="identity",
    axis_maps=_axis_maps,
    approximations=_approximations,
)
