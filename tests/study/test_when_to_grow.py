"""Studies of when to grow: sources of several ages and seeds, flat arms, parts of the text, halving, longer budgets."""

from __future__ import annotations

import math
from typing import Any

import pytest
from studies import content, loaded, written
from test_jobs import finish

from phigrow.errors import GrowthError
from phigrow.models.cost import count_cost
from phigrow.study import Study, load_study
from phigrow.study.jobs import StudyJobs
from phigrow.study.runner import final_keys, wanted
from phigrow.training import RunConfig

SOURCE, DST = content()["source"]["model"], content()["dst"]
SHALLOW = DST | {"num_hidden_layers": 1}
SOURCES: dict[str, Any] = {
    "wide": {"model": SOURCE, "steps": [40, 20], "seeds": [7, 8]},
    "shallow": {"model": SHALLOW, "steps": 30, "seed": 7},
}
STUDY: dict[str, Any] = {
    "source": None,
    "sources": SOURCES,
    "arms": {
        "scratch": {"longer": [80]},
        "tile": {"source": "wide"},
        "stack": {"method": "wr", "depth": "stack", "source": "shallow"},
        "continued": {"source": "wide", "ages": [{"steps": 40}], "same_text": True},
    },
    "flat": {"small": SOURCE, "other": {"model": SHALLOW, "budgets": [30]}},
    "text": {"source": [0, 1, 4], "arms": [1, 4, 4], "choose": [0, 1, 2], "report": [1, 2, 2]},
    "sweep": {"lr": [1e-3, 2e-3, 4e-3], "steps": [20, 40], "seeds": [90], "widen": 1},
    "train": {key: value for key, value in content()["train"].items() if key != "lr"},
    "seeds": [0, 1],
}
AGE = 40 * 16 * 64 / count_cost(SOURCE).parameters
STUDY["arms"]["continued"]["ages"] = [AGE]


def jobs_by_name(study: Study) -> dict[str, Any]:
    return {job.name: job for job in StudyJobs(study).all()}


def labels(study: Study) -> list[str]:
    return [arm.label for arm in study.arms]


def test_every_arm_starts_at_every_age_of_its_source_in_their_order(tmp_path):
    study = loaded(tmp_path, **STUDY)
    old, young = (f"{float(f'{age:.2g}'):g}" for age in (AGE, AGE / 2))
    assert labels(study) == ["scratch", f"tile@{old}", "stack", f"continued@{old}", f"tile@{young}", "small", "other"]
    tile = study.arms[1]
    assert (tile.source, tile.source_steps) == ("wide", 40)
    assert tile.age == pytest.approx(AGE, rel=1e-2)
    jobs = jobs_by_name(study)
    place = {name: number for number, name in enumerate(jobs)}
    assert all(place[name] < place[job.name] for job in jobs.values() for name in job.needs)
    folders = [job.folder for job in jobs.values() if not job.undecided and job.kind != "trunk"]
    assert len(set(folders)) == len(folders)
    starts = {name: job.needs for name, job in jobs.items() if job.kind == "expand" and "seed0" in name}
    assert starts == {
        f"tile@{old}/source7-seed0/start": ("source-wide/seed7/40",),
        f"tile@{old}/source8-seed0/start": ("source-wide/seed8/40",),
        "stack/seed0/start": ("source-shallow",),
        f"tile@{young}/source7-seed0/start": ("source-wide/seed7/20",),
        f"tile@{young}/source8-seed0/start": ("source-wide/seed8/20",),
    }


def test_the_ages_of_a_source_share_its_trunk(tmp_path):
    jobs = jobs_by_name(loaded(tmp_path, **STUDY))
    trunks = [job for name, job in jobs.items() if name.startswith("source-wide/seed7/trunk")]
    assert [(job.first, job.steps, job.keys["save_at"]) for job in trunks] == [(0, 16, [16]), (16, 32, [16, 32])]
    assert len({job.folder for job in trunks}) == 1
    young, old = jobs["source-wide/seed7/20"], jobs["source-wide/seed7/40"]
    assert (young.first, young.steps, old.first, old.steps) == (16, 20, 32, 40)
    assert old.keys["branch_from"] == str(trunks[0].folder)
    assert (old.keys["export"], old.keys["seed"], old.keys["arm"]) == ("export", 7, "source")
    assert jobs["source-shallow"].steps == 30


