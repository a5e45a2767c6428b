"""Sources that are grown from other sources: depth first and width later, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import content, loaded

from phigrow.checkpoints.provenance import read_provenance
from phigrow.errors import GrowthError
from phigrow.measure import load_run
from phigrow.models.cost import count_cost
from phigrow.study import run_study
from phigrow.study.job import Job
from phigrow.study.jobs import StudyJobs
from phigrow.training import RunConfig

SOURCE, DST = content()["source"]["model"], content()["dst"]
LAYERS = DST["num_hidden_layers"]
DEEP = SOURCE | {"num_hidden_layers": LAYERS}
STUDY: dict[str, Any] = {
    "source": None,
    "sources": {
        "small": {"model": SOURCE, "steps": [40, 20], "seeds": [7, 8]},
        "deep": {"model": DEEP, "steps": 30, "grow": {"source": "small", "depth": "stack"}},
    },
    "arms": {"scratch": {}, "twice": {"method": "lossless", "source": "deep"}, "wr": {"source": "small"}},
}


def jobs_of(folder: Path, **changes: Any) -> dict[str, Job]:
    return {job.name: job for job in StudyJobs(loaded(folder, **STUDY | changes)).all()}


def with_grow(**changes: Any) -> dict[str, Any]:
    deep = STUDY["sources"]["deep"]
    return {"sources": STUDY["sources"] | {"deep": deep | {"grow": deep["grow"] | changes}}}


def test_a_source_is_grown_from_the_one_before_it_and_trained(tmp_path):
    jobs = jobs_of(tmp_path)
    start, trained = jobs["source-deep/seed7/start"], jobs["source-deep/seed7"]
    assert start.needs == ("source-small/seed7/40",)
    assert start.start == jobs["source-small/seed7/40"].folder / "export"
    assert trained.needs == ("data", "source-deep/seed7/start")
    assert trained.keys["init"] == str(start.folder)
    assert "model" not in trained.keys
    # It reads on where its source stopped: 40 steps of 16 blocks.
    assert trained.keys["data_start"] == 40 * 16
    assert trained.flops == 30 * 16 * 64 * count_cost(DEEP, 64).training_flops
    RunConfig(**trained.keys)
    arm = jobs["twice/source7-seed0/start"]
    assert arm.needs == ("source-deep/seed7",)
    assert arm.start == trained.folder / "export"
    place = {name: number for number, name in enumerate(jobs)}
    assert all(place[name] < place[job.name] for job in jobs.values() for name in job.needs)
    assert {name for name in jobs if name.startswith("source-deep")} == {
        f"source-deep/seed{seed}{part}" for seed in (7, 8) for part in ("", "/start")
    }  # as many seeds as the source before it


def test_the_growth_is_part_of_what_follows_and_of_nothing_else(tmp_path):
    one, other = jobs_of(tmp_path), jobs_of(tmp_path, **with_grow(depth="interpose"))
    changed = {name for name in one if one[name].key != other[name].key}
    assert changed == {
        name for name in one if name.startswith(("source-deep", "twice")) and one[name].kind not in ("sweep",)
    }
    age = 20 * 16 * 64 / count_cost(SOURCE).parameters
    young = jobs_of(tmp_path, **with_grow(age=age))
    assert young["source-deep/seed7/start"].needs == ("source-small/seed7/20",)
    assert young["source-deep/seed7"].keys["data_start"] == 20 * 16


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (with_grow(source="smal")["sources"], "(?s)no source 'smal' before this one.*did you mean small"),
        (with_grow(age=99)["sources"], "(?s)small has no age of 99.*add this age to the steps of small"),
        (with_grow(train={"warmup": 5})["sources"], "grown by a method and its options only"),
        (with_grow(state="scale")["sources"], "grown by a method and its options only"),
        (with_grow(depth="nothing")["sources"], "(?s)depth.*grow of source deep"),
        ({"deep": STUDY["sources"]["deep"]}, "(?s)no source before this one.*write the source to grow from first"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, sources, message):
    with pytest.raises(GrowthError, match=message):
        loaded(
            tmp_path,
            **STUDY | {"sources": sources, "arms": {"scratch": {}, "twice": {"source": "deep", "method": "wr"}}},
        )


@pytest.mark.slow
@pytest.mark.launch
def test_two_growths_run_and_charge_both_sources(tmp_path):
    sources = {
        "small": {"model": SOURCE, "steps": 8, "train": {"lr": 5e-3}},
        "deep": {"model": DEEP, "steps": 6, "grow": {"source": "small", "method": "lossless", "depth": "identity"}},
    }
    train = {"batch": 8, "warmup": 2, "eval_every": 0, "eval_at": [], "eval_blocks": 16, "dtype": "fp32", "lr": 5e-3}
    study = loaded(
        tmp_path, **STUDY | {"sources": sources, "train": train, "budgets": [6, 10], "seeds": [0]}
        | {"arms": {"scratch": {}, "twice": {"method": "lossless", "source": "deep"}}},
    )  # fmt: skip
    lines: list[str] = []
    outcome = run_study(study, say=lines.append)
    assert outcome.failed == {}, lines
    jobs = {job.name: job for job in StudyJobs(study).all()}
    grown = read_provenance(jobs["source-deep/start"].folder)
    assert grown is not None
    assert (grown.plan["method"], grown.plan["depth"]["method"]) == ("lossless", "identity")
    first, later = (load_run(jobs[name].folder) for name in ("source-small", "source-deep"))
    # An exact growth: the deeper source begins at the loss of the smaller one's end.
    assert later.held_out(0) == pytest.approx(float(first.evals["loss"][-1]), abs=1e-5)
    arm = load_run(jobs["twice/seed0/10"].folder)
    assert arm.held_out(0) == pytest.approx(float(later.evals["loss"][-1]), abs=1e-5)
    assert arm.source_cost("tokens") == (8 + 6) * 8 * 64
    flops = [steps * 8 * 64 * count_cost(model, 64).training_flops for steps, model in ((8, SOURCE), (6, DEEP))]
    assert arm.source_cost("flops") == pytest.approx(sum(flops))
