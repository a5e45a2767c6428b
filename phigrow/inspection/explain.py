"""Rows of the tables that explain a plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from phigrow.growth.axes import AxisMap
from phigrow.growth.axis_groups import axis_label, stored_label
from phigrow.growth.plan import Plan
from phigrow.models.family import spelled


def axis_rows(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    """(axis with its group, sizes, coordinates, write gain, read gain) of every named axis."""
    rows = [(axis_label(plan.table, name), plan.axes[name]) for name in plan.table.axis_names]
    if plan.learned is not None:
        used = {axis: made for axis, made in plan.composites.items() if made.dense is not None}
        alone = {part for axis in plan.composites if axis not in used for part in axis}
        rows = [(axis_label(plan.table, name), plan.axes[name]) for name in plan.table.axis_names if name in alone]
        rows += [(stored_label(spelled(axis)), made) for axis, made in used.items()]
    return [
        (name, f"{axis.src_size} → {axis.dst_size}", _filling(axis), _gains(axis.write, axis), _gains(axis.read, axis))
        for name, axis in rows
    ]


def _filling(axis: AxisMap) -> str:
    if axis.is_identity:
        return "unchanged"
    if axis.dense is not None:
        stored = axis.dense.to_json()
        details = [str(stored.pop("kind")), *(f"{key} {value}" for key, value in stored.items())]
        return f"mixtures of all {axis.src_size} ({', '.join(details)})"
    kept = int((axis.counts > 0).sum())
    copied = int(axis.is_copy.sum())
    parts = [f"{kept} kept"]
    if copied > kept:
        parts.append(f"{copied - kept} further copies")
    if means := int(axis.is_mean.sum()):
        parts.append(f"{means} written as the mean")
    fresh = axis.is_fresh
    if fresh.any():
        legs = " and ".join(
            f"{verb} {'random' if flags[fresh].all() else 'zero'}"
            for verb, flags in (("written", axis.write_random), ("read", axis.read_random))
        )
        parts.append(f"{int(fresh.sum())} new ({legs})")
    return ", ".join(parts)


def _gains(gains: np.ndarray, axis: AxisMap) -> str:
    used = gains[axis.is_copy | (axis.dense is not None)]
    low, high = used.min(), used.max()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def layer_rows(plan: Plan) -> list[tuple[int, int | str, str]]:
    """(destination layer, source layer, kind) of every destination layer; the source of a new layer is ``-``."""
    if plan.learned is not None and plan.maps is not None and plan.maps.sha256 and plan.learned.lines():
        return [
            (layer, source, "learned sum of all, started from this one") for layer, source in enumerate(plan.layers)
        ]
    seen: set[int] = set()
    rows: list[tuple[int, int | str, str]] = []
    for layer, source in enumerate(plan.layers):
        if source < 0:
            rows.append((layer, "-", "new random values"))
            continue
        kind = "identity layer" if layer in plan.identity_layers else "repeated" if source in seen else "kept"
        seen.add(source)
        rows.append((layer, source, kind))
    return rows


def cost_rows(plan: Plan, seq_len: int | None = None) -> list[tuple[str, str, str, str]]:
    """(quantity, source, destination, factor): parameters, and FLOPs per token at ``seq_len`` tokens of context."""
    old, new = plan.cost(seq_len)
    quantities: list[tuple[str, float, float]] = [
        ("parameters", old.parameters, new.parameters),
        ("parameters without embeddings", old.non_embedding_parameters, new.non_embedding_parameters),
        ("FLOPs per token, forward", old.forward_flops, new.forward_flops),
        ("FLOPs per token, training", old.training_flops, new.training_flops),
    ]
    return [(what, _engineering(a), _engineering(b), f"{b / a:.2f}x") for what, a, b in quantities]


def claim(plan: Plan) -> str:
    """Return the claim in one line: exact, or approximate with the reasons."""
    if plan.exact:
        return "exact: computes the source's function (evaluation mode, to rounding)"
    return "approximate: " + "; ".join(plan.approximations)


def summary(plan: Plan, seq_len: int | None = None) -> dict[str, Any]:
    """The plan as JSON, with its hash and costs."""
    old, new = plan.cost(seq_len)
    return {"hash": plan.hash, **plan.to_json(), "cost": {"source": vars(old), "destination": vars(new)}}


def _engineering(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.3f}{unit}"
    return f"{value:.0f}"
