"""Groups of axes: names by which a user chooses a width method for a part of a model.

Options take the name of a group. Tables, pictures and messages begin with it, and name the axis behind it.
"""

from __future__ import annotations

from phigrow.models.families import all_families, built_in_families
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
    """A group and its axis, where the two names differ: ``heads: kv``, ``mlp``."""
    group = group_of(family, axis)
    return axis if axis == group else f"{group}: {axis}"


def groups_of_axis(axis: str) -> list[str]:
    """The groups that have an axis of this name, in any family; empty for a name that is no axis."""
    for families in (built_in_families, all_families):
        groups = [group_of(family, axis) for family in families().values() if axis in family.axis_names]
        if groups:
            return list(dict.fromkeys(groups))
    return []


def stored_label(spelled: str) -> str:
    """A stored axis, which may have several parts, after the groups of its parts.

    >>> stored_label("normed"), stored_label("(kv group q)"), stored_label("mlp")
    ('hidden: normed', 'heads x head: (kv group q)', 'mlp')
    """
    parts = spelled.strip("()").split()
    groups = " x ".join(dict.fromkeys(next(iter(groups_of_axis(part)), part) for part in parts))
    return spelled if groups in (spelled, spelled.strip("()")) else f"{groups}: {spelled}"
