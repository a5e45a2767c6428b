"""The held-out loss of all text and of each source. Every run reads the same blocks, divided among its ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from phigrow.corpus.order import Indices, apportion, heldout_rows, picked, shares
from phigrow.training.compilation import compiled_evaluation
from phigrow.training.device_copy import host_batch, to_device
from phigrow.training.process import World

GROUPS = 100
"""Largest number of groups of held-out blocks whose losses a run records at its end."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out blocks of an evaluation: their numbers, the source of each, and the sources' names and weights.

    Weights are None if every block counts the same. In a mixture they add up to 1 over the sources that have held-out
    blocks.
    """

    rows: Indices
    labels: Indices
    names: list[str]
    weights: tuple[float, ...] | None

    def loss(self, sums: Any, counts: Any) -> float:
        """Return the mean of the blocks' losses; for a mixture the weighted mean of the sources' means."""
        if self.weights is None:
            return float(sum(sums) / sum(counts))
        return float(sum(w * s / n for w, s, n in zip(self.weights, sums, counts, strict=True) if n))

    def groups(self) -> tuple[Indices, Indices]:
        """Assign each block to one of at most `GROUPS` groups.

        Groups are contiguous and differ in size by one block at most. Each has its share of every source of a mixture.

        Returns:
            The group of each block, and the size of each group.
        """
        sizes = np.bincount(self.labels, minlength=len(self.names)) if self.weights else np.array([len(self.rows)])
        count = min(GROUPS, int(sizes.max()))
        group = np.concatenate([np.arange(size, dtype=np.int64) * count // max(size, 1) for size in sizes])
        return group, np.bincount(group, minlength=count)

    def block_weights(self) -> npt.NDArray[np.float64]:
        """Return the weight of each block in `loss`, as a multiple of the mean weight."""
        if self.weights is None:
            return np.ones(len(self.rows))
        counts = np.bincount(self.labels, minlength=len(self.names))
        each = np.divide(self.weights, counts, out=np.zeros(len(counts)), where=counts > 0)
        weights: npt.NDArray[np.float64] = each[self.labels] * len(self.rows)
        return weights


@dataclass(frozen=True)
class HeldOutLoss:
    """Held-out loss in nats per token: of all blocks, of each source, and, if asked for, of groups of blocks."""

    mean: float
    by_source: dict[str, float]
    by_group: list[float] | None = None
    group_blocks: list[int] | None = None


def held_out(blocks: Any, wanted: int) -> HeldOut:
    """Choose the held-out blocks of a run's evaluations, as a function of the data, its weights and ``wanted`` alone.

    Every source of a mixture gives blocks by its weight, and at least one. With ``wanted`` 0, all blocks are chosen.
    Blocks outside of the data's ``heldout_part`` are not read.
    """
    part = blocks.heldout_part
    if not blocks.mixture:
        rows = part.numbers(heldout_rows(wanted, part.size(len(blocks.heldout))))
        return HeldOut(rows, blocks.heldout.source_of(rows), list(blocks.heldout.sources), None)
    sources = [source for source in blocks.mixture if part.size(len(source.heldout))]
    if not sources:
        return HeldOut(np.empty(0, np.int64), np.empty(0, np.int64), [], None)
    weights = shares([source.weight for source in sources])
    numbers = [max(1, n) if wanted else 0 for n in apportion(weights, wanted)]
    parts = []
    for source, number in zip(sources, numbers, strict=True):
        places = heldout_rows(number, part.size(len(source.heldout)))
        parts.append(picked(source.heldout, part.numbers(places)))
    labels = np.repeat(np.arange(len(parts)), [len(rows) for rows in parts])
    names = [source.name for source in sources]
    return HeldOut(np.concatenate(parts), labels, names, tuple(map(float, weights)))


def heldout_loss(
    engine: Any,
    blocks: Any,
    held: HeldOut,
    micro_batch: int,
    world: World,
    *,
    by_group: bool = False,
    same_shape: bool = False,
) -> HeldOutLoss:
    """Compute the loss over held-out blocks, in nats per token, in evaluation mode.

    Every rank makes the same number of forward passes, as ZeRO-3's gathers need. A rank that has no rows left reads the
    first block and ignores its loss.

    Args:
        engine: DeepSpeed's engine, whose forward with ``by_row`` is the loss of every block.
        blocks: the held-out split; ``batch(indices)`` gives int64 ``[n, seq_len + 1]``.
        held: the blocks to read, see `held_out`.
        micro_batch: blocks per forward pass.
        world: the ranks.
        by_group: compute the losses of groups of blocks too. Their mean, weighted by their sizes, is the loss.
        same_shape: fill the last batch up with blocks whose losses are ignored, so that every pass has the shape of the
            training passes. Compiled layers then serve evaluations, too, with one graph more. Kernels of another shape
            may round the losses of a short batch in another way.
    """
    import torch.distributed as dist

    mine = np.arange(len(held.rows))[world.rank :: world.size]
    passes = math.ceil(math.ceil(len(held.rows) / world.size) / micro_batch)
    total = torch.zeros(2, len(held.names), dtype=torch.float64)
    group, sizes = held.groups()
    weights = torch.from_numpy(held.block_weights())
    group_sums = torch.zeros(len(sizes), dtype=torch.float64)
    engine.eval()
    with torch.no_grad(), compiled_evaluation(engine.module, same_shape):
        for index in range(passes):
            part = mine[index * micro_batch : (index + 1) * micro_batch]
            rows = held.rows[part] if len(part) else held.rows[:1]
            if same_shape:
                rows = np.concatenate([rows, np.repeat(rows[:1], micro_batch - len(rows))])
            batch = to_device(host_batch(blocks.batch(rows), world.device), world.device)
            losses = engine(batch, by_row=True)[: len(part)]
            if len(part):
                labels = torch.from_numpy(held.labels[part])
                values = losses.double().cpu()
                total[0].index_add_(0, labels, values)
                total[1].index_add_(0, labels, torch.ones(len(part), dtype=torch.float64))
                if by_group:
                    group_sums.index_add_(0, torch.from_numpy(group[part]), values * weights[part])
    engine.train()
    total = total.to(world.device)
    dist.all_reduce(total)
    sums, counts = total.tolist()
    by_source = {name: s / n for name, s, n in zip(held.names, sums, counts, strict=True) if n}
    if not by_group:
        return HeldOutLoss(held.loss(sums, counts), by_source)
    group_sums = group_sums.to(world.device)
    dist.all_reduce(group_sums)
    means = (group_sums.cpu() / torch.from_numpy(sizes)).tolist()
    return HeldOutLoss(held.loss(sums, counts), by_source, means, sizes.tolist())
