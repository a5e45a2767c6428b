"""lossless: any sizes, exactly, into the stock destination configuration, LayerNorm epsilon untouched.

With c = sqrt(D'/D) for hidden D -> D':

1. Writers of the residual stream: old rows c W, new rows c mean_rows(W). The stream's mean becomes c mu and its
   variance (D/D') c^2 var = var. Under RMSNorm new rows are 0: the mean square is (D/D') c^2 times what it was.
2. Normalisations: old weights gamma / c, old biases as they are; new weights 1, new biases 0. The new coordinates equal
   the mean (are 0 under RMSNorm), so they normalise to exactly 0 whatever their weight. Where embeddings are tied, the
   head reads with gain c what the embedding wrote: the last normalisation gets gamma / c^2 and beta / c.
3. Readers: old columns as they are, new columns random: they multiply 0, and make the new width trainable.
4. Head dimension h -> h' at fixed rotary part: new coordinates at the end of each head; queries times sqrt(h'/h);
   new key rows and biases 0; new query and value rows random; new columns of the output projection 0.
5. New heads and new mlp units: rows random, the columns that read them 0.
6. Inserted layers are identity layers (depth method ``identity``).
7. New tokens: embeddings random (0 where tied), lm_head rows 0 and bias `UNREACHABLE`; refused without that bias.

Key/value heads and query heads a group may both grow, at any ratio: new heads are not read, wherever they lie.

Function-preserving in evaluation mode, to rounding. The mean fill is LEMON's (2310.07999); LEMON changes epsilon and
does not grow heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from phigrow.axes import FRESH, MEAN, AxisMap, axis_map, block, concatenate
from phigrow.method import Growth, Method

UNREACHABLE = -100.0
"""Logit of a new token. While the source's log-sum-exp stays above -50, 100,000 such tokens change its
log-probabilities by less than 2e-17; lower values would preserve no more and take training longer to undo."""


def _axis_maps(growth: Growth, options: dict[str, Any]) -> dict[str, AxisMap]:
    family, config = growth.family, growth.dst_config
    if growth.grows("rotary"):
        src, dst = growth.sizes("rotary")
        whole = src == growth.src[family.query]
        raise growth.refuse(
            f"lossless cannot grow the rotary part of a head, {src} -> {dst} coordinates",
            "rotary",
            "other rotary sizes turn at other frequencies, so no weights give the same attention",
            (
                f"keep heads of {src} coordinates in the destination configuration and choose more of them"
                if whole and "partial_rotary_factor" not in config
                else f"set partial_rotary_factor to {src} / head_dim = {src / growth.dst[family.query]:g} in the "
                "destination configuration"
            )
            + ", or use --method tile or wr",
        )
    if growth.grows(family.vocab) and not family.has_vocab_bias:
        src, dst = growth.sizes(family.vocab)
        raise growth.refuse(
            f"lossless cannot grow the vocabulary of a {family.model_type} model, {src} -> {dst} tokens",
            family.vocab,
            "its head has no bias, so a new token gets a logit that takes probability from the old ones",
            f"keep vocab_size at {src}, or use --method tile or wr",
        )
    if growth.grows(family.query) and config.get("qk_layernorm"):
        raise growth.refuse(
            "lossless cannot grow heads with qk_layernorm",
            family.query,
            "LayerNorm inside a head sees another mean and variance when the head grows",
            "keep hidden_size / num_attention_heads, or use --method tile or wr",
        )

    maps = {axis: _end_block(growth, axis, "random", "zero") for axis in family.axis_names}
    src, dst = growth.sizes(family.residual)
    gain = float(np.sqrt(dst / src))
    new = MEAN if family.centred else FRESH
    source = np.where(np.arange(dst) < src, np.arange(dst), new)
    maps[family.residual] = axis_map(src, source, write=gain, read=1 / gain, fresh_write="zero")
    maps[family.normed] = _end_block(growth, family.normed, "zero", "random")
    tied = gain if config.get("tie_word_embeddings") else 1.0
    maps[family.final] = _end_block(growth, family.final, "zero", "random", write=1 / tied)
    maps[family.query] = _end_block(growth, family.query, "random", "zero", write=_temperature(growth))
    maps[family.key] = _end_block(growth, family.key, "zero", "zero")
    vocab = block(*growth.sizes(family.vocab))
    maps[family.vocab] = axis_map(
        growth.src[family.vocab],
        vocab,
        fresh_write="zero",
        fresh_read="zero" if config.get("tie_word_embeddings") else "random",
        fresh_bias=UNREACHABLE,
    )
    return maps


def _temperature(growth: Growth) -> float:
    """Attention divides by sqrt(head dimension): what a query needs to undo a larger one."""
    src, dst = growth.sizes(growth.family.query)
    return float(np.sqrt(dst / src))


def _end_block(growth: Growth, axis: str, fresh_write: Any, fresh_read: Any, write: float = 1.0) -> AxisMap:
    parts = growth.head_parts(axis) if axis in (growth.family.query, growth.family.key) else [growth.sizes(axis)]
    source = concatenate([(src, block(src, dst)) for src, dst in parts])
    assert (source[: growth.src[axis]] != FRESH).all(), "new coordinates come last"
    return axis_map(
        growth.src[axis], source, write=write, read=1 / write, fresh_write=fresh_write, fresh_read=fresh_read
    )


def _approximations(growth: Growth, options: dict[str, Any]) -> list[str]:
    return []


METHOD = Method(
    name="lossless",
    summary="function-preserving at any sizes: mean-filled stream, unread new units",
    depth="identity",
    axis_maps=_axis_maps,
    approximations=_approximations,
    always_exact=True,
)
