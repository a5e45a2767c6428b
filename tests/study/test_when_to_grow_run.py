"""A study of when to grow, for real: ages, parts of the text, halving, a flat model, a longer budget, a report."""

from __future__ import annotations

import json
from typing import Any

import pytest
from studies import content, loaded

from phigrow.measure import load_run
from phigrow.models.cost import count_cost
from phigrow.study import progress, run_study
from phigrow.study.jobs import StudyJobs

pytestmark = [pytest.mark.slow, pytest.mark.launch]

SOURCE = content()["source"]["model"]

AGE = 16 * 8 * 64 / count_cost(SOURCE).parameters
STUDY: dict[str, Any] = {
    "source": {"model": SOURCE, "steps": [8, 16], "seed": 7, "train": {"lr": 5e-3}},
    "arms": {"scratch": {"longer": [20]}, "tile": {"ages": [AGE]}},
    "flat": {"small": {"model": SOURCE, "budgets": [6]}},
    "text": {"source": [0, 1, 2], "arms": [1, 2, 2], "choose": [0, 1, 2], "report": [1, 2, 2]},
    "sweep": {"lr": [2e-3, 8e-3], "steps": [6, 10], "seeds": [90], "widen": 0},
    "train": {
        "batch": 8, "warmup": 2, "eval_every": 0, "eval_at": [], "eval_blocks": 16, "log_every": 1, "dtype": "fp32",
    },
    "budgets": [6, 10],
    "workers": 2,
    "ranks": 1,
}  # fmt: skip


def test_a_study_of_two_ages_runs_to_its_report(tmp_path):
    study = loaded(tmp_path, **STUDY)
    lines: list[str] = []
    outcome = run_study(study, say=lines.append)
    assert outcome.failed == {}, lines
    assert outcome.report is not None, outcome.why_no_report
    jobs = {job.name: job for job in StudyJobs(study).all()}
    ends = [job for job in jobs.values() if job.kind == "end"]
    assert all(progress.done(job) is not None for job in ends)
    assert len(ends) == 3 + 2 + 1
    rates = json.loads((study.out / "sweep.json").read_text())["arms"]
    assert {name: len(arm["lengths"]) for name, arm in rates.items()} == {arm.label: 2 for arm in study.arms}
    for arm in rates.values():
        lengths = arm["lengths"].values()
        assert sorted(map(len, lengths)) == [1, 2]  # the better one went on
        assert arm["lr"] == float(next(rate for rate, losses in arm["lengths"].items() if len(losses) == 2))

    # The ages of the source: each as if it had been trained alone, on its own text, decayed at its end.
    (old,) = (job for job in jobs.values() if job.name == "source/seed7/16")
    run = load_run(old.folder)
    assert run.steps["step"].tolist() == list(range(1, 17))
    assert run.steps["lr"][-1] < run.steps["lr"].max()
    parameters = count_cost(SOURCE).parameters
    tile = load_run(next(job for job in ends if job.arm is not None and job.arm.source_steps == 16).folder)
    facts = tile.meta["study"]
    assert facts["source_seed"] == 7
    assert facts["source_age"] == pytest.approx(16 * 8 * 64 / parameters, rel=5e-3)
    assert facts["source_loss"] == pytest.approx(float(run.evals["loss"][-1]))
    assert facts["side_by_side"] == 2
    assert tile.meta["source_tokens"] == 16 * 8 * 64
    assert tile.meta["config"]["data_part"] == [1, 2, 2]

    # The longer budget went on from the trunk: the same losses as the shorter ones up to where they branch.
    short, long = (load_run(jobs[f"scratch/seed0/{budget}"].folder) for budget in (10, 20))
    assert short.steps["loss"].tolist()[:8] == long.steps["loss"].tolist()[:8]
    assert len(long.steps["loss"]) == 20
    report = json.loads((outcome.report / "report.json").read_text())
    assert "small" in json.dumps(report)
    assert run_study(study, say=lines.append).failed == {}  # nothing is left to do
