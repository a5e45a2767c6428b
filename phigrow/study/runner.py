"""Run what is missing of a study: as many runs at a time as the machine has places, each complete or not there."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.lock import locked
from phigrow.files.output import make_folder, writing
from phigrow.records.readers.phigrow import last_record
from phigrow.study import progress
from phigrow.study.automatic import study_choices, with_choices
from phigrow.study.job import Job
from phigrow.study.jobs import StudyJobs
from phigrow.study.launch import Ranks, still_running
from phigrow.study.learning import learned_maps
from phigrow.study.results import write_results
from phigrow.study.settings import Study
from phigrow.study.table import Display
from phigrow.training.automatic import Choices

LOCK = ".lock"
POLL_SECONDS = 0.2
PATIENCE = 60.0
"""Seconds to wait for the processes of a former command that was killed."""


@dataclass
class Outcome:
    """Outcome of a study: failed jobs with their errors, jobs that needed those, and the folder of the report."""

    failed: dict[str, GrowthError] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)
    report: Path | None = None
    why_no_report: str = ""


def run_study(
    study: Study,
    *,
    only: Collection[str] = (),
    seeds: Collection[int] = (),
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run what is missing of a study, and write the report of what there is.

    A job that fails stops the jobs that need it, and no other. Run again, or after a kill, it goes on where it stopped.

    Args:
        study: from `load_study`.
        only: names of arms; empty: all.
        seeds: of the study's; empty: all.
        say: receives what is said outside of the live table.

    Raises:
        GrowthError: an unknown arm or seed; another command runs this study.
    """
    work = _Work(study, only, seeds)
    with alone(study.out):
        outcome = Outcome()
        trains = any(job.trains for job in wanted(work.jobs))
        choices = study_choices(study, work.everything, say) if trains else {}
        with (
            Display(study, work.everything, work.jobs, say) as display,
            Crew(study, work.jobs, display.tell, choices) as crew,
        ):
            _run_all(work, crew, display, outcome)
        try:
            outcome.report = write_results(study, work.everything, say)
        except GrowthError as error:
            outcome.why_no_report = str(error)
    return outcome


class _Work:
    """Jobs of a study, all of them and those that were asked for; both follow from the rates that were tried so far."""

    def __init__(self, study: Study, only: Collection[str], seeds: Collection[int]) -> None:
        self.study, self.only, self.seeds = study, only, seeds
        self._source = StudyJobs(study)
        self.update()

    def update(self) -> None:
        """Read anew which rates were tried."""
        self.everything = self._source.all()
        self.jobs = chosen(self.study, self.everything, self.only, self.seeds)


def _run_all(work: _Work, crew: Crew, display: Display, outcome: Outcome) -> None:
    waiting = wanted(work.jobs)
    running: dict[str, Job] = {}
    while waiting or running:
        ahead = {*running, *(job.name for job in waiting)}
        for job in list(waiting):
            if any(name in outcome.failed or name in outcome.blocked for name in job.needs):
                outcome.blocked.append(job.name)
                waiting.remove(job)
            elif not job.undecided and crew.has_place(job) and not ahead.intersection(job.needs):
                display.start(job)
                waiting.remove(job)
                running[job.name] = job
                crew.begin(job)
        time.sleep(POLL_SECONDS)
        display.refresh()
        for job, error in crew.ended():
            del running[job.name]
            if error is not None:
                outcome.failed[job.name] = error
                display.fail(job, error)
                continue
            display.finish(job)
            prune_trunk(work.jobs, job)
            if job.kind == "sweep" or (work.study.refine and job.kind == "end"):
                work.update()
                display.update(work.everything, work.jobs)
                crew.jobs = work.jobs
                known = {*running, *outcome.failed, *outcome.blocked}
                waiting = [job for job in wanted(work.jobs) if job.name not in known]


@dataclass
class _Place:
    """A part of the machine, and the training run on it."""

    ranks: Ranks
    job: Job | None = None
    began: float = 0.0
    flops: float = 0.0
    former: float = 0.0


