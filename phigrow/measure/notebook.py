"""Comparisons that notebooks show as tables."""

from __future__ import annotations

from phigrow.measure.estimates import Comparison
from phigrow.measure.page import tables


class ShownComparison(Comparison):
    """A `Comparison` with the display hook of notebooks."""

    def _repr_html_(self) -> str:
        return tables(self)
