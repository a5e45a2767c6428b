"""What a study shows while it runs, and how it ends what it started."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from rich.console import Console
from studies import loaded
from test_jobs import SWEPT, finish

from phigrow.errors import GrowthError
from phigrow.study import jobs_of, run_study
from phigrow.study.launch import GROUP, _last_words, _wait, default_ranks, still_running
from phigrow.study.runner import _alone
from phigrow.study.table import Display, position


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
    display.running = running = next(job for job in jobs if job.name == "tile/seed0/40")
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


def test_asked_to_stop_it_asks_the_run_and_waits_until_it_has_saved(tmp_path):
    script = f"until [ -e {tmp_path}/stop ]; do sleep 0.05; done; touch {tmp_path}/saved"
    process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    (tmp_path / GROUP).write_text(str(process.pid))
    assert still_running(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _wait(process, tmp_path, interrupt)
    assert process.returncode == 0
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "stop").exists()
    assert not still_running(tmp_path)


def test_a_study_is_run_by_one_command_at_a_time(tmp_path):
    study = loaded(tmp_path)
    study.out.mkdir()
    with _alone(study.out), pytest.raises(GrowthError, match="another command runs this study"):
        run_study(study, only=["scratch"])
    assert sorted(path.name for path in study.out.iterdir()) == [".lock"]


def test_the_reason_of_a_failure_is_what_the_run_said(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("step 1\nerror: no blocks\n  where: data\n  why: empty\n  what to do: more\n[rank0] gone\n")
    assert _last_words(log) == "error: no blocks\n  where: data\n  why: empty\n  what to do: more"
    log.write_text("".join(f"line {n}\n" for n in range(9)))
    assert _last_words(log).splitlines() == [f"line {n}" for n in range(3, 9)]


def test_ranks_divide_the_batch(monkeypatch):
    monkeypatch.setattr("phigrow.study.launch.gpus", lambda: 8)
    assert [default_ranks(batch) for batch in (16, 12, 6, 7)] == [8, 4, 2, 1]
    monkeypatch.setattr("phigrow.study.launch.gpus", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert default_ranks(16) == 2
