"""Staged growth: what a recipe means, what is refused, one run of several, and the whole way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from phigrow.cli import app
from phigrow.errors import GrowthError
from phigrow.measure import load_run
from phigrow.records.concatenation import concatenate_stages
from phigrow.records.readers.phigrow import last_record, written_so_far
from phigrow.records.writer import write_records
from phigrow.study import load_stages, run_stages, staged

ROOT = Path(__file__).parents[2]
TINY = ROOT / "phigrow" / "recipes" / "stages" / "tiny.yaml"


def content(**changes: Any) -> dict[str, Any]:
    found = yaml.safe_load(TINY.read_text()) | changes
    return {key: value for key, value in found.items() if value is not None}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump(content(**changes), sort_keys=False))
    return path


def test_the_shipped_recipe_says_what_it_does(tmp_path):
    found = load_stages(TINY, out=tmp_path)
    assert "phigrow grow-train tiny --dry-run" in TINY.read_text()
    assert [stage.config["hidden_size"] for stage in found.stages] == [32, 48, 48]
    assert [stage.config["num_hidden_layers"] for stage in found.stages] == [2, 2, 3]
    assert [(stage.first, stage.steps) for stage in found.stages] == [(0, 30), (30, 30), (60, 30)]
    first, second, third = (stage.keys for stage in found.stages)
    assert first["model"]["hidden_size"] == 32
    assert ("schedule_start" in first, first["schedule_steps"]) == (False, 90)
    assert (second["schedule_start"], second["schedule_steps"], second["rewarm"]) == (30, 90, 5)
    assert (third["schedule_start"], "rewarm" in third) == (60, False)
    assert (second["init"], second["init_optimizer"]) == (f"{second['out']}-start", f"{second['out']}-state")
    assert {keys["data"] for keys in (first, second, third)} == {str(found.data_folder)}
    assert {keys["export_dtype"] for keys in (first, second, third)} == {"fp32"}
    assert found.scratch is not None
    assert (found.scratch.steps, found.scratch.config, found.scratch.keys["arm"]) == (90, third_model(found), "scratch")
    assert [stage.tokens for stage in found.stages] == [30 * 16 * 64] * 3
    assert found.stages[0].flops < found.stages[1].flops < found.stages[2].flops


def third_model(found: Any) -> Any:
    return found.stages[2].config


def test_a_change_makes_anew_what_comes_after_it(tmp_path):
    folders = [stage.folder for stage in load_stages(TINY, out=tmp_path).stages]
    stages = content()["stages"]
    stages[1]["grow"]["state"] = "copy"
    changed = [stage.folder for stage in load_stages(written(tmp_path, stages=stages), out=tmp_path).stages]
    assert (changed[0] == folders[0], changed[1] == folders[1], changed[2] == folders[2]) == (True, False, False)
    slower = content()["train"] | {"log_every": 3}
    assert [s.folder for s in load_stages(written(tmp_path, train=slower), out=tmp_path).stages] == folders
    each = load_stages(written(tmp_path, schedule="each", train={"lr": 1e-3, "warmup": 2}), out=tmp_path).stages
    assert all("schedule_steps" not in stage.keys and "schedule_start" not in stage.keys for stage in each)


def test_every_growth_draws_its_own_values(tmp_path):
    def seeds(seed):
        stages = load_stages(written(tmp_path, seed=seed), out=tmp_path).stages
        return [stage.growing.seed for stage in stages if stage.growing]

    assert seeds(0) == [2, 3]
    assert seeds(1) == [1002, 1003]


def changed(number: int, **keys: Any) -> dict[str, Any]:
    stages = content()["stages"]
    stages[number - 1] = {k: v for k, v in (stages[number - 1] | keys).items() if v is not None}
    return {"stages": stages}


def grow(**keys: Any) -> dict[str, Any]:
    found = content()["stages"][1]["grow"] | keys
    return changed(2, grow={key: value for key, value in found.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 3}, r"no key 'stage'\n  where: .*stages.yaml\n  what to do: did you mean stages"),
        ({"data": None}, r"the recipe of stages has no 'data'"),
        ({"stages": {}}, r"there are no stages\n"),
        ({"schedule": "two"}, r"schedule is 'two'"),
        (changed(1, steps=None), r"the stage has no 'steps'\n  where: stage 1 in"),
        (changed(1, model=None), r"begins with nothing\n  where: stage 1"),
        (changed(2, model={}), r"begins with model and grow\n  where: stage 2"),
        (changed(2, grow=None, model={}), r"begins with model\n  where: stage 2[\s\S]*every later one has grow"),
        (changed(2, steps=0), r"steps is 0\n  where: steps in stage 2"),
        (
            changed(3, train={"batch": 7}),
            r"stage 3 starts after 960 sequences, which is not a multiple of its batch size 7",
        ),
        (changed(3, train={"init_optimizer": "x"}), r"init_optimizer cannot be set [\s\S]*the stages decide it"),
        (changed(3, train={"save_every": 0}), r"save_every is 0"),
        (grow(method=None), r"the growth has no 'method'\n  where: grow of stage 2"),
        (grow(method="tiel"), r"method 'tiel' is unknown|no method 'tiel'"),
        (grow(scal="rms"), r"no key 'scal'\n  where: grow of stage 2[\s\S]*did you mean scale"),
        (grow(seed=3), r"no key 'seed'\n  where: grow of stage 2"),
        (grow(src="x"), r"no key 'src'\n  where: grow of stage 2"),
        (grow(snr=10), r"method lossless has no option 'snr'"),
        (grow(noise="x"), r"noise 'x' is not allowed\n  where: grow of stage 2"),
        (changed(2, steps=[5, 6]), r"steps is \[5, 6\]\n.*\n  what to do: give one whole number"),
        ({"seed": [1, 2]}, r"seed is \[1, 2\]\n.*\n  what to do: give one whole number"),
        ({"scratch": "false"}, r"scratch is 'false'\n.*\n  what to do: give true or false"),
        (changed(1, train={"batch": 0}), r"batch is 0\n  where: batch in stage 1"),
        (grow(state="half"), r"state 'half' is unknown\n  where: grow of stage 2"),
        (
            grow(method="isometric", state="copy"),
            r"mixes coordinates[\s\S]*grow of stage 2[\s\S]*state scale, or reset",
        ),
        ({"train": {"warmup": 95}}, r"warmup 95 is longer than the 90 steps"),
    ],
)
def test_what_is_wrong_is_said_by_key(tmp_path, changes, message):
    with pytest.raises(GrowthError, match=message):
        load_stages(written(tmp_path, **changes))


def test_the_dry_run_lists_stages_and_writes_nothing(tmp_path):
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["grow-train", str(written(tmp_path)), "--dry-run", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split(":")[0] for line in lines] == ["stage 1/3", "stage 2/3", "stage 3/3", "scratch"]
    assert "grown by lossless, state scale, steps 31 to 60, 0.0307M tokens" in lines[1]
    assert [path.name for path in tmp_path.iterdir()] == ["stages.yaml"]


def run_of(steps: int, flops: float, **meta: Any) -> list[dict[str, Any]]:
    """Records of a run of 10 tokens and half a second a step, evaluated at its beginning and end."""
    run = {"type": "run", "arm": "x", "seed": 0, "config": {"steps": steps}, "flops_per_token": flops, **meta}
    of = [{"step": k, "tokens": 10 * k, "flops": 10 * k * flops, "seconds": 0.5 * k} for k in range(steps + 1)]
    sources = {"a": 6 * steps, "b": 4 * steps}
    return [
        run,
        {"type": "eval", **of[0], "loss": 5.0 + flops},
        *({"type": "step", **at, "loss": 4.0, "lr": 1.0} for at in of[1:]),
        {"type": "resume", "step": 1},
        {"type": "eval", **of[-1], "loss": 3.0 + flops, "tokens_by_source": sources},
    ]


def test_joined_records_count_on_at_what_every_stage_cost(tmp_path):
    growth = {"method": "tile", "state": "scale", "plan_hash": "p", "depth": "stack"}
    runs = [run_of(2, 1.0, source_tokens=7), run_of(3, 5.0, expand_seconds=2.25, growth=growth, parameters=9)]
    found = concatenate_stages(runs, "staged", 5)
    assert [(r["type"], r.get("step")) for r in found] == [
        ("run", None), ("eval", 0), ("step", 1), ("step", 2), ("eval", 2), ("growth", 2),
        ("step", 3), ("step", 4), ("step", 5), ("eval", 5),
    ]  # fmt: skip
    last = found[-1]
    assert (last["tokens"], last["flops"], last["seconds"]) == (50, 20 + 150, 1.0 + 2.25 + 1.5)
    assert last["tokens_by_source"] == {"a": 30, "b": 20}
    assert found[5] == {
        "type": "growth", "step": 2, "tokens": 20, "flops": 20.0, "seconds": 3.25, "grow_seconds": 2.25,
        "method": "tile", "depth": "stack", "state": "scale", "plan_hash": "p", "loss_before": 4.0,
        "loss_after": 10.0, "parameters": 9,
    }  # fmt: skip
    meta = found[0]
    assert (meta["arm"], meta["budget"], meta["config"]["steps"], meta["source_tokens"]) == ("staged", 5, 5, 7)
    assert (meta["flops_per_token"], meta["growth"]["method"]) == (5.0, "tile")
    assert meta["stage_settings"] == [{}]  # the number of steps is no such setting
    # A report reads them, up to where they go.
    write_records(tmp_path, found)
    run = load_run(tmp_path)
    assert (run.finished, run.notes, run.evals["step"].tolist()) == (True, (), [0, 2, 5])
    write_records(tmp_path, concatenate_stages(runs[:1], "staged", 5))
    assert not load_run(tmp_path).finished


def test_joined_records_name_the_settings_that_a_later_stage_changes():
    runs = [run_of(2, 1.0), run_of(3, 1.0), run_of(4, 1.0)]
    for number, (records, rewarm) in enumerate(zip(runs, (None, 5, None), strict=True)):
        records[0]["config"] |= {"rewarm": rewarm, "schedule_start": 2 * number, "init": f"stage{number}-start"}
    assert concatenate_stages(runs, "staged", 9)[0]["stage_settings"] == [{"rewarm": 5}, {}]


class Here:
    """`Ranks`, in this process and on made-up text; ``stop_after`` runs it is interrupted instead."""

    left = 99

    def __init__(self, ranks: int, say: Any) -> None:
        self.ranks, self.say = ranks, say

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, keys: dict[str, Any]) -> None:
        from phigrow.training import RunConfig, train

        if not Here.left:
            raise KeyboardInterrupt
        Here.left -= 1
        train(RunConfig(**keys | {"threads": 1}), blocks())

    def ended(self) -> bool:
        return True


def blocks() -> Any:
    sys.path.insert(0, str(ROOT / "tests" / "training"))
    from scenarios import FakeBlocks

    sys.path.pop(0)
    return FakeBlocks()


@pytest.fixture
def in_process(alone, monkeypatch) -> None:
    monkeypatch.setattr(staged, "Ranks", Here)
    monkeypatch.setattr("phigrow.study.stages.data_of", lambda value, path: (Path(value), 16))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_stages_are_one_run_and_go_on_where_they_stopped(tmp_path, in_process):
    """Widened, then grown into its own size, which is to change nothing: the steps of a run of two stages."""
    train = {"batch": 8, "lr": 1e-2, "warmup": 1, "schedule": "wsd", "decay": 3, "dtype": "fp32", "zero": 1}
    train |= {"eval_every": 2, "eval_blocks": 0, "log_every": 1}
    stages = content()["stages"]
    same = {"grow": stages[1]["grow"] | {"method": "tile"}, "steps": 3}
    stages = [stages[0] | {"steps": 3}, stages[1] | {"steps": 3, "train": None}, same]
    changes = {"data": "made-up", "train": train, "scratch": None}
    said: list[str] = []
    recipe = written(tmp_path, stages=stages, **changes)
    Here.left = 2
    with pytest.raises(KeyboardInterrupt):
        run_stages(load_stages(recipe, out=tmp_path / "out", ranks=1), say=said.append)
    part = load_run(tmp_path / "out")
    assert (part.finished, part.steps["step"].tolist()) == (False, [1, 2, 3, 4, 5, 6])
    Here.left = 99
    found = load_stages(recipe, out=tmp_path / "out", ranks=1)
    assert run_stages(found, say=said.append) == found.stages[2].folder / "export"
    assert sum("(done before)" in line for line in said) == 2

    run = load_run(tmp_path / "out")
    assert (run.arm, run.finished, run.steps["step"].tolist()) == ("stages", True, list(range(1, 10)))
    own = [load_run(stage.folder) for stage in found.stages]
    assert run.evals["flops"][-1] == sum(each.evals["flops"][-1] for each in own)
    assert run.evals["tokens"][-1] == 9 * 8 * 16
    took = [each.meta["expand_seconds"] for each in own[1:]]
    assert min(took) > 0
    seconds = sum(each.evals["seconds"][-1] for each in own) + sum(took)
    np.testing.assert_allclose(run.evals["seconds"][-1], seconds, atol=1e-3)
    # What the last stage says was spent before it is what the joined records say.
    assert own[2].meta["source_tokens"] == 6 * 8 * 16
    grown = [record for record in written_so_far(tmp_path / "out") if record["type"] == "growth"]
    assert [record["step"] for record in grown] == [3, 6]
    for record in grown:  # both preserve the function
        assert record["loss_after"] == pytest.approx(record["loss_before"], abs=1e-4)
    assert own[2].meta["source_flops"] == pytest.approx(grown[1]["flops"])
    spent = own[2].meta["source_seconds"] + own[2].meta["expand_seconds"]
    assert spent == pytest.approx(grown[1]["seconds"], abs=2e-2)
    assert run.steps["lr"].tolist() == pytest.approx([0.001, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.007, 0.004])

    # The same in two stages: growing into the same size has changed nothing, neither data, moments nor rate.
    two = load_stages(
        written(tmp_path, stages=[stages[0], stages[1] | {"steps": 6}], **changes), out=tmp_path / "two", ranks=1
    )
    run_stages(two, say=said.append)
    assert load_run(tmp_path / "two").steps["loss"].tolist() == run.steps["loss"].tolist()
    # Negative control: without the moments it is another run.
    stages[2]["grow"]["state"] = "reset"
    other = load_stages(written(tmp_path, stages=stages, **changes), out=tmp_path / "out", ranks=1)
    run_stages(other, say=said.append)
    losses = load_run(tmp_path / "out").steps["loss"].tolist()
    assert losses[:7] == run.steps["loss"].tolist()[:7]
    assert losses[7:] != run.steps["loss"].tolist()[7:]


@pytest.mark.long
def test_the_shipped_recipe_is_killed_and_ends(tmp_path):
    """Under DeepSpeed's launcher, on text: killed in the second stage, run again, measured against scratch."""
    command = [sys.executable, "-c", "from phigrow.cli import main; main()", "grow-train", str(written(tmp_path))]
    command += ["--out", str(tmp_path / "out"), "--ranks", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = load_stages(tmp_path / "stages.yaml", out=tmp_path / "out")
    second = found.stages[1].folder
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 600
    while last_record(second, "step") is None and time.monotonic() < until:
        assert run.poll() is None, run.communicate()[0].decode()
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 1/3" in done.stdout
    assert done.stdout.count("(done before)") == 1
    joined_run = load_run(tmp_path / "out")
    assert joined_run.finished
    assert joined_run.steps["step"].tolist() == list(range(1, 91))
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert "stages" in json.dumps(report)
