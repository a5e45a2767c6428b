"""Ranks that are lost or do not answer: one error that says where a rank waited, and notices before a timeout.

NCCL's watchdog ends a process by SIGABRT, from a thread of C++ that Python cannot catch. Modes of
``TORCH_NCCL_ASYNC_ERROR_HANDLING`` without an abort would let the rank go on with values that were never exchanged. So
phigrow keeps the abort, lets torch write its flight recorder first, and prints a notice about every rank before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from phigrow.errors import MachineError
from phigrow.files.machine_errors import machine_error

DUMPS = "nccl-trace-rank-"
"""Start of the names of the flight recorder's files in a run's folder. torch appends the rank."""

FIRST_WITH_NEW_NAMES = (2, 9)
"""First torch whose flight recorder has variables called ``TORCH_FR_``. It records unasked."""

_ROOT = Path(__file__).parents[1]
_LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "peer", "socket")
_SET_UP = ("calloc", "out of memory", "invalid usage", "duplicate gpu")
"""Words of errors that come from this rank's own device or set-up. No other rank was lost then."""


class Ranks(Protocol):
    """The number of this rank and of all ranks, such as `phigrow.training.process.World`."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""


class LostRank(MachineError):
    """Another rank has ended or does not answer. The message has the last checkpoint and the way to continue."""


def timeout_minutes() -> float:
    """Return the minutes after which a collective fails: ``DEEPSPEED_TIMEOUT``, by default 10."""
    try:
        return float(os.environ.get("DEEPSPEED_TIMEOUT", ""))
    except ValueError:
        return 10.0


@contextlib.contextmanager
def groups_with_timeout() -> Iterator[None]:
    """Give process groups that are made within the block the timeout of ``DEEPSPEED_TIMEOUT``; a context.

    DeepSpeed gives this timeout to the first group only. Those of its own collectives would have torch's default, which
    is 10 minutes on GPUs and 30 on CPUs.
    """
    import torch.distributed.distributed_c10d as c10d

    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    former = {name: getattr(c10d, name, None) for name in names}
    try:
        for name, value in former.items():
            if value is not None:  # the second is None where PyTorch has no NCCL
                setattr(c10d, name, timedelta(minutes=timeout_minutes()))
        yield
    finally:
        for name, value in former.items():
            if value is not None:
                setattr(c10d, name, value)


def keep_traces(out: Path) -> None:
    """Let torch write the last collectives of every rank into the run's folder before NCCL's watchdog ends a rank.

    Call it before the process group is made. Values that the user has set stay.
    """
    import torch

    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    place = str(out.absolute() / DUMPS)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if release >= FIRST_WITH_NEW_NAMES:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", place))
    else:
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", place)
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")


@contextlib.contextmanager
def lost_rank_named(world: Ranks, advice: Callable[[], str], watch: RankWatch | None = None) -> Iterator[None]:
    """Turn the error of a collective into a `LostRank` with advice; other errors pass through.

    Args:
        world: the ranks.
        advice: returns a sentence on how to continue.
        watch: knows the step, and since when this rank is in it.
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        kind = type(error).__name__
        if world.size == 1 or not (kind == "DistBackendError" or any(word in first.lower() for word in _LOST)):
            raise
        raise _described(error, first, world, advice(), watch) from error


def _described(error: RuntimeError, first: str, world: Ranks, advice: str, watch: RankWatch | None) -> LostRank:
    """Return the error for a collective that failed: its name and place, the step, the wait and what to look at."""
    collective, place = _failed_call(error.__traceback__)
    if named := re.search(r"OpType=(\w+)", str(error)):  # NCCL's own name, which comes from another thread
        collective = named[1].lower()
    parts = [f"step {watch.step}"] if watch is not None else []
    parts += [collective] if collective else []
    parts += [f"({place})"] if place else []
    waited = float(ran[1]) / 1000 if (ran := re.search(r"ran for (\d+) milliseconds", str(error))) else None
    if waited is None and watch is not None:
        waited = watch.waited
    parts += [f"after {waited:.0f} s"] if waited is not None else []
    if any(word in str(error).lower() for word in _SET_UP):
        what = f"a collective failed on rank {world.rank}"
        fix = "check the memory of this GPU, and that every rank has a GPU of its own; run again with NCCL_DEBUG=INFO"
    else:
        what = f"rank {world.rank} lost another rank"
        fix = (
            "look for the first error in the output of the other ranks, and for 'Out of memory' in dmesg on their "
            f"hosts; run again with NCCL_DEBUG=INFO. A rank waits for {timeout_minutes():g} minutes; a rank that needs "
            "longer requires a larger DEEPSPEED_TIMEOUT"
        )
    return LostRank(what, where=" ".join(parts) or None, why=first[:300], fix=f"{fix}. {advice}" if advice else fix)


