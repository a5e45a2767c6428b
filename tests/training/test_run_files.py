"""What a run writes and reads: records, cost accounts, checkpoints' markers, the claim on its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phigrow.checkpoints.provenance import TrainingCost
from phigrow.checkpoints.run_checkpoints import FOLDER
from phigrow.errors import GrowthError
from phigrow.measure import load_run
from phigrow.records.writer import RecordWriter
from phigrow.training import RunConfig
from phigrow.training.branches import branch
from phigrow.training.checkpoints import claim
from phigrow.training.training_cost import source_of


def step(n: int) -> dict[str, Any]:
    costs = {"step": n, "tokens": 10 * n, "flops": 1e3 * n, "seconds": n / 2}
    return {**costs, "loss": 5.0 - n, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 20.0}


def write(folder: Path, *steps: int, resume_step: int | None = None) -> None:
    writer = RecordWriter(folder, resume_step=resume_step)
    if resume_step is None:
        writer.write("run", arm="scratch", seed=0, config={}, source_tokens=0, source_flops=0.0, source_seconds=0.0)
    for n in steps:
        writer.write("step", **step(n))
        if n % 2 == 0:
            writer.write("eval", **{key: step(n)[key] for key in ("step", "tokens", "flops", "seconds", "loss")})
    writer.close()


def test_records_are_flushed_line_by_line(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.write("step", **step(1))
    (line,) = (tmp_path / "records.jsonl").read_text().splitlines()
    assert json.loads(line) == {"type": "step", **step(1)}
    assert line.startswith('{"type": "step"')
    writer.close()


def test_a_resumed_run_drops_what_lies_past_the_checkpoint_and_a_line_cut_off(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 5)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"type": "step", "st')
    write(tmp_path, 3, 4, resume_step=2)
    run = load_run(tmp_path)
    assert run.steps["step"].tolist() == [1, 2, 3, 4]
    assert run.evals["step"].tolist() == [2, 4]
    assert not run.notes


def test_a_fresh_start_replaces_records(tmp_path):
    write(tmp_path, 1, 2, 3)
    write(tmp_path, 1)
    assert load_run(tmp_path).steps["step"].tolist() == [1]


TRAINING = {"tokens": 1000, "flops": 2e9, "seconds": 30.5}


def checkpoint(folder: Path, *, grown: Any = None, trained: Any = None) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    if grown is not None:
        (folder / "phigrow.json").write_text(json.dumps(grown))
    if trained is not None:
        (folder / "training.json").write_text(json.dumps(trained))
    return RunConfig(init=str(folder))


def test_scratch_has_no_source():
    source = source_of(RunConfig())
    assert (source.arm, source.growth) == ("scratch", None)
    assert source.cost == TrainingCost(0, 0.0, 0.0)


def test_a_grown_checkpoint_carries_its_sources_cost(tmp_path):
    plan = {"method": "wr", "depth": "interpose", "hash": "abc", "axes": {"hidden": {}}}
    config = checkpoint(tmp_path, grown={"plan": plan, "source": {"name": "small", "training": TRAINING}})
    source = source_of(config)
    assert source.cost == TrainingCost(1000, 2e9, 30.5)
    assert source.arm == "wr"
    assert source.growth == {"method": "wr", "depth": "interpose", "plan_hash": "abc", "source": "small"}


def test_the_expansion_is_on_the_account(tmp_path):
    grown = {"plan": {"method": "tile"}, "source": {"name": "x", "training": TRAINING}, "seconds": 9.5}
    source = source_of(checkpoint(tmp_path, grown=grown))
    assert source.expand_seconds == 9.5
    assert source.before == TrainingCost(1000, 2e9, 40.0)
    assert source.cost.seconds == 30.5
    assert source_of(RunConfig()).before == TrainingCost(0, 0.0, 0.0)


def test_a_grown_checkpoint_whose_source_says_nothing_has_an_unknown_cost(tmp_path):
    source = source_of(checkpoint(tmp_path, grown={"plan": {"method": "tile"}, "source": {"name": "phi-1_5"}}))
    assert source.cost == TrainingCost(None, None, None)
    assert source.arm == "tile"


def test_growth_outranks_a_stray_training_file_and_the_run_outranks_both(tmp_path):
    grown = {"plan": {}, "source": {"training": TRAINING}}
    config = checkpoint(tmp_path, grown=grown, trained={"tokens": 7, "flops": 7.0, "seconds": 7.0})
    assert source_of(config).cost == TrainingCost(1000, 2e9, 30.5)
    given = RunConfig(init=str(tmp_path), source_tokens=5.0, arm="mine")
    assert source_of(given).cost == TrainingCost(5.0, 2e9, 30.5)
    assert source_of(given).arm == "mine"


def test_continued_training_counts_what_came_before(tmp_path):
    source = source_of(checkpoint(tmp_path, trained=TRAINING))
    assert (source.arm, source.growth) == ("continued", None)
    assert TrainingCost(1, 1.0, 1.0).plus(source.cost) == TrainingCost(1001, 2e9 + 1, 31.5)
    assert TrainingCost(1, 1.0, 1.0).plus(TrainingCost(None, 2.0, None)) == TrainingCost(None, 3.0, None)


def test_a_broken_account_is_refused(tmp_path):
    config = checkpoint(tmp_path)
    (tmp_path / "phigrow.json").write_text("{")
    with pytest.raises(GrowthError, match=r"phigrow\.json cannot be read"):
        source_of(config)


def test_a_folder_is_claimed_for_one_configuration(tmp_path):
    curve = RunConfig(steps=30).reproducibility_keys()
    assert not claim(tmp_path, curve, resume=True)
    write(tmp_path)
    assert claim(tmp_path, curve, resume=True)
    # The stage may change: the checkpoint knows the one that wrote it.
    assert claim(tmp_path, RunConfig(steps=30, zero=3).reproducibility_keys(), resume=True)
    with pytest.raises(GrowthError) as error:
        claim(tmp_path, RunConfig(steps=31, lr=0.5).reproducibility_keys(), resume=True)
    assert "steps (30, now 31)" in str(error.value)
    assert "lr (0.001, now 0.5)" in str(error.value)
    assert "batch" not in str(error.value)
    with pytest.raises(GrowthError, match="resume is never"):
        claim(tmp_path, curve, resume=False)


@pytest.mark.parametrize("key", sorted(RunConfig().reproducibility_keys()))
def test_a_run_older_than_a_setting_goes_on_at_its_default(tmp_path, key):
    curve = RunConfig().reproducibility_keys()
    write(tmp_path)
    older = {name: value for name, value in curve.items() if name != key}
    (tmp_path / "run.json").write_text(json.dumps(older))
    assert claim(tmp_path, curve, resume=True)
    assert json.loads((tmp_path / "run.json").read_text())[key] == curve[key]
    # Negative control: any other value is another run.
    (tmp_path / "run.json").write_text(json.dumps(older))
    with pytest.raises(GrowthError, match=rf"these keys differ: {key} \("):
        claim(tmp_path, curve | {key: "other"}, resume=True)


def test_a_trunk_older_than_a_setting_is_branched_from_at_its_default(tmp_path):
    config = RunConfig(schedule="wsd", steps=9, warmup=2, decay=3, branch_from=str(tmp_path))
    older = {key: value for key, value in config.reproducibility_keys().items() if key != "fresh_lr"}
    (tmp_path / "run.json").write_text(json.dumps(older | {"steps": None, "decay": 0}))
    with pytest.raises(GrowthError, match="the trunk has no checkpoint of step 6"):  # all that is wrong with it
        branch(config, config.reproducibility_keys(), tmp_path / "out")
    with pytest.raises(GrowthError, match=r"these keys differ: fresh_lr \(1.0, now 2.0\)"):
        branch(config, config.reproducibility_keys() | {"fresh_lr": 2.0}, tmp_path / "out")


def test_keys_that_have_no_default_are_nothing_where_they_are_absent(tmp_path):
    curve = RunConfig().reproducibility_keys() | {"data_fingerprint": "a"}
    write(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(curve))
    with pytest.raises(GrowthError, match=r"these keys differ: mixture \(None, now \{'a': 1\}\)"):
        claim(tmp_path, curve | {"mixture": {"a": 1}}, resume=True)
    # A setting that was taken out again, and is not known here, may have been used.
    (tmp_path / "run.json").write_text(json.dumps(curve | {"nesterov": 0.5}))
    with pytest.raises(GrowthError, match=r"these keys differ: nesterov \(0.5, now None\)"):
        claim(tmp_path, curve, resume=True)


def test_run_folders_in_which_optimizer_was_a_folder_are_continued(tmp_path):
    now = RunConfig(init="grown", init_optimizer="grown-optimizer").reproducibility_keys()
    former = {key: value for key, value in now.items() if key not in ("optimizer", "init_optimizer")}
    write(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(former | {"optimizer": "grown-optimizer"}))
    assert claim(tmp_path, now, resume=True)
    # Negative control: it was another folder.
    (tmp_path / "run.json").write_text(json.dumps(former | {"optimizer": "other"}))
    with pytest.raises(GrowthError, match=r"these keys differ: init_optimizer \('other', now 'grown-optimizer'\)"):
        claim(tmp_path, now, resume=True)


def test_records_in_which_optimizer_was_a_folder_are_read_under_todays_names(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.write("run", arm="wr", seed=0, config={"lr": 0.1, "optimizer": "grown-optimizer"})
    writer.write("eval", **{key: step(0)[key] for key in ("step", "tokens", "flops", "seconds", "loss")})
    writer.close()
    assert load_run(tmp_path).meta["config"] == {"lr": 0.1, "init_optimizer": "grown-optimizer"}


@pytest.mark.parametrize("trained", ["records", "checkpoint"])
def test_a_folder_in_which_nothing_was_trained_is_anybodys(tmp_path, trained):
    first, other = RunConfig(model="small").reproducibility_keys(), RunConfig(model="small.json").reproducibility_keys()
    assert not claim(tmp_path, first, resume=True)
    assert not claim(tmp_path, other, resume=True)  # the first failed before its first record
    assert not claim(tmp_path, other, resume=False)
    assert json.loads((tmp_path / "run.json").read_text())["model"] == "small.json"
    # Negative control: what was trained is not taken over.
    if trained == "records":
        write(tmp_path)
    else:
        (tmp_path / FOLDER / "step-3").mkdir(parents=True)
    with pytest.raises(GrowthError, match=r"these keys differ: model \('small.json', now 'small'\)"):
        claim(tmp_path, first, resume=True)
    with pytest.raises(GrowthError, match="resume is never"):
        claim(tmp_path, other, resume=False)


def test_a_configuration_with_a_model_in_it_survives_the_round_trip(tmp_path):
    curve = RunConfig(model={"hidden_size": 8, "list": [1, 2]}).reproducibility_keys()
    assert not claim(tmp_path, curve, resume=True)
    write(tmp_path)
    assert claim(tmp_path, curve, resume=True)  # the same run again, with no checkpoint yet
    # Negative control: a change inside the model is another run.
    with pytest.raises(GrowthError, match="these keys differ: model"):
        claim(tmp_path, RunConfig(model={"hidden_size": 8, "list": [1, 3]}).reproducibility_keys(), resume=True)
