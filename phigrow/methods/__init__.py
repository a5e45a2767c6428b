"""Names for a method of your own: `Method`, axis maps, and functions that build them.

Later releases keep these names. A method file imports from here and from numpy, and from nothing else in phigrow.
``docs/own-method.md`` explains how to write one; `phigrow.testing.check_method` tests it.
"""

from phigrow.errors import GrowthError
from phigrow.growth.axes import (
    FRESH,
    MEAN,
    AxisMap,
    axis_map,
    block,
    concatenate,
    copies_of_each,
    identity,
    wrap,
)
from phigrow.growth.copy_maps import average_maps, copy_maps, copy_reasons, drawn_evenly, generator
from phigrow.growth.exact_maps import extended, kept_stream, refuse_inexact, statistics_kept, unread
from phigrow.growth.method import NEW, GrowthTask, Method, Option

__all__ = [
    "FRESH",
    "MEAN",
    "NEW",
    "AxisMap",
    "GrowthError",
    "GrowthTask",
    "Method",
    "Option",
    "average_maps",
    "axis_map",
    "block",
    "concatenate",
    "copies_of_each",
    "copy_maps",
    "copy_reasons",
    "drawn_evenly",
    "extended",
    "generator",
    "identity",
    "kept_stream",
    "refuse_inexact",
    "statistics_kept",
    "unread",
    "wrap",
]
