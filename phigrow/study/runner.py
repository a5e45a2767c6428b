"""Run the missing jobs of a study, as many side by side as the machine has places."""

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
from phigrow.study.inputs import Ledger, check_inputs, check_method_files, result_of, results_of
from phigrow.study.job import Job
from phigrow.study.jobs import StudyJobs
from phigrow.study.launch import GROUP, Ranks, still_running
from phigrow.study.learning import learned_maps
from phigrow.study.places import inputs_of_study, keep_places, moved_lines
from phigrow.study.reading import check_text
from phigrow.study.results import NoBaselineYetError, check_result_files, write_results
from phigrow.study.settings import Study
from phigrow.study.table import Display
from phigrow.training.automatic import Choices

LOCK = ".lock"
POLL_SECONDS = 0.2
PATIENCE = 60.0
"""Seconds to wait for the processes of an earlier command that was killed."""


@dataclass
class Outcome:
    """Outcome of a study.

    Attributes:
        failed: failed jobs with their errors.
        blocked: jobs that needed a failed job.
        stale: finished ends of arms with a failed job. The report still has them.
        report: folder of the report; None if there is none.
        why_no_report: the error instead of the report.
        old_report: folder of a report that an earlier command wrote, where this one wrote none.
        waits: the report waits only for a run of the baseline, which no one asked for.
    """

    failed: dict[str, GrowthError] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    report: Path | None = None
    why_no_report: str = ""
    old_report: Path | None = None
    waits: bool = False

    @property
    def succeeded(self) -> bool:
        """True if all requested jobs are done, and the report was written or waits for jobs that were not requested."""
        return not self.failed and not self.blocked and (self.report is not None or self.waits)


def run_study(
    study: Study,
    *,
    only: Collection[str] = (),
    seeds: Collection[int] = (),
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run the missing jobs of a study, and write a report about all finished runs.

    A failed job stops only the jobs that need it. A second call, or one after a kill, continues where the first
    stopped.

    Args:
        study: the result of `load_study`.
        only: names of arms to run; empty for all.
        seeds: seeds to run; empty for all.
        say: receives messages that are not part of the live table, line by line.

    Raises:
        GrowthError: an arm or a seed is unknown, the text does not exist, another command runs this study, or an input
            was replaced since results were made of it.
    """
    work = _Work(study, only, seeds)
    check_text_of(study, wanted(work.jobs))
    with alone(study.out):
        check_result_files(study.out)
        outcome = Outcome()
        ledger = check_inputs(study.out, results_of(study, work.everything), say)
        ledger.write()
        for job in work.everything:
            if job.kind == "expand" and job.arm is not None and job.arm.method_files:
                starts = job.folder.parent.glob("*/")
                check_method_files(starts, job.arm.method_files, f"{job.name} of study {study.name}")
        keep_places(study.out, inputs_of_study(study), study.former_places)
        for line in moved_lines(study.former_places):
            say(line)
        trains = any(job.trains for job in wanted(work.jobs))
        choices = study_choices(study, work.everything, say) if trains else {}
        with (
            Display(study, work.everything, work.jobs, say) as display,
            Crew(study, work.jobs, display.tell, choices, ledger) as crew,
        ):
            _run_all(work, crew, display, outcome)
        outcome.stale = stale_ends(work.everything, {*outcome.failed, *outcome.blocked})
        try:
            outcome.report = write_results(study, work.everything, say)
        except GrowthError as error:
            outcome.why_no_report, outcome.waits = str(error), isinstance(error, NoBaselineYetError)
            former = study.out / "report"
            outcome.old_report = former if (former / "report.html").is_file() else None
    return outcome


def stale_ends(jobs: list[Job], missing: set[str]) -> list[str]:
    """Return the finished ends of arms that have a job which failed or could not begin."""
    arms = {job.arm.label for job in jobs if job.arm is not None and job.name in missing}
    ends = [job for job in jobs if job.kind == "end" and job.arm is not None and job.arm.label in arms]
    return [job.name for job in ends if progress.done(job) is not None]


class _Work:
    """All jobs of a study, and the requested ones. Both depend on the results of the sweeps so far."""

    def __init__(self, study: Study, only: Collection[str], seeds: Collection[int]) -> None:
        self.study, self.only, self.seeds = study, only, seeds
        self._source = StudyJobs(study)
        self.update()

    def update(self) -> None:
        """Read the results of the sweeps, and update the jobs."""
        self.everything = self._source.all()
        self.jobs = chosen(self.study, self.everything, self.only, self.seeds)


def check_text_of(study: Study, jobs: list[Job]) -> None:
    """Refuse a study whose text has to be packed and does not exist.

    Raises:
        GrowthError: as `check_text`.
    """
    for job in jobs:
        if job.kind == "data":
            check_text(study.data, job.folder)


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
        self,
        study: Study,
        jobs: list[Job],
        say: Callable[[str], None],
        choices: Choices | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.study, self.jobs, self.choices = study, jobs, choices or {}
        self.ledger = ledger or Ledger(study.out)
        chosen = study.layout()
        # All places start at the same time, so only the first prints a message.
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
        for place in self.places:  # ask all to stop before waiting for one
            place.ranks.ask_to_stop()
        for place in self.places:
            place.ranks.__exit__(*error)
        self._thread.shutdown(cancel_futures=True)

    def has_place(self, job: Job) -> bool:
        """Return True if a job could begin now."""
        return any(place.job is None for place in self.places) if job.trains else self._made is None

    def begin(self, job: Job) -> None:
        """Begin a job; `ended` reports its errors."""
        try:
            self.ledger.begin(result_of(self.study, job))
        except GrowthError as error:
            self._refused.append((job, error))
            return
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
        """Yield the jobs that have ended since the last call, each with its error, or None."""
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
    """Return the jobs of some arms and seeds, and the jobs that these need.

    Raises:
        GrowthError: the study does not have an arm or a seed of this name.
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
    """Do a job that does not train: pack the data, expand a source, or grow an optimizer's state."""
    if job.kind == "data":
        from phigrow.corpus import prepare

        assert isinstance(study.data, dict)
        prepare(**study.data | {"out": job.folder, "progress": False})
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
    expand_checkpoint(source, study.model_of(job.arm), growth, OutputSpec(job.folder, dtype="float32"))


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
            fix="add smaller rates to lr of the sweep",
        )
    properties = dict(keys.get("study", {}), side_by_side=study.layout().workers)
    for other in jobs:
        if other.kind == "source" and job.start == other.folder / "export" and (ended := progress.done(other)):
            properties["source_loss"] = ended["heldout_loss"]
    keys["study"] = properties
    if "branch_from" in keys and job.first not in progress.saved_steps(Path(keys["branch_from"])):
        # The trunk was already longer when this budget was added. A run without it has the same losses at more cost.
        del keys["branch_from"]
    return keys


