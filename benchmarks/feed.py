"""Order of the data of a large run, by simulation: seconds a step, memory of a rank, and a resume near the end.

    python benchmarks/feed.py                       # phi-2: 1.4T tokens in blocks of 2,048, on 96 ranks, at 80 %
    python benchmarks/feed.py --tokens 1e9

Each line is JSON. The blocks have labels but no text, so reading the disk is not part of it. Every rank computes the
order of the whole batch, so one rank is simulated.

- ``start_seconds`` and ``start_MiB`` are of finding the blocks of each source.
- ``step_ms`` and ``step_MiB`` are of the order of one step.
- ``resume_seconds`` is of the counts by source that the first evaluation after a resume records, and
  ``recount_seconds`` of the same without the records of the run.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from phigrow.corpus.feed import BlockFeed
from phigrow.corpus.source_rows import rows_by_source
from phigrow.corpus.splits import MixedSource

STEPS = 20
"""Timed steps."""

Labels = npt.NDArray[np.int64]


class Labelled:
    """Blocks with computed labels: two sources one after the other, or mingled in a ratio of 3 to 1."""

    def __init__(self, blocks: int, *, mingled: bool) -> None:
        self.blocks, self.mingled, self.sources = blocks, mingled, ["web", "code"]

    def __len__(self) -> int:
        return self.blocks

    def labels(self, start: int, stop: int) -> Labels:
        """Return the source of each of these blocks."""
        return self.source_of(np.arange(start, stop))

    def source_of(self, indices: Any) -> Labels:
        """Return the source of each block."""
        rows = np.asarray(indices, np.int64)
        chosen = rows % 4 == 3 if self.mingled else rows >= self.blocks * 3 // 4
        return chosen.astype(np.int64)

    def batch(self, indices: Any) -> Labels:
        """Refuse to read, because there is no text."""
        raise NotImplementedError


def traced(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return a result, its seconds, and the peak of its memory in MiB, of two calls: tracing memory takes time."""
    tracemalloc.start()
    result = work()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    began = time.perf_counter()
    work()
    return result, time.perf_counter() - began, peak


def mixture(split: Labelled) -> tuple[MixedSource, ...]:
    """Return the two sources in equal parts, as `phigrow.corpus.mix_sources` finds them."""
    rows = rows_by_source(split)
    return tuple(MixedSource(name, 1.0, each, range(0)) for name, each in zip(split.sources, rows, strict=True))


def measure(name: str, split: Labelled, *, mixed: bool, batch: int, step: int, recount: bool) -> dict[str, Any]:
    """Measure one kind of data."""
    sources, start, opened = traced(lambda: mixture(split)) if mixed else ((), 0.0, 0.0)
    feed = BlockFeed(split, sources, 0, batch)
    feed.rows(step)  # generators and tables are made once
    rows, seconds, peak = traced(lambda: [feed.rows(step + each) for each in range(STEPS)][-1])
    assert 0 <= rows.min() <= rows.max() < len(split)
    out = {"data": name, "start_seconds": round(start, 2), "start_MiB": round(opened, 1)}
    out |= {"step_ms": round(1000 * seconds / STEPS, 2), "step_MiB": round(peak, 2)}
    began = time.perf_counter()
    if not mixed and recount:
        counts = feed.blocks_read(step)
        out["recount_seconds"] = round(time.perf_counter() - began, 1)
    else:
        counts = feed.blocks_read(step) if mixed else [step * batch * 3 // 4, step * batch - step * batch * 3 // 4]
    resumed = BlockFeed(split, sources, 0, batch)
    began = time.perf_counter()
    resumed.resume_count(step, counts)
    assert sum(resumed.blocks_read(step + 1)) == (step + 1) * batch
    return out | {"resume_seconds": round(time.perf_counter() - began, 4)}


def run(tokens: float, seq_len: int, ranks: int, batch: int, share: float, *, recount: bool) -> list[dict[str, Any]]:
    """Measure every kind of data, and print a line for each."""
    blocks = int(tokens) // seq_len
    steps = blocks // batch
    shown: list[dict[str, Any]] = [
        {"tokens": int(tokens), "blocks": blocks, "steps": steps, "batch": batch, "blocks_a_rank": batch // ranks}
    ]
    print(json.dumps(shown[0]), flush=True)
    kinds = [
        ("sources in order", Labelled(blocks, mingled=False), False),
        ("mixture of ranges", Labelled(blocks, mingled=False), True),
        ("mixture of mingled sources", Labelled(blocks, mingled=True), True),
    ]
    for name, split, mixed in kinds:
        found = measure(name, split, mixed=mixed, batch=batch, step=int(share * steps), recount=recount)
        shown.append(found)
        print(json.dumps(found), flush=True)
    return shown


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1.4e12)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=96)
    parser.add_argument("--batch", type=int, default=2016)
    parser.add_argument("--share", type=float, default=0.8, help="of the steps that are done when the run resumes")
    parser.add_argument("--recount", action="store_true", help="time a count without records, too (minutes)")
    given = parser.parse_args()
    run(given.tokens, given.seq_len, given.ranks, given.batch, given.share, recount=given.recount)


if __name__ == "__main__":
    main()
