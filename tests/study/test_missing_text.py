"""Runs and studies without text: refused before a step, and named in a dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_stages
from studies import content, written
from typer.testing import CliRunner

from phigrow.cli import app
from phigrow.errors import GrowthError
from phigrow.study import foreground, load_stages, load_study, run_stages, run_study
from phigrow.training import RunConfig, load_run_config, train
from phigrow.training.data import check_data

NO_TEXT = r"the run has no text to train on\n  where: data\n[\s\S]*phigrow data"


@pytest.mark.parametrize("words", [["phi-2"], ["phi-1-small"], ["--init", "grown"], ["demo", "--model", "phi-1"]])
def test_only_the_demo_trains_without_text(monkeypatch, words):
    monkeypatch.setattr(foreground, "main", lambda words: 0)
    with pytest.raises(GrowthError, match=NO_TEXT):
        foreground.pretrain(words, ranks=1)
    assert foreground.pretrain([*words, "--data", "embedded"], ranks=1) == 0
    assert foreground.pretrain(["demo"], ranks=1) == foreground.pretrain([], ranks=1) == 0


def test_every_rank_refuses_before_it_joins_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("phigrow.training.loop.start", None)  # it is not called
    with pytest.raises(GrowthError, match=NO_TEXT):
        train(load_run_config("phi-2", out=str(tmp_path / "run")))
    check_data(RunConfig(model="phi-2", stream={"ref": "text.txt", "tokenizer": "phi-2"}))
    check_data(RunConfig(model="demo"))
    assert not list(tmp_path.iterdir())


def test_maps_are_not_learned_from_a_text_that_nobody_chose(tmp_path):
    from phigrow.ligo.train import learn_growth

    with pytest.raises(GrowthError, match=r"no text to learn the maps from\n  where: data\n"):
        learn_growth("phi-1_5", "phi2.json", tmp_path / "maps")


def test_a_study_names_its_text(tmp_path):
    data = {key: value for key, value in content()["data"].items() if key != "ref"}
    with pytest.raises(GrowthError, match=r"the data has no 'ref'\n  where: data in .*study.yaml"):
        load_study(written(tmp_path, data=data))
    with pytest.raises(GrowthError, match=r"the data has no 'ref'\n  where: data in .*stages.yaml"):
        load_stages(test_stages.written(tmp_path, data=data))


@pytest.mark.parametrize("ref", ["missing.jsonl", "texts/*.txt"])
def test_text_that_does_not_exist_is_named_before_a_job_starts(tmp_path, ref):
    data = content()["data"] | {"ref": str(tmp_path / ref)}
    study, stages = written(tmp_path, data=data), test_stages.written(tmp_path, data=data)
    out = tmp_path / "out"
    with pytest.raises(GrowthError, match=r"(does not exist|no text files)\n  where: the text of the study, data.ref"):
        run_study(load_study(study, out=out))
    with pytest.raises(GrowthError, match=r"(does not exist|no text files)\n  where: the text of the study, data.ref"):
        run_stages(load_stages(stages, out=out))
    assert not out.exists()
    for command, path in (("compare", study), ("grow-train", stages)):
        done = CliRunner().invoke(app, [command, str(path), "--dry-run", "--out", str(out)])
        assert done.exit_code == 0, done.exception
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("before you run it:")]
        assert str(tmp_path / ref) in line
        assert "tokens" in done.stdout  # the jobs are listed all the same
    # Negative control: with the text, nothing is missing.
    (tmp_path / "missing.jsonl").write_text(json.dumps({"text": "to be or not to be"}))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("to be or not to be")
    done = CliRunner().invoke(app, ["compare", str(study), "--dry-run", "--out", str(out)])
    assert done.stderr == ""


def test_text_beside_the_study_is_read_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("to be or not to be")
    path = written(tmp_path, data=content()["data"] | {"ref": "text.txt"})
    assert load_study(path).data["ref"] == str(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    assert load_study(Path("study.yaml")).data["ref"] == "text.txt"
