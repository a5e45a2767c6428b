"""Read, lift and write every block of every tensor, on all cores and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

from phigrow.checkpoints.bits import LARGEST, is_finite
from phigrow.checkpoints.stored_model import StoredModel
from phigrow.checkpoints.writer import CheckpointWriter
from phigrow.errors import GrowthError
from phigrow.expansion.progress_bar import progress_bar
from phigrow.files.staged_folder import StagedFolder
from phigrow.growth.lift import Lift
from phigrow.growth.plan import Plan

BLOCK_VALUES = 1 << 20
"""Values of a block, the unit of work, of checksums and of resuming.

From 2^18 to 2^22 all sizes were about as fast, smaller ones slower, larger ones took more memory
(`benchmarks/expand.py --blocks`).
"""


def write_tensors(
    plan: Plan,
    reader: StoredModel,
    writer: CheckpointWriter,
    partial: StagedFolder,
    dtype: str,
    *,
    allow_nonfinite: bool,
    progress: bool,
    beside: Callable[[Path], Any],
) -> dict[str, Any]:
    """Write every tensor of a plan, leaving out the blocks that an earlier run of the same expansion wrote.

    Args:
        plan: the growth.
        reader, writer: source and destination.
        partial: the unfinished folder, with the journal of finished blocks.
        dtype: of the output.
        allow_nonfinite: let NaN and infinities through.
        progress: show a progress bar.
        beside: a function that is called once for each source file meanwhile, such as a hash.

    Returns:
        File name -> result of ``beside``.

    Raises:
        GrowthError: values are not finite, a source file ends early, or a write fails.
    """
    with ThreadPoolExecutor(1) as hashing:
        hashes = {file.name: hashing.submit(beside, file) for file in reader.files}
        try:
            _write_all(plan, reader, writer, partial, dtype, allow_nonfinite, progress)
            return {name: job.result() for name, job in hashes.items()}
        finally:
            hashing.shutdown(cancel_futures=True)


def _write_all(
    plan: Plan,
    reader: StoredModel,
    writer: CheckpointWriter,
    partial: StagedFolder,
    dtype: str,
    allow_nonfinite: bool,
    progress: bool,
) -> None:
    lifts = {recipe.name: Lift(recipe, reader.tensors, dtype) for recipe in plan.recipes()}
    blocks = {
        name: [(start, stop) for start, stop in block_rows(lift.recipe.shape)]
        for name, lift in lifts.items()
        if partial.resumed or not lift.recipe.is_zero  # a new file reads as zeros where nothing was written
    }
    lanes = [deque((lifts[n], *block) for n in names for block in blocks.get(n, ())) for names in writer.shards]
    ended = Event()

    def work(own: int) -> None:
        # A thread keeps to a shard of its own while there is one: only one at a time can write to a file.
        lane = lanes[own % len(lanes)]
        while not ended.is_set():
            try:
                lift, start, stop = lane.popleft()
            except IndexError:
                lane = max(lanes, key=len)
                if not lane:
                    return
                continue
            _block(writer, partial, lift, start, stop, allow_nonfinite)
            advance(None)

    gigabytes = writer.total_bytes / 1e9
    size = f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.2f} MB"
    label = f"{plan.method}: {'resuming' if partial.done else 'writing'} {size}"
    workers = os.cpu_count() or 1
    with progress_bar(label, sum(map(len, lanes)), progress) as advance, ThreadPoolExecutor(workers) as pool:
        try:
            jobs = [pool.submit(work, own) for own in range(workers)]
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        finally:
            ended.set()


def block_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the (first, last) rows of the blocks in which a tensor is written. A vector is one block."""
    step = shape[0] if len(shape) == 1 else max(1, BLOCK_VALUES // shape[1])
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _block(
    writer: CheckpointWriter, partial: StagedFolder, lift: Lift, start: int, stop: int, allow_nonfinite: bool
) -> None:
    name = lift.recipe.name
    known = partial.done.get((name, start))
    if known is not None and writer.checksum(name, start, stop) == known:
        return
    bits = lift.rows(start, stop)
    if not allow_nonfinite and not is_finite(bits, lift.dtype):
        _refuse_nonfinite(lift)
    checksum = writer.write(name, start, bits)
    partial.record(name, start, checksum)


def _refuse_nonfinite(lift: Lift) -> None:
    rows, dtype = lift.recipe.source_shape[0], lift.source.dtype_name
    source_is_finite = all(
        is_finite(lift.source.bits(start, min(start + 4096, rows)), dtype) for start in range(0, rows, 4096)
    )
    if not source_is_finite:
        raise GrowthError(
            "the weights hold NaN or infinities",
            where=lift.recipe.source,
            why="the source holds values that are not finite, and growth would spread them",
            fix="repair the checkpoint, or let them through with --allow-nonfinite",
        )
    raise GrowthError(
        f"values do not fit {lift.dtype}",
        where=lift.recipe.name,
        why=f"its largest finite value is {LARGEST[lift.dtype]:g}",
        fix="use --dtype bfloat16 or float32",
    )
