"""``--module phigrow.training.service FOLDER``: ranks that train one run after another, as files ask for them.

Starting Python, torch, DeepSpeed and a process group takes as long as hundreds of steps of a small model. In a study
with hundreds of short runs, ranks that stay alive pay this once. Every run seeds its random numbers, so its results
are equal to the bit to those of new ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from phigrow.files.machine_errors import machine_error, replace_odd_characters
from phigrow.training.allocator import keep_freed_memory
from phigrow.training.entry import end_after_lost_rank, refuse, run
from phigrow.training.lost_ranks import LostRank, lost_rank_named
from phigrow.training.process import World, leave, on_rank_zero, start

LEAVE = "leave"


def asked(folder: Path, number: int) -> Path:
    """Return the file that requests run ``number``: JSON with two paths, ``recipe`` and ``log``."""
    return folder / f"run-{number}.json"


def ended(folder: Path, number: int) -> Path:
    """Return the file that marks run ``number`` as ended."""
    return folder / f"run-{number}.ended"


def main(folder: Path) -> int:
    """Train until a file `LEAVE` appears, or a run fails or is asked to stop.

    Returns:
        0, or the exit code of a failed run. After a failure these processes train no further run.
    """
    keep_freed_memory()
    replace_odd_characters()
    try:
        world = start()
    except LostRank as error:
        end_after_lost_rank(error)
    except Exception as error:
        if (described := machine_error(error)) is None:
            raise
        return refuse(described)
    number = 0
    try:
        while (wanted := _wanted(world, folder, number)) is not None:
            _speak_to(Path(wanted["log"]))
            code, finished = run([wanted["recipe"]])
            if not finished:
                return code
            _mark(folder, number, world)
            number += 1
    except LostRank as error:
        end_after_lost_rank(error)
    finally:
        if world.first:
            shutil.rmtree(folder, ignore_errors=True)  # who asked may be gone
        leave()
    return 0


def _wanted(world: World, folder: Path, number: int) -> dict[str, str] | None:
    """Wait on all ranks for the next request; None if there is no further one."""
    with lost_rank_named(world, lambda: "The ranks were waiting for the next run."):
        return on_rank_zero(world, partial(_next, folder, number), patient=True)


def _next(folder: Path, number: int) -> dict[str, str] | None:
    parent = os.getppid()
    while not (folder / LEAVE).exists() and os.getppid() == parent:
        if (file := asked(folder, number)).exists():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        time.sleep(0.05)
    return None


def _speak_to(log: Path) -> None:
    """Redirect the output of this process, including that of C code, to the log of the run."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _mark(folder: Path, number: int, world: World) -> None:
    sys.stdout.flush()
    if world.first:
        ended(folder, number).touch()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[-1])))