class Crew:
    """Workers: one place for each run that is trained side by side, and one thread for other jobs; a context."""

    def __init__(
        self, study: Study, jobs: list[Job], say: Callable[[str], None], choices: Choices | None = None
    ) -> None:
        self.study, self.jobs, self.choices = study, jobs, choices or {}
        chosen = study.layout()
        # The places start together: one of them says so.
        self.places = [
            _Place(Ranks(chosen.ranks, place, chosen.workers, say=None if place else say))
            for place in range(chosen.workers)
        ]
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._made: tuple[Job, Future[None]] | None = None
        self._refused: list[tuple[Job, GrowthError]] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for place in self.places:  # all are asked before one is waited for
            place.ranks.ask_to_stop()
        for place in self.places:
            place.ranks.__exit__(*error)
        self._thread.shutdown(cancel_futures=True)

    def has_place(self, job: Job) -> bool:
        """Return True if a job could begin now."""
        return any(place.job is None for place in self.places) if job.trains else self._made is None

    def begin(self, job: Job) -> None:
        """Begin a job; what is wrong with it is told by `ended`."""
        if not job.trains:
            self._made = job, self._thread.submit(_make, self.study, self.jobs, job)
            return
        place = next(place for place in self.places if place.job is None)
        try:
            wait_for_former(job.folder)
            keys = with_choices(final_keys(self.study, self.jobs, job), self.choices)
            place.flops, place.former = progress.remaining(job), _former_seconds(job, keys)
            place.began = time.monotonic()
            place.ranks.begin(keys)
            place.job = job
        except GrowthError as error:
            self._refused.append((job, error))

    def ended(self) -> Iterator[tuple[Job, GrowthError | None]]:
        """The jobs that have ended since the last call, and why one failed."""
        yield from self._refused
        self._refused = []
        if self._made is not None and self._made[1].done():
            (job, future), self._made = self._made, None
            try:
                future.result()
                yield job, None
            except GrowthError as error:
                yield job, error
        for place in self.places:
            if (trained := place.job) is None:
                continue
            try:
                if place.ranks.ended():
                    place.job = None
                    _finish(trained, place)
                    yield trained, None
            except GrowthError as error:
                place.job = None
                yield trained, error


def chosen(study: Study, jobs: list[Job], only: Collection[str], seeds: Collection[int]) -> list[Job]:
    """The jobs of some arms and seeds, and what these need.

    Raises:
        GrowthError: an arm or a seed that the study does not have.
    """
    for name in only:
        if name not in (names := [arm.name for arm in study.arms]):
            raise GrowthError(
                f"there is no arm {name!r}", where=f"study {study.name}", fix=f"choose one of {', '.join(names)}"
            )
    for seed in seeds:
        if seed not in study.seeds:
            raise GrowthError(
                f"there is no seed {seed}", where=f"study {study.name}", fix=f"choose one of {list(study.seeds)}"
            )
    ends = {
        job.name
        for job in jobs
        if job.kind == "end"
        and job.arm is not None
        and (not only or job.arm.name in only)
        and (not seeds or job.seed in seeds)
    }
    for job in reversed(jobs):
        if job.name in ends:
            ends |= set(job.needs)
    return [job for job in jobs if job.name in ends]


def wanted(jobs: list[Job]) -> list[Job]:
    """Return the missing jobs that are an end, or that another missing job needs, in their order."""
    needed: set[str] = set()
    missing = []
    for job in reversed(jobs):  # each comes after those it needs
        if (job.kind == "end" or job.name in needed) and progress.done(job) is None:
            needed.update(job.needs)
            missing.append(job)
    return missing[::-1]


