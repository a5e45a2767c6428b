"""Display of a running study: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError
from phigrow.records.readers.phigrow import last_record
from phigrow.study import progress
from phigrow.study.job import Job
from phigrow.study.jobs import StudyJobs
from phigrow.study.settings import Arm, Study

if TYPE_CHECKING:
    from rich.table import Table

LINE_SECONDS = 60.0
"""Seconds between plain lines about one run."""

MOST_COLUMNS = 12
"""Largest number of columns of losses. With more, one column has the mean over seeds."""

DRAW_SECONDS = 0.5
"""Seconds between two drawings of the table."""


class Display:
    """Show finished, running and remaining jobs; a context."""

    def __init__(self, study: Study, everything: list[Job], jobs: list[Job], say: Callable[[str], None]) -> None:
        self.study, self.everything, self.jobs, self.say = study, everything, jobs, say
        self.failed: set[str] = set()
        self._rates: dict[str, float | None] = {}
        self.running: dict[str, Job] = {}
        self._began: dict[str, float] = {}
        self._printed: dict[str, float] = {}
        self._drawn = 0.0
        self._live: Any = None

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(self.table(), refresh_per_second=2)
            self._live.start()
        else:
            missing = sum(progress.done(job) is None for job in self.jobs)
            self.say(
                f"study {self.study.name} in {self.study.out}: {missing} of {len(self.jobs)} jobs to do, {self.left()}"
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.running = {}
        if self._live:
            self._live.update(self.table())
            self._live.stop()

    def start(self, job: Job) -> None:
        """Show that a job begins."""
        self.running[job.name] = job
        self._began[job.name] = self._printed[job.name] = time.monotonic()
        if self._live:
            self.refresh()
        else:
            self.say(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {described(job)}")

    def refresh(self) -> None:
        """Show the progress of the running jobs."""
        if self._live:
            if time.monotonic() - self._drawn > DRAW_SECONDS:
                self._drawn = time.monotonic()
                self._live.update(self.table())
            return
        for name, job in self.running.items():
            if time.monotonic() - self._printed[name] > LINE_SECONDS:
                self._printed[name] = time.monotonic()
                self.say(f"    {name}: {position(job)}; {self.left()}")

    def finish(self, job: Job) -> None:
        """Show that a job is done."""
        took = clock(time.monotonic() - self._began[job.name])
        del self.running[job.name]
        if self._live:
            self.refresh()
            return
        loss = (progress.done(job) or {}).get("heldout_loss")
        end = f", held-out loss {loss:.4f}" if isinstance(loss, float) else ""
        self.say(f"    {job.name}: done in {took}{end}; {self.left()}")

    def fail(self, job: Job, error: GrowthError) -> None:
        """Show that a job failed."""
        self.failed.add(job.name)
        self.running.pop(job.name, None)
        self.tell(f"{job.name} failed: {error}")

    def tell(self, text: str) -> None:
        """Print a line beside the table."""
        self._live.console.print(text, markup=False) if self._live else self.say(text)

    def left(self) -> str:
        """Return the time that is left, in words."""
        seconds = progress.time_left(self.study, self.everything, self.jobs)
        return "time left unknown before the first run" if seconds is None else f"about {clock(seconds)} left"

    def table(self) -> Table:
        """Return a table with a row per arm: its rate, and its held-out loss at every budget, seed by seed if few."""
        from rich.table import Table

        table = Table(title=f"study {self.study.name}", caption=self._caption())
        table.add_column("arm")
        if self.study.sweep:
            table.add_column("lr", justify="right")
        seeds: list[int | None] = [*self.study.seeds]
        if len(seeds) * len(self.study.budgets) > MOST_COLUMNS:
            seeds = [None]
        for seed in seeds:
            for budget in self.study.budgets:
                table.add_column(f"{budget}" if seed is None else f"seed {seed}\n{budget}", justify="right")
        for arm in self.study.arms:
            rate = [self._rate(arm)] if self.study.sweep else []
            ends = [job for job in self.everything if job.kind == "end" and job.arm == arm]
            cells = [
                self._cell([job for job in ends if job.budget == budget and seed in (None, job.seed)])
                for seed in seeds
                for budget in self.study.budgets_of(arm)
            ]
            table.add_row(arm.label, *rate, *cells[: len(seeds) * len(self.study.budgets)])
        return table

    def update(self, everything: list[Job], jobs: list[Job]) -> None:
        """Take over the new jobs after a sweep has new results."""
        self.everything, self.jobs, self._rates = everything, jobs, {}

    def _rate(self, arm: Arm) -> str:
        if arm.label not in self._rates:
            self._rates[arm.label] = StudyJobs(self.study).rates(arm).best
        if (best := self._rates[arm.label]) is not None:
            return f"{best:g}"
        tried = [job for job in self.everything if job.kind == "sweep" and job.arm == arm]
        return f"{sum(progress.done(job) is not None for job in tried)}/{len(tried)}"

    def _cell(self, jobs: list[Job]) -> str:
        """Return the mean loss of the runs of one arm and budget, and the number of finished runs."""
        losses = [ended["heldout_loss"] for job in jobs if (ended := progress.done(job)) is not None]
        if losses:
            mean = sum(math.nan if loss is None else loss for loss in losses) / len(losses)
            return f"{mean:.3f}" + (f" ({len(losses)}/{len(jobs)})" if len(losses) < len(jobs) else "")
        if any(name in self.failed for job in jobs for name in (job.name, *job.needs)):
            return "[red]failed[/]"
        for running in self.running.values():
            if any(running.name in (job.name, *job.needs) for job in jobs):
                last = last_record(running.folder, "step") or {"step": 0}
                return f"[bold]step {last['step']}[/]"
        return "" if any(job in self.jobs for job in jobs) else "-"

    def _caption(self) -> str:
        done = sum(progress.done(job) is not None for job in self.jobs)
        where = "".join(f"{name}, {position(job)}\n" for name, job in self.running.items())
        return f"{where}{done} of {len(self.jobs)} jobs done, {self.left()}"


def described(job: Job) -> str:
    """Return one line about a job: its name, steps, tokens and FLOPs."""
    if job.kind == "data":
        return f"data: packed blocks in {job.folder}"
    if job.kind == "state":
        return f"{job.name}: grow the optimizer's state: {job.arm.state if job.arm else '?'}"
    if not job.trains:
        return f"{job.name}: expand by {job.arm.method if job.arm else '?'}"
    part = f"steps {job.first} to {job.steps}" if job.first else f"{job.steps} steps"
    return f"{job.name}: {part}, {millions(job.tokens)} tokens, {job.flops:.2e} FLOPs"


def position(job: Job) -> str:
    """Return the position of a running job in words."""
    if not job.trains:
        return "running"
    if (last := last_record(job.folder, "step")) is None:
        return "starting"
    loss = last["loss"] if isinstance(last["loss"], int | float) else math.nan
    return f"step {last['step']}/{job.steps}, loss {loss:.4f}"


def listing(study: Study, jobs: list[Job]) -> list[str]:
    """Return the jobs and costs of a study as lines, one per arm, and totals; with times if a speed is known."""
    speed, seconds = progress.throughput(jobs, study.flops_per_second), progress.time_left(study, jobs, jobs)
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        title = job.arm.label if job.arm is not None else job.name.partition("/")[0]
        groups.setdefault(title, []).append(job)
    rows = [("", "jobs", "done", "tokens", "FLOPs", "time"), *(_row(name, own, speed) for name, own in groups.items())]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    training = [job for job in jobs if job.trains]
    left = sum(progress.remaining(job) for job in jobs)
    tokens, total = sum(job.tokens for job in training), sum(job.flops for job in training)
    lines.append(f"{len(jobs)} jobs, {millions(tokens)} tokens, {total:.2e} FLOPs in all, {left:.2e} to do")
    if study.sweep:
        swept = sum(job.tokens for job in training if "/sweep/" in job.name)
        lines.append(f"sweeps of the learning rate take {millions(swept)} of these tokens")
    if speed is None or seconds is None:
        lines.append("time: unknown, because no run was timed here yet and flops_per_second is not set")
    else:
        side = study.layout().workers
        runs = "run" if side == 1 else "runs"
        lines.append(f"time: {clock(seconds)}, {side} {runs} at a time")
        lines.append(f"      each at {speed.flops_per_second:.2e} FLOPs per second, and {speed.start:.0f} s to start")
    return lines


def _row(name: str, jobs: list[Job], speed: progress.Throughput | None) -> tuple[str, ...]:
    training = [job for job in jobs if job.trains]
    done = sum(progress.done(job) is not None for job in jobs)
    missing = [job for job in training if progress.done(job) is None]
    seconds = speed.seconds(sum(map(progress.remaining, missing)), len(missing)) if speed and training else None
    return (
        name,
        str(len(jobs)),
        str(done),
        millions(sum(job.tokens for job in training)) if training else "",
        f"{sum(job.flops for job in training):.2e}" if training else "",
        "" if seconds is None else clock(seconds),
    )


def millions(tokens: float) -> str:
    """Return tokens in millions.

    >>> millions(364_544), millions(12_300_000_000)
    ('0.365M', '12,300M')
    """
    text = f"{tokens / 1e6:.3g}"
    return f"{float(text):,.0f}M" if "e+" in text else f"{text}M"


def clock(seconds: float) -> str:
    """Return seconds as ``h:mm:ss``, or ``m:ss`` below an hour."""
    from phigrow.training.progress import clock

    return clock(seconds)