def test_arms_read_what_their_source_did_not_and_rates_are_chosen_on_other_text_than_figures(tmp_path):
    jobs = jobs_by_name(loaded(tmp_path, **STUDY))
    parts = {
        name: (job.keys["data_part"], job.keys["eval_part"])
        for name, job in jobs.items()
        if job.trains and not job.undecided
    }
    (continued,) = {part for name, (part, _) in parts.items() if "continued" in name for part in [tuple(part)]}
    assert continued == (0, 1, 4)
    assert parts["source-wide/seed7/40"] == parts["source-shallow"] == ([0, 1, 4], [1, 2, 2])
    assert parts["scratch/seed0/40"] == parts["small/seed0/trunk"] == ([1, 4, 4], [1, 2, 2])
    assert parts["scratch/sweep/lr0.001/seed90/20"] == ([1, 4, 4], [0, 1, 2])
    for job in jobs.values():
        if job.trains:
            RunConfig(**job.keys)
    assert not {90} & {job.seed for job in jobs.values() if job.kind == "end"}


def test_flat_arms_spend_what_the_destination_spends(tmp_path):
    study = loaded(tmp_path, **STUDY)
    jobs = jobs_by_name(study)
    small, other = study.arms[-2:]
    ratio = count_cost(DST, 64).training_flops / count_cost(SOURCE, 64).training_flops
    assert (small.budgets, other.budgets) == ((round(20 * ratio), round(40 * ratio)), (30,))
    end = jobs[f"small/seed0/{small.budgets[1]}"]
    trunk = jobs["small/seed0/trunk"]
    whole = jobs["scratch/seed0/trunk"].flops + jobs["scratch/seed0/40"].flops
    assert trunk.flops + end.flops == pytest.approx(whole, rel=0.02)
    assert end.keys["model"] == SOURCE
    assert end.keys["study"] == {"flat": True}
    lengths = [
        job.steps for name, job in jobs.items() if name.startswith("small/sweep/lr0.001/") and job.kind == "sweep"
    ]
    assert lengths == [small.budgets[0]]


def test_longer_budgets_come_last_and_make_the_trunk_longer(tmp_path):
    jobs = jobs_by_name(loaded(tmp_path, **STUDY))
    names = list(jobs)
    longer = ["scratch/seed0/trunk-longer", "scratch/seed0/80", "scratch/seed1/trunk-longer", "scratch/seed1/80"]
    assert names[-4:] == longer
    trunk, first = jobs["scratch/seed0/trunk-longer"], jobs["scratch/seed0/trunk"]
    assert (trunk.folder, trunk.first, trunk.steps) == (first.folder, first.steps, 64)
    assert trunk.keys["save_at"] == [16, 32, 64]
    assert jobs["scratch/seed0/80"].needs == ("scratch/seed0/trunk-longer",)


def test_the_first_seed_and_source_of_every_arm_come_before_the_others(tmp_path):
    names = [job.name for job in StudyJobs(loaded(tmp_path, **STUDY)).all() if job.kind == "end"]
    firsts = [name for name in names if "/seed0/" in name or "/source7-seed0/" in name]
    firsts = [name for name in firsts if not name.endswith("/80")]
    assert names[: len(firsts)] == firsts


def test_records_tell_source_and_age(tmp_path):
    study = loaded(tmp_path, **STUDY)
    jobs = StudyJobs(study).all()
    end = next(job for job in jobs if job.name.startswith("tile@") and "source8-seed1/40" in job.name)
    assert end.keys["study"] == {"source_seed": 8, "source_age": study.arms[1].age, "source": "wide"}
    for job in jobs:
        if job.kind == "source":
            finish(job, 3.25)
        if "/sweep/" in job.name and not job.undecided:
            finish(job, 3.0 if job.keys["lr"] == 2e-3 else 4.0)
    jobs = StudyJobs(study).all()
    for job in jobs:
        if "/sweep/" in job.name and not job.undecided:
            finish(job, 3.0 if job.keys["lr"] == 2e-3 else 4.0)
    jobs = StudyJobs(study).all()
    end = next(job for job in jobs if job.name == end.name)
    keys = final_keys(study, jobs, end)
    assert keys["study"]["source_loss"] == 3.25
    assert keys["study"]["side_by_side"] == study.layout().workers
    assert keys["lr"] == 2e-3
    assert keys["lr_chosen_by"]["edge"] is None
    assert keys["lr_chosen_by"]["losses"]["0.002"] == [3.0, 3.0]
    RunConfig(**keys)


