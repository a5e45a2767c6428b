"""Groups of axes: names by which a user chooses a width method for a part of a model."""

from __future__ import annotations

from phigrow.models.family import Family

AXIS_GROUPS = {
    "hidden": "the residual stream, before and after its normalisations",
    "head": "coordinates of a query, key or value head",
    "heads": "number of key/value heads, and of query heads for each of them",
    "mlp": "units of the mlp",
    "vocab": "tokens",
}
"""Group -> its axes in words."""


def axis_groups(family: Family) -> dict[str, tuple[str, ...]]:
    """The axes of each group, by their names in the family table."""
    return {
        "hidden": (family.residual, family.normed, family.final),
        "head": (family.query, family.key, family.value),
        "heads": family.heads,
        "mlp": (family.mlp,),
        "vocab": (family.vocab,),
    }


def group_of(family: Family, axis: str) -> str:
    """The group of an axis; the rotary part belongs to the head."""
    return next((group for group, axes in axis_groups(family).items() if axis in axes), "head")


def axis_label(family: Family, axis: str) -> str:
    """An axis with its group in brackets, where the two names differ: ``kv (heads)``, ``mlp``."""
    group = group_of(family, axis)
    return axis if axis == group else f"{axis} ({group})"
