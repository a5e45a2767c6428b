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