def _former_seconds(job: Job, keys: dict[str, Any]) -> float:
    """Return the seconds of training in a run's records; before its first record, those of its trunk at its branch."""
    if (last := last_record(job.folder, "step")) is None and "branch_from" in keys:
        last = last_record(Path(keys["branch_from"]), "step", at_most=job.first)
    return float(last["seconds"]) if last else 0.0


def prune_trunk(jobs: list[Job], job: Job) -> None:
    """Delete a trunk's checkpoints after all of its ends are done, except the last, which a longer budget needs."""
    for trunk in [other for other in jobs if other.kind == "trunk" and other.name in job.needs]:
        if all(progress.done(other) is not None for other in jobs if trunk.name in other.needs):
            for step in progress.saved_steps(trunk.folder)[:-1]:
                shutil.rmtree(trunk.folder / "checkpoints" / f"step-{step}")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make a folder if there is none, and lock it for this command; a context.

    Raises:
        GrowthError: another command has locked it, or it cannot be written.
    """
    make_folder(out)
    with contextlib.ExitStack() as held:
        with writing(out):
            fix = "wait for it, or give another --out"
            held.enter_context(locked(out / LOCK, "another command runs this study", where=out, fix=fix))
        yield


def wait_for_former(folder: Path) -> None:
    """Wait for processes that a killed command left on this run.

    Raises:
        GrowthError: they do not end.
    """
    until = time.monotonic() + PATIENCE
    while still_running(folder):
        if time.monotonic() > until:
            raise GrowthError(
                "processes of an earlier command still train this run",
                where=str(folder),
                fix=f"wait until they end, or end the process group in {folder / GROUP}",
            )
        time.sleep(0.5)
