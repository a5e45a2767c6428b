"""Diagnostics of symmetry in a grown model: similarity of copies, rank of the residual, and share of new values.

Copies with equal gradients stay equal forever, and then the new width is never used. The plan in the checkpoint's
``phigrow.json`` has the source coordinate of every copy, and the family's table has the axes of each parameter.
Parameters are gathered one at a time, at any ZeRO stage.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phigrow.checkpoints.provenance import PROVENANCE_FILE, read_provenance
from phigrow.checkpoints.stored_model import StoredModel
from phigrow.errors import GrowthError
from phigrow.models.families import family_of, find_family
from phigrow.models.family import Family, Parameter, stacked_names
from phigrow.training.zero import full_value

if TYPE_CHECKING:
    from phigrow.training.configuration import RunConfig
    from phigrow.training.process import World

Ints = NDArray[np.int64]


class Diagnostics:
    """Diagnostics of one run; every rank calls `measure` at the same steps."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.world = world
        self.folder = Path(config.init)
        self.family: Family | None = None
        self.axes: dict[str, Ints] = {}
        if (made := read_provenance(self.folder)) is not None:
            self.family, self.axes = source_indices(made.plan, self.folder / PROVENANCE_FILE)

    def measure(self, engine: Any, blocks: Any, rows: Ints, micro_batch: int) -> dict[str, float]:
        """Return the columns of one ``diagnostics`` record, without those that cannot be computed.

        Args:
            engine: DeepSpeed's engine.
            blocks: the held-out split; ``batch(indices)`` gives int64 ``[n, seq_len + 1]``.
            rows: the held-out blocks that may be read, the same on every rank.
            micro_batch: blocks per forward pass.
        """
        columns: dict[str, float] = {}
        if len(rows):
            columns["effective_rank"] = effective_rank(self._residual(engine, blocks, rows, micro_batch))
        if self.family is not None:
            columns |= self._weights(engine, self.family)
        return columns

    def _residual(self, engine: Any, blocks: Any, rows: Ints, micro_batch: int) -> Tensor:
        """Return the residual before the last norm, [tokens, hidden], of 2 * hidden tokens or more, or of all rows."""
        seen: list[Tensor] = []
        family = family_of(engine.module.config.to_dict(), "the configuration of the model")
        handle = engine.module.get_submodule(last_norm(family)).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].detach().float().flatten(0, -2))
        )
        engine.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(rows), micro_batch):
                    engine(torch.from_numpy(blocks.batch(rows[start : start + micro_batch])).to(self.world.device))
                    if sum(map(len, seen)) >= 2 * seen[0].shape[1]:
                        break
        finally:
            handle.remove()
            engine.train()
        return torch.cat(seen)

    def _weights(self, engine: Any, family: Family) -> dict[str, float]:
        cosines: list[float] = []
        copied, fresh = 0.0, 0.0
        lines = {parameter.name: parameter for parameter in family.parameters}
        with StoredModel(self.folder) as reader:
            for model_name, parameter in engine.module.named_parameters():
                name = family.stored_name(model_name)
                line = lines.get(re.sub(r"\.\d+\.", ".{layer}.", name, count=1), lines.get(name))
                sides = sides_of(line, self.axes) if line else ()
                # A collective under ZeRO: every rank takes part, and rank 0 gets the value.
                value = full_value(parameter, engine.optimizer, master=True) if sides else None
                if value is None or not self.world.first or tuple(value.shape) != tuple(map(len, sides)):
                    continue
                value = value.float()
                cosines += [
                    c for side, source in enumerate(sides) if (c := copy_cosine(value, source, side)) is not None
                ]
                if (stored := reader.tensors.get(name)) is not None and stored.shape == tuple(value.shape):
                    squared_update = (value - stored.rows(0, stored.shape[0]).float()).double().square()
                    total = float(squared_update.sum())
                    for side, source in enumerate(sides):
                        index = torch.from_numpy(np.flatnonzero(source >= 0))
                        squared_update = squared_update.index_select(side, index)
                    of_copies = float(squared_update.sum())
                    copied += of_copies
                    fresh += total - of_copies
        columns: dict[str, float] = {}
        if cosines:
            mean, least, most = float(np.mean(cosines)), min(cosines), max(cosines)
            columns |= {"copy_cosine": mean, "copy_cosine_min": least, "copy_cosine_max": most}
        if (total := fresh + copied) > 0:
            columns["fresh_update_share"] = fresh / total
        return columns


