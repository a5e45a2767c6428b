"""The training command: parse, train, and turn errors into one message and an exit code on every rank."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from phigrow.errors import GrowthError, MachineError
from phigrow.files.machine_errors import flush_stdout, machine_error, replace_odd_characters, with_advice
from phigrow.training.allocator import keep_freed_memory
from phigrow.training.configuration import RunConfig
from phigrow.training.lost_ranks import LostRank
from phigrow.training.options import parse, usage
from phigrow.training.process import environment_kept, leave, own_rank

DEMO_WORDS = """\
Without arguments this is a demonstration. It trains a Phi of a few million parameters from scratch for some minutes, on
the corpus that ships with phigrow. The model learns the form of text and little more. For a real run give a recipe:
    phigrow pretrain phi-1-small --data <folder made by 'phigrow data'>
To train an expanded model, add --init <folder made by 'phigrow expand'>. 'phigrow pretrain --help' lists every key.
"""


BAD_INPUT = 2
"""Exit code for bad input. The same command would fail again, so the Slurm script ends the job."""

TEMPORARY = 75
"""Exit code for refusals of the machine or the network, EX_TEMPFAIL of sysexits.h. A later start may succeed, for
example on another host or after space was freed, so the Slurm script queues the job again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pretraining recipe on this rank.

    Args:
        argv: the words after the script's name; None takes them from the command line.

    Returns:
        0 when the run ended or stopped as asked, `BAD_INPUT`, or `TEMPORARY` for a refusal of the machine, such as a
        full disk or a lost rank; stderr then has the error.
    """
    keep_freed_memory()
    replace_odd_characters()
    with environment_kept():
        try:
            code, _ = run(list(sys.argv[1:] if argv is None else argv))
        finally:
            leave()
    if (error := flush_stdout()) is not None and code == 0:
        code = refuse(error)
    return code


def run(words: list[str]) -> tuple[int, bool]:
    """Run the recipe and stay in the process group.

    Returns:
        The exit code of `main`, and True if the run reached its end.
    """
    config: RunConfig | None = None
    try:
        first = own_rank() == 0
        config = parse(words)
        if config is None:
            if first:
                print(usage(), flush=True)
            return 0, True
        if first and not [word for word in words if not word.startswith("--local")]:
            print(DEMO_WORDS, flush=True)
        from phigrow.training.loop import train

        return 0, train(config).finished
    except LostRank as error:
        end_after_lost_rank(error)
    except GrowthError as error:
        code = refuse(error)
        if isinstance(error, MachineError):
            _end_without_others(code)
        return code, False
    except Exception as error:
        if (described := machine_error(error)) is None:
            raise
        code = refuse(with_advice(described, _how_to_continue(config)))
        _end_without_others(code)
        return code, False


def end_after_lost_rank(error: LostRank) -> NoReturn:
    """Print the error on this rank, because rank 0 may be the lost one, and end this process with `TEMPORARY`.

    Leaving the process group would wait for the lost rank.
    """
    flush_stdout()
    with contextlib.suppress(OSError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(TEMPORARY)


def _end_without_others(code: int) -> None:
    """End this process if the run has several ranks, because the others may still wait in a collective."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        flush_stdout()
        os._exit(code)


WAIT_SECONDS = 3.0
"""Seconds that other ranks wait before they print an error. A launcher ends them before, when rank 0 has ended."""


def refuse(error: GrowthError) -> int:
    """Print an error on stderr, once for all ranks, and return `TEMPORARY` for a `MachineError`, else `BAD_INPUT`.

    Every rank meets most errors, so only rank 0 prints at once. A rank that still runs some seconds later prints, too:
    rank 0 may have met no error, or there is no rank 0.
    """
    try:
        rank = own_rank()
    except GrowthError:  # this is the error
        rank = 0
    if rank:
        time.sleep(WAIT_SECONDS)
    flush_stdout()
    with contextlib.suppress(OSError):
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return TEMPORARY if isinstance(error, MachineError) else BAD_INPUT


def _how_to_continue(config: RunConfig | None) -> str:
    """Return a sentence on how to continue a run; empty if the run has not made its folder yet."""
    with contextlib.suppress(Exception):  # a full disk may refuse this, too
        from phigrow.training.checkpoints import how_to_continue
        from phigrow.training.training_cost import run_folder

        if config is not None and (out := run_folder(config)).is_dir():
            return how_to_continue(out)
    return ""
