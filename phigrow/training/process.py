"""The process of a rank: threads, environment, process group, signals, and results of rank 0 for all ranks."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from phigrow.errors import GrowthError
from phigrow.files.output import writing
from phigrow.training.deepspeed_cleanup import without_shared_memory_kernel
from phigrow.training.gpu_setup import check_gpus_work
from phigrow.training.lost_ranks import unreachable_named

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks of a run, with the number and the device of this rank."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0


def own_rank() -> int:
    """Return the rank of this process, from its launcher or its process group; 0 without either."""
    if _launched():
        return int(os.environ["RANK"])
    return group.get_rank() if (group := _process_group()) is not None else 0


def _process_group() -> Any:
    """Return `torch.distributed` if this process is in a process group, else None. It does not import torch."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _launched() -> bool:
    """Return True if a launcher has started this process.

    A rank without a number of ranks, or an empty one, was left behind by something else and counts as none.

    Raises:
        GrowthError: a variable of the launcher is no whole number.
    """
    given = {name: os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE")}
    if not all(given.values()):
        return False
    for name, value in given.items():
        if not value.isdecimal():
            raise GrowthError(
                f"the environment variable {name} is {value!r}",
                where=name,
                why="launchers set it to a whole number",
                fix="start the run with deepspeed or torchrun, or unset RANK and WORLD_SIZE",
            )
    return True


def _check_launch() -> None:
    """Refuse a launch of several ranks whose variables are incomplete or contradict each other.

    Raises:
        GrowthError: a variable is missing, or the rank is not below the number of ranks.
    """
    fix = "start the run with deepspeed or torchrun, or unset RANK and WORLD_SIZE to train on one rank"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise GrowthError(f"RANK is {rank}, but WORLD_SIZE is {size}", where="RANK, WORLD_SIZE", fix=fix)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if not os.environ.get(name, "").strip()]
    if missing and size > 1 and _process_group() is None:
        raise GrowthError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            where=", ".join(missing),
            why="a rank finds the others by these environment variables",
            fix=fix,
        )
    for name in ("MASTER_PORT", "LOCAL_RANK"):
        if (value := os.environ.get(name, "").strip()) and not value.isdecimal():
            raise GrowthError(f"the environment variable {name} is {value!r}", where=name, fix=fix)


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Restore the environment variables of this process at the end of the block; a context.

    A run sets those of a launcher and of libraries. A later run in the same process, and programs that it starts, would
    take them for their own.
    """
    former = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - former.keys():
            del os.environ[name]
        os.environ.update(former)


def prepare_environment() -> None:
    """Set the environment variables that a launcher sets, for one process, and those of DeepSpeed's builds.

    Raises:
        GrowthError: the variables of a launcher are incomplete.
    """
    if _launched():
        _check_launch()
    elif (group := _process_group()) is not None:  # another program has made it
        rank = group.get_rank()
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(group.get_world_size())})
        os.environ.setdefault("LOCAL_RANK", str(rank))
    else:
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"})
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "", ""
    if int(os.environ["WORLD_SIZE"]) == 1:
        alone = {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        os.environ.update({name: value for name, value in alone.items() if not os.environ.get(name, "").strip()})
    # Deterministic kernels require a fixed workspace of cuBLAS, and torch reads this once, at its first product: a run
    # that needs it may follow another in this process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Idle threads of GNU OpenMP spin for milliseconds, and on a busy core they keep the thread from running for
        # which they wait. A short spin was as fast on idle cores, and 1.7 times as fast with one core in use.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Use the ninja of this environment even if it is not activated. Another version of ninja would not recognise the
    # existing builds and would repeat them.
    ninja = Path(sys.executable).with_name("ninja")
    if ninja.exists() and shutil.which("ninja") != str(ninja):
        os.environ["PATH"] = f"{ninja.parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


_joined = False
"""True while this process is in a process group that `start` has made."""


def start(threads: int | None = None) -> World:
    """Join the process group and choose the device; on CPU share the cores among the ranks of this machine.

    A process group that another program has made is used as it is.

    Raises:
        GrowthError: the variables of a launcher are incomplete, or the GPUs of this host cannot be used.
    """
    global _joined
    prepare_environment()
    # DeepSpeed calls collectives that torch 2.13 has renamed, and torch warns at every call on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import torch

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK") or 0)
    check_gpus_work(size, local_rank)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every rank warns that it found no GPU
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        if threads is not None:
            torch.set_num_threads(threads)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores() // local_size))
    else:
        if local_rank >= (devices := accelerator.device_count()):  # of other makers; `check_gpus_work` looks at CUDA
            raise GrowthError(
                f"LOCAL_RANK is {local_rank}, but this host has {devices} device{'s' * (devices != 1)}",
                where="LOCAL_RANK",
                fix="start one rank for each device",
            )
        accelerator.set_device(local_rank)
    if not deepspeed.comm.is_initialized():
        made_elsewhere = torch.distributed.is_initialized()
        with quiet(), without_shared_memory_kernel(), unreachable_named(rank, size):
            deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name())
        _joined = not made_elsewhere
    return World(rank, size, local_rank, local_size, torch.device(accelerator.current_device_name()))


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Let torch use only deterministic kernels in this context, if ``wanted``; others raise a RuntimeError.

    flash-attn reads the same switch, see `phigrow.training.attention`.
    """
    if not wanted:
        yield
        return
    import torch

    fill: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = False  # it finds reads of empty tensors, and costs a write of each
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fill.fill_uninitialized_memory = before[1]


