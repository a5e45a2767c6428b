"""Monitors get what the records have, against tokens; and are refused by name where a package is missing."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import records
from scenarios import SEQ_LEN

from phigrow.errors import GrowthError
from phigrow.training import RunConfig, load_run_config, train
from phigrow.training.engine import engine_config
from phigrow.training.monitors import monitor_sections

FAKE_WANDB = """
import json, os
def init(**words): log({"init": words, "name": os.environ["WANDB_NAME"]})
def log(data, step=None, commit=None):
    with open(os.environ["WANDB_DIR"] + "/wandb.jsonl", "a") as file:
        file.write(json.dumps([step, data]) + "\\n")
def finish(): log("finished")
"""


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    if ranks != 2:
        return []
    (folder / "fakes" / "wandb").mkdir(parents=True)
    (folder / "fakes" / "wandb" / "__init__.py").write_text(FAKE_WANDB)
    asked = ["csv", *(["tensorboard"] if importlib.util.find_spec("tensorboard") else [])]
    cut = {"out": "cut", "monitor": "csv", "zero": 1, "dtype": "bf16", "save_every": 2, "log_every": 2}
    return [
        {"out": "whole", "monitor": ",".join(asked), "zero": 0},
        {"out": "silent", "zero": 0},
        {"out": "wandb", "zero": 0, "monitor": "wandb", "path": str(folder / "fakes")},
        {**cut, "poison": {"rank": 0, "calls": [4], "what": "loss"}, "nonfinite_limit": 1, "save_every": 4},
        cut,
    ]


@pytest.fixture(scope="module")
def runs(launches) -> Path:
    return launches(__name__)


def column(path: Path) -> list[tuple[float, float]]:
    heading, *rows = list(csv.reader(path.read_text().splitlines()))
    assert heading == ["step", path.stem.split("_", 1)[1]]
    return [(float(tokens), float(value)) for tokens, value in rows]


@pytest.mark.parametrize("run", ["whole", "cut"])
def test_csv_has_the_records_values_against_tokens(runs, run):
    steps, evals = records(runs / run, "step"), records(runs / run, "eval")
    for key in ("loss", "lr", "grad_norm", "tokens_per_second", "data_wait"):
        assert column(runs / run / "csv" / f"train_{key}.csv") == [(step["tokens"], step[key]) for step in steps]
    assert column(runs / run / "csv" / "heldout_loss.csv") == [(e["tokens"], e["loss"]) for e in evals]
    assert [tokens for tokens, _ in column(runs / run / "csv" / "train_lr.csv")] == [
        8 * SEQ_LEN * step for step in range(1, 7)
    ]


def test_monitors_are_off_by_default_and_change_nothing(runs):
    assert not (runs / "silent" / "csv").exists()
    assert [s["loss"] for s in records(runs / "silent", "step")] == [s["loss"] for s in records(runs / "whole", "step")]


def test_weights_and_biases_gets_the_same_calls(runs):
    lines = [json.loads(line) for line in (runs / "wandb" / "wandb.jsonl").read_text().splitlines()]
    assert lines[0][1] == {"init": {"project": "phigrow", "group": None, "entity": None}, "name": "wandb"}
    assert lines[-1] == [None, "finished"]
    found = [(step, data["train/loss"]) for step, data in lines[1:-1] if "train/loss" in data]
    assert found == [(step["tokens"], step["loss"]) for step in records(runs / "wandb", "step")]
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(lines[1:-1]))  # or it drops them


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_same_values(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "whole" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(step["tokens"], pytest.approx(step["loss"])) for step in records(runs / "whole", "step")]


def test_a_missing_package_is_said_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        GrowthError, match="the monitor wandb requires the package wandb, which is not installed"
    ) as error:
        train(RunConfig(monitor="csv, wandb", out=str(tmp_path / "run")))
    assert "pip install wandb" in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(GrowthError, match="there is no monitor 'tensorbord'"):
        train(RunConfig(monitor="tensorbord"))


def test_sections_of_the_deepspeed_file_are_kept_and_the_engine_does_not_see_them(tmp_path):
    file = tmp_path / "engine.json"
    section: dict[str, Any] = {"enabled": True, "output_path": "elsewhere"}
    file.write_text(json.dumps({"csv_monitor": section, "wandb": {"project": "mine"}, "zero_optimization": {}}))
    config = RunConfig(deepspeed=str(file))
    assert monitor_sections(config, tmp_path) == {"csv_monitor": section | {"job_name": "csv"}}
    assert not {"csv_monitor", "wandb"} & set(engine_config(config, 1, 16))
    assert monitor_sections(RunConfig(), tmp_path) == {}


def test_a_list_in_yaml_is_understood(tmp_path):
    (tmp_path / "run.yaml").write_text("monitor: [csv, tensorboard]\n")
    assert load_run_config(tmp_path / "run.yaml").monitor == "csv,tensorboard"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_folder_of_its_name_is_no_package(name, tmp_path, monkeypatch):
    package = "tensorboard" if name == "tensorboard" else "wandb"
    (tmp_path / package).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    importlib.invalidate_caches()
    with pytest.raises(GrowthError, match=f"requires the package {package}, which is not installed"):
        monitor_sections(RunConfig(monitor=name), tmp_path)
