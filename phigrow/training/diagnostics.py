"""Diagnostics of symmetry in a grown model: are copies still copies, how wide is the stream really, what moves.

Copies that get equal gradients stay equal for ever, and the new width is then never used. The plan in the start's
``phigrow.json`` says which coordinate of every axis is a copy of which; it is read here as data, and nothing of growth
is imported. Parameters are looked at one at a time, whole on rank 0, at any ZeRO stage.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phigrow.checkpoints.provenance import PROVENANCE_FILE, read_provenance
from phigrow.checkpoints.reader import CheckpointReader
from phigrow.errors import GrowthError
from phigrow.training.zero import full_value

if TYPE_CHECKING:
    from phigrow.training.configuration import RunConfig
    from phigrow.training.process import World

Ints = NDArray[np.int64]
Axis = tuple[str, ...]

AXES: dict[str, tuple[Axis, ...]] = {
    "model.embed_tokens.weight": (("vocab",), ("hidden",)),
    "input_layernorm.weight": (("hidden",),),
    "self_attn.q_proj.weight": (("kv", "group", "q"), ("normed",)),
    "self_attn.k_proj.weight": (("kv", "k"), ("normed",)),
    "self_attn.v_proj.weight": (("kv", "v"), ("normed",)),
    "self_attn.dense.weight": (("hidden",), ("kv", "group", "v")),
    "mlp.fc1.weight": (("mlp",), ("normed",)),
    "mlp.fc2.weight": (("hidden",), ("mlp",)),
    "model.final_layernorm.weight": (("hidden",),),
    "lm_head.weight": (("vocab",), ("final",)),
}
"""Which axes of the plan each parameter of a Phi is stored by, without what differs from layer to layer; biases carry
the first axis of their weight. A test holds this against the table that growth itself uses."""

STREAM = "model.final_layernorm"
"""What enters this module is the residual stream."""


class Diagnostics:
    """What to look at in one run; every rank calls `measure` at the same steps."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.world = world
        self.folder = Path(config.init)
        self.axes: dict[str, Ints] | None = None
        if (made := read_provenance(self.folder)) is not None:
            self.axes = source_indices(made.plan, self.folder / PROVENANCE_FILE)

    def measure(self, engine: Any, blocks: Any, rows: Ints, micro: int) -> dict[str, float]:
        """Return the columns of one ``diagnostics`` record; those that cannot be told are left out.

        Args:
            engine: DeepSpeed's engine.
            blocks: the held-out split: ``batch(indices)`` gives int64 ``[n, seq_len + 1]``.
            rows: of the held-out split that may be read; the same on every rank.
            micro: blocks at once.
        """
        found: dict[str, float] = {}
        if len(rows):
            found["effective_rank"] = effective_rank(self._stream(engine, blocks, rows, micro))
        if self.axes is not None:
            found |= self._weights(engine, self.axes)
        return found

    def _stream(self, engine: Any, blocks: Any, rows: Ints, micro: int) -> Tensor:
        """The residual stream before the last norm, [tokens, hidden], of twice as many tokens as it is wide."""
        seen: list[Tensor] = []
        handle = engine.module.get_submodule(STREAM).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].detach().float().flatten(0, -2))
        )
        engine.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(rows), micro):
                    engine(torch.from_numpy(blocks.batch(rows[start : start + micro])).to(self.world.device))
                    if sum(map(len, seen)) >= 2 * seen[0].shape[1]:
                        break
        finally:
            handle.remove()
            engine.train()
        return torch.cat(seen)

    def _weights(self, engine: Any, axes: dict[str, Ints]) -> dict[str, float]:
        cosines: list[float] = []
        moved = {"fresh": 0.0, "copied": 0.0}
        with CheckpointReader(self.folder) as reader:
            for name, parameter in engine.module.named_parameters():
                sides = sides_of(name, axes)
                # Collective under ZeRO: every rank takes part, rank 0 gets the value.
                value = full_value(parameter, engine.optimizer, master=True) if sides else None
                if value is None or not self.world.first or tuple(value.shape) != tuple(map(len, sides)):
                    continue
                value = value.float()
                cosines += [
                    c for side, source in enumerate(sides) if (c := copy_cosine(value, source, side)) is not None
                ]
                if (stored := reader.tensors.get(name)) is not None and stored.shape == tuple(value.shape):
                    square = (value - stored.rows(0, stored.shape[0]).float()).double().square()
                    total = float(square.sum())
                    for side, source in enumerate(sides):
                        square = square.index_select(side, torch.from_numpy(np.flatnonzero(source >= 0)))
                    copied = float(square.sum())
                    moved["copied"] += copied
                    moved["fresh"] += total - copied
        found: dict[str, float] = {}
        if cosines:
            mean, least, most = float(np.mean(cosines)), min(cosines), max(cosines)
            found |= {"copy_cosine": mean, "copy_cosine_min": least, "copy_cosine_max": most}
        if (whole := moved["fresh"] + moved["copied"]) > 0:
            found["fresh_update_share"] = moved["fresh"] / whole
        return found