def leave() -> None:
    """Leave a process group that `start` has made, so that PyTorch does not warn and a later run can make another."""
    global _joined
    if _joined and (dist := _process_group()) is not None:
        import deepspeed.comm.comm as comm
        from deepspeed.utils import groups

        dist.destroy_process_group()
        comm.cdb = groups._WORLD_GROUP = None  # DeepSpeed would take the group that is gone for the next one
    _joined = False


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress DeepSpeed's print statements in this context; its log messages remain."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def on_rank_zero(world: World, work: Callable[[], T], *, patient: bool = False) -> T:
    """Run ``work`` on rank 0 and return its (picklable) result on all ranks; a GrowthError is raised on every rank.

    With ``patient`` the work may take longer than the timeout of collectives (`DEEPSPEED_TIMEOUT`, 10 minutes). Rank 0
    then works in a thread, and tells the other ranks every second that it is still working.
    """
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    thread: threading.Thread | None = None
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer[0] = work()
        except GrowthError as error:
            answer[1] = error
        except BaseException as error:
            failure.append(error)

    if world.first:
        if patient and world.size > 1:
            thread = threading.Thread(target=run)
            thread.start()
        else:
            run()
    while patient and world.size > 1:
        busy = [thread is not None and not _has_ended(thread)]
        dist.broadcast_object_list(busy, src=0)
        if not busy[0]:
            break
    if failure:
        raise failure[0]
    if world.size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def _has_ended(thread: threading.Thread) -> bool:
    thread.join(1.0)
    return not thread.is_alive()


def forget_stop(file: Path) -> None:
    """Remove a stop file that was meant for an earlier run; call it on rank 0 before everything else.

    A start takes up to a minute, and a file that appears in this time is meant for this run. Times of files are not
    compared, because clocks differ between machines.
    """
    if own_rank() == 0:
        with writing(file.parent), contextlib.suppress(NotADirectoryError):  # `claim` reports it
            file.unlink(missing_ok=True)


class StopRequest:
    """A request to stop, by SIGTERM, SIGHUP, SIGUSR1, SIGINT or a file. The loop then saves and exits with code 0.

    SIGHUP comes when a terminal closes. It stays ignored where it was, as under nohup.

    The loop sees a request when it next reads from the device: after ``log_every`` steps or 10 seconds, whichever is
    sooner, but at least one step. Launchers repeat signals: DeepSpeed's sends SIGTERM twice within a second. So only
    SIGINT, and only some seconds after the first signal, ends the process at once.

    Args:
        file: a file that requests a stop and is then deleted, for launchers that do not pass signals on. It may exist
            before the first step, because `forget_stop` removes the file of an earlier run.
    """

    PATIENCE = 5.0
    """Seconds after the first signal in which no other counts."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._asked_at: float | None = None
        self._former: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """True once the run was asked to stop."""
        if self._asked_at is None and self._file is not None and self._file.exists():
            self._file.unlink(missing_ok=True)
            self._asked_at = time.monotonic()
        return self._asked_at is not None

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):  # not in the main thread: no signals to handle
            for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"):
                number = getattr(signal, name, None)
                if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                    self._former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif number == signal.SIGINT and now - self._asked_at > self.PATIENCE:
            signal.signal(number, self._former[number])
            os.kill(os.getpid(), number)


def gather_objects(world: World, mine: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    if world.size == 1:
        return [mine]
    import torch.distributed as dist

    out: list[Any] = [None] * world.size
    dist.all_gather_object(out, mine)
    return out