def _failed_call(trace: TracebackType | None) -> tuple[str, str]:
    """Return the name of the collective in a traceback and the last line of phigrow before it; empty without one."""
    frames = []
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return _call(frames)


def _call(frames: list[tuple[FrameType, int]]) -> tuple[str, str]:
    """Return the outermost collective of torch and the innermost line of phigrow, in frames from outside to inside."""
    collective = place = ""
    for frame, line in frames:
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if file.name == "distributed_c10d.py" and not collective:
            collective = name
        elif file.is_relative_to(_ROOT) and file != Path(__file__):
            place, collective = f"phigrow/{file.relative_to(_ROOT)}, line {line}", ""
    return collective, place


@contextlib.contextmanager
def unreachable_named(rank: int, size: int) -> Iterator[None]:
    """Turn the error of a rank that does not reach rank 0 at the start into a `LostRank`; others pass through.

    A launcher that starts lost ranks again starts these again, too.
    """
    try:
        yield
    except RuntimeError as error:
        if size == 1 or "EADDRINUSE" in str(error) or (described := machine_error(error)) is None:
            raise
        what = f"rank {rank}: {described.what}"
        raise LostRank(what, where=described.where, why=described.why, fix=described.fix) from error


LATER = 1.6
"""Factor on the patience after the first notice. A later one still comes before the timeout of collectives."""


@dataclass(frozen=True)
class Answer:
    """State of a rank that has finished no step for long: its step, and the line and collective that it is in."""

    rank: int
    step: int
    place: str


class RankWatch:
    """Thread that reports where every rank is if this rank finishes no step for half the timeout; a context.

    It ends nothing. Each rank that waits writes its state into a store of rank 0, and the lowest of them prints one
    notice. A rank without an answer has ended, or its process or host is stopped. So the lost rank is known before
    NCCL's watchdog aborts the others. One rank needs no thread.

    Args:
        world: the ranks.
        name: of the run, the same on every rank. Several runs may share one store.
        patience: seconds without a step before a notice; None takes half the timeout of collectives.
        grace: seconds that answers of other ranks may take.
    """

    def __init__(self, world: Ranks, name: str, *, patience: float | None = None, grace: float = 10.0) -> None:
        self.world, self.name, self.grace = world, name, grace
        self.patience = 30 * timeout_minutes() if patience is None else patience
        self.step = 0
        self._since = time.monotonic()
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def waited(self) -> float:
        """Seconds since this rank began its step."""
        return time.monotonic() - self._since

    def begin(self, step: int) -> None:
        """Note that this rank begins a step, or what follows it; steps count from 1."""
        self.step, self._since = step, time.monotonic()

    def __enter__(self) -> RankWatch:
        if self.world.size > 1:
            self._thread = threading.Thread(target=self._watch, name="phigrow-ranks", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(1.0)  # it may wait for the store

    def _watch(self) -> None:
        reported: float | None = None  # the beginning of the step that was reported
        patience = self.patience
        while not self._ended.wait(min(1.0, patience / 4)):
            since = self._since
            if since == reported or time.monotonic() - since < patience:
                continue
            reported = since
            with contextlib.suppress(Exception):  # a notice never ends a run
                self._report()
            patience = LATER * self.patience  # a run with slow steps is not reported at every step

    def _report(self) -> None:
        waited = self.waited
        answers, missing = self._answers(Answer(self.world.rank, self.step, self._place()))
        if answers and min(answers) < self.world.rank:
            return  # a lower rank prints
        print(notice(waited, list(answers.values()), missing), file=sys.stderr, flush=True)

    def _place(self) -> str:
        frame = sys._current_frames().get(self._main)
        frames: list[tuple[FrameType, int]] = []
        while frame is not None:
            frames.insert(0, (frame, frame.f_lineno))
            frame = frame.f_back
        collective, place = _call(frames)
        return f"{collective} ({place})" if collective else place

    def _answers(self, mine: Answer) -> tuple[dict[int, Answer], list[int] | None]:
        """Return the states of all ranks that answer, and the ranks that do not; None without the store of rank 0."""
        import torch.distributed as dist

        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        try:
            connect: Any = dist.TCPStore  # type: ignore[attr-defined]
            store = connect(
                address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self.grace)
            )
            store.set(self._key(mine.rank, mine.step), json.dumps([mine.step, mine.place]))
            limit = time.monotonic() + self.grace
            keys = {rank: [self._key(rank, mine.step + late) for late in (-1, 0, 1)] for rank in range(self.world.size)}
            answers: dict[int, Answer] = {}
            while len(answers) < self.world.size and time.monotonic() < limit and not self._ended.is_set():
                for rank, names in keys.items():
                    for name in names if rank not in answers else ():
                        if store.check([name]):
                            step, place = json.loads(store.get(name))
                            answers[rank] = Answer(rank, step, place)
                            break
                time.sleep(min(0.5, self.grace / 10))
        except (RuntimeError, ValueError):
            return {}, None
        return answers, [rank for rank in keys if rank not in answers]

    def _key(self, rank: int, step: int) -> str:
        return f"phigrow/waiting/{self.name}/{rank}/{step}"


