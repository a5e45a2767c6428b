"""The held-out loss, of all text and of each source: the same blocks in every run, shared among the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from phigrow.corpus.order import Indices, apportion, heldout_rows, shares
from phigrow.training.process import World


@dataclass(frozen=True)
class HeldOut:
    """The held-out blocks of an evaluation: their numbers, the source of each, and the sources' names and weights.

    Weights are None where every block counts the same; those of a mixture add up to 1 over the sources that have
    held-out blocks.
    """

    rows: Indices
    labels: Indices
    names: list[str]
    weights: tuple[float, ...] | None

    def loss(self, sums: Any, counts: Any) -> float:
        """The mean of the blocks' losses; for a mixture the weighted mean of the sources' means."""
        if self.weights is None:
            return float(sum(sums) / sum(counts))
        return float(sum(w * s / n for w, s, n in zip(self.weights, sums, counts, strict=True) if n))


def held_out(blocks: Any, wanted: int) -> HeldOut:
    """Choose the held-out blocks of a run's evaluations: a function of the data, its weights and ``wanted`` alone.

    Of a mixture every source gives blocks by its weight, and at least one; 0 takes all blocks.
    """
    if not blocks.mixture:
        rows = heldout_rows(wanted, len(blocks.heldout))
        return HeldOut(rows, blocks.heldout.source_of(rows), list(blocks.heldout.sources), None)
    sources = [source for source in blocks.mixture if len(source.heldout)]
    if not sources:
        return HeldOut(np.empty(0, np.int64), np.empty(0, np.int64), [], None)
    weights = shares([source.weight for source in sources])
    numbers = [max(1, n) if wanted else 0 for n in apportion(weights, wanted)]
    parts = []
    for source, number in zip(sources, numbers, strict=True):
        places = heldout_rows(number, len(source.heldout))
        parts.append(np.asarray(source.heldout, np.int64)[places])
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    names = [source.name for source in sources]
    return HeldOut(np.concatenate(parts), labels, names, tuple(map(float, weights)))


def heldout_loss(
    engine: Any, blocks: Any, held: HeldOut, micro_batch: int, world: World
) -> tuple[float, dict[str, float]]:
    """Return the loss over held-out blocks, in nats per token, in evaluation mode; and that of every source.

    Every rank makes the same number of forward passes, as ZeRO-3's gathers need; one without rows of its own reads
    the first block and counts it as nothing.

    Args:
        engine: DeepSpeed's engine, whose forward with ``by_row`` is the loss of every block.
        blocks: the held-out split: ``batch(indices)`` gives int64 ``[n, seq_len + 1]``.
        held: what to read, see `held_out`.
        micro_batch: blocks at once.
    """
    import torch.distributed as dist

    mine = np.arange(len(held.rows))[world.rank :: world.size]
    passes = math.ceil(math.ceil(len(held.rows) / world.size) / micro_batch)
    total = torch.zeros(2, len(held.names), dtype=torch.float64)
    engine.eval()
    with torch.no_grad():
        for index in range(passes):
            part = mine[index * micro_batch : (index + 1) * micro_batch]
            batch = torch.from_numpy(blocks.batch(held.rows[part] if len(part) else held.rows[:1])).to(world.device)
            losses = engine(batch, by_row=True)
            if len(part):
                labels = torch.from_numpy(held.labels[part])
                total[0].index_add_(0, labels, losses.double().cpu())
                total[1].index_add_(0, labels, torch.ones(len(part), dtype=torch.float64))
    engine.train()
    total = total.to(world.device)
    dist.all_reduce(total)
    sums, counts = total.tolist()
    return held.loss(sums, counts), {name: s / n for name, s, n in zip(held.names, sums, counts, strict=True) if n}
