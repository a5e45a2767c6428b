"""Start DeepSpeed on a training run, watch it, and leave nothing behind."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError

LOG = "log.txt"
RECIPE = "recipe.yaml"
GROUP = "running.pid"
STOP_SECONDS = 120.0
"""Seconds that a run has to save and leave, once it is asked to."""


def default_ranks(batch: int) -> int:
    """One rank a GPU, or a core, up to eight and a power of two, so that they share the batch evenly.

    On two cores two ranks of one thread were faster than one of two, most of all when other work takes a core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = 1 << (min(gpus() or cores, 8).bit_length() - 1)
    while batch % ranks:
        ranks //= 2
    return ranks


def gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def launch(keys: dict[str, Any], ranks: int, watch: Callable[[], None]) -> None:
    """Train one run under DeepSpeed's launcher, one process a rank, in a process group of its own.

    The keys are written to ``recipe.yaml`` in the run's folder, what the ranks print to ``log.txt``. The launcher is
    asked to end with this process, whatever ends it, and asks the ranks, which save first.

    Args:
        keys: of the training run.
        ranks: processes on this machine.
        watch: called about twice a second while it runs.

    Raises:
        GrowthError: it ended with an error; the last lines of its log are the reason.
        KeyboardInterrupt: after the run was asked to stop, and saved.
    """
    import yaml

    folder = Path(keys["out"])
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / RECIPE
    given = {key: value for key, value in keys.items() if value is not None or key == "export"}
    recipe.write_text(yaml.safe_dump(given), encoding="utf-8")
    # What `deepspeed` starts on one machine, started without it: that one would not pass a signal on.
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]
    command += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", "--log_level=error"]
    command += ["--module", "phigrow.training", str(recipe)]
    with (folder / LOG).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env=environment(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=_end_with_parent(),
        )  # fmt: skip
        group = folder / GROUP
        group.write_text(str(process.pid))
        try:
            _wait(process, folder, watch)
        finally:
            group.unlink(missing_ok=True)
    if process.returncode != 0:
        raise GrowthError(
            f"training ended with code {process.returncode}",
            where=str(folder),
            why=_last_words(folder / LOG),
            fix=f"read {folder / LOG}, then run the same command again: it resumes",
        )


def still_running(folder: Path) -> bool:
    """Whether processes of an earlier launch on this folder have not ended yet."""
    try:
        os.killpg(int((folder / GROUP).read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def _wait(process: subprocess.Popen[bytes], folder: Path, watch: Callable[[], None]) -> None:
    from phigrow.training.loop import STOP_FILE

    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                return
            watch()
    except BaseException:
        (folder / STOP_FILE).touch()
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(STOP_SECONDS)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        (folder / STOP_FILE).unlink(missing_ok=True)
        raise


def environment() -> dict[str, str]:
    """The environment variables of a launch."""
    # The launcher and DeepSpeed's builds look for their tools on PATH, where an inactive environment is not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path}
    if not gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every process warns that it found no GPU
    return environment


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux: have the launcher asked to end when this process is gone, even if it was killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: after it only the call is safe
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[told[-1] :][:4] if told else lines[-6:])
