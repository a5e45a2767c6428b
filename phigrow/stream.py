"""The stream: read, lift and write every block of every tensor, on all cores, in bounded memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoint import CheckpointReader
from phigrow.errors import GrowthError
from phigrow.journal import PartialFolder
from phigrow.lift import Lift, span_rows
from phigrow.plan import Plan
from phigrow.shards import CheckpointWriter

if TYPE_CHECKING:
    import torch


def stream(
    plan: Plan,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    partial: PartialFolder,
    dtype: str,
    *,
    allow_nonfinite: bool,
    progress: bool,
    beside: Callable[[Path], Any],
) -> dict[str, Any]:
    """Write every tensor of a plan, leaving out the blocks that an earlier run of the same expansion wrote.

    Args:
        plan, reader, writer, partial: what is grown, from where, to where, and the journal of what is done.
        dtype: of the output.
        allow_nonfinite: let NaN and infinities through.
        progress: show a progress bar.
        beside: work to do once for each source file, on the same threads (its hash).

    Returns:
        File name -> what ``beside`` gave.

    Raises:
        GrowthError: values that are not finite, a source file that ends early, or a failed write.
    """
    with ThreadPoolExecutor(1) as hashing:
        # Started before torch is imported, which takes as long on one core as hashing gigabytes does on the other.
        hashes = {file.name: hashing.submit(beside, file) for file in reader.files}
        try:
            _write_all(plan, reader, writer, partial, dtype, allow_nonfinite, progress)
            return {name: job.result() for name, job in hashes.items()}
        finally:
            hashing.shutdown(cancel_futures=True)


def _write_all(
    plan: Plan,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    partial: PartialFolder,
    dtype: str,
    allow_nonfinite: bool,
    progress: bool,
) -> None:
    import torch

    lifts = {g.name: Lift(g, reader.tensors[g.source], plan, getattr(torch, dtype)) for g in plan.tensors()}
    # The shards in turn, because only one thread at a time can write to a file.
    in_turn = [lifts[name] for names in itertools.zip_longest(*writer.shards) for name in names if name is not None]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            jobs: list[Future[None]] = [
                pool.submit(_block, writer, partial, lift, start, stop, allow_nonfinite)
                for lift in in_turn
                if partial.resumed or not lift.growth.zero  # a new file reads as zeros where nothing was written
                for start, stop in block_rows(lift.growth.shape)
            ]
            label = f"{plan.method}: {'resuming' if partial.done else 'writing'} {writer.total_bytes / 1e9:.2f} GB"
            with progress_bar(label, len(jobs), progress) as bar:
                for job in jobs:
                    job.add_done_callback(bar)
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def block_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, last) row of the blocks of a tensor: vectors whole, matrices by the spans that random values share."""
    step = shape[0] if len(shape) == 1 else span_rows(shape)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _block(
    writer: CheckpointWriter, partial: PartialFolder, lift: Lift, start: int, stop: int, allow_nonfinite: bool
) -> None:
    name = lift.growth.name
    known = partial.done.get((name, start))
    if known is not None and writer.checksum(name, start, stop) == known:
        return
    lift.prepare()
    values = lift.rows(start, stop)
    if not allow_nonfinite and not _is_finite(values):
        _refuse_nonfinite(lift)
    checksum = writer.write(name, start, values)
    partial.record(name, start, checksum)


def _is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite. A finite sum proves it in one pass; only a sum that is not needs a closer look."""
    import torch

    total = values.sum(dtype=torch.float32 if values.dtype.itemsize < 4 else values.dtype)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def _refuse_nonfinite(lift: Lift) -> None:
    import torch

    rows = lift.growth.source_shape[0]
    source_is_finite = all(
        _is_finite(lift.source.rows(start, min(start + 4096, rows))) for start in range(0, rows, 4096)
    )
    if not source_is_finite:
        raise GrowthError(
            "NaN or infinite weights",
            where=lift.growth.source,
            why="the source holds values that are not finite, and growth would spread them",
            fix="repair the checkpoint, or let them through with --allow-nonfinite",
        )
    raise GrowthError(
        f"values that do not fit {str(lift.dtype).removeprefix('torch.')}",
        where=lift.growth.name,
        why=f"its largest finite value is {torch.finfo(lift.dtype).max:g}",
        fix="use --dtype bfloat16 or float32",
    )


class progress_bar:
    """A rich progress bar whose ``with`` gives a callback that advances it, or a silent one."""

    def __init__(self, description: str, total: int, shown: bool) -> None:
        self.description, self.total, self.shown = description, total, shown

    def __enter__(self) -> Callable[[object], None]:
        if not self.shown:
            return lambda _: None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self._bar.start()
        task = self._bar.add_task(self.description, total=self.total)
        return lambda _: self._bar.advance(task)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.stop()
