"""A study for real: killed, broken, run again; it goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies import content, loaded, written

from phigrow.measure import load_run
from phigrow.records.readers.phigrow import last_record
from phigrow.study import jobs_of, progress

pytestmark = pytest.mark.long

SMALL = {
    "arms": {"scratch": None, "tile": None},
    "source": content()["source"] | {"steps": 6},
    "budgets": [6, 10],
    "train": {"batch": 8, "lr": 5e-3, "warmup": 2, "eval_every": 4, "eval_blocks": 8, "save_every": 2, "log_every": 1},
    "ranks": 1,
    "workers": 1,  # one run at a time: the source is done before the first trunk begins
}


def command(folder: Path, *words: str) -> list[str]:
    program = "from phigrow.cli import main; main()"
    return [sys.executable, "-c", program, "compare", str(folder / "study.yaml"), "--out", str(folder / "out"), *words]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def losses(folder: Path) -> dict[str, list[float]]:
    """Training losses of every run of the study."""
    jobs = [job for job in jobs_of(loaded(folder, **SMALL)) if job.trains]
    return {job.name: load_run(job.folder).steps["loss"].tolist() for job in jobs if progress.done(job) is not None}


def test_a_study_that_is_killed_goes_on_and_one_broken_arm_stops_no_other(tmp_path):
    written(tmp_path, **SMALL)
    jobs = {job.name: job for job in jobs_of(loaded(tmp_path, **SMALL))}
    trunk = jobs["scratch/seed0/trunk"]
    # Killed while the first trunk trains; the launcher and the rank must go with it.
    study = subprocess.Popen(command(tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 240
    while last_record(trunk.folder, "step") is None and time.monotonic() < until:
        assert study.poll() is None, study.communicate()[0].decode()
        time.sleep(0.05)
    study.send_signal(signal.SIGKILL)
    study.communicate()
    assert progress.done(jobs["source"]) is not None
    assert progress.done(trunk) is None

    # The start of tile is damaged before it is needed: that arm fails, scratch ends and the report is written.
    start = jobs["tile/seed0/start"].folder
    shutil.rmtree(start, ignore_errors=True)  # it may have been made ahead
    start.mkdir(parents=True)
    done = subprocess.run(command(tmp_path), env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: tile/seed0/trunk: training ended with code" in done.stderr
    assert "not run, because they need a failed run: tile/seed0/6, tile/seed0/10" in done.stderr
    assert "source:" not in done.stdout  # it was done before

    start.rmdir()
    done = subprocess.run(command(tmp_path), env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scratch/seed0" not in done.stdout.partition("tile: ")[0]
    killed = losses(tmp_path)
    assert set(killed) == {name for name, job in jobs.items() if job.trains}
    for arm in ("scratch", "tile"):
        short, long, shared = (killed[f"{arm}/seed0/{name}"] for name in ("6", "10", "trunk"))
        assert (len(short), len(long), len(shared)) == (6, 10, 8)
        assert short[:5] == long[:5] == shared[:5]
        assert long[:8] == shared
        rates = [load_run(jobs[f"{arm}/seed0/{end}"].folder).steps["lr"] for end in ("6", "10")]
        assert [rate[-1] / rate.max() for rate in rates] == pytest.approx([0.55, 0.55])  # each has decayed at its end
        assert rates[1][5] == rates[1].max()
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert "tile" in json.dumps(report)

    # Nothing is left to do: nothing runs, and the records stay as they are.
    done = subprocess.run(command(tmp_path), env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
    assert "0 of 9 jobs to do" in done.stdout
    assert losses(tmp_path) == killed
