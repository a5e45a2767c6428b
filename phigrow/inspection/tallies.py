"""Counts of a plan's values by kind, line by line of the family table, and as percentages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from phigrow.growth.origins import WORDS, Kind, anatomy
from phigrow.growth.plan import Plan


def by_line(plan: Plan) -> dict[str, dict[Kind, int]]:
    """Line of the family table -> how many values of each kind its tensors hold, over all layers."""
    lines: dict[str, dict[Kind, int]] = {}
    # Layers differ only by being identity layers, new layers, sums of several, or none of these.
    known: dict[tuple[str, bool, bool, bool], dict[Kind, int]] = {}
    for recipe in plan.recipes():
        key = recipe.line, recipe.is_zero, recipe.is_new, bool(recipe.layer_sum)
        if key not in known:
            known[key] = anatomy(recipe).counts
        total = lines.setdefault(recipe.line, dict.fromkeys(Kind, 0))
        for kind, count in known[key].items():
            total[kind] += count
    return lines


def totals(lines: Mapping[str, Mapping[Kind, int]]) -> dict[Kind, int]:
    """Counts of each kind over all lines."""
    return {kind: sum(counts[kind] for counts in lines.values()) for kind in Kind}


def percent(counts: Mapping[Kind, int], kind: Kind) -> str:
    """Return the share of a kind, to a tenth of a percent; never rounded to 0 or to 100 percent.

    >>> percent({Kind.COPIED: 1, Kind.FRESH: 99999}, Kind.COPIED), percent({Kind.ZERO: 3}, Kind.ZERO)
    ('<0.1 %', '100 %')
    """
    count, size = counts[kind], sum(counts.values())
    if count in (0, size):
        return "100 %" if count else "-"
    share = 100 * count / size
    return "<0.1 %" if share < 0.05 else ">99.9 %" if share >= 99.95 else f"{share:.1f} %"


def shares(counts: Mapping[Kind, int]) -> Iterator[tuple[str, str]]:
    """(word, percent) of every kind that occurs, in the order of `Kind`."""
    return ((WORDS[kind], percent(counts, kind)) for kind in Kind if counts.get(kind))
