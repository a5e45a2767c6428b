"""Helpers for exact methods: coordinates that are not read, a stream with unchanged statistics, and refusals."""

from __future__ import annotations

from typing import Literal

import numpy as np

from phigrow.growth.axes import FRESH, MEAN, AxisMap, axis_map, block, concatenate
from phigrow.growth.method import GrowthTask

UNREACHABLE = -100.0
"""Logit of a new token. While the source's log-sum-exp stays above -50, 100,000 such tokens change its
log-probabilities by less than 2e-17; lower values would preserve no more and take training longer to undo."""

Fill = Literal["random", "zero"]


def extended(task: GrowthTask, axis: str, fresh_write: Fill, fresh_read: Fill, write: float = 1.0) -> AxisMap:
    """Return the map of the old coordinates, with one gain, then new ones (in a head, after the rotary part)."""
    parts = task.parts(axis)
    source = concatenate([(src, block(src, dst)) for src, dst in parts])
    assert (source[: task.src[axis]] != FRESH).all(), "new coordinates come last"
    return axis_map(task.src[axis], source, write=write, read=1 / write, fresh_write=fresh_write, fresh_read=fresh_read)


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
    maps[family.vocab] = axis_map(
        task.src[family.vocab],
        block(*task.sizes(family.vocab)),
        fresh_write="zero",
        fresh_read="zero" if task.tied else "random",
        fresh_bias=UNREACHABLE,
    )
    return maps


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
        GrowthError: a growing rotary part, a vocabulary that grows without a bias, or heads with ``qk_layernorm``.
    """
    family, config = task.family, task.dst_config
    if task.grows("rotary"):
        src, dst = task.sizes("rotary")
        whole = src == task.src[family.query] and "partial_rotary_factor" not in config
        raise task.refuse(
            f"{method} cannot grow the rotary part of a head, {src} -> {dst} coordinates",
            "rotary",
            "other rotary sizes turn at other frequencies, so no weights give the same attention",
            (
                f"keep heads of {src} coordinates in the destination configuration and choose more of them"
                if whole
                else f"set partial_rotary_factor to {src} / head_dim = {src / task.dst[family.query]:g} in the "
                "destination configuration"
            )
            + ", or use --method tile or wr",
        )
    if task.grows(family.vocab) and not family.has_vocab_bias:
        src, dst = task.sizes(family.vocab)
        raise task.refuse(
            f"{method} cannot grow the vocabulary of a {family.model_type} model, {src} -> {dst} tokens",
            family.vocab,
            "its head has no bias, so a new token gets a logit that takes probability from the old ones",
            f"keep vocab_size at {src}, or use --method tile or wr",
        )
    if task.grows(family.query) and config.get("qk_layernorm"):
        raise task.refuse(
            f"{method} cannot grow heads with qk_layernorm",
            family.query,
            "LayerNorm inside a head sees another mean and variance when the head grows",
            "keep hidden_size / num_attention_heads, or use --method tile or wr",
        )
