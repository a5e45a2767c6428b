"""Check the values of a configuration that decide sizes against the limits of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from phigrow.errors import GrowthError
from phigrow.models.config import Config, is_number

# Limits of each size, tens to hundreds of times those of any language model. A larger size is a mistake or an attack,
# and is refused before memory is allocated for it.
MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 20,
    "num_key_value_heads": 1 << 20,
    "head_dim": 1 << 20,
    "max_position_embeddings": 1 << 40,
}
OPTIONAL = {"num_key_value_heads", "head_dim", "max_position_embeddings"}
MOST_PARAMETERS = 10**14

RANGES = {
    "partial_rotary_factor": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "layer_norm_eps": (0.0, 1.0),
    "rms_norm_eps": (0.0, 1.0),
    "resid_pdrop": (0.0, 1.0),
    "embd_pdrop": (0.0, 1.0),
    "hidden_dropout": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
}
"""Smallest and largest value of every other number that growth reads."""


def check_values(config: Config, where: str, *, sizes: Iterable[str], flags: Iterable[str]) -> None:
    """Check every value that decides shapes or arithmetic.

    Args:
        config: normalised.
        where: for messages, such as ``a Phi configuration``.
        sizes: the keys of `MOST` that the family reads.
        flags: keys that must be true or false if the configuration has them.

    Raises:
        GrowthError: a value has the wrong type or is out of range; the message names the key.
    """
    for key in sizes:
        value = config.get(key)
        if key in OPTIONAL and (key not in config or (value is None and key != "max_position_embeddings")):
            continue
        if type(value) is not int or value < 1:
            raise GrowthError(
                f"{key} is {value!r}, but must be a positive whole number", where=where, fix=f"set {key} to a size"
            )
        if value > MOST[key]:
            raise GrowthError(
                f"{key} is {value}, but phigrow accepts at most {MOST[key]}", where=where, fix=f"set a smaller {key}"
            )
    for key, (least, most) in RANGES.items():
        if key in config and not (is_number(config[key]) and least <= config[key] <= most):
            raise GrowthError(
                f"{key} is {config[key]!r}, but must be a number from {least:g} to {most:g}",
                where=where,
                fix=f"correct {key}, or leave it out",
            )
    for key in flags:
        if key in config and not isinstance(config[key], bool):
            raise GrowthError(
                f"{key} is {config[key]!r}, but must be true or false",
                where=where,
                fix=f"correct {key}, or leave it out",
            )


def check_division(config: Config, where: str, model: str) -> tuple[int, int]:
    """Return the number of heads and of key/value heads.

    Raises:
        GrowthError: hidden_size is not a multiple of the number of heads, or that of the key/value heads.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    for size, parts, what in ((hidden, heads, "hidden_size"), (heads, kv, "num_attention_heads")):
        if size % parts:
            by = "num_attention_heads" if what == "hidden_size" else "num_key_value_heads"
            raise GrowthError(
                f"{what} is {size}, which is not a multiple of {by} {parts}",
                where=where,
                why=f"{model} gives every head hidden_size / num_attention_heads coordinates"
                if what == "hidden_size"
                else "every key/value head serves the same number of query heads",
                fix=f"choose a {what} that is a multiple of {parts}",
            )
    return heads, kv


def check_total(sizes: Mapping[str, int], where: str, matrices: int) -> None:
    """Refuse a model of too many parameters, although each size is in range.

    Args:
        sizes: of every axis.
        matrices: number of mlp matrices of a layer.

    Raises:
        GrowthError: more parameters than `MOST_PARAMETERS`.
    """
    attention = sizes["kv"] * sizes.get("group", 1) * sizes["q"]
    layer = sizes["hidden"] * (4 * attention + matrices * sizes["mlp"])
    if (parameters := sizes["layer"] * layer + 2 * sizes["vocab"] * sizes["hidden"]) > MOST_PARAMETERS:
        raise GrowthError(
            f"the configuration has {parameters:.3g} parameters",
            where=where,
            why=f"phigrow accepts at most {MOST_PARAMETERS:.0e} parameters",
            fix="check hidden_size, intermediate_size, num_hidden_layers and vocab_size",
        )


def rotary_factor(rotary: int, head: int) -> float:
    """Return the rotary fraction of a head, such that ``int(head * fraction)`` is exactly ``rotary``."""
    factor = rotary / head
    return factor if int(head * factor) == rotary else (rotary + 0.5) / head
