"""Read the sizes of all axes from a configuration, with the checks that every family shares."""

from __future__ import annotations

from dataclasses import dataclass

from phigrow.errors import GrowthError
from phigrow.models.bounds import check_division, check_total, check_values
from phigrow.models.config import Config, context_of, normalised
from phigrow.models.family import Sizes
from phigrow.models.rotary import rotary_of

_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip

FULL_ATTENTION = ("full_attention", "attention")
"""Entries of ``layer_types`` that name ordinary attention; the second is an older spelling."""


@dataclass(frozen=True)
class SizeRules:
    """Rules by which the configurations of a family give the sizes of its axes.

    Attributes:
        where: the kind of configuration, for messages, such as ``a Phi configuration``.
        architecture: the transformers class, for messages.
        flags: keys that are true or false.
        mlp_matrices: matrices of one MLP: 2, or 3 for a gated MLP.
        grouped: query heads may share key/value heads (``num_key_value_heads``).
        kv_heads: transformers' default of ``num_key_value_heads``, where that is not ``num_attention_heads``.
        own_head_dim: ``head_dim`` may differ from hidden_size / num_attention_heads.
        rotary: default of ``partial_rotary_factor``; None if the rotary embedding always covers whole heads.
    """

    where: str
    architecture: str
    flags: tuple[str, ...]
    mlp_matrices: int
    grouped: bool = True
    kv_heads: int | None = None
    own_head_dim: bool = False
    rotary: float | None = None


def axis_sizes(config: Config, rules: SizeRules) -> Sizes:
    """Return the size of every axis.

    Raises:
        GrowthError: a value is missing, of the wrong type or out of range; or values do not fit together.
    """
    config = normalised(config)
    keys = (*_KEYS, *(["num_key_value_heads"] if rules.grouped else []), *(["head_dim"] if rules.own_head_dim else []))
    check_values(config, rules.where, sizes=keys, flags=rules.flags)
    if not rules.grouped:
        config = {**config, "num_key_value_heads": None}
    elif "num_key_value_heads" not in config:
        config = {**config, "num_key_value_heads": _default_kv_heads(config["num_attention_heads"], rules)}
    heads, kv = check_division(config, rules.where, rules.architecture)
    hidden = config["hidden_size"]
    head = (config.get("head_dim") if rules.own_head_dim else None) or hidden // heads
    if not rules.own_head_dim:
        _check_head_dim(config, head, rules.where)
    factor = None if rules.rotary is None else config.get("partial_rotary_factor", rules.rotary)
    sizes = {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "normed": hidden,
        "final": hidden,
        "kv": kv,
        **({"group": heads // kv} if rules.grouped else {}),
        "q": head,
        "k": head,
        "v": head,
        "rotary": head if factor is None else int(head * factor),
        "mlp": config["intermediate_size"],
        "layer": config["num_hidden_layers"],
    }
    check_total(sizes, rules.where, matrices=rules.mlp_matrices)
    _check_layer_types(config, rules.where)
    rotary_of(config, size=sizes["rotary"], head=head, context=context_of(config)).check(rules.where)
    return sizes


def _check_layer_types(config: Config, where: str) -> None:
    """Refuse layers of several kinds. transformers lets some of them attend to, or keep, fewer positions."""
    kinds = config.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or not all(kind in FULL_ATTENTION for kind in kinds):
        others = next((kind for kind in kinds if kind not in FULL_ATTENTION), kinds) if kinds else kinds
        raise GrowthError(
            f"layer_types holds {others!r}, which phigrow does not support",
            where=where,
            why="layers of other kinds than full_attention see fewer positions, and growth moves layers",
            fix="leave layer_types out, if every layer of the model attends to all positions",
        )


def _default_kv_heads(heads: int, rules: SizeRules) -> int | None:
    """Return transformers' default of ``num_key_value_heads``; a null, unlike a missing key, stands for all heads."""
    if rules.kv_heads is not None and heads % rules.kv_heads:
        raise GrowthError(
            "num_key_value_heads is missing",
            where=rules.where,
            why=f"transformers then takes {rules.kv_heads}, which does not divide num_attention_heads {heads}",
            fix=f"set num_key_value_heads, such as {heads} if query heads share none",
        )
    return rules.kv_heads


def _check_head_dim(config: Config, head: int, where: str) -> None:
    """Refuse a ``head_dim`` of another size. transformers would use it for the rotary embedding only."""
    value = config.get("head_dim")
    if value is None:
        return
    if type(value) is not int or value != head:
        raise GrowthError(
            f"head_dim is {value!r}, but hidden_size / num_attention_heads is {head}",
            where=where,
            fix="leave head_dim out",
        )
