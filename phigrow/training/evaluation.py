"""The held-out loss: the same blocks in every run, shared among the ranks."""

from __future__ import annotations

import math
from typing import Any

import torch

from phigrow.training.order import Indices
from phigrow.training.process import World


def heldout_loss(engine: Any, blocks: Any, rows: Indices, micro: int, world: World) -> float:
    """Return the mean loss, in nats a token, over held-out blocks, in evaluation mode.

    Every rank makes the same number of forward passes, as ZeRO-3's gathers need; one without rows of its own reads
    the first block and counts it as nothing.

    Args:
        engine: DeepSpeed's engine, whose forward is the loss.
        blocks: the held-out split: ``batch(indices)`` gives int64 ``[n, seq_len + 1]``.
        rows: indices to read, see `heldout_rows`.
        micro: blocks at once.
    """
    import torch.distributed as dist

    mine = rows[world.rank :: world.size]
    passes = math.ceil(math.ceil(len(rows) / world.size) / micro)
    total = torch.zeros(2, dtype=torch.float64)
    engine.eval()
    with torch.no_grad():
        for index in range(passes):
            part = mine[index * micro : (index + 1) * micro]
            batch = torch.from_numpy(blocks.batch(part if len(part) else rows[:1])).to(world.device)
            loss = engine(batch)
            if len(part):
                total += torch.tensor([loss.item() * len(part), len(part)], dtype=torch.float64)
    engine.train()
    total = total.to(world.device)
    dist.all_reduce(total)
    return float(total[0] / total[1])
