"""Keep DeepSpeed from what CPU ranks do not need, and remove the locks of its compilations that were killed."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest import mock

from phigrow.errors import GrowthError


@contextlib.contextmanager
def without_shared_memory_kernel() -> Iterator[None]:
    """Keep DeepSpeed from building its all-reduce in shared memory between CPU ranks; a context.

    DeepSpeed 0.19 compiles it in every process on CPUs, even in a single one, and each rank then makes a file of 67 MB
    in ``/dev/shm`` that stays there. Only DeepSpeed's inference calls it: training reduces through the process group.
    Without it, training on CPUs needs no compiler.
    """
    backend = import_module("deepspeed.comm.torch")  # `deepspeed.comm` has another attribute of this name, torch itself
    with mock.patch.object(backend, "build_shm_op", return_value=None, create=True):
        yield


STALE = 180.0
"""Seconds without a write after which a lock counts as left over, if no process of this host holds it.

One file of these extensions takes up to a minute to compile, and another host may hold the lock on a network disk.
"""


def free_compile_lock(extension: str, stale: float = STALE) -> None:
    """Remove the lock of a compilation that was killed. PyTorch would wait for it forever, without a message.

    A process that compiles keeps its lock open. If no process of this host has it open, wait until another host
    releases it, or until nothing was written beside it for ``stale`` seconds. Call it on every rank before DeepSpeed
    loads the extension. The first rank of each host removes the lock and prints; the others wait.

    Args:
        extension: DeepSpeed's name of the extension, such as ``cpu_adam``.
        stale: seconds without a write after which the lock is removed.

    Raises:
        GrowthError: the lock cannot be removed.
    """
    from torch.utils.cpp_extension import _get_build_directory

    if sys.platform != "linux":
        return
    folder = Path(_get_build_directory(extension, False))
    lock, told, leads = folder / "lock", False, os.environ.get("LOCAL_RANK", "0") == "0"
    newest, seen_at = 0.0, time.monotonic()
    while (lock_state := _made(lock)) and not _held(lock):
        if (written := max(map(_written, folder.iterdir()), default=0.0)) != newest:
            newest, seen_at = written, time.monotonic()
        # A clock that was set back, or another host's, may have written times of tomorrow.
        quiet = max(time.time() - newest, time.monotonic() - seen_at)
        if leads and quiet > stale and _made(lock) == lock_state:
            try:
                lock.unlink(missing_ok=True)
            except OSError as error:
                fix = "delete it, or set TORCH_EXTENSIONS_DIR to a folder of your own"
                message = "a killed compilation left a lock that cannot be removed"
                raise GrowthError(message, where=str(lock), why=str(error), fix=fix) from None
            print(f"removed the lock of a compilation that was killed: {lock}", flush=True)
        elif leads and not told:
            told = True
            print(
                f"waiting up to {stale - quiet:.0f} s for a compilation on another machine; "
                f"if there is none, delete {lock}",
                flush=True,
            )
        time.sleep(0.2)


def _made(lock: Path) -> int | None:
    try:
        return lock.stat().st_ctime_ns
    except OSError:
        return None


def _held(lock: Path) -> bool:
    """Return true if a process of this host has the file open."""
    end = f"/{lock.parent.name}/{lock.name}"
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry).endswith(end):
                return True
        except OSError:
            continue  # it was closed meanwhile, or belongs to another user
    return False


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
