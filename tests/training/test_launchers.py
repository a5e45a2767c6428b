"""torchrun and accelerate start the same run as DeepSpeed's launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import HERE, environment, losses

pytestmark = pytest.mark.launch
SETTINGS = {"zero": 1, "dtype": "fp32"}
PORT = str(20000 + os.getpid() % 20000)
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", PORT],
    "accelerate": [
        "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ],
}  # fmt: skip
"""On CPUs accelerate starts several processes through MPI only."""


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [{"out": f"deepspeed-{ranks}", **SETTINGS}]


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), ("accelerate", 1)])
def test_a_launcher_starts_the_same_run(launcher, ranks, launches, tmp_path):
    listed = tmp_path / "scenarios.json"
    listed.write_text(json.dumps([{"out": str(tmp_path / "run"), **SETTINGS}]))
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(HERE / "scenarios.py"), str(listed)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    expected = launches(__name__)
    assert losses(tmp_path / "run") == losses(expected / f"deepspeed-{ranks}")
    assert f"ranks: {ranks} on" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("how", ["address", "rendezvous"])
def test_torchrun_on_two_hosts_starts_the_same_run(how, launches, tmp_path):
    """Two agents on this machine, with one rank each, as on two hosts."""
    listed = tmp_path / "scenarios.json"
    listed.write_text(json.dumps([{"out": str(tmp_path / "run"), **SETTINGS}]))
    jobs = []
    for host in (0, 1):
        place = ["--node-rank", str(host), "--master-addr", "127.0.0.1", "--master-port", PORT]
        if how == "rendezvous":
            place = ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", f"127.0.0.1:{PORT}"]
        command = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *place]
        words = [sys.executable, *command, str(HERE / "scenarios.py"), str(listed)]
        jobs.append(
            subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [job.communicate(timeout=600)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert losses(tmp_path / "run") == losses(launches(__name__) / "deepspeed-2")
    assert sum("ranks: 2 on" in output for output in outputs) == 1  # rank 0 speaks for all
