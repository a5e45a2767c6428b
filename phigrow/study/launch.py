"""Start DeepSpeed's ranks, have them train one run after another, and leave nothing behind."""

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
from phigrow.training import service
from phigrow.training.loop import STOP_FILE
from phigrow.training.process import cores

LOG = "log.txt"
RECIPE = "recipe.yaml"
GROUP = "running.pid"
STOP_SECONDS = 120.0
"""Seconds that a run has to save and leave, once it is asked to."""


@dataclass(frozen=True)
class Layout:
    """Share of a machine: the number of runs side by side, and the ranks of each."""

    workers: int
    ranks: int


def layout(batch: int, workers: int | None = None, ranks: int | None = None) -> Layout:
    """Choose what is not given: one rank a run, and a run on every GPU, or on every core up to four.

    A run that fits on one device is trained with the least work there; several runs share nothing and wait for nothing.
    On two cores two short runs of one rank side by side took 48 s, and 97 s after each other on two ranks, starts
    included. A model that does not fit on one device needs more ranks.
    """
    devices = gpus() or min(cores(), 4)
    if ranks is None:
        ranks = 1
        while workers and ranks * 2 * workers <= devices and batch % (ranks * 2) == 0:
            ranks *= 2
    return Layout(workers or max(1, devices // ranks), ranks)


def default_ranks(batch: int) -> int:
    """Ranks where runs go one after another: one a GPU or a core, up to eight and a power of two, to share the batch.

    On two cores two ranks of one thread were faster than one of two, most of all when other work takes a core.
    """
    ranks = 1 << (min(gpus() or cores(), 8).bit_length() - 1)
    while batch % ranks:
        ranks //= 2
    return ranks


def gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


class Ranks:
    """Ranks of this machine that train one run after another; a context, at whose end they are gone.

    They are started with the first run, under DeepSpeed's launcher, one process a rank, in a process group of their
    own, and anew after a run that failed. The launcher is asked to end with this process, whatever ends it, and asks
    the ranks, which save first.

    Args:
        ranks: processes.
        place, places: which part of the machine's devices they take, of how many equal parts.
        say: is told when they are started, which takes longer than many a run.
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
        """Start a run: its keys are written to ``recipe.yaml`` in its folder, what the ranks print to ``log.txt``."""
        import yaml

        folder = Path(keys["out"])
        make_folder(folder)
        given = {key: value for key, value in keys.items() if value is not None or key == "export"}
        (folder / RECIPE).write_text(yaml.safe_dump(given), encoding="utf-8")
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
            GrowthError: it failed; the last lines of its log are the reason.
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
                raise GrowthError(
                    f"training ended with code {code}",
                    where=str(run),
                    why=last_words(run / LOG),
                    fix=f"read {run / LOG}, then run the same command again: it resumes",
                )
            return True
        self._number += 1
        self._forget_run()
        return True

    def ask_to_stop(self) -> None:
        """Have the run save and end; others may be asked before this one is waited for."""
        if self._folder is not None:
            with contextlib.suppress(FileNotFoundError):  # the ranks have left
                (self._folder / service.LEAVE).touch()
        if self._run is not None:
            (self._run / STOP_FILE).touch()

    def command(self, folder: Path) -> list[str]:
        """Return the command that starts the ranks, which read from ``folder`` which run is next."""
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
                os.killpg(process.pid, signal.SIGTERM)
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
    """Return the command that starts a module on ranks of this machine, without lines of the launcher's own.

    It is what `deepspeed` itself starts on one machine; started without `deepspeed`, which would not pass a signal on.

    Args:
        ranks: number of processes.
        place: which part of the machine's devices they take.
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
        os.killpg(int((folder / GROUP).read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def environment(processes: int = 1) -> dict[str, str]:
    """The environment variables of a launch, where so many processes share the machine."""
    # The launcher and DeepSpeed's builds look for their tools on PATH, where an inactive environment is not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path}
    if not gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every process warns that it found no GPU
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    return environment


def rank_devices(ranks: int, place: int) -> list[int | str]:
    """Return the devices of one part of the machine, of those that this process may see."""
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
    """On Linux: have the launcher asked to end when this process is gone, even if it was killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: after it only the call is safe
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[told[-1] :][:4] if told else lines[-6:])
