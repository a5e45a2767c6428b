"""Tensors as the family table and a plan's axis maps describe them, for formulas that do not rest on recipes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from phigrow.growth.axes import AxisMap
from phigrow.growth.norm_fusion import NormFusion
from phigrow.growth.plan import Plan
from phigrow.growth.recipe import TensorRecipe
from phigrow.models.family import Parameter


@dataclass(frozen=True, eq=False)
class TableLine:
    """One destination tensor.

    Attributes:
        recipe: its recipe, for names, layers and shapes.
        parameter: its line in the family table.
        maps: the axis map of each stored axis, in storage order.
        norm_read: for a normalisation, the map of the axis that it reads.
    """

    recipe: TensorRecipe
    parameter: Parameter
    maps: tuple[AxisMap, ...]
    norm_read: AxisMap | None

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def source(self) -> str:
        return self.recipe.source

    @property
    def layer(self) -> int | None:
        return self.recipe.layer

    @property
    def source_shape(self) -> tuple[int, ...]:
        return self.recipe.source_shape

    @property
    def fusion(self) -> NormFusion | None:
        return self.recipe.norm_fusion

    @property
    def is_zero(self) -> bool:
        return self.recipe.is_zero

    @property
    def written(self) -> int:
        """Index in ``maps`` of the axis that it writes."""
        return self.parameter.axes.index(self.parameter.written)


def table_lines(plan: Plan) -> Iterator[TableLine]:
    """Every destination tensor, in the order of the family table."""
    parameters = {parameter.name: parameter for parameter in plan.table.parameters}
    for recipe in plan.recipes():
        parameter = parameters[recipe.line]
        is_norm = parameter.kind in ("scale", "shift")
        read = plan.composites[parameter.read] if is_norm and parameter.read else None
        yield TableLine(recipe, parameter, tuple(plan.composites[axis] for axis in parameter.axes), read)