def notice(seconds: float, answers: list[Answer], missing: list[int] | None) -> str:
    """Return lines for the user on the state of every rank.

    >>> print(notice(300, [Answer(0, 7, "all_reduce (phigrow/training/step.py, line 9)")], [1]))
    notice: no step has ended for 300 s
      rank 0: step 7, all_reduce (phigrow/training/step.py, line 9)
      rank 1: no answer; its process or host has ended or is stopped. Look at its output, and at dmesg on its host
    """
    lines = [f"notice: no step has ended for {seconds:.0f} s"]
    alike: dict[str, list[int]] = {}
    for answer in answers:
        alike.setdefault(f"step {answer.step}, {answer.place}", []).append(answer.rank)
    lines += [f"  {_named(ranks)}: {state}" for state, ranks in alike.items()]
    if missing is None:
        lines.append("  rank 0: its store does not answer; its process or host has ended or is stopped")
    elif missing:
        owner = "its process or host has" if len(missing) == 1 else "their processes or hosts have"
        verb = "is" if len(missing) == 1 else "are"
        its = "its" if len(missing) == 1 else "their"
        hosts = "host" if len(missing) == 1 else "hosts"
        lines.append(
            f"  {_named(missing)}: no answer; {owner} ended or {verb} stopped. Look at {its} output, and at dmesg on "
            f"{its} {hosts}"
        )
    return "\n".join(lines)


def _named(ranks: list[int]) -> str:
    """Name ranks, neighbours as a range.

    >>> _named([3]), _named([0, 1, 2, 5])
    ('rank 3', 'ranks 0-2, 5')
    """
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    listed = ", ".join("-".join(map(str, part)) for part in parts)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}"


SIGNALS = {
    6: "a rank aborted (SIGABRT). On GPUs this is mostly NCCL's watchdog, which ends a rank whose collective got no "
    "answer: another rank was lost, or needed longer than DEEPSPEED_TIMEOUT. Look for the first error of any rank, "
    f"and for files {DUMPS}* in the run's folder (torchfrtrace reads them)",
    7: "a rank got SIGBUS. A disk or /dev/shm may be full, or a file that is mapped into memory was cut off",
    9: "a rank was killed (SIGKILL). Most often the host had too little memory: look for 'Out of memory' in dmesg, and "
    "for the memory limit of the job",
    11: "a rank crashed (SIGSEGV) in compiled code. With PYTHONFAULTHANDLER=1 its output has the last Python lines",
}
"""Signal that ended a rank -> explanation."""


def exit_explained(code: int) -> str | None:
    """Return an explanation of the exit code of ranks that a signal has ended; None for other codes.

    Shells report 128 + signal. DeepSpeed's launcher passes on Python's negative number, which becomes 256 - signal.

    >>> exit_explained(250) == exit_explained(134) == exit_explained(-6) == SIGNALS[6], exit_explained(75)
    (True, None)
    """
    return SIGNALS.get(-code if code < 0 else 256 - code if code >= 224 else code - 128)
