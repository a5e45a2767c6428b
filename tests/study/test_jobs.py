"""The jobs of a study: their order, what they need, and what a change makes anew."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from studies import RECIPES, content, loaded

from phigrow.errors import GrowthError
from phigrow.measure import compare
from phigrow.measure.pairing import check_pair
from phigrow.models.cost import count_cost
from phigrow.records import load_run
from phigrow.study import Study, jobs_of, load_study, progress
from phigrow.study.job import Job
from phigrow.study.jobs import StudyJobs
from phigrow.study.results import sweep_results
from phigrow.study.runner import final_keys, prune_trunk, wanted
from phigrow.study.table import described
from phigrow.training import RunConfig
from phigrow.training.declaration import Role

SWEPT: dict[str, Any] = {
    "train": {"batch": 16, "warmup": 4},
    "sweep": {"lr": [1e-3, 4e-3], "steps": 10, "seeds": [0]},
    "seeds": [0, 1],
}

OPERATIONAL: dict[str, Any] = {
    "micro_batch": 2, "threads": 1, "log_every": 3, "save_every": 7, "keep": 5, "monitor": "csv", "nonfinite_limit": 3,
    "offload_dir": "disk",
}  # fmt: skip

FIRST_RELEASE = {
    "data": "d50428267e",
    "source": "0b8986abb9",
    "scratch/seed0/trunk": "6701422a66",
    "scratch/seed0/20": "76153141eb",
    "scratch/seed0/40": "987eafadf9",
    "tile/seed0/trunk": "19a4d5333c",
    "tile/seed0/20": "df3bcc8280",
    "tile/seed0/40": "4a084d73d6",
    "lossless/seed0/trunk": "e8ce1e54d2",
    "lossless/seed0/20": "c1b509eaf1",
    "lossless/seed0/40": "ee9f0dc1a2",
}


def by_name(study: Study) -> dict[str, Job]:
    return {job.name: job for job in jobs_of(study)}


def finish(job: Job, loss: float = 4.0, step: int | None = None) -> None:
    """Leave what a run leaves that has ended."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if not job.trains:
        return
    made = {"key": job.key, "step": step or job.steps, "heldout_loss": loss, "wall": 3.0, "trained": 1.0, "flops": 5e9}
    (job.folder / progress.DONE).write_text(json.dumps(made))


def test_every_job_comes_after_what_it_needs(tmp_path):
    jobs = jobs_of(loaded(tmp_path, **SWEPT))
    place = {job.name: number for number, job in enumerate(jobs)}
    assert len(place) == len(jobs) == 2 + 3 * 2 + 2 * 2 + 2 * 3 * 3
    assert all(place[name] < place[job.name] for job in jobs for name in job.needs)
    assert len({job.folder for job in jobs}) == len(jobs)
    assert {"tile/sweep/lr0.001/seed0", "tile/sweep/lr0.004/seed0", "tile/seed1/start"} < set(
        by_name(loaded(tmp_path, **SWEPT))["tile/seed1/trunk"].needs
    )


