"""Pretrain in the foreground: start DeepSpeed's ranks, show their output, and let them save at Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from phigrow.files.portable import end_group
from phigrow.study.launch import STOP_SECONDS, end_with_parent, environment, gpus, launcher
from phigrow.training import main
from phigrow.training.data import check_data
from phigrow.training.loop import STOP_FILE
from phigrow.training.lost_ranks import exit_explained
from phigrow.training.options import parse
from phigrow.training.process import environment_kept
from phigrow.training.training_cost import run_folder


def pretrain(words: Sequence[str], ranks: int | None = None, *, shown: bool = True) -> int:
    """Train one run on ranks of this machine.

    A single rank runs in this process. DeepSpeed's launcher starts several ranks in a process group of their own, so
    Ctrl-C reaches this process alone. It then asks the run to stop, which gives the run time to save.

    Args:
        words: a recipe and ``--key value`` words, as `phigrow.training.main` takes them.
        ranks: number of processes; by default one for every GPU, or one where there is no GPU.
        shown: show the ranks' output on stdout.

    Returns:
        The exit code: 0 when the run ended or stopped as asked, else as `phigrow.training.main`. Rank 0 explains it.

    Raises:
        GrowthError: the recipe or one of the keys cannot be read.
        KeyboardInterrupt: Ctrl-C came before the run could save anything, or a second time.
    """
    config = parse(words)  # raises an error about the words before any rank starts
    if config is not None:
        check_data(config)
    ranks = ranks or gpus() or 1
    if ranks == 1:
        with environment_kept():
            os.environ.update(environment())
            return main(words)
    assert config is not None
    process = subprocess.Popen(
        launcher(ranks, 0, "phigrow.training", *words), env=environment(ranks), stdin=subprocess.DEVNULL,
        stdout=None if shown else subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent(),
    )  # fmt: skip
    try:
        code = process.wait()
        if (reason := exit_explained(code)) is not None:
            print(reason, file=sys.stderr, flush=True)
        return code
    except KeyboardInterrupt:
        if _stop(process, run_folder(config) / STOP_FILE) != 0:
            raise
        return 0
    finally:
        if process.poll() is None:
            end_group(process)
            process.wait()


def _stop(process: subprocess.Popen[bytes], stop_file: Path) -> int | None:
    """Ask the ranks to save and leave, for up to `STOP_SECONDS`; return their exit code, None if they did not leave.

    A run deletes the file when it starts, so the file is made again until the ranks have left.
    """
    print("\nstopping: the run saves a checkpoint first", file=sys.stderr, flush=True)
    try:
        for _ in range(int(STOP_SECONDS)):
            if stop_file.parent.is_dir():
                stop_file.touch()
            with suppress(subprocess.TimeoutExpired):
                return process.wait(1)
        return None
    finally:
        stop_file.unlink(missing_ok=True)
