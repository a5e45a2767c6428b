"""Results of a study: the report over its decayed ends, and the outcome of its sweeps of the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.output import check_file, json_keys
from phigrow.study import progress
from phigrow.study.automatic import FILE as CHOICES
from phigrow.study.automatic import NAMES
from phigrow.study.job import Job
from phigrow.study.jobs import StudyJobs
from phigrow.study.settings import Study
from phigrow.study.table import millions


class NoBaselineYetError(GrowthError):
    """No run of the baseline has ended, so there is nothing to compare yet."""


def write_results(study: Study, jobs: list[Job], say: Callable[[str], None]) -> Path:
    """Compare the decayed ends that are done, write the report, and print its findings.

    Returns:
        The folder of the report.

    Raises:
        NoBaselineYetError: the baseline has no end yet.
        GrowthError: the runs cannot be compared, or the report cannot be written.
    """
    from phigrow.measure import report
    from phigrow.measure.wording import finding_lines

    sweeps = sweep_results(study, jobs)
    if sweeps is not None:
        atomic_json(study.out / "sweep.json", sweeps)
        for line in sweep_lines(sweeps):
            say(line)
    ends = [job for job in jobs if job.kind == "end" and progress.done(job) is not None]
    # Ends of a seed that the baseline does not have yet cannot be compared, and the report would refuse them.
    seeds = {job.seed for job in ends if job.arm is not None and job.arm.name == study.baseline}
    folders = [job.folder for job in ends if job.seed in seeds]
    if not folders:
        raise NoBaselineYetError(
            f"there is no report yet, because no run of the baseline {study.baseline} has ended",
            where=str(study.out),
            fix=f"run the study, or only its baseline with --only {study.baseline}",
        )
    comparison = report(folders, study.out / "report", study.baseline)
    for line in finding_lines(comparison):
        say(line)
    return study.out / "report"


def check_result_files(out: Path, *, sweeps: bool = True) -> None:
    """Check, before anything is trained, that the results may be written into the folder of a study or of stages.

    Args:
        out: the folder.
        sweeps: the results of sweeps are among them.

    Raises:
        GrowthError: a file of the same name is there, and phigrow did not write it.
    """
    from phigrow.measure.report_files import check_out

    if sweeps:
        check_file(out / "sweep.json", lambda file: "arms" in json_keys(file), "the results of a sweep", "--out")
    check_file(out / CHOICES, lambda file: bool(json_keys(file) & set(NAMES)), "the choices of a study", "--out")
    check_out(out / "report")


def sweep_results(study: Study, jobs: list[Job]) -> dict[str, Any] | None:
    """Return the outcome and the cost of every arm's sweep; None for a study without one."""
    if study.sweep is None:
        return None
    arms: dict[str, Any] = {}
    all_jobs = StudyJobs(study)
    for arm in study.arms:
        rates = all_jobs.rates(arm)
        if rates.best is None:
            continue
        spent = [job for job in jobs if job.arm == arm and "/sweep/" in job.name and not job.undecided]
        record = rates.record(study.sweep)
        arms[arm.label] = {
            "lr": rates.best,
            "heldout_loss": {f"{rate:g}": losses[-1] for rate, losses in sorted(rates.losses.items())},
            "at_edge": rates.edge is not None,
            "tokens": sum(job.tokens for job in spent),
            "flops": sum(job.flops for job in spent),
        } | ({"lengths": record["losses"]} if study.sweep.halves else {})
    return {**study.sweep.record(), "arms": arms}


def sweep_lines(sweeps: dict[str, Any]) -> list[str]:
    """Return one sentence about each sweep."""
    lines = []
    for name, outcome in sweeps["arms"].items():
        losses = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in outcome["heldout_loss"].items())
        edge = (
            "; it is at the edge of the rates that were tried, so a better one may lie beyond"
            if outcome["at_edge"]
            else ""
        )
        lines.append(
            f"{name}: learning rate {outcome['lr']:g} of a sweep ({losses}){edge}; "
            f"the sweep's {millions(outcome['tokens'])} tokens are in no cost"
        )
    return lines
