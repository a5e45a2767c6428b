"""Helpers for exact methods: coordinates that are not read, a stream with unchanged statistics, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from phigrow.growth.axes import FRESH, MEAN, AxisMap, HeadNorm, Ints, axis_map, block, concatenate
from phigrow.growth.method import GrowthTask
from phigrow.models.config import normalised, rotary_keys

UNREACHABLE = -100.0
"""Logit of a new token. While the source's log-sum-exp stays above -50, 100,000 such tokens change its
log-probabilities by less than 2e-17; lower values would preserve no more and take training longer to undo."""

Fill = Literal["random", "zero"]


def extended(task: GrowthTask, axis: str, fresh_write: Fill, fresh_read: Fill, write: float = 1.0) -> AxisMap:
    """Return the map of the old coordinates, with one gain, and of new ones after them.

    In a head, new coordinates that do not turn lie at its end, and new pairs that turn lie between the old ones.
    """
    source = _sources(task, axis)
    return axis_map(task.src[axis], source, write=write, read=1 / write, fresh_write=fresh_write, fresh_read=fresh_read)


def _sources(task: GrowthTask, axis: str) -> Ints:
    *turning, (src, dst) = task.parts(axis)
    return concatenate([*((size, _spread(size, grown)) for size, grown in turning), (src, block(src, dst))])


def _spread(src: int, dst: int) -> Ints:
    """Sources of pairs that turn: pair i becomes pair m i where their number grows by a whole factor m.

    Pair i of n turns by theta^(-i/n) a position, as pair m i of m n does.
    """
    source = np.full(dst, FRESH, dtype=np.int64)
    if src:
        source[:: dst // src] = np.arange(src)
    return source


def unread(task: GrowthTask) -> dict[str, AxisMap]:
    """Return maps in which new heads, head coordinates and mlp units are written at random and read with zeros.

    Queries are scaled, so that attention has the same temperature in larger heads.
    """
    family = task.family
    src, dst = task.sizes(family.query)
    maps = {axis: extended(task, axis, "random", "zero") for axis in family.axis_names}
    # Attention divides by sqrt(head dimension); this gain undoes the larger divisor.
    maps[family.query] = extended(task, family.query, "random", "zero", write=float(np.sqrt(dst / src)))
    maps[family.key] = extended(task, family.key, "zero", "zero")
    if task.dst_config.get("qk_layernorm") and task.grows(family.query):
        maps |= {axis: _normed_head(task, axis) for axis in (family.query, family.key)}
    maps[family.vocab] = axis_map(
        task.src[family.vocab],
        block(*task.sizes(family.vocab)),
        fresh_write="zero",
        fresh_read="zero" if task.tied else "random",
        fresh_bias=UNREACHABLE,
    )
    return maps


def _normed_head(task: GrowthTask, axis: str) -> AxisMap:
    """Return the map of queries or keys that a LayerNorm inside each head normalises.

    With k = sqrt(h'/h), old coordinates are written with k and new ones hold k times their mean, so that mean and
    variance behave as in `kept_stream`. Behind the norm, queries keep k for the larger divisor, and keys do not. New
    coordinates normalise to 0: the bias alone fills them, 0 in keys and random in queries, so that keys learn.
    """
    src, dst = task.sizes(axis)
    gain, is_query = float(np.sqrt(dst / src)), axis == task.family.query
    source = _sources(task, axis)
    made = axis_map(src, np.where(source == FRESH, MEAN, source), write=gain, read=1 / gain, fresh_read="zero")
    return replace(made, structure=HeadNorm(gain if is_query else 1.0, random=is_query))


def kept_stream(task: GrowthTask, new: int) -> dict[str, AxisMap]:
    """Return the maps of the residual stream, written with c = sqrt(D'/D), and of its normalised forms.

    Args:
        task: the sizes.
        new: content of new coordinates of the stream, ``MEAN`` or ``FRESH`` (zero).
    """
    family = task.family
    src, dst = task.sizes(family.residual)
    gain = float(np.sqrt(dst / src))
    source = np.where(np.arange(dst) < src, np.arange(dst), new)
    return {
        family.residual: axis_map(src, source, write=gain, read=1 / gain, fresh_write="zero"),
        family.normed: extended(task, family.normed, "zero", "random"),
        family.final: extended(task, family.final, "zero", "random", write=1 / gain if task.tied else 1.0),
    }


def statistics_kept(task: GrowthTask) -> int:
    """Return the content of new coordinates that keeps the statistics of the stream: its mean, or zero (RMSNorm)."""
    return MEAN if task.family.centred else FRESH


def refuse_inexact(task: GrowthTask, method: str) -> None:
    """Refuse growth that no weights can make exact.

    Raises:
        GrowthError: a rotary part that grows so that its frequencies change, or a vocabulary that grows without a bias.
    """
    family = task.family
    if task.grows("rotary"):
        _refuse_other_frequencies(task, method)
    if task.grows(family.vocab) and not family.has_vocab_bias:
        src, dst = task.sizes(family.vocab)
        raise task.refuse(
            f"{method} cannot grow the vocabulary of a {family.model_type} model, {src} -> {dst} tokens",
            family.vocab,
            "its head has no bias, so a new token gets a logit that takes probability from the old ones",
            f"keep vocab_size at {src}, or use --method tile or wr",
        )


def _refuse_other_frequencies(task: GrowthTask, method: str) -> None:
    """Refuse a rotary part whose pairs do not lie among those of the larger one.

    Where they do, `phigrow.models.rotary.compare` decides whether they turn at the same frequencies.
    """
    config, part, (src, dst) = task.dst_config, rotary_keys(task.family.model_type)[1], task.sizes("rotary")
    if src == 0 or dst % src == 0:
        return
    if src == task.src[task.family.query] and "partial_rotary_factor" not in normalised(config):
        keep = f"keep heads of {src} coordinates in the destination configuration and choose more of them"
    else:
        keep = (
            f"set {part} to {src} / head_dim = {src / task.dst[task.family.query]:g} in the destination configuration"
        )
    raise task.refuse(
        f"{method} cannot grow the rotary part of a head, {src} -> {dst} coordinates",
        "rotary",
        "it turns at all frequencies of the smaller one only if it grows by a whole factor",
        f"{keep}, or choose a rotary part of {src * -(-dst // src)} coordinates, or use --method tile or wr",
    )