def test_halving_adds_runs_as_losses_come_in_and_a_better_rate_moves_the_runs(tmp_path):
    study = loaded(tmp_path, **STUDY)
    before = StudyJobs(study).all()
    cost = sum(job.tokens for job in before)
    tried = [job.name for job in before if job.name.startswith("scratch/sweep/") and job.kind == "sweep"]
    assert tried[:3] == [f"scratch/sweep/lr{rate}/seed90/20" for rate in ("0.001", "0.002", "0.004")]
    assert len(tried) == 3 + 2  # two stand for the rates that go on
    assert [job.undecided for job in before if job.name in tried] == [False] * 3 + [True] * 2
    for job in before:
        if job.name in tried[:3] or ("scratch/sweep" in job.name and job.kind == "trunk"):
            finish(job, {1e-3: 3.5, 2e-3: 3.0, 4e-3: 3.1}[job.keys["lr"]])
    halved = StudyJobs(study).all()
    now = [job for job in halved if job.name.startswith("scratch/sweep/") and job.kind == "sweep"]
    assert [job.name.split("/")[2] for job in now if job.steps == 40] == ["lr0.002", "lr0.004"]
    assert sum(job.tokens for job in halved) == pytest.approx(cost, rel=1e-9)
    assert not {job.name for job in wanted(halved)} & {job.name for job in now if job.steps == 20}
    for job in now:
        finish(job, {1e-3: 3.5, 2e-3: 3.0, 4e-3: 2.9}[job.keys["lr"]])
    beyond = [job.name for job in StudyJobs(study).all() if job.name.startswith("scratch/sweep/lr0.008")]
    assert len(beyond) == 4
    for job in StudyJobs(study).all():
        if job.name in beyond:
            finish(job, 2.95)
    run = jobs_by_name(study)["scratch/seed0/40"]
    assert run.keys["lr"] == 4e-3
    assert math.isclose(run.keys["lr_chosen_by"]["losses"]["0.008"][1], 2.95)
    for job in StudyJobs(study).all():
        if job.name in beyond:
            finish(job, 2.5)
    moved = jobs_by_name(study)["scratch/seed0/40"]
    assert (moved.keys["lr"], moved.keys["lr_chosen_by"]["edge"]) == (8e-3, "high")
    assert moved.folder != run.folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": SOURCES["wide"]}, r"source and sources are both set"),
        ({"sources": None}, r"the study has no 'source'"),
        ({"arms": {"scratch": None, "tile": None}}, r"the arm names no source\n.*\n  what to do: .*wide, shallow"),
        ({"arms": {"scratch": None, "tile": {"source": "wyde"}}}, r"no source 'wyde'\n.*\n  what to do: .*wide"),
        ({"arms": {"scratch": None, "tile": {"source": "wide", "ages": [5]}}}, r"has no age of 5\.\d* tokens per par"),
        ({"arms": {"scratch": {"ages": [5]}}}, r"ages is set, but the arm starts from scratch"),
        ({"text": {"arms": [3, 3, 4]}}, r"\[3, 3, 4\] is no part of the text\n  where: arms of text in"),
        ({"text": {"arms": "most"}}, r"'most' is no part of the text"),
        ({"flat": {"a/b": SOURCE}}, r"'a/b' is not a valid name"),
        ({"flat": {"scratch": SOURCE}}, r"two arms are called 'scratch'"),
        ({"budgets": {"tokens": [1e5], "tokens_per_parameter": [1]}}, r"give tokens: \[...\] or tokens_per_parameter"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    with pytest.raises(GrowthError, match=message):
        load_study(written(tmp_path, **STUDY | changes))


def test_a_source_of_the_constant_phase_is_trained_alone(tmp_path):
    arms = {"scratch": None, "tile-constant": {"method": "tile", "source": "wide", "constant": True, "state": "scale"}}
    jobs = jobs_by_name(loaded(tmp_path, **STUDY | {"arms": arms, "flat": None}))
    source = jobs["source-wide/seed7/constant-40"]
    assert (source.keys["decay"], source.steps, source.first, source.keeps) == (0, 40, 0, True)
    end = next(job for name, job in jobs.items() if name.endswith("source7-seed0/40") and job.kind == "end")
    assert end.keys["study"]["source_constant"] is True
    assert end.start == source.folder / "export"
