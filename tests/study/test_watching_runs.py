"""What a study shows while it runs, and how it ends what it started."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from studies import loaded
from test_jobs import SWEPT, finish

from phigrow.errors import GrowthError
from phigrow.study import jobs_of, load_stages, run_stages, run_study
from phigrow.study.launch import GROUP, Layout, Ranks, default_ranks, last_words, layout, rank_devices, still_running
from phigrow.study.runner import Crew, alone
from phigrow.study.table import Display, position

ROOT = Path(__file__).parents[2]


def shown(display: Display) -> list[str]:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(display.table())
    return [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]


def test_the_table_has_the_losses_that_are_there_and_where_the_running_one_is(tmp_path):
    study = loaded(tmp_path, **SWEPT)
    jobs = jobs_of(study)
    for job in jobs:
        if job.kind == "sweep" and job.arm and job.arm.name == "tile":
            finish(job, 3.0 if job.keys["lr"] == 4e-3 else 3.5)
        elif job.name in ("tile/seed0/trunk", "tile/seed0/20"):
            finish(job, 2.75)
    display = Display(study, jobs, jobs, print)
    running = next(job for job in jobs if job.name == "tile/seed0/40")
    display.running = {running.name: running}
    assert position(running) == "starting"
    running.folder.mkdir(parents=True)
    record = {"type": "step", "step": 33, "tokens": 1, "flops": 1, "seconds": 1, "loss": 2.5}
    (running.folder / "records.jsonl").write_text(json.dumps(record) + '\n{"type": "st')
    display.failed.add("lossless/seed1/trunk")
    lines = shown(display)
    assert "tile 0.004 2.750 step 33" in lines
    assert "scratch 0/2" in lines
    assert "lossless 0/2 failed failed" in lines
    assert any("tile/seed0/40, step 33/40, loss 2.5000" in line for line in lines)


class Scripted(Ranks):
    """Ranks that are a shell script, whose first argument is the folder that names the runs."""

    def __init__(self, script: str, say: Any = None) -> None:
        super().__init__(1, say=say)
        self.script, self.folders = script, []

    def command(self, folder: Path) -> list[str]:
        self.folders.append(folder)
        return ["sh", "-c", self.script, "ranks", str(folder)]


def wait_for(ranks: Ranks) -> None:
    while not ranks.ended():
        time.sleep(0.02)


def test_asked_to_stop_it_asks_the_run_and_waits_until_it_has_saved(tmp_path):
    run = tmp_path / "run"
    script = f"until [ -e {run}/stop ] && [ -e $1/leave ]; do sleep 0.05; done; touch {run}/saved"
    with Scripted(script) as ranks:  # left in the middle of a run, as by Ctrl-C
        ranks.begin({"out": str(run)})
        assert still_running(run)
        assert not ranks.ended()
    assert (run / "saved").exists()
    assert not (run / "stop").exists()
    assert not (run / GROUP).exists()
    assert not any(folder.exists() for folder in ranks.folders)
    assert not still_running(run)


def test_one_run_after_another_on_the_same_ranks_and_on_new_ones_after_a_failure(tmp_path):
    wait = "until [ -e $1/run-$n.json ]; do [ -e $1/leave ] && exit; sleep 0.02; done"
    script = f"for n in 0 1; do {wait}; touch $1/run-$n.ended; done; n=2; {wait}; exit 3"
    said: list[str] = []
    with Scripted(script, said.append) as ranks:
        processes = []
        for name in ("first", "second"):
            ranks.begin({"out": str(tmp_path / name), "lr": 1e-3, "seed": None, "export": None})
            processes.append((tmp_path / name / GROUP).read_text())
            wait_for(ranks)
            assert not (tmp_path / name / GROUP).exists()
        assert processes[0] == processes[1]
        assert said == ["starting DeepSpeed ranks (up to a minute)"]  # once for both
        recipe = yaml.safe_load((tmp_path / "second" / "recipe.yaml").read_text())
        assert recipe == {"out": str(tmp_path / "second"), "lr": 1e-3, "export": None}
        ranks.begin({"out": str(tmp_path / "third")})
        (tmp_path / "third" / "log.txt").write_text("error: no blocks\n")
        with pytest.raises(GrowthError, match=r"training ended with code 3\n.*third\n.*error: no blocks"):
            wait_for(ranks)
        assert len(ranks.folders) == 1
        assert not ranks.folders[0].exists()
        ranks.begin({"out": str(tmp_path / "fourth")})
        assert (tmp_path / "fourth" / GROUP).read_text() != processes[0]
        assert len(said) == len(ranks.folders) == 2


def test_a_study_is_run_by_one_command_at_a_time(tmp_path):
    study = loaded(tmp_path)
    study.out.mkdir()
    with alone(study.out), pytest.raises(GrowthError, match="another command runs this study"):
        run_study(study, only=["scratch"])
    assert sorted(path.name for path in study.out.iterdir()) == [".lock"]


def test_where_a_study_or_stages_cannot_be_written_they_say_so(tmp_path):
    (tmp_path / "file").write_text("text")
    beyond = tmp_path / "file" / "out"
    message = rf"the output cannot be written\n  where: {beyond}\n  why: \[Errno 20\]"
    with pytest.raises(GrowthError, match=message):
        run_study(dataclasses.replace(loaded(tmp_path), out=beyond))
    stages = load_stages(ROOT / "phigrow" / "recipes" / "stages" / "tiny.yaml", out=beyond)
    with pytest.raises(GrowthError, match=message):
        run_stages(stages)
    (tmp_path / ".lock").mkdir()  # the folder is there, and nothing can be written into it
    with pytest.raises(GrowthError, match=r"cannot be written[\s\S]*Is a directory"), alone(tmp_path):
        pass


@pytest.mark.parametrize("terminal", [False, True])
def test_of_several_places_one_says_that_ranks_are_started(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setattr(Ranks, "command", lambda self, folder: ["true"])
    said: list[str] = []
    study = loaded(tmp_path, workers=2)
    jobs = jobs_of(study)
    with Display(study, jobs, jobs, said.append) as display, Crew(study, jobs, display.tell) as crew:
        for number, place in enumerate(crew.places):
            place.ranks.begin({"out": str(tmp_path / f"run-{number}")})
    assert len(crew.places) == 2
    assert (said[1:] == ["starting DeepSpeed ranks (up to a minute)"]) is not terminal
    assert capsys.readouterr().out.count("starting DeepSpeed ranks") == terminal  # above the live table


def test_the_reason_of_a_failure_is_what_the_run_said(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("step 1\nerror: no blocks\n  where: data\n  why: empty\n  what to do: more\n[rank0] gone\n")
    assert last_words(log) == "error: no blocks\n  where: data\n  why: empty\n  what to do: more"
    log.write_text("".join(f"line {n}\n" for n in range(9)))
    assert last_words(log).splitlines() == [f"line {n}" for n in range(3, 9)]
    assert last_words(tmp_path / "nothing.txt") == "the ranks ended without any output"


def test_a_machine_is_shared_by_runs_of_one_rank_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr("phigrow.study.launch.gpus", lambda: 8)
    assert layout(16) == Layout(8, 1)
    assert layout(16, ranks=4) == Layout(2, 4)
    assert layout(16, workers=2) == Layout(2, 4)
    assert layout(6, workers=1) == Layout(1, 2)
    assert layout(16, workers=3, ranks=5) == Layout(3, 5)
    assert layout(16, ranks=16) == Layout(1, 16)
    monkeypatch.setattr("phigrow.study.launch.gpus", lambda: 0)
    monkeypatch.setattr("phigrow.study.launch.cores", lambda: 64)
    assert layout(16) == Layout(4, 1)


def test_each_worker_has_devices_of_its_own(monkeypatch):
    monkeypatch.setattr("phigrow.study.launch.gpus", lambda: 4)
    assert [rank_devices(2, place) for place in (0, 1)] == [[0, 1], [2, 3]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6,7")
    assert [rank_devices(2, place) for place in (0, 1)] == [["4", "GPU-5"], ["6", "7"]]


def test_ranks_divide_the_batch(monkeypatch):
    monkeypatch.setattr("phigrow.study.launch.gpus", lambda: 8)
    assert [default_ranks(batch) for batch in (16, 12, 6, 7)] == [8, 4, 2, 1]
    monkeypatch.setattr("phigrow.study.launch.gpus", lambda: 0)
    monkeypatch.setattr("phigrow.study.launch.cores", lambda: 3)
    assert default_ranks(16) == 2