def _make(study: Study, jobs: list[Job], job: Job) -> None:
    """The data, a start, or the optimizer's state for one."""
    if job.kind == "data":
        from phigrow.corpus import prepare

        assert isinstance(study.data, dict)
        prepare(**{"ref": "embedded", **study.data, "out": job.folder, "progress": False})
        return
    from phigrow.expansion.expand import OutputSpec, expand_checkpoint
    from phigrow.growth.growth_spec import GrowthSpec

    assert job.arm is not None
    assert job.start is not None
    source = job.start
    if job.kind == "state":
        from phigrow.expansion.grow_optimizer import grow_optimizer

        start = next(other for other in jobs if other.kind == "expand" and other.name in job.needs)
        grow_optimizer(source.parent, start.folder, job.folder, state=str(job.arm.state))
        return
    make_folder(job.folder.parent)
    growth = job.arm.spec(job.seed)
    if job.arm.learn is not None:
        data = study.data if isinstance(study.data, Path) else next(o for o in jobs if o.kind == "data").folder
        growth = GrowthSpec(job.arm.method, seed=job.seed, maps=learned_maps(study, job, source, data))
    expand_checkpoint(source, study.dst, growth, OutputSpec(job.folder, dtype="float32"))


def _finish(job: Job, place: _Place) -> None:
    if progress.finish(job, time.monotonic() - place.began, place.flops, place.former) is None:
        last = last_record(job.folder, "step") or {"step": 0}
        raise GrowthError(
            f"training stopped at step {last['step']} of {job.steps}",
            where=str(job.folder),
            fix="run the same command again: it resumes",
        )


def final_keys(study: Study, jobs: list[Job], job: Job) -> dict[str, Any]:
    """Return the keys of a training run, with those that are known only when it starts."""
    keys = dict(job.keys, universal=True)
    if study.sweep and job.kind in ("trunk", "end") and job.arm is not None and "lr" not in keys:
        raise GrowthError(
            f"every learning rate of the sweep diverged for {job.arm.label}",
            where=f"sweep of study {study.name}",
            fix="add smaller rates to lr",
        )
    facts = dict(keys.get("study", {}), side_by_side=study.layout().workers)
    for other in jobs:
        if other.kind == "source" and job.start == other.folder / "export" and (ended := progress.done(other)):
            facts["source_loss"] = ended["heldout_loss"]
    keys["study"] = facts
    if "branch_from" in keys and job.first not in progress.saved_steps(Path(keys["branch_from"])):
        # A trunk that was longer before this budget was asked for. Alone the run has the same losses, at more cost.
        del keys["branch_from"]
    return keys


def _former_seconds(job: Job, keys: dict[str, Any]) -> float:
    """Seconds of training that a run has in its records, or in those of its trunk at the step where it branches."""
    if (last := last_record(job.folder, "step")) is None and "branch_from" in keys:
        last = last_record(Path(keys["branch_from"]), "step", at_most=job.first)
    return float(last["seconds"]) if last else 0.0


def prune_trunk(jobs: list[Job], job: Job) -> None:
    """Once all ends of a trunk are done, delete its checkpoints but the last, from which it could be made longer."""
    for trunk in [other for other in jobs if other.kind == "trunk" and other.name in job.needs]:
        if all(progress.done(other) is not None for other in jobs if trunk.name in other.needs):
            for step in progress.saved_steps(trunk.folder)[:-1]:
                shutil.rmtree(trunk.folder / "checkpoints" / f"step-{step}")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make a folder, if it is not there, and hold it for one command; a context.

    Raises:
        GrowthError: another command holds it, or it cannot be written.
    """
    make_folder(out)
    with contextlib.ExitStack() as held:
        with writing(out):
            fix = "wait for it, or give another --out"
            held.enter_context(locked(out / LOCK, "another command runs this study", where=out, fix=fix))
        yield


def wait_for_former(folder: Path) -> None:
    """Wait for the processes of a command on this run that was killed.

    Raises:
        GrowthError: they do not end.
    """
    until = time.monotonic() + PATIENCE
    while still_running(folder):
        if time.monotonic() > until:
            raise GrowthError(
                "processes of an earlier command still train this run", where=str(folder), fix="end them, or wait"
            )
        time.sleep(0.5)
