"""Everything in a configuration that decides the function of given weights, as values that can be compared.

Two configurations may spell one function in two ways, and two functions in one. So nothing here is compared by its
spelling: rotary embeddings are compared by their frequencies, activations by their function, and a missing key or null
stands for transformers' default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phigrow.errors import GrowthError
from phigrow.models.config import Config, context_of, normalised
from phigrow.models.family import Family
from phigrow.models.forward import ACTIVATIONS
from phigrow.models.rotary import SETTINGS, Rotary, comparable, compare, rotary_of

CACHE_KEYS = ("sliding_window", "attention_chunk_size")
"""Keys by which transformers shortens the cache of a model without ``layer_types``, whatever its family. Generated
text then differs from a pass over the whole sequence."""


@dataclass(frozen=True)
class ModelFunction:
    """The function of a model, apart from its weights.

    Attributes:
        settings: key -> value, with transformers' default where the configuration has none.
        rotary: the rotary embedding.
        context: ``max_position_embeddings``.
    """

    settings: dict[str, Any]
    rotary: Rotary
    context: int


def function_of(family: Family, config: Config) -> ModelFunction:
    """Return the function of a configuration.

    Raises:
        GrowthError: the configuration has an impossible value.
    """
    sizes, read = family.sizes_of(config), normalised(config)
    settings = {key: default if read.get(key) is None else read[key] for key, default in family.function_keys.items()}
    if not isinstance(settings.get("hidden_act", ""), str):
        raise GrowthError(
            f"hidden_act is {settings['hidden_act']!r}",
            where=f"the configuration of a {family.model_type}",
            why="it is the name of an activation",
            fix="write the name of one, such as gelu_new",
        )
    if not family.has_layer_types and read.get("layer_types") is None:
        settings |= {key: read.get(key) for key in CACHE_KEYS}
    context = context_of(config)
    rotary = rotary_of(read, size=sizes["rotary"], head=sizes[family.query], context=context)
    return ModelFunction(settings, rotary, context)


def function_differences(old: ModelFunction, new: ModelFunction) -> list[str]:
    """Return every difference of two functions at lengths up to the larger context, as ``key: old -> new``."""
    keys = dict.fromkeys((*old.settings, *new.settings))
    values = ((key, old.settings.get(key), new.settings.get(key)) for key in keys)
    changes = [f"{key}: {before} -> {after}" for key, before, after in values if not _same(key, before, after)]
    return [*changes, *_rotary_differences(old.rotary, new.rotary, max(old.context, new.context))]


def _same(key: str, before: Any, after: Any) -> bool:
    """Compare two values; two names of an activation may name one function."""
    if key == "hidden_act" and before in ACTIVATIONS and after in ACTIVATIONS:
        return ACTIVATIONS[before] is ACTIVATIONS[after]
    return bool(before == after)


def _rotary_differences(old: Rotary, new: Rotary, context: int) -> list[str]:
    """Return the rotary keys that differ, and by how much the values that come out differ, or nothing."""
    before, after = _rotary_keys(old), _rotary_keys(new)
    both = ((key, before.get(key), after.get(key)) for key in dict.fromkeys((*before, *after)))
    changes = [f"{key}: {one} -> {two}" for key, one, two in both if one != two]
    if not comparable(old, new):  # methods themselves tell that the rotary part grows
        return changes
    difference = compare(old, new, context)
    if difference is None:
        return []
    if list(before) == list(after) == ["rope_theta", "rope_type"]:
        return changes
    amounts = [("inverse frequencies", difference.inverse), ("attention scaling", difference.scaling)]
    text = " and ".join(f"{name} by {100 * amount:.3g} %" for name, amount in amounts if amount)
    if old.size != new.size:
        changes = [f"the rotary part of a head: {old.size} -> {new.size} coordinates", *changes]
    by_length = old.last_lengths() or new.last_lengths()
    at = f"at {difference.length} tokens, " if by_length else ""
    return [f"{', '.join(changes)} ({at}this changes {text})"]


def _rotary_keys(rotary: Rotary) -> dict[str, Any]:
    """Return the keys that decide a rotary embedding, with the values that transformers takes."""
    keys: dict[str, Any] = {"rope_theta": rotary.theta, "rope_type": rotary.kind}
    keys |= {key: rotary.settings[key] for key in SETTINGS[rotary.kind] if rotary.settings.get(key) is not None}
    if rotary.kind in ("yarn", "longrope", "llama3"):
        keys["original_max_position_embeddings"] = rotary.original
    by_context = rotary.kind in ("yarn", "longrope") and rotary.settings.get("factor") is None
    if rotary.kind == "dynamic" or by_context:
        keys["max_position_embeddings"] = rotary.context
    return keys