def last_norm(family: Family) -> str:
    """Return the name of the last norm, whose input is the final residual.

    >>> last_norm(find_family("phi"))
    'model.final_layernorm'
    """
    return next(p.name for p in family.parameters if p.written == (family.final,)).rpartition(".")[0]


def sides_of(parameter: Parameter, axes: dict[str, Ints]) -> tuple[Ints, ...]:
    """Return the source index of every coordinate, for each stored axis of a parameter; -1 for new coordinates.

    A composite axis is a Kronecker product. A coordinate of it is a copy if all of its parts are copies.
    """
    sides = []
    for parts in parameter.axes:
        joined = np.zeros(1, np.int64)
        for part in parts:
            source = _stacked([axes[name] for name in stacked_names(part)])
            combined = joined[:, None] * (source.max(initial=0) + 1) + source[None, :]
            joined = np.where((joined[:, None] < 0) | (source[None, :] < 0), -1, combined).ravel()
        sides.append(joined)
    return tuple(sides)


def _stacked(sources: list[Ints]) -> Ints:
    """Return the source indices of axes that are stored one after the other."""
    parts, offset = [], 0
    for source in sources:
        parts.append(np.where(source < 0, -1, source + offset))
        offset += int(source.max(initial=-1)) + 1
    return np.concatenate(parts)


def copy_cosine(value: Tensor, source: Ints, side: int) -> float | None:
    """Return the cosine between first copies and later copies along one axis, each flattened into one vector.

    None if nothing is copied twice, or if one of the vectors is zero.

    >>> copy_cosine(torch.tensor([1.0, 2.0, 1.0, 2.0]), np.array([0, 1, 0, 1]), 0)
    1.0
    """
    (copies,) = np.nonzero(source >= 0)
    _, first, group = np.unique(source[copies], return_index=True, return_inverse=True)
    firsts = copies[first[group]]
    later = firsts != copies
    if not later.any():
        return None
    one, other = (
        value.index_select(side, torch.from_numpy(each[later])).double().flatten() for each in (firsts, copies)
    )
    norms = float(one.norm() * other.norm())
    return float(one @ other) / norms if norms else None


def effective_rank(residual: Tensor) -> float:
    """Return exp of the entropy of the covariance's normalised eigenvalues (O. Roy, M. Vetterli, 2007); 1 to width.

    >>> round(effective_rank(torch.eye(4).repeat(2, 1) - 0.25), 6)
    3.0
    """
    centred = residual.double() - residual.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    total = float(values.sum())
    if not math.isfinite(total) or total == 0:
        return math.nan
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def source_indices(plan: dict[str, Any], path: Path) -> tuple[Family, dict[str, Ints]]:
    """Return the family of a plan and the source index of every destination coordinate, axis by axis.

    Args:
        plan: the plan as JSON data.
        path: the file, for messages.

    Raises:
        GrowthError: the plan is of an unknown family, or its axes cannot be read.
    """
    try:
        axes = {name: _sources(axis) for name, axis in plan["axes"].items()}
        family = find_family(plan["family"])
        if family is None or set(family.axis_names) - set(axes):
            raise ValueError(f"the plan has the axes of {plan['family']}, not those of the model")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GrowthError(
            "the plan does not show which values are copies",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            fix="leave diagnostics_every out, or grow the start again",
        ) from error
    return family, axes


def _sources(axis: Any) -> Ints:
    parts = []
    for length, start, _, _ in axis["runs"]:
        if type(length) is not int or not 0 <= length <= axis["dst_size"]:
            raise ValueError(f"the length of a range is {length!r}")
        if start == "dense":  # every coordinate is computed from the source, and no two are copies of each other
            start = 0
        parts.append(np.arange(start, start + length) if type(start) is int else np.full(length, -1))
    coordinates = np.concatenate(parts).astype(np.int64)
    if len(coordinates) != axis["dst_size"]:
        raise ValueError(f"the plan places {len(coordinates)} of {axis['dst_size']} coordinates")
    return coordinates
