"""The training command: parse, train, and turn bad input into one message and exit code 2 on every rank."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from phigrow.errors import GrowthError
from phigrow.training.allocator import keep_freed_memory
from phigrow.training.options import parse, usage
from phigrow.training.process import own_rank

DEMO_WORDS = """\
Without arguments this is a demonstration. It trains a Phi of a few million parameters from scratch for some minutes, on
the corpus that ships with phigrow. The model learns the form of text and little more. For a real run give a recipe:
    phigrow pretrain phi-1-small --data <folder made by 'phigrow data'>
To train an expanded model, add --init <folder made by 'phigrow expand'>. 'phigrow pretrain --help' lists every key.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pretraining recipe on this rank.

    Args:
        argv: the words after the script's name; None takes them from the command line.

    Returns:
        0 when the run ended or stopped as asked, 2 for bad input, which rank 0 explains on stderr. A rank that loses
        another rank prints a message and exits with code 1.
    """
    keep_freed_memory()
    try:
        return run(list(sys.argv[1:] if argv is None else argv))[0]
    finally:
        leave()


def run(words: list[str]) -> tuple[int, bool]:
    """Run the recipe and stay in the process group.

    Returns:
        The exit code of `main`, and True if the run reached its end.
    """
    try:
        first = own_rank() == 0
    except GrowthError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2, False
    try:
        config = parse(words)
        if config is None:
            if first:
                print(usage())
            return 0, True
        if first and not [word for word in words if not word.startswith("--local")]:
            print(DEMO_WORDS, flush=True)
        from phigrow.training.loop import train

        return 0, train(config).finished
    except GrowthError as error:
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher kills every rank when one fails; rank 0 prints its message before
        return 2, False
    except RuntimeError as error:
        from phigrow.training.process import LostRank

        if not isinstance(error, LostRank):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)  # on every rank, because rank 0 may be the lost one
        sys.stdout.flush()
        os._exit(1)  # leaving the process group would wait for the lost rank


def leave() -> None:
    """Leave the process group, without PyTorch's warning about a group that is still open."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and os.environ.get("WORLD_SIZE") and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