def sides_of(name: str, axes: dict[str, Ints]) -> tuple[Ints, ...]:
    """For each stored axis of a parameter the source index of every coordinate, -1 where it is no copy; () if unknown.

    A composite axis is a Kronecker product: it is a copy where all of its parts are.
    """
    short = name.split(".", 3)[3] if name.startswith("model.layers.") else name
    known = AXES.get(short) or AXES.get(short.removesuffix("bias") + "weight", ())[:1]
    sides = []
    for parts in known:
        whole = np.zeros(1, np.int64)
        for part in parts:
            source = axes[part]
            joined = whole[:, None] * (source.max(initial=0) + 1) + source[None, :]
            whole = np.where((whole[:, None] < 0) | (source[None, :] < 0), -1, joined).ravel()
        sides.append(whole)
    return tuple(sides)


def copy_cosine(value: Tensor, source: Ints, side: int) -> float | None:
    """The cosine between first copies and later ones along one axis, all taken as one long vector each.

    None where nothing is copied twice, or where one of the two is zero.

    >>> copy_cosine(torch.tensor([1.0, 2.0, 1.0, 2.0]), np.array([0, 1, 0, 1]), 0)
    1.0
    """
    (copies,) = np.nonzero(source >= 0)
    _, first, place = np.unique(source[copies], return_index=True, return_inverse=True)
    firsts = copies[first[place]]
    later = firsts != copies
    if not later.any():
        return None
    one, other = (
        value.index_select(side, torch.from_numpy(each[later])).double().flatten() for each in (firsts, copies)
    )
    norms = float(one.norm() * other.norm())
    return float(one @ other) / norms if norms else None


def effective_rank(stream: Tensor) -> float:
    """exp of the entropy of the normalised eigenvalues of the covariance (O. Roy, M. Vetterli, 2007); 1 to width.

    >>> round(effective_rank(torch.eye(4).repeat(2, 1) - 0.25), 6)
    3.0
    """
    centred = stream.double() - stream.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    total = float(values.sum())
    if not math.isfinite(total) or total == 0:
        return math.nan
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def source_indices(plan: dict[str, Any], path: Path) -> dict[str, Ints]:
    """Return the source index of every destination coordinate, axis by axis, from the plan in a ``phigrow.json``.

    Args:
        plan: the plan as JSON data.
        path: the file, for messages.

    Raises:
        GrowthError: the plan is of another family than Phi, or its axes cannot be read.
    """
    try:
        found = {name: _sources(axis) for name, axis in plan["axes"].items()}
        missing = {part for sides in AXES.values() for parts in sides for part in parts} - set(found)
        if plan["family"] != "phi" or missing:
            raise ValueError(f"its axes are those of {plan['family']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GrowthError(
            "a plan in which copies cannot be found",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            fix="leave diagnostics_every out, or grow the start again",
        ) from error
    return found


def _sources(axis: Any) -> Ints:
    parts = []
    for length, start, _, _ in axis["runs"]:
        if type(length) is not int or not 0 <= length <= axis["dst_size"]:
            raise ValueError(f"a run of {length!r} coordinates")
        if start == "dense":  # every coordinate is made of the source, and none like another
            start = 0
        parts.append(np.arange(start, start + length) if type(start) is int else np.full(length, -1))
    found = np.concatenate(parts).astype(np.int64)
    if len(found) != axis["dst_size"]:
        raise ValueError(f"{len(found)} coordinates of {axis['dst_size']}")
    return found
