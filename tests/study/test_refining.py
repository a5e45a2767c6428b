"""Studies with `refine: true`: one more end for each run of an arm, where its cost was read between two ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from studies import loaded
from test_jobs import finish

from phigrow.errors import GrowthError
from phigrow.measure import load_run
from phigrow.study import Study, progress
from phigrow.study.job import Job
from phigrow.study.jobs import StudyJobs
from phigrow.study.runner import chosen, final_keys, wanted

BUDGETS = [20, 40, 80]
REFINED: dict[str, Any] = {"refine": True, "budgets": BUDGETS, "seeds": [0, 1]}
SPEED = {"scratch": 1.0, "tile": 1.4, "lossless": 0.5}


def law(steps: float) -> float:
    return 2.5 + 2.0 * steps**-0.3


def ends(study: Study) -> list[Job]:
    return [job for job in StudyJobs(study).all() if job.kind == "end"]


def end_all(study: Study, jobs: list[Job]) -> None:
    """Leave records of finished runs, whose losses follow a power law."""
    for job in jobs:
        assert job.arm is not None
        finish(job, loss := law(SPEED[job.arm.name] * job.steps))
        run = {
            "type": "run", "arm": job.arm.name, "seed": job.seed, "growth": None, "parameters": 1000,
            "config": {"steps": job.steps, "schedule": "wsd"}, "study": job.keys.get("study", {}),
        }  # fmt: skip
        spent = {"tokens": job.steps * study.batch_tokens, "flops": 1e9 * job.steps, "seconds": float(job.steps)}
        evals = [
            {"type": "eval", "step": 0, "tokens": 0, "flops": 0, "seconds": 0, "loss": 5.0},
            {"type": "eval", "step": job.steps, **spent, "loss": loss},
        ]
        (job.folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [run, *evals]))


def test_ends_are_refined_once_all_others_are_done(tmp_path):
    study = loaded(tmp_path, **REFINED)
    first = ends(study)
    assert sorted({job.steps for job in first}) == BUDGETS
    (last,) = [job for job in first if job.name == "tile/seed1/80"]
    end_all(study, [job for job in first if job != last])
    assert ends(study) == first  # one end of tile is missing
    end_all(study, [last])

    refined = [job for job in ends(study) if job not in first]
    # 80 steps of scratch are 80 / 1.4 of tile. lossless is too slow to meet the target, and has none.
    assert [(job.name, job.steps, job.first) for job in refined] == [("tile/seed0/57", 57, 0), ("tile/seed1/57", 57, 0)]
    job = refined[0]
    assert job.keys["study"] == {"source_seed": 0, "source_age": 0.699, "refined": True}
    assert "branch_from" not in job.keys
    assert (job.keys["steps"], job.keys["decay"], job.folder.name) == (57, 11, "57-decay11")
    assert job.tokens == 57 * study.batch_tokens
    everything = StudyJobs(study).all()
    assert [other.name for other in wanted(everything) if other.kind == "end"] == ["tile/seed0/57", "tile/seed1/57"]
    assert final_keys(study, everything, job)["study"]["refined"] is True
    assert [other.name for other in chosen(study, everything, ["tile"], [1]) if other.steps == 57] == ["tile/seed1/57"]

    # Done, they do not move the step at which they stand.
    end_all(study, refined)
    assert [other for other in ends(study) if other not in first] == refined
    assert all(progress.done(other) is not None for other in ends(study))
    assert load_run(job.folder).is_refined


def test_no_end_is_refined_unless_asked_for(tmp_path):
    study = loaded(tmp_path, **REFINED | {"refine": False})
    first = ends(study)
    end_all(study, first)
    assert ends(study) == first


def test_an_end_close_to_the_crossing_is_near_enough(tmp_path, monkeypatch):
    monkeypatch.setitem(SPEED, "tile", 2.01)  # meets the target at 39.8 steps
    study = loaded(tmp_path, **REFINED)
    first = ends(study)
    end_all(study, first)
    assert ends(study) == first
    monkeypatch.setitem(SPEED, "tile", 2.1)  # at 38.1
    end_all(study, first)
    assert {job.steps for job in ends(study) if job not in first} == {38}


def test_records_that_cannot_be_read_leave_the_study_running(tmp_path):
    study = loaded(tmp_path, **REFINED)
    first = ends(study)
    end_all(study, first)
    (damaged,) = [job for job in first if job.name == "tile/seed0/40"]
    (damaged.folder / "records.jsonl").write_text("nothing\n")
    assert ends(study) == first


def test_refine_must_be_a_truth_value(tmp_path):
    with pytest.raises(GrowthError, match=r"refine is 3\n.*\n.*give refine: true or refine: false"):
        loaded(tmp_path, refine=3)