def test_ends_share_their_trunk_and_only_its_cost(tmp_path):
    jobs = by_name(loaded(tmp_path))
    trunk, short, long = (jobs[f"tile/seed0/{name}"] for name in ("trunk", "20", "40"))
    assert (trunk.keys["steps"], trunk.keys["decay"], trunk.keys["save_at"]) == (32, 0, [16, 32])
    assert (short.first, short.steps, long.first, long.steps) == (16, 20, 32, 40)
    assert long.keys["branch_from"] == str(trunk.folder)
    assert trunk.keys["trunk"] == short.keys["trunk"] == long.keys["trunk"]
    assert trunk.tokens + short.tokens + long.tokens == (32 + 4 + 8) * 16 * 64
    assert [job.kind for job in jobs_of(loaded(tmp_path, budgets=[40])) if job.arm and job.arm.name == "tile"] == [
        "expand", "end",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"arms": {"scratch": None, "tile": {"scale": "rms"}, "lossless": None}}, {"tile"}),
        ({"arms": {"scratch": None, "tile": {"train": {"warmup": 2}}, "lossless": None}}, {"tile"}),
        *(({"train": content()["train"] | {key: value}}, set()) for key, value in OPERATIONAL.items()),
        ({"train": content()["train"] | {"weight_decay": 0.2}}, {"source", "scratch", "tile", "lossless"}),
        ({"train": content()["train"] | {"lr": 1e-3}}, {"source", "scratch", "tile", "lossless"}),
        ({"source": content()["source"] | {"seed": 1}}, {"source", "tile", "lossless"}),
        ({"data": content()["data"] | {"seed": 1}}, {"data", "source", "scratch", "tile", "lossless"}),
    ],
)
def test_a_change_makes_anew_what_depends_on_it_and_nothing_else(tmp_path, changes, anew):
    before, after = by_name(loaded(tmp_path)), by_name(loaded(tmp_path, **changes))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].folder != after[name].folder}
    assert {name.split("/")[0] for name in changed} == anew
    whole = {name for name in before if name.split("/")[0] in anew}
    starts = {name for name in whole - changed if name.endswith("/start")}  # training keys leave the starts alone
    assert whole - changed <= starts
    assert all(before[name].key != after[name].key for name in changed)


def test_every_operational_key_is_tried_above():
    assert set(OPERATIONAL) == set(RunConfig.keys_with(Role.OPERATIONAL))
    assert not set(RunConfig.keys_with(Role.OPERATIONAL)) & set(RunConfig().reproducibility_keys())


def test_the_folders_of_a_shipped_study_stay_where_they_were(tmp_path):
    # As the first release named them: finished runs of a study are found again by these hashes.
    study = load_study(RECIPES / "tiny.yaml", out=tmp_path)
    assert {job.name: job.key for job in jobs_of(study) if job.kind != "expand"} == FIRST_RELEASE


def test_a_larger_budget_leaves_what_is_done_and_makes_the_trunk_longer(tmp_path):
    before, after = by_name(loaded(tmp_path)), by_name(loaded(tmp_path, budgets=[20, 40, 80]))
    assert all(after[name].folder == job.folder and after[name].key == job.key for name, job in before.items())
    for job in before.values():
        finish(job)
    missing = [job.name for job in wanted(list(after.values()))]
    assert missing == [f"{arm}/seed0/{what}" for arm in ("scratch", "tile", "lossless") for what in ("trunk", "80")]


def test_only_what_is_missing_and_asked_for_is_wanted(tmp_path):
    jobs = jobs_of(loaded(tmp_path))
    assert wanted(jobs) == jobs
    for job in jobs:
        if job.kind == "end":
            finish(job)
    assert not wanted(jobs)  # trunks and starts serve nothing now


def test_the_sweep_chooses_by_held_out_loss_and_costs_every_arm_the_same(tmp_path):
    study = loaded(tmp_path, **SWEPT)
    jobs = jobs_of(study)
    tile = next(arm for arm in study.arms if arm.name == "tile")
    assert StudyJobs(study).rates(tile).best is None
    for job in jobs:
        if job.kind == "sweep" and job.arm:
            loss = {"scratch": [4.0, 3.5], "tile": [3.0, float("nan")], "lossless": [3.1, 3.0]}[job.arm.name]
            finish(job, loss[job.keys["lr"] == 4e-3])
    trunk = by_name(study)["tile/seed1/trunk"]
    assert final_keys(study, jobs, trunk)["lr"] == 1e-3
    found = sweep_results(study, jobs)
    assert found is not None
    assert {name: arm["lr"] for name, arm in found["arms"].items()} == {"scratch": 4e-3, "tile": 1e-3, "lossless": 4e-3}
    assert {(arm["tokens"], arm["flops"]) for arm in found["arms"].values()} == {
        (2 * 10 * 16 * 64, found["arms"]["tile"]["flops"])
    }
    for job in jobs:
        if job.kind == "sweep" and job.arm and job.arm.name == "tile":
            finish(job, float("nan"))
    trunk = by_name(study)["tile/seed1/trunk"]
    with pytest.raises(ValueError, match="every learning rate of the sweep diverged for tile"):
        final_keys(study, jobs, trunk)


