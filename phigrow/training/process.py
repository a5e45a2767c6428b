"""What surrounds a rank: allocator, threads, environment, process group, signals, and rank 0 speaking for all."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks of a run, and this one's place and device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0


def own_rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def prepare_environment() -> None:
    """Fill in what a launcher would have set, for one process, and what DeepSpeed's just-in-time builds need."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        os.environ.update(one | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    if "OMP_WAIT_POLICY" not in os.environ:
        # Idle threads of GNU OpenMP spin for milliseconds; where another process wants the core, the thread they wait
        # for cannot run. Spinning briefly was as fast on idle cores and 1.7 times as fast with one core taken.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    beside = Path(sys.executable).parent  # of a virtual environment that was not activated
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"


def start(threads: int | None = None) -> World:
    """Join the process group and choose the device; on CPU share the cores among the ranks of this machine."""
    prepare_environment()
    # DeepSpeed calls collectives that torch 2.13 has renamed; every rank would say so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every rank warns that it found no GPU
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        if threads is not None:
            torch.set_num_threads(threads)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores() // local_size))
    else:
        accelerator.set_device(local_rank)
    if not deepspeed.comm.is_initialized():
        with quiet():
            deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name())
    return World(rank, size, local_rank, local_size, torch.device(accelerator.current_device_name()))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what DeepSpeed prints, rather than logs, out of the output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def on_rank_zero(world: World, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and give its (picklable) result to all; a GrowthError there is raised on every rank."""
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    if world.first:
        try:
            answer[0] = work()
        except GrowthError as error:
            answer[1] = (error.what, error.where, error.why, error.fix)
    if world.size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        what, where, why, fix = answer[1]
        raise GrowthError(what, where=where, why=why, fix=fix)
    result: T = answer[0]
    return result


class StopRequest:
    """Set by SIGTERM or SIGINT: the loop ends at its next reading, saves, and exits with code 0.

    Readings come every ``log_every`` steps, or every 10 seconds where that is sooner; at least one step lies between
    them. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):  # not in the main thread: no signals to handle
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, self._former[number])
