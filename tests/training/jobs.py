"""Real runs of the recipe on a tiny model, as processes to be stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from launching import ROOT, environment
from scenarios import TINY

PRETRAIN = ROOT / "recipes" / "pretrain.py"
STEPS, SAVE_EVERY = 120, 5


def prepared(folder: Path) -> Path:
    """Write data, which the tests of one session share, and a tiny model's configuration into a folder."""
    from phigrow.corpus import load_blocks, prepare

    shared = folder.parent / "embedded-data"
    if not shared.is_dir():
        prepare("embedded", shared, seq_len=32, progress=False)
    (folder / "data").symlink_to(shared)
    (folder / "tiny.json").write_text(json.dumps(TINY | {"vocab_size": load_blocks(shared).vocab_size}))
    return folder


def words(folder: Path, out: str, **more: Any) -> list[str]:
    """The words after ``recipes/pretrain.py``."""
    settings = {
        "model": folder / "tiny.json",
        "data": folder / "data",
        "out": folder / out,
        "steps": STEPS,
        "batch": 4,
        "dtype": "fp32",
        "zero": 1,
        "save_every": SAVE_EVERY,
        "eval_every": 60,
        "eval_blocks": 4,
        "log_every": 1,
        "export": "none",
        "threads": 1,
    }
    return [str(word) for key, value in (settings | more).items() for word in (f"--{key.replace('_', '-')}", value)]


def launcher(ranks: int) -> list[str]:
    """DeepSpeed's launcher on one host."""
    port = 20000 + os.getpid() % 20000
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--num_gpus={ranks}",
        f"--master_port={port}",
        str(PRETRAIN),
    ]


def start(command: list[str], **environ: str) -> subprocess.Popen[str]:
    """Start a command whose output is kept, in a process group of its own."""
    return subprocess.Popen(
        command,
        env=environment() | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher, rank 0 first."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            line = child.cmdline()
            if str(PRETRAIN) in line and "launch" not in " ".join(line[:5]):
                found.append((int(child.environ()["RANK"]), child))
        except (psutil.NoSuchProcess, KeyError):
            continue
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def last_step(out: Path) -> int:
    """The last step in a run's records, 0 without any."""
    try:
        lines = (out / "records.jsonl").read_text().splitlines()
    except OSError:
        return 0
    steps = [json.loads(line)["step"] for line in lines if line.startswith('{"type": "step"') and line.endswith("}")]
    return max(steps, default=0)


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 240.0) -> None:
    """Wait until a condition holds; fail with the output if the process ends or time runs out first."""
    limit = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > limit:
            end(process)
            raise AssertionError(f"ended with {process.returncode}:\n{process.communicate()[0][-6000:]}")
        time.sleep(0.002)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process group that is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen[str], seconds: float = 240.0) -> tuple[int, str]:
    """Wait for the end and return code and output."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(process.communicate()[0][-6000:]) from None
    return process.returncode, output
