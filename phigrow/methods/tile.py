"""Tiling (tile): every axis wraps around, ``src[i mod n]``.

Phi (M. Javaheripi, NeurIPS 2023 LLM Efficiency Challenge): the rest of the large matrix is filled with wrapped copies
of the small one. Whole heads are copied; inside a query or key head the rotary part wraps onto the rotary part.
``anchor center`` puts the source in the middle and wraps to both sides, as ModernBERT (2412.13663) found best.

``scale`` decides what a consumer of c copies of a coordinate does:

- ``none`` (what the Phi talk shows): nothing; sums grow c-fold. Not function-preserving.
- ``preserve``: read gain 1/c, and queries times sqrt(h'/h) for head dimension h -> h', because attention divides by
  its root. Function-preserving when hidden grows by a whole factor: only then does LayerNorm see the same statistics.
- ``rms``: read gain 1/sqrt(c), which keeps the root mean square of sums of independent copies.

Exact copies get equal gradients for ever: ``noise`` adds N (I - E R) to every matrix that reads copies, which the
copies cancel (as HyperCloning's noise pairs, 2409.12903), so ``preserve`` stays exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from phigrow.axes import AxisMap, Floats, axis_map, concatenate, copies_of_each, wrap
from phigrow.method import Growth, Method, Option


def _axis_maps(growth: Growth, options: dict[str, Any]) -> dict[str, AxisMap]:
    family, scale = growth.family, options["scale"]
    maps = {}
    for axis in family.axis_names:
        is_rotary = axis in (family.query, family.key)
        parts = growth.head_parts(axis) if is_rotary else [growth.sizes(axis)]
        source = concatenate([(src, wrap(src, dst, options["anchor"])) for src, dst in parts])
        counts = copies_of_each(growth.src[axis], source)
        write: float | Floats = 1.0
        # A token is looked up, not summed over, so its copies are read as they are.
        read = np.ones_like(counts) if axis == family.vocab else _read_gain(counts, scale)
        if axis == family.query:
            # A query is read by the product with its key, so the read gain of both sits on the query.
            write = read * (np.sqrt(growth.dst[axis] / growth.src[axis]) if scale == "preserve" else 1.0)
            read = 1 / (write * counts)
        if axis == family.final and growth.dst_config.get("tie_word_embeddings"):
            # The head is the embedding, which is written with gain 1: what it reads is scaled instead.
            write, read = read, np.ones_like(counts)
        maps[axis] = axis_map(growth.src[axis], source, write=write, read=read)
    return maps


def _read_gain(counts: Floats, scale: str) -> Floats:
    return {"none": np.ones_like(counts), "preserve": 1 / counts, "rms": 1 / np.sqrt(counts)}[scale]


def _approximations(growth: Growth, options: dict[str, Any]) -> list[str]:
    family = growth.family
    grown = [axis for axis in family.axis_names if growth.grows(axis)]
    if not grown:
        return []
    if options["scale"] != "preserve":
        return [f"tile with scale {options['scale']} lets sums over copies of {', '.join(grown)} grow"]
    reasons = []
    src, dst = growth.sizes(family.residual)
    if dst % src:
        seen = "LayerNorm sees another mean and variance" if family.centred else "RMSNorm sees another mean square"
        reasons.append(f"hidden {src} -> {dst} is no whole factor: {seen}")
    if growth.grows("rotary"):
        reasons.append("the rotary part of heads grows: its coordinates turn at other frequencies")
    if growth.grows(family.vocab):
        reasons.append("copies of tokens share their probability")
    if growth.grows(family.query) and growth.dst_config.get("qk_layernorm"):
        reasons.append("LayerNorm inside heads sees another mean and variance")
    return reasons


METHOD = Method(
    name="tile",
    summary="tiling (Phi): wrapped copies of the source on every axis",
    depth="interpose",
    axis_maps=_axis_maps,
    approximations=_approximations,
    options={
        "anchor": Option(("edge", "center"), "where the unbroken copy lies on every axis"),
        "scale": Option(("none", "preserve", "rms"), "gain with which c copies are read: 1, 1/c or 1/sqrt(c)"),
    },
    takes_noise=True,
)
