"""Start DeepSpeed's ranks, let them train one run after another, and end them without leftover processes or files."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.output import make_folder
from phigrow.files.portable import end_group, group_runs
from phigrow.files.strict_yaml import dump_yaml
from phigrow.training import service
from phigrow.training.loop import STOP_FILE
from phigrow.training.lost_ranks import exit_explained
from phigrow.training.process import cores

LOG = "log.txt"
RECIPE = "recipe.yaml"
GROUP = "running.pid"
STOP_SECONDS = 120.0
"""Seconds that a run has to save and leave after a request to stop."""


@dataclass(frozen=True)
class Layout:
    """Division of a machine: the number of runs side by side, and the ranks of each."""

    workers: int
    ranks: int


def layout(batch: int, workers: int | None = None, ranks: int | None = None) -> Layout:
    """Choose the values that are not given: one rank per run, and one run per GPU, or per core up to four.

    A run on one device does the least work, and runs side by side do not wait for each other. On two cores two short
    runs took 48 s side by side with one rank each, and 97 s in sequence with two ranks each, starts included. A model
    that does not fit on one device needs more ranks.
    """
    devices = gpus() or min(cores(), 4)
    if ranks is None:
        ranks = 1
        while workers and ranks * 2 * workers <= devices and batch % (ranks * 2) == 0:
            ranks *= 2
    return Layout(workers or max(1, devices // ranks), ranks)


def default_ranks(batch: int) -> int:
    """Return the number of ranks for runs that go one after another.

    It is a power of two that divides the batch, up to the number of GPUs or cores, and up to eight. On two cores two
    ranks with one thread were faster than one rank with two, especially if other work takes a core.
    """
    ranks = 1 << (min(gpus() or cores(), 8).bit_length() - 1)
    while batch % ranks:
        ranks //= 2
    return ranks


def gpus() -> int:
    """Return the number of GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


class Ranks:
    """Ranks of this machine that train one run after another; a context that ends them.

    DeepSpeed's launcher starts them with the first run, one process per rank, in a process group of their own. After a
    failed run they are started again. If this process ends, even if it is killed, the launcher asks the ranks to stop,
    and they save first.

    Args:
        ranks: number of processes.
        place, places: number of this part of the machine's devices, and the number of equal parts.
        say: receives a message when the ranks are started, because a start takes longer than many runs.
    """

    def __init__(
        self, ranks: int, place: int = 0, places: int = 1, *, say: Callable[[str], None] | None = None
    ) -> None:
        self.ranks, self.place, self.places, self._say = ranks, place, places, say
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._run: Path | None = None
        self._number = 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        if KeyboardInterrupt in error and self._say is not None and self._process is not None:
            self._say("stopping: runs save a checkpoint first")
        self.ask_to_stop()
        self._end()

    def begin(self, keys: dict[str, Any]) -> None:
        """Start a run; its keys go to ``recipe.yaml`` in its folder, and the ranks' output to ``log.txt``."""
        folder = Path(keys["out"])
        make_folder(folder)
        given = {key: value for key, value in keys.items() if value is not None or key == "export"}
        (folder / RECIPE).write_text(dump_yaml(given), encoding="utf-8")
        self._run = folder
        if self._process is None:
            if self._say is not None:
                self._say("starting DeepSpeed ranks (up to a minute)")
            self._start(folder / LOG)
        assert self._process is not None
        assert self._folder is not None
        (folder / GROUP).write_text(str(self._process.pid))
        order = {"recipe": str((folder / RECIPE).absolute()), "log": str((folder / LOG).absolute())}
        atomic_json(service.asked(self._folder, self._number), order)

    def ended(self) -> bool:
        """Return True if the run has ended.

        Raises:
            GrowthError: the run failed; the reason has the last lines of its log.
        """
        assert self._process is not None
        assert self._folder is not None
        assert self._run is not None
        code = self._process.poll()
        if not service.ended(self._folder, self._number).exists():
            if code is None:
                return False
            run = self._run
            self._end()
            if code:
                reason = exit_explained(code)
                raise GrowthError(
                    f"training ended with code {code}" + (f": {reason}" if reason else ""),
                    where=str(run),
                    why=last_words(run / LOG),
                    fix=f"read {run / LOG}, then run the same command again: it resumes",
                )
            return True
        self._number += 1
        self._forget_run()
        return True

    def ask_to_stop(self) -> None:
        """Ask the run to save and end, without waiting for it."""
        if self._folder is not None:
            with contextlib.suppress(FileNotFoundError):  # the ranks have left
                (self._folder / service.LEAVE).touch()
        if self._run is not None:
            (self._run / STOP_FILE).touch()

    def command(self, folder: Path) -> list[str]:
        """Return the command that starts the ranks, which read their next run from ``folder``."""
        return launcher(self.ranks, self.place, "phigrow.training.service", str(folder))

    def _start(self, log: Path) -> None:
        self._folder, self._number = Path(tempfile.mkdtemp(prefix="phigrow-ranks-")), 0
        with log.open("a", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                self.command(self._folder),
                env=environment(self.ranks * self.places),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    def _end(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(STOP_SECONDS)
            if process.poll() is None:
                end_group(process)
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._folder = None
        self._forget_run()

    def _forget_run(self) -> None:
        if self._run is not None:
            (self._run / STOP_FILE).unlink(missing_ok=True)
            (self._run / GROUP).unlink(missing_ok=True)
        self._run = None


def launcher(ranks: int, place: int, module: str, *words: str) -> list[str]:
    """Return the command that starts a module on ranks of this machine, without output of the launcher itself.

    `deepspeed` runs the same command on one machine. It is started directly, because `deepspeed` does not pass signals
    on.

    Args:
        ranks: number of processes.
        place: number of the part of the machine's devices that they use.
        module: name of the Python module that every rank runs.
        words: arguments of the module.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": rank_devices(ranks, place)}).encode()).decode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]
    command += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", "--log_level=error"]
    return [*command, "--module", module, *words]


def still_running(folder: Path) -> bool:
    """Return True if processes of an earlier launch on this folder still run."""
    try:
        return group_runs(int((folder / GROUP).read_text()))
    except (OSError, ValueError):
        return False


def environment(processes: int = 1) -> dict[str, str]:
    """Return the environment variables of a launch if so many processes share the machine."""
    # The launcher and DeepSpeed's builds search PATH, which does not have the tools of an inactive environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path}
    if not gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every process warns that it found no GPU
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    return environment


def rank_devices(ranks: int, place: int) -> list[int | str]:
    """Return the devices of one part of the machine, out of those that this process may use."""
    first = place * ranks
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and gpus():
        return [visible[number % len(visible)] for number in range(first, first + ranks)]
    return [number % (gpus() or first + ranks) for number in range(first, first + ranks)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def end_with_parent() -> Callable[[], None] | None:
    """Return a function for ``preexec_fn``: on Linux the child gets SIGTERM when this process ends, even if killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: after it only the call is safe
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def last_words(log: Path) -> str:
    """Return the last error message in a log, or its last lines if it has none."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # the ranks ended before they opened it
        return "the ranks ended without any output"
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if line.startswith(("error: ", "error on rank "))]
    return "\n".join(lines[errors[-1] :][:4] if errors else lines[-6:])
