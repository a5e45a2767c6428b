"""Clean up after DeepSpeed: names in shared memory, and the locks of compilations that were killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from phigrow.errors import GrowthError

SHARED_MEMORY = Path("/dev/shm")


def unlink_shared_buffers(rank: int, size: int, local_size: int, folder: Path = SHARED_MEMORY) -> None:
    """Unlink the shared memory through which DeepSpeed reduces between CPU ranks of one host.

    DeepSpeed 0.19 makes ``deepspeed_allreduce_buffer_<uid>_<address>_<port>_<rank>`` of 67 MB when the process group
    is made, and never unlinks it. When the call has returned on all ranks, each has mapped every buffer, and the names
    are no longer needed. The kernel frees the memory when the last process ends, even if it is killed.

    Call it on every rank after the process group was made. It waits for the other ranks.

    Args:
        rank: number of this rank.
        size: number of all ranks.
        local_size: number of ranks on this host; DeepSpeed makes the buffers only if all ranks are on one host.
        folder: folder of the system's shared memory.
    """
    if sys.platform != "linux" or size != local_size:
        return
    import torch.distributed as dist

    dist.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    (folder / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


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
        extension: DeepSpeed's name of the extension, such as ``deepspeed_shm_comm``.
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
