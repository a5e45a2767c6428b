"""Progress of a study: finished jobs, their cost, and the time that the others will take."""

from __future__ import annotations

import functools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.files.atomic import atomic_json
from phigrow.records.readers.phigrow import last_record, written_so_far
from phigrow.study.job import Job
from phigrow.study.settings import Study

DONE = "done.json"
"""File in the folder of a training run that has ended, with its key, cost and last losses."""

START = 6.0
"""Assumed seconds of a run besides training. It is not measured, and is used only until runs have been timed here."""


def done(job: Job) -> dict[str, Any] | None:
    """Return the content of a finished job's `DONE` file ({} for jobs that do not train), or None if it is not done."""
    if job.undecided:
        return None
    if not job.trains:
        return {} if job.folder.is_dir() else None
    if job.keeps and not saved_steps(job.folder):
        return None
    path = job.folder / DONE
    try:
        ended = _content(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return None
    longer = ended["step"] < job.steps  # a trunk that a new budget makes longer
    return None if longer or ended["key"] != job.key else dict(ended)


@functools.lru_cache(maxsize=1 << 14)  # a study checks each of its jobs several times a second
def _content(path: Path, modified: int) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Throughput:
    """Speed of one run on this machine: FLOPs a second of training, and seconds of starting and evaluating."""

    flops_per_second: float
    start: float

    def seconds(self, flops: float, launches: int) -> float:
        """Return the seconds that runs take one after another."""
        return flops / self.flops_per_second + launches * self.start


def finish(job: Job, wall: float, flops: float, before: float) -> dict[str, Any] | None:
    """Mark a training run as done if its records reach its end, and delete checkpoints that are no longer needed.

    Args:
        job: the run.
        wall: seconds that this launch took, start and evaluations included.
        flops: FLOPs of the training in this launch.
        before: seconds of training before this launch.

    Returns:
        The content of its `DONE` file, None if the run has not reached its end.
    """
    last = last_record(job.folder, "eval")
    if last is None or last["step"] < job.steps:
        return None
    step = last_record(job.folder, "step") or last
    trained = step["seconds"] - before
    ran = {
        "wall": round(wall, 1),
        "trained": round(trained, 3),
        "flops": flops,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    content = {"key": job.key, "step": last["step"], "heldout_loss": last["loss"], "loss": step["loss"], **ran}
    content |= {"lr": written_so_far(job.folder)[0]["config"]["lr"]}
    atomic_json(job.folder / DONE, content, indent=None)
    if job.kind != "trunk" and not job.keeps:
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    return content


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, in rising order."""
    from phigrow.checkpoints.run_checkpoints import marked_checkpoints

    return [ended.progress.step for ended in marked_checkpoints(folder)[0]]


def throughput(jobs: list[Job], flops_per_second: float | None) -> Throughput | None:
    """Return the speed of the finished runs; before the first one, the speed in the study file, or None."""
    ended = [content for job in jobs if job.trains and (content := done(job)) and content["flops"] > 0]
    if not ended:
        return None if flops_per_second is None else Throughput(flops_per_second, START)
    wall, trained, flops = (sum(content[key] for content in ended) for key in ("wall", "trained", "flops"))
    return Throughput(flops / trained, (wall - trained) / len(ended))


def time_left(study: Study, everything: list[Job], jobs: list[Job]) -> float | None:
    """Return the seconds that missing jobs will take; None if the speed of runs is unknown."""
    if (speed := throughput(everything, study.flops_per_second)) is None:
        return None
    missing = [job for job in jobs if job.trains and done(job) is None]
    return speed.seconds(sum(map(remaining, missing)), len(missing)) / study.layout().workers


def remaining(job: Job) -> float:
    """Return the FLOPs that a job has left to do."""
    if not job.trains or done(job) is not None:
        return 0.0
    last = last_record(job.folder, "step")
    at = job.first if last is None else min(max(last["step"], job.first), job.steps)
    return job.flops * (job.steps - at) / (job.steps - job.first)
