"""The Slurm script, run for real under stand-ins for srun and scontrol: it stops, is queued again, and finishes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import STEPS, finish, last_step, prepared, start, wait_for, words
from launching import ROOT, losses, records

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "phigrow" / "recipes" / "slurm" / "pretrain.sbatch"
SRUN = """#!/bin/bash
# Two tasks, signals passed on; the largest code, as srun's.
echo "$1 $2" >> "$CALLS.srun"
shift 2  # --kill-on-bad-exit=1 --cpus-per-task=8
pids=()
trap 'kill -TERM "${pids[@]}"' TERM
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" && one=0 || one=$?; done
    [ "${one:-0}" -gt "$code" ] && code=$one
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "scontrol $*" >> "$CALLS"; fi
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job, its commands first in the path."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {
        "CPUS_PER_TASK": "8",
        "JOB_ID": str(os.getpid()),
        "JOB_NODELIST": "node1",
        "NTASKS": "2",
        "NNODES": "1",
        "SUBMIT_DIR": str(ROOT),
    }
    path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {f"SLURM_{key}": value for key, value in job.items()} | {"PATH": path, "CALLS": str(tmp_path / "calls")}


def test_the_script_stops_before_the_time_limit_is_queued_again_and_finishes(cluster, tmp_path):
    prepared(tmp_path)
    calls, out = tmp_path / "calls", tmp_path / "run"
    command = ["bash", str(SCRIPT), *words(tmp_path, "run")]
    job = start(command, **cluster)
    wait_for(lambda: last_step(out) >= 7, job)
    os.kill(job.pid, signal.SIGUSR1)
    code, output = finish(job)
    assert code == 0, output[-4000:]
    assert "as asked; the same command resumes" in output
    assert last_step(out) < STEPS
    assert calls.read_text().split() == ["scontrol", "requeue", cluster["SLURM_JOB_ID"]]
    assert set(Path(f"{calls}.srun").read_text().splitlines()) == {"--kill-on-bad-exit=1 --cpus-per-task=8"}
    code, output = finish(start(command, **cluster, SLURM_RESTART_COUNT="1"))
    assert code == 0, output[-4000:]
    assert len(calls.read_text().splitlines()) == 1  # finished: not queued again
    assert [r["step"] for r in records(out, "step")] == list(range(1, STEPS + 1))
    assert len(losses(out)) == STEPS

    code, output = finish(start([*command, "--lr", "5"], **cluster))
    assert code == 2  # another configuration: a person must look
    assert "lr (0.001, now 5.0)" in output
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(("code", "queued"), [(75, True), (1, True), (137, True), (2, False), (0, False)])
def test_the_exit_code_of_the_ranks_decides_if_the_job_is_queued_again(cluster, tmp_path, code, queued):
    (tmp_path / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
    done = subprocess.run(["bash", str(SCRIPT), "demo"], env=cluster, check=False, capture_output=True, text=True)
    assert (tmp_path / "calls").exists() == queued, done.stderr
    assert done.returncode == (0 if queued else code)


def test_the_script_is_valid_bash_and_asks_slurm_for_what_the_page_says():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text, page = SCRIPT.read_text(), (ROOT / "docs" / "clusters.md").read_text()
    for option in ("--requeue", "--signal=B:USR1@600", "--ntasks-per-node"):
        assert f"#SBATCH {option}" in text
        assert option in page
