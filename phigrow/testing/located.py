"""Find the parameter at which a grown model parts from its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from phigrow.growth.axes import AxisMap
from phigrow.growth.plan import Plan
from phigrow.models.family import Parameter, spelled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Located:
    """A parameter of the grown model, and how far it or its output is from what the plan gives it.

    Attributes:
        name: the tensor's name.
        axis: the axis that differs.
        coordinate: first coordinate with the largest difference.
        difference: largest difference.
    """

    name: str
    axis: str
    coordinate: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.name}: its output differs by {self.difference:.3g} at coordinate {self.coordinate} of {self.axis}"
        )


def first_difference(plan: Plan, old: Any, new: Any, ids: torch.Tensor, tolerance: float) -> Located | None:
    """Run both models, and find the first parameter whose output is not the source's, spread by the plan's write leg.

    Modules of layers that a plan repeats, reorders or makes new are left out, and so are normalisations that are fused
    into their readers.

    Args:
        plan: the plan.
        old, new: models of source and destination.
        ids: tokens to run on.
        tolerance: largest difference that is rounding.
    """
    before, after = _outputs(plan, old, ids), _outputs(plan, new, ids)
    for (name, layer), output in after.items():
        parameter = _parameter(plan, name)
        source_layer = plan.layers[layer] if layer >= 0 else -1
        if layer >= 0 and (layer in plan.identity_layers or source_layer < 0):
            continue
        source = before.get((name, source_layer))
        axis = _written(plan, parameter)
        if source is None or axis is None or output.shape[-1] != axis.dst_size:
            continue
        known = ~axis.write_random
        if parameter.written == (plan.table.vocab,):
            known = axis.is_copy
        expected = source @ axis.dense_legs()[0].T
        difference = np.where(known, np.abs(output - expected), 0.0).reshape(-1, axis.dst_size).max(axis=0)
        difference = np.nan_to_num(difference, nan=np.inf)
        if difference.max(initial=0.0) > tolerance:
            worst = int(difference.argmax())
            tensor = parameter.name.format(layer=layer)
            return Located(tensor, spelled(parameter.written), worst, float(difference[worst]))
    return None


def _written(plan: Plan, parameter: Parameter) -> AxisMap | None:
    """Return the map of a parameter's output; None where the output of its module is not one of an axis."""
    axis = plan.composites[parameter.written]
    if parameter.kind == "scale":
        if parameter.read is not None and plan.composites[parameter.read].dense is not None:
            return None
        return axis.behind_norm() if axis.head_norm is not None else axis
    return axis


def _parameter(plan: Plan, name: str) -> Parameter:
    return next(p for p in plan.table.parameters if p.name == name)


def _outputs(plan: Plan, model: Any, ids: torch.Tensor) -> dict[tuple[str, int], np.ndarray]:
    """Return (line of the family table, layer) -> output of its module, in the order of the forward pass."""
    import torch

    family, modules = plan.table, dict(model.named_modules())
    found: dict[tuple[str, int], np.ndarray] = {}
    handles = []

    def keep(key: tuple[str, int]) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[key] = output.detach().double().numpy()

        return hook

    for parameter in family.parameters:
        if parameter.kind not in ("matrix", "scale"):
            continue
        for layer in range(model.config.num_hidden_layers) if parameter.in_layer else (-1,):
            stored = parameter.name.format(layer=layer)
            owner = family.live_names.get(stored, stored).rpartition(".")[0]
            if owner in modules:
                handles.append(modules[owner].register_forward_hook(keep((parameter.name, layer))))
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