def test_rates_may_differ_within_a_pair_only_where_one_sweep_chose_both(tmp_path):
    runs = {}
    sweep = {"lr": [1e-3, 2e-3], "steps": 9, "seeds": [0]}
    for name, config in {
        "base": {"lr": 1e-3, "lr_chosen_by": sweep}, "swept": {"lr": 2e-3, "lr_chosen_by": sweep},
        "other": {"lr": 2e-3, "lr_chosen_by": sweep | {"steps": 90}}, "given": {"lr": 2e-3},
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        lines = [{"type": "run", "arm": name, "seed": 0, "config": config}]
        lines += [
            {"type": "eval", "step": step, "tokens": step, "flops": step, "seconds": step, "loss": 3.0 - step}
            for step in range(3)
        ]
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs[name] = load_run(tmp_path / name)
    check_pair(runs["swept"], runs["base"], "base")
    comparison = compare([runs["base"], runs["swept"]], "base")
    assert comparison["swept"].estimate("tokens", "sunk").speedup == 1.0
    assert comparison["swept"].settings == ("lr 0.002 (base: 0.001)",)
    said = "every arm's learning rate was chosen by its own sweep: 2 rates, 9 steps each, with 1 of the seeds; "
    assert said + "no arm's cost includes its sweep" in comparison.baseline.notes
    assert not compare([runs["given"]], "given").baseline.notes
    for name in ("other", "given"):
        with pytest.raises(ValueError, match=r"cannot be compared with base: config.lr is 0.002 against 0.001"):
            check_pair(runs[name], runs["base"], "base")


def test_a_trunk_keeps_its_checkpoints_while_an_end_needs_them(tmp_path):
    study = loaded(tmp_path)
    jobs = jobs_of(study)
    named = by_name(study)
    trunk, short, long = (named[f"tile/seed0/{name}"] for name in ("trunk", "20", "40"))
    for step in (16, 32):
        folder = trunk.folder / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        marker = {"progress": {"step": step}, "world_size": 1, "stage": 1, "files": {}}
        write_marker(folder, marker)
    assert progress.saved_steps(trunk.folder) == [16, 32]
    finish(short)
    prune_trunk(jobs, short)
    assert progress.saved_steps(trunk.folder) == [16, 32]
    finish(long)
    prune_trunk(jobs, long)
    assert progress.saved_steps(trunk.folder) == [32]
    assert "branch_from" in final_keys(study, jobs, long)
    assert "branch_from" not in final_keys(study, jobs, short)  # it is trained alone


def write_marker(folder, content):
    from phigrow.checkpoints.integrity import write_marker

    files = content.pop("files")
    write_marker(folder, content, files)


def test_time_is_told_from_runs_that_were_timed(tmp_path):
    study = loaded(tmp_path, workers=2)
    jobs = jobs_of(study)
    assert progress.time_left(study, jobs, jobs) is None
    for job in jobs[:2]:
        finish(job)
    trunk = next(job for job in jobs if job.kind == "trunk")
    finish(trunk)  # by a launch that found nothing left to train: it took time, and tells no pace
    content = json.loads((trunk.folder / progress.DONE).read_text())
    (trunk.folder / progress.DONE).write_text(json.dumps(content | {"flops": 0.0}))
    assert progress.throughput([trunk], None) is None
    pace = progress.throughput(jobs, None)
    assert pace == progress.Throughput(5e9, 2.0)
    shutil.rmtree(trunk.folder)
    assert pace.seconds(1e10, 2) == 6.0
    missing = [job for job in jobs[2:] if job.trains]
    assert progress.time_left(study, jobs, jobs) == pytest.approx(
        (sum(j.flops for j in missing) / 5e9 + 2 * len(missing)) / 2
    )


def test_the_source_teaches_an_arm_of_any_method_that_sets_teacher_steps(tmp_path):
    taught = {"train": {"teacher_steps": 12, "teacher_weight": 0.3}}
    arms = {
        "scratch": None,
        "tile": None,
        "salt": {"method": "scratch", **taught},
        "tile-salt": {"method": "tile", **taught},
    }
    study = loaded(tmp_path, arms=arms, budgets=[40])
    jobs = by_name(study)
    source = jobs["source"].folder / "export"
    salt, tile = jobs["salt/seed0/40"], jobs["tile-salt/seed0/40"]
    for job in (salt, tile):
        assert (job.keys["teacher"], job.keys["teacher_steps"], job.keys["teacher_weight"]) == (str(source), 12, 0.3)
        assert job.start == source
        assert RunConfig(**job.keys).teacher == str(source)
    assert "model" in salt.keys
    assert "source" in salt.needs
    assert tile.keys["init"] == str(jobs["tile-salt/seed0/start"].folder)
    # The teacher's forward pass is part of the expected cost; arms without one stay as they were.
    flops = 12 * study.batch_tokens * count_cost(study.source().config, study.seq_len).forward_flops
    assert salt.flops - jobs["scratch/seed0/40"].flops == flops
    alone = by_name(loaded(tmp_path, arms={"scratch": None, "tile": None}, budgets=[40]))
    for name in ("scratch/seed0/40", "tile/seed0/40", "source"):
        assert alone[name].folder == jobs[name].folder
        assert "teacher" not in alone[name].keys
    # Another source is another teacher, so the scratch arm that it teaches is trained again.
    older = by_name(loaded(tmp_path, arms=arms, budgets=[40], source={"model": study.source().config, "steps": 30}))
    assert older["scratch/seed0/40"].folder == jobs["scratch/seed0/40"].folder
    assert older["salt/seed0/40"].folder != salt.folder


def test_a_flat_model_has_no_teacher(tmp_path):
    flat = {"small": {"model": load_study(RECIPES / "tiny.yaml").source().config, "train": {"teacher_steps": 3}}}
    with pytest.raises(GrowthError, match="teacher_steps is set for a flat model"):
        loaded(tmp_path, flat=flat)


def test_arms_of_one_growth_differ_in_the_state_that_they_start_with(tmp_path):
    states = ("reset", "copy", "scale", "asymmetric")
    arms = {"scratch": None, "tile": None} | {f"tile-{s}": {"method": "tile", "state": s} for s in states}
    study = loaded(tmp_path, arms=arms, budgets=[40])
    jobs = by_name(study)
    assert jobs["source"].keeps
    ends = [jobs["tile/seed0/40"], *(jobs[f"tile-{state}/seed0/40"] for state in states)]
    assert len({job.key for job in ends}) == 5
    assert "init_optimizer" not in ends[0].keys
    for state, end in zip(states, ends[1:], strict=True):
        made, start = jobs[f"tile-{state}/seed0/state"], jobs[f"tile-{state}/seed0/start"]
        assert (end.keys["init_optimizer"], end.keys["data_start"]) == (str(made.folder), 0)
        assert made.folder.name == f"{start.folder.name}-{state}"
        assert set(made.needs) == {start.name, "source"}
        assert made.name in end.needs
        assert described(made) == f"tile-{state}/seed0/state: grow the optimizer's state: {state}"
    # An arm without a state has the folder that it had before there were states.
    alone = by_name(loaded(tmp_path, arms={"scratch": None, "tile": None}, budgets=[40]))
    assert alone["tile/seed0/40"].folder == ends[0].folder
    assert not alone["source"].keeps
    # A source whose checkpoint was deleted is trained again, but only where a state needs it.
    finish(jobs["source"])
    assert progress.done(alone["source"]) is not None
    assert progress.done(jobs["source"]) is None
